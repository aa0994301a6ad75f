"""AdaptContext: what every layer of an adapted model knows about the tokens of one forward.

It is built where ids and pictures meet, once, and travels as one keyword argument (`mod_context`) to every decoder
layer. Only a forward that carries pictures is looked at on the host (one copy of what the tokens are); text and decode
steps wait for nothing.
"""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from zoo.adapt.config import AdaptConfig
from zoo.adapt.family import ANSWER, IMAGE, PADDING, TEXT, VIDEO, has_pictures, lengths, may_follow
from zoo.config import UserError
from zoo.host import send
from zoo.noise import token_keys
from zoo.routing.candidates import Candidates
from zoo.trace import Trace


@dataclasses.dataclass(frozen=True, eq=False)
class AdaptContext:
    """B rows of T tokens; indices are flat, into B·T."""

    shape: tuple[int, int]
    """(B, T): rows, and tokens of a row."""
    competing: Tensor
    """(n,) tokens that compete, pool after pool; each group of the config is a pool."""
    pools: tuple[int, ...]
    """Tokens of each pool."""
    pool_rows: tuple[int, ...]
    """Row of each pool."""
    by_threshold: Tensor
    """(m,) tokens that are kept where their probability is above the threshold."""
    dense_mask: Tensor | None
    """(B·T,) bool: tokens that go through every layer; None: all but `competing` and `by_threshold`."""
    dense_counts: tuple[int, ...]
    """How many tokens of each row go through every layer, padding apart."""
    kind: Tensor | None = None
    """(B, T) int64 on the host, what each token is; None in a forward without pictures."""
    start: int = 0
    """Tokens of a row that came before, in a cache."""
    indivisible: tuple[int, ...] = ()
    """Kinds that may not go on where an earlier forward ended: they would be the rest of a picture."""
    key: Tensor | None = None
    """(B·T,) int32, for random routers: of each token's place in its row, padding apart."""
    training: bool = False
    trace: Trace | None = None
    _derived: dict[Any, Any] = dataclasses.field(default_factory=dict, repr=False)

    @property
    def routes(self) -> bool:
        """Whether any token may be skipped."""
        return self.competing.numel() + self.by_threshold.numel() > 0

    def candidates(self, salt: int | Tensor = 0) -> Candidates:
        """The n + m tokens that may be skipped: `competing`, then `by_threshold`.

        Args:
            salt: of a layer's noise.
        """
        index = self.shared("candidates", lambda: torch.cat((self.competing, self.by_threshold)))
        return Candidates(self, index, (), self.pools, len(self.pools) == 1, salt)

    @property
    def dense(self) -> Tensor:
        """(B·T,) bool: tokens that go through every layer."""

        def compute() -> Tensor:
            if self.dense_mask is not None:
                return self.dense_mask
            every = torch.ones(self.shape[0] * self.shape[1], dtype=torch.bool, device=self.competing.device)
            return every.index_fill(0, self.candidates().index, False)

        return self.shared("dense", compute)

    def everyone(self) -> Candidates:
        """All tokens but padding, the candidates first."""

        def compute() -> Tensor:
            if not self.routes and self.dense_mask is None:
                return torch.arange(self.shape[0] * self.shape[1], device=self.competing.device)
            return torch.cat((self.candidates().index, self.dense.nonzero()[:, 0]))

        return Candidates(self, self.shared("everyone", compute), (), self.pools)

    def to(self, device: torch.device | str, **options: Any) -> AdaptContext:
        """The same on another device: accelerate asks for it where a decoder's layers lie on several.

        Args:
            options: for `Tensor.to`.
        """
        if self.competing.device == torch.device(device):
            return self

        def compute() -> AdaptContext:
            moved = {
                name: value.to(device, **options)
                for name in ("competing", "by_threshold", "dense_mask", "key")
                if (value := getattr(self, name)) is not None
            }
            return dataclasses.replace(self, **moved, _derived={})

        return self.shared(("on", torch.device(device)), compute)

    def shared(self, name: Any, compute: Callable[[], Any]) -> Any:
        """A value that depends on this context alone: computed by the first layer that asks, kept for the others."""
        if name not in self._derived:
            self._derived[name] = compute()
        return self._derived[name]

    def constant(self, name: Any, compute: Callable[[], Any]) -> Any:
        """As `shared`."""
        return self.shared(name, compute)

    @classmethod
    def text(cls, like: Tensor) -> AdaptContext:
        """Context of rows (B, T, …) in which nothing may be skipped."""
        none = torch.empty(0, dtype=torch.int64, device=like.device)
        rows, columns = like.shape[:2]
        return cls((rows, columns), none, (), (), none, None, (columns,) * rows)

    @classmethod
    def build(
        cls,
        config: AdaptConfig,
        ids: Mapping[int, int],
        inputs: Mapping[str, Any],
        like: Tensor,
        *,
        model_config: Any,
        training: bool = False,
        embed: Callable[[Tensor], Tensor] | None = None,
        answers: Tensor | None = None,
        trace: Trace | None = None,
    ) -> AdaptContext:
        """Context of one forward.

        Args:
            ids: placeholder id → IMAGE or VIDEO.
            inputs: the forward's arguments: input_ids (B, T) or inputs_embeds (B, T, D), attention_mask, pictures.
            like: (B, T, …), for shape and device.
            model_config: of the multimodal model.
            embed: the model's embedding, to find placeholders among `inputs_embeds`.
            answers: (B, T) bool, tokens with a label.
        Raises:
            UserError: the forward has pictures but no token stands for them.
        """
        rows, columns = like.shape[:2]
        cache = inputs.get("past_key_values")
        start = cache.get_seq_length() if cache is not None else 0
        options: dict[str, Any] = {"shape": (rows, columns), "start": start, "training": training, "trace": trace}
        answers = answers if training and config.candidates == "image_and_answer" else None
        if not has_pictures(inputs) and answers is None:
            threshold = not training and config.inference.text == "threshold"
            everything = torch.arange(rows * columns if threshold else 0, device=like.device)
            return dataclasses.replace(cls.text(like), by_threshold=everything, **options)
        kind = _kinds(ids, inputs, like, embed, answers, start)
        key = _keys(config.router.seed, kind, inputs, training) if config.router.type == "random" else None
        division = _divided(config, kind, inputs, model_config, training)
        frames = config.group == "frame"
        return cls(
            **options,
            competing=send(division.competing, like.device),
            pools=division.pools,
            pool_rows=division.pool_rows(columns),
            by_threshold=send(division.by_threshold, like.device),
            dense_mask=send(division.dense, like.device),
            dense_counts=tuple(division.dense.reshape(rows, columns).sum(1).tolist()),
            kind=kind,
            indivisible=tuple(k for k in _pictures(config) if not may_follow(k, frames, inputs, model_config)),
            key=None if key is None else send(key, like.device),
        )


