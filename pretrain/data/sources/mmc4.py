"""Pages whose pictures are matched with sentences, as in MMC4."""

from __future__ import annotations

from collections import defaultdict

from pretrain.data.errors import BrokenDocument
from pretrain.data.sources.interleaved import add_picture, checked, listed
from pretrain.data.sources.media import Folder
from pretrain.data.sources.recorded import OrderConfig, RecordsConfig, RecordSource
from pretrain.data.sources.records import Record
from pretrain.data.sources.source import Content, Contents, Loss, text_part
from zoo.registry import register


@register("source", "mmc4")
class MMC4(RecordSource):
    """Pages as MMC4 has them: `text_list`, the sentences, and `image_info`, the pictures, each with the number of the
    sentence that it stands at. A picture that cannot be had is left out of its page and counted."""

    class Config(RecordsConfig, OrderConfig):
        image: str = "image_name"
        """Key of a picture in `image_info`: the name of its file below the folder, or its bytes."""
        joint: str = " "
        """What stands between sentences without a picture between them."""

    config: Config

    def contents(self, key: str, record: Record, folder: Folder) -> Contents:
        sentences, images = listed(record, "text_list"), listed(record, "image_info")
        at: dict[int, list] = defaultdict(list)
        for number, image in enumerate(images):
            sentence = image.get("matched_text_index") if isinstance(image, dict) else None
            if not isinstance(sentence, int) or not 0 <= sentence < len(sentences):
                raise BrokenDocument(f"image {number} has no matched_text_index from 0 to {len(sentences) - 1}")
            at[sentence].append(image.get(self.config.image))
        first = self.config.text_first(key)
        parts: list[Content] = []
        losses: list[Loss] = []
        run: list[str] = []
        for number, sentence in enumerate(sentences):
            text_part(sentence, number)
            for text in (True, False) if first else (False, True):
                if text:
                    run.append(sentence)
                elif number in at:
                    _end(run, self.config.joint, parts)
                    for image in at[number]:
                        add_picture(folder, image, parts, losses)
        _end(run, self.config.joint, parts)
        return checked(parts, losses)


def _end(run: list[str], joint: str, parts: list[Content]) -> None:
    """Sentences without a picture between them become one text."""
    if run:
        parts.append(text_part(joint.join(run), len(parts)))
        run.clear()
