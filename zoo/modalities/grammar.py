"""Grammar: how an item of a modality stands in the stream, for those who read a stream and those who write one."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from zoo.carries import Carries, Ids
from zoo.generate import Choice, Item
from zoo.modalities.section import Modalities, vocabulary
from zoo.modality import Positions


@dataclasses.dataclass(frozen=True)
class Grammar:
    """A begin marker, positions, an end marker. Text has no markers and any number of positions."""

    carries: Carries
    begin: int | None
    """Token of the marker."""
    end: int | None
    positions: Positions | None
    choice: Choice
    """What the token of a position is chosen from; where positions carry no ids, the one id that holds their places."""

    def tokens(self, ids: Sequence[int] | np.ndarray) -> np.ndarray:
        """The tokens of an item, int32, of the ids that its modality gave it; of the places, where it carries no ids.

        Args:
            ids: (n,) counted from 0; or anything of length n that is carried.
        """
        content = np.asarray(ids)
        own = content.astype(np.int32) if isinstance(self.carries, Ids) else np.zeros(len(content), np.int32)
        own = own + np.int32(self.choice.start)
        if self.begin is None or self.end is None:
            return own
        return np.concatenate([[self.begin], own, [self.end]]).astype(np.int32)

    def choices(self) -> list[Choice]:
        """What each token after the begin marker is chosen from, in generation, the end marker apart.

        Raises:
            ValueError: how many positions there are is left to the model, or they carry no ids.
        """
        if not isinstance(self.carries, Ids):
            raise ValueError(f"its positions carry {self.carries}, no ids; they are not chosen but predicted by a head")
        if self.positions is None or not self.positions.fixed:
            raise ValueError("how many positions an item takes is left to the model; choose them one by one")
        return [self.choice] * self.positions.most

    def item(self) -> Item:
        """What `zoo.generate.generate_channels` needs to know of an item.

        Raises:
            ValueError: its positions carry ids, or it has no markers.
        """
        if isinstance(self.carries, Ids) or self.end is None or self.positions is None:
            raise ValueError("its positions carry ids; they are chosen, one by one")
        return Item(self.choice.start, self.end, self.choice.modality, self.positions.least, self.positions.most)


def grammars(modalities: Modalities) -> dict[str, Grammar]:
    """The grammar of each modality."""
    words, result = vocabulary(modalities), {}
    for number, (name, config) in enumerate(modalities.items()):
        markers = (None, None) if config.positions is None else (words.begin(name), words.end(name))
        result[name] = Grammar(config.carries, *markers, config.positions, Choice(*words.range(name), number))
    return result
