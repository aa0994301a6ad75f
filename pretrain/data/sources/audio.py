"""Recordings with transcripts, as files of a folder."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePath

from pretrain.data.errors import BrokenDocument, shown
from pretrain.data.sources.files import Shard
from pretrain.data.sources.folders import FolderSource
from pretrain.data.sources.recorded import OrderConfig
from pretrain.data.sources.source import Content, Contents, Document, Numbered, text_part
from zoo.registry import register

TRANSCRIPTS = (".txt", ".normalized.txt", ".lab")
"""What a transcript is called beside its recording: `NAME.txt`."""
LISTS = "*.trans.txt"
"""LibriSpeech's files of transcripts: a line is the name of a recording, a space, and what is said."""


@register("source", "audio_folder")
class AudioFolder(FolderSource):
    """Recordings, each with its transcript beside it: `NAME.txt`, `NAME.normalized.txt` (LibriTTS), `NAME.lab`, or a
    line of a `*.trans.txt` (LibriSpeech). Transcripts in a table (LJSpeech, Common Voice) are for `captions`."""

    class Config(OrderConfig):
        files: str = "**/*.{wav,flac,ogg,opus,mp3,m4a}"

    config: Config

    @contextlib.contextmanager
    def open(self, shard: Shard, cache: Path) -> Iterator[Sequence[Document]]:
        root = Path(shard.url)
        folders = sorted({PurePath(file).parent for file in shard.files})
        said = {folder: _listed(root / folder) for folder in folders}

        def make(number: int) -> Document:
            file = shard.files[number]
            listed = said[PurePath(file).parent].get(PurePath(file).stem)
            return Document(file, lambda: self._contents(root / file, file, listed))

        yield Numbered(len(shard.files), make)

    def _contents(self, path: Path, key: str, listed: str | None) -> Contents:
        beside = (path.with_suffix(ending) for ending in TRANSCRIPTS)
        file = next((each for each in beside if each.is_file()), None)
        try:
            text = listed if file is None else file.read_text("utf-8-sig").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise BrokenDocument(f"its transcript cannot be read ({error})") from None
        if not text:
            raise BrokenDocument(f"it has no transcript: {', '.join(TRANSCRIPTS)} beside it, or a line in {LISTS}")
        audio = Content("audio", shown(path.name), path.read_bytes)
        return Contents(self.config.ordered(key, text_part(text), audio))


def _listed(folder: Path) -> dict[str, str]:
    """What is said in the recordings of a folder, as its lists of transcripts have it."""
    said = {}
    for file in sorted(folder.glob(LISTS)):
        for line in file.read_text("utf-8", "replace").splitlines():
            name, _, text = line.partition(" ")
            said[name] = text.strip()
    return said
