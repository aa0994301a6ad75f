"""TokenContext: what a block knows about its tokens.

A context is built once per batch on the host and moved with it. Everything that all layers share (token indices by
modality, masks, rotary tables) is derived once; shapes are Python ints known on the host, so that no block waits for
the device to learn one.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from zoo import noise
from zoo.host import send
from zoo.spans import Span, Spans
from zoo.trace import Trace

TOPK, CAUSAL = "topk", "causal"

_STEP = "step"
"""Name of the step among `constants`."""

TEXT_AND_IMAGE = ("text", "image")
"""The modalities where a caller in Python names none: those of the papers."""


Counts = tuple[tuple[int, ...], ...]
"""counts[b][m]: tokens of modality m in row b."""


class Kept:
    """What the host knows of the tokens of a context, or of those that a router keeps of it.

    The tokens of each row are always known. Those of each modality, and where documents and items stand, may depend on
    what a device decides: the first who asks for them waits for their copy, once, and where nobody asks nobody waits.

    Args:
        row_counts: tokens of each row.
        read: gives the counts by modality, and what is left of documents and items, in the columns of the kept tokens;
            None where the host does not know that.
        counts: where they are known already.
    """

    def __init__(
        self,
        row_counts: tuple[int, ...],
        read: Callable[[], tuple[Counts, Spans | None]],
        counts: Counts | None = None,
    ) -> None:
        self.row_counts, self.total = row_counts, sum(row_counts)
        self._read, self._counts = read, counts
        self._totals = None if counts is None else _totals(counts)
        self._found: tuple[Counts, Spans | None] | None = None

    @classmethod
    def of(cls, counts: Counts, spans: Spans | None = None) -> Kept:
        """What is known already."""
        return cls(tuple(map(sum, counts)), lambda: (counts, spans), counts)

    @property
    def counts(self) -> Counts:
        return self._counts or self._numbers()[0]

    @property
    def totals(self) -> tuple[int, ...]:
        """Tokens of each modality."""
        return self._totals or _totals(self.counts)

    @property
    def spans(self) -> Spans | None:
        return self._numbers()[1]

    def _numbers(self) -> tuple[Counts, Spans | None]:
        if self._found is None:
            self._found = self._read()
        return self._found


@dataclasses.dataclass(frozen=True, eq=False)
class TokenContext:
    """B rows of T tokens. Build with `from_modality`; narrow with `select`.

    Tensors are on one device. Padding has modality −1 and document −1, is counted nowhere, and its output is 0.

    A row holds documents, which never see each other. A document may hold items: attention, causal elsewhere, goes in
    both directions inside an item. Recurrent mixers stay causal there.
    """

    modalities: tuple[str, ...]
    modality: Tensor
    """(B, T) int64, an index into `modalities`; −1 for padding. Begin/end-of-image tokens are text."""
    position: Tensor
    """(B, T) int64, index inside the document: original, never renumbered."""
    document: Tensor
    """(B, T) int64, id within the row; −1 for padding."""
    key: Tensor
    """(B, T) int32, identity of the token for counter-based noise (`zoo.noise`)."""
    known: Kept
    """What the host knows of the tokens."""
    single_document: bool
    """Every row is one document, its padding (if any) at the end: without items plain causal attention is right."""
    item: Tensor | None = None
    """(B, T) int64, number within its row of the item with bidirectional attention that a position belongs to (an image
    whose parts all see each other), −1 elsewhere; None where the batch has no such item."""
    narrowed: bool = False
    """A sub-sequence that a router kept, for a single layer: what is derived from it is shared by no other layer."""
    step: int = 0
    routing: str = TOPK
    """"topk": expert choice over the scope, as in training. "causal": auxiliary routers decide token by token."""
    trace: Trace | None = None
    derived: dict[Any, Any] = dataclasses.field(default_factory=dict, repr=False)
    """What `shared` has computed; `replace` hands it on, `select` and `to` begin anew."""
    constants: dict[Any, Any] = dataclasses.field(default_factory=dict, repr=False)
    """What `constant` has computed; `replace` and `select` hand it on, `to` begins anew."""

    @classmethod
    def from_modality(
        cls,
        modality: Tensor,
        document: Tensor | None = None,
        position: Tensor | None = None,
        *,
        modalities: tuple[str, ...] = TEXT_AND_IMAGE,
        step: int = 0,
        routing: str = TOPK,
        trace: Trace | None = None,
        key: Tensor | None = None,
        item: Tensor | None = None,
    ) -> TokenContext:
        """Context of a batch.

        Args:
            modality: (B, T) integers in the order of `modalities`, −1 for padding.
            document: (B, T) ids within the row, −1 for padding; default: each row is one document.
            position: (B, T) index inside the document; default: counted from each document's first token in the row.
            key: (B, T) int32 noise identities; default: hashed from (row, column).
            item: (B, T) integers, number within its row of the item with bidirectional attention that a position
                belongs to, −1 elsewhere; default: attention is causal everywhere.
        Raises:
            ValueError: a modality out of range, a document or an item in two pieces, an item that is not inside one
                document, or padding that `modality` and `document` see differently.
        """
        if modality.dim() != 2:
            raise ValueError(f"modality: shape {tuple(modality.shape)}; it must be (B, T)")
        modality = modality.to(torch.int64)
        document = (torch.where(modality < 0, -1, 0) if document is None else document).to(torch.int64)
        host_modality, host_document = modality.cpu(), document.cpu()
        _check(host_modality, host_document, item, modalities)
        spans = Spans.of(host_document, item)
        if position is None:
            position = send(_positions(spans, host_modality), modality.device)
        if key is None:
            key = send(noise.token_keys(0, np.arange(modality.shape[0]), modality.shape[1]), modality.device)
        return cls(
            modalities=tuple(modalities),
            modality=modality,
            position=position.to(torch.int64),
            document=document,
            key=key,
            known=Kept.of(_on_host(_counts(host_modality, len(modalities))), spans),
            single_document=spans.single_document,
            item=None if item is None or not spans.items else item.to(torch.int64),
            step=step,
            routing=routing,
            trace=trace,
        )

    # ------------------------------------------------------------------------------------------ shapes, on the host

    @property
    def shape(self) -> tuple[int, int]:
        """(B, T): rows, and tokens of a row."""
        return tuple(self.modality.shape)  # type: ignore[return-value]

    @property
    def row_counts(self) -> tuple[int, ...]:
        """Tokens of each row, padding apart."""
        return self.known.row_counts

    @property
    def counts(self) -> Counts:
        """counts[b][m]: tokens of modality m in row b. Where the host does not know them, the first to ask waits."""
        return self.known.counts

    @property
    def totals(self) -> tuple[int, ...]:
        """Tokens of each modality in the batch."""
        return self.known.totals

    @property
    def padded(self) -> bool:
        return self.known.total < self.modality.numel()

    @property
    def document_spans(self) -> tuple[Span, ...]:
        """Span of every document. Where the host does not know them, the first to ask waits for their copy."""
        return self._known_spans().documents

    @property
    def item_spans(self) -> tuple[Span, ...]:
        """Span of every item with bidirectional attention, as `document_spans`; empty where `item` is None."""
        return self._known_spans().items if self.item is not None else ()

    def _known_spans(self) -> Spans:
        return self.known.spans or self.shared("spans", lambda: Spans.of(self.document, self.item))

    @property
    def most_documents(self) -> int | None:
        """Documents of the row that has most; of a sub-sequence at most so many. None where the host would have to
        wait."""
        if self.narrowed:
            return self.constants.get("most documents")

        def compute() -> int | None:
            spans = self.known.spans
            if spans is None:
                return None
            return max(collections.Counter(row for row, *_ in spans.documents).values(), default=1)

        return self.constant("most documents", compute)

    # ------------------------------------------------------------------------------------------- derived once, shared

    def shared(self, name: Any, compute: Callable[[], Any]) -> Any:
        """A value that depends on this context alone: computed by the first layer that asks, kept for the others."""
        if name not in self.derived:
            self.derived[name] = compute()
        return self.derived[name]

    def constant(self, name: Any, compute: Callable[[], Any]) -> Any:
        """A value that depends on its name alone, such as a table of numbers that the host knows: as `shared`, and also
        for the contexts narrowed from this one, so that a batch sends it to the device once."""
        if torch.compiler.is_compiling():  # a graph must not look at the numbers in a name
            return compute()
        if name not in self.constants:
            self.constants[name] = compute()
        return self.constants[name]

    def count_steps(self) -> None:
        """Put the step on the device, where a compiled graph may read it: noise that changes with it needs no other
        graph."""
        self.constants[_STEP] = send([self.step], self.modality.device)[0]

    def salt(self, name: str) -> int | Tensor:
        """Salt of the noise of the block `name` at this step (`zoo.noise`)."""
        return noise.salt(name, self.constants.get(_STEP, self.step))

    @property
    def valid(self) -> Tensor:
        """(B, T) bool: not padding."""
        return self.shared("valid", lambda: self.modality >= 0)

    @property
    def order(self) -> Tensor:
        """(B·T,) flat token indices: padding first, then modality by modality, in time order within each."""
        return self.shared("order", lambda: torch.argsort(self.modality.reshape(-1), stable=True))

    def index(self, modality: int) -> Tensor:
        """Flat indices into B·T of the tokens of a modality, in row and time order: (totals[modality],)."""
        start = self.modality.numel() - sum(self.totals[modality:])
        return self.order[start : start + self.totals[modality]]

    @property
    def tokens(self) -> Tensor:
        """Flat indices of all tokens that are not padding, in row and time order."""
        if not self.padded:
            return self.shared("tokens", lambda: torch.arange(self.modality.numel(), device=self.modality.device))
        start = self.modality.numel() - self.known.total
        return self.shared("tokens", lambda: self.order[start:].sort().values)

    @property
    def mask(self) -> Tensor:
        """(B, 1, T, T) bool: query t may see key s of its document if s ≤ t or both belong to the same item.

        Padding sees earlier padding, so that no query sees nothing.
        """

        def compute() -> Tensor:
            time = torch.arange(self.modality.shape[1], device=self.modality.device)
            seen = time[:, None] >= time[None, :]
            if self.item is not None:
                seen = seen | same_item(self.item)
            return seen & (self.document[:, None, :, None] == self.document[:, None, None, :])

        return self.shared("mask", compute)

    # ---------------------------------------------------------------------------------------------------- narrowing

    def kept(self, keep: Tensor, row_counts: tuple[int, ...] | None = None, counts: Counts | None = None) -> Kept:
        """What is left where only the tokens at which `keep` (B, T) is true are kept.

        What depends on the data is copied to the host together, once: here, where tokens by row are not known, else
        when somebody asks. Spans are among it where attention needs them.

        Args:
            row_counts: tokens kept of each row, where they do not depend on the data.
            counts: those of each modality as well.
        """
        needs_spans = not self.single_document or self.item is not None
        if counts is not None and not needs_spans:
            return Kept.of(counts)
        # not the context: what it holds besides (a trace) must not live as long as what a trace has recorded
        parent = self.known if needs_spans else None
        read = functools.partial(_read, self.modality, len(self.modalities), keep, counts, parent, self.constants)
        if counts is None and row_counts is None:
            return Kept.of(*read())
        return Kept(row_counts or tuple(map(sum, counts or ())), read, counts)

    def select(self, index: Tensor, valid: Tensor | None, kept: Kept | None = None) -> TokenContext:
        """The context of a kept sub-sequence.

        Args:
            index: (B, K) columns kept, ascending within a row; K is the largest row's count.
            valid: (B, K) bool; False where a shorter row is padded. None: every row keeps K.
            kept: what the host knows of it, from `kept`; default: the counts are copied to the host here, once.
        Returns:
            Context of B rows of K tokens with original positions, documents and items. What was kept of a document or
            an item is one run again, and what was kept of an item still sees all of itself.
        """

        def take(values: Tensor, padding: int) -> Tensor:
            taken = values.gather(1, index)
            return taken if valid is None else taken.masked_fill(~valid, padding)

        _ = self.most_documents  # a constant, which is handed on
        modality = take(self.modality, -1)
        kept = kept or Kept.of(_on_host(_counts(modality, len(self.modalities))))
        return dataclasses.replace(
            self,
            modality=modality,
            position=take(self.position, 0),
            document=take(self.document, -1),
            key=take(self.key, 0),
            known=kept,
            item=None if self.item is None else take(self.item, -1),
            narrowed=True,
            derived={},
        )

    def replace(self, **changes: Any) -> TokenContext:
        """The same tokens under another `step`, `routing` or `trace`; derived values stay shared."""
        return dataclasses.replace(self, **changes)

    def to(self, device: torch.device | str) -> TokenContext:
        if self.modality.device == torch.device(device):
            return self
        moved = {name: send(getattr(self, name), device) for name in ("modality", "position", "document", "key")}
        if self.item is not None:
            moved["item"] = send(self.item, device)
        return dataclasses.replace(self, **moved, derived={}, constants={})


def _check(modality: Tensor, document: Tensor, item: Tensor | None, modalities: tuple[str, ...]) -> None:
    """Raise ValueError where modality, document and item, all (B, T), do not go together."""
    if modality.numel() and int(modality.max()) >= len(modalities):
        raise ValueError(f"modality: {int(modality.max())} is out of range; modalities are {', '.join(modalities)}")
    if not torch.equal(modality < 0, document < 0):
        raise ValueError("modality and document disagree about padding; both are −1 exactly there")
    if item is not None and item.shape != modality.shape:
        raise ValueError(f"item: shape {tuple(item.shape)}; it must be that of modality, {tuple(modality.shape)}")


def _positions(spans: Spans, like: Tensor) -> Tensor:
    """(B, T) int64: index of every token inside its document, counted in its row; 0 for padding."""
    position = torch.zeros_like(like)
    for row, start, length in spans.documents:
        position[row, start : start + length] = torch.arange(length)
    return position


def _totals(counts: Counts) -> tuple[int, ...]:
    """Over the rows; of no rows there are none."""
    return tuple(map(sum, zip(*counts, strict=True)))


def _read(
    modality: Tensor,
    modalities: int,
    keep: Tensor,
    counts: Counts | None,
    parent: Kept | None,
    constants: dict[Any, Any],
) -> tuple[Counts, Spans | None]:
    """Counts, and spans where `parent` knows those before anything was left out; one copy to the host for both.

    Args:
        modality, keep: (B, T).
        counts: where they are known.
        parent: of the context that is narrowed; None: nobody needs spans.
        constants: of the context.
    """
    numbers = [] if counts else [_counts(modality.masked_fill(~keep, -1), modalities)]
    spans = None if parent is None else parent.spans
    if spans is not None:
        places = tuple(spans.boundaries(modality.shape[1]))
        if places not in constants:
            constants[places] = send(places, keep.device)
        numbers.append(F.pad(keep.reshape(-1).cumsum(0), (1, 0)).index_select(0, constants[places]))
    if not numbers:
        assert counts is not None
        return counts, None
    found = torch.cat([number.reshape(-1) for number in numbers]).cpu()
    if counts is None:
        rows = modality.shape[0]
        counts, found = _on_host(found[: rows * modalities].view(rows, modalities)), found[rows * modalities :]
    return counts, None if spans is None else spans.narrowed(found.tolist())


def _counts(modality: Tensor, modalities: int) -> Tensor:
    """(B, M): tokens of each row and modality; modality (B, T)."""
    return torch.stack([(modality == m).sum(1) for m in range(modalities)], dim=1)


def _on_host(counts: Tensor) -> Counts:
    """(B, M) counts as numbers; the host waits for them."""
    return tuple(map(tuple, counts.tolist()))


def same_item(item: Tensor) -> Tensor:
    """(B, 1, T, T) bool: both positions belong to the same item; item (B, T), −1 where there is none."""
    query, key = item[:, None, :, None], item[:, None, None, :]
    return (query == key) & (query >= 0)