def _kinds(
    ids: Mapping[int, int],
    inputs: Mapping[str, Any],
    like: Tensor,
    embed: Callable[[Tensor], Tensor] | None,
    answers: Tensor | None,
    start: int,
) -> Tensor:
    """(B, T) int64 on the host: what each token is. Pictures without a token are no mistake where all of theirs are
    masked, or after tokens in a cache: Phi-4 is given them again at every step of generation."""
    found = _placeholders(ids, inputs, like, embed)
    kind = _masked(found, inputs).cpu()
    if has_pictures(inputs) and not start and not bool((kind > TEXT).any()) and not bool(found.any()):
        names = " or ".join(map(str, ids))
        raise UserError(
            f"the batch has pictures but no token of them: the id {names} never occurs in input_ids; build "
            "the prompt with the model's own processor, which puts one id for each picture token"
        )
    return kind if answers is None else torch.where((kind == TEXT) & answers.cpu(), ANSWER, kind)


def _placeholders(
    ids: Mapping[int, int], inputs: Mapping[str, Any], like: Tensor, embed: Callable[[Tensor], Tensor] | None
) -> Tensor:
    """(B, T) int64: IMAGE, VIDEO or, everywhere else, TEXT."""
    kind = torch.zeros(like.shape[:2], dtype=torch.int64, device=like.device)
    tokens, values = inputs.get("input_ids"), inputs.get("inputs_embeds")
    for token, what in ids.items():
        if tokens is not None:
            found = tokens == token
        else:
            assert values is not None and embed is not None
            found = (values == embed(torch.tensor(token, device=values.device))).all(-1)
        kind = kind.masked_fill(found, what)
    return kind


def _masked(kind: Tensor, inputs: Mapping[str, Any]) -> Tensor:
    """kind (B, T), PADDING where the attention mask says so."""
    mask = inputs.get("attention_mask")
    if isinstance(mask, Tensor) and mask.dim() == 2:
        kind = kind.masked_fill(mask[:, -kind.shape[1] :] == 0, PADDING)
    return kind


def _keys(seed: int, kind: Tensor, inputs: Mapping[str, Any], training: bool) -> np.ndarray:
    """(B·T,) int32. In training each sample draws anew, by its ids; else places alone count, so that tokens generated
    later, or given in a later forward, change nothing."""
    real = kind.numpy() != PADDING
    rows, columns = real.shape
    before, mask = np.zeros((rows, 1), np.int64), inputs.get("attention_mask")
    if isinstance(mask, Tensor) and mask.dim() == 2:
        before = mask[:, : mask.shape[1] - columns].sum(1, keepdim=True).cpu().numpy()
    places = (before + real.cumsum(1) - 1).clip(min=0)
    content = np.zeros(rows, np.int64)
    if training and inputs.get("input_ids") is not None:
        ids = inputs["input_ids"].cpu().numpy()
        content = np.array([zlib.crc32(row[own].tobytes()) for row, own in zip(ids, real, strict=True)])
    keys = token_keys(seed, content, int(places.max()) + 1)
    return np.take_along_axis(keys, places, axis=1).reshape(-1)


def _pictures(config: AdaptConfig) -> tuple[int, ...]:
    """Kinds of tokens that compete."""
    return (VIDEO,) if config.candidates == "video" else (IMAGE, VIDEO)


@dataclasses.dataclass(frozen=True)
class _Division:
    """The tokens of a forward by what happens to them, on the host; indices are flat, into B·T."""

    competing: np.ndarray
    """(n,) int64, pool after pool."""
    pools: tuple[int, ...]
    """Tokens of each pool."""
    by_threshold: np.ndarray
    """(m,) int64, ascending: kept where their probability is above the threshold."""
    dense: np.ndarray
    """(B·T,) bool: those that go through every layer; padding does not."""

    def pool_rows(self, columns: int) -> tuple[int, ...]:
        """Row of each pool, in rows of `columns` tokens."""
        starts = np.cumsum([0, *self.pools[:-1]]) if self.pools else np.empty(0, np.int64)
        return tuple((self.competing[starts] // columns).tolist())


def _divided(
    config: AdaptConfig, kind: Tensor, inputs: Mapping[str, Any], model_config: Any, training: bool
) -> _Division:
    """Who competes, who is held against the threshold, and who does neither; kind (B, T)."""
    columns, flat = kind.shape[1], kind.numpy().reshape(-1)
    competing, pools = _pools(config, flat, columns, inputs, model_config)
    dense = flat != PADDING
    dense[competing] = False
    by_threshold = np.empty(0, np.int64)
    if not training and config.inference.text == "threshold":
        by_threshold = np.flatnonzero(dense)
    if not training and config.inference.rule == "threshold":
        by_threshold, competing, pools = np.sort(np.concatenate((competing, by_threshold))), competing[:0], []
    dense[by_threshold] = False
    return _Division(competing, tuple(map(int, pools)), by_threshold, dense)


def _pools(
    config: AdaptConfig, kind: np.ndarray, columns: int, inputs: Mapping[str, Any], model_config: Any
) -> tuple[np.ndarray, Sequence[int]]:
    """Flat indices of the tokens that compete, (n,) int64, pool after pool, and the pools' sizes."""
    pictures = _pictures(config)
    if config.group == "sample":
        index = np.flatnonzero(np.isin(kind, (*pictures, ANSWER)))
        return index, _runs(index // columns)
    members, sizes = [np.empty(0, np.int64)], []
    for what in pictures:
        index = np.flatnonzero(kind == what)
        if index.size:
            sizes += lengths(what, index, columns, config.group == "frame", inputs, model_config)
            members.append(index)
    answers = np.flatnonzero(kind == ANSWER)
    return np.concatenate((*members, answers)), [*sizes, *_runs(answers // columns)]


def _runs(ids: np.ndarray) -> list[int]:
    """Lengths of the runs of equal ids, (n,)."""
    ends = np.flatnonzero(np.diff(ids)) + 1
    return np.diff([0, *ends, ids.size]).tolist() if ids.size else []
