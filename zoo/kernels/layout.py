"""Layout: which row of a block's values holds the token of each step, so that recurrences need no values in time order.

A Mamba block sorts its tokens by modality once. Everything pointwise runs on the sorted rows; convolution and scan,
where tokens meet, step through the rows by index instead of bringing them back into time order.

Letters: B sequences, T steps, R rows, W width.
"""

from __future__ import annotations

import dataclasses
import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.context import TokenContext
from zoo.gather import exchange
from zoo.untied import TIED, Grouping, grouped_bias


@dataclasses.dataclass(frozen=True, eq=False)
class Layout:
    """Where the tokens of B sequences stand among R rows. Build with `of`."""

    row: Tensor
    """(B, T) int64: the row of each token; a sequence's tokens come first, then −1."""
    ids: Tensor
    """(B, T) int64: document id of the token, −1 where `row` is."""
    first: Tensor
    """(B, T) bool: the token begins a document; what came before it is forgotten."""
    count: Tensor
    """(B,) int64, tokens of each sequence."""
    group: Tensor
    """(R,) int32, the weights' group of each row; 0 where they are tied."""
    sizes: tuple[int, ...]
    """Rows of each group, one group after the other; on the host. What `after_window` adds is in none."""
    padded: bool
    """Some sequence has fewer than T tokens."""
    in_order: bool
    """Row b·T + t is step t of sequence b: values need no gather."""
    many_documents: bool
    """Some sequence may hold more than one document; known on the host."""
    most_documents: int | None = None
    """Documents of the sequence that holds most of them, or a bound of that; None where the host does not know."""

    @classmethod
    def of(cls, context: TokenContext, grouping: Grouping = TIED, before: Tensor | None = None) -> Layout:
        """Layout of a context's tokens.

        Args:
            grouping: the rows are those of `grouping.split`; with one group the B·T tokens, flat, padding included.
            before: (B,) id of the document that a decoding state holds, −1 for none; a first token of the same document
                continues it. None: every sequence begins anew.
        """
        layout = context.shared(("layout", grouping), lambda: _lay_out(context, grouping))
        if before is None:
            return layout
        first = layout.first.clone()
        first[:, 0] &= layout.ids[:, 0] != before
        return dataclasses.replace(layout, first=first)

    @property
    def rows(self) -> int:
        """R, rows without padding."""
        return self.group.shape[0]

    @functools.cached_property
    def source(self) -> Tensor:
        """(B·T,) row of each flat step b·T + t; R where there is no token. The inverse of `step`."""
        row = self.row.reshape(-1)
        return row.masked_fill(row < 0, self.rows) if self.padded else row

    @functools.cached_property
    def step(self) -> Tensor:
        """(R,) flat step b·T + t of each row; B·T for a row that holds no token."""
        step = self.row.new_full((self.rows + 1,), self.row.numel())
        step[self.source] = torch.arange(self.row.numel(), device=self.row.device)
        return step[:-1]

    @functools.cached_property
    def document(self) -> Tensor:
        """(B, T) int32 number of the document within the sequence; 0 is one that a state began."""
        return self.first.cumsum(1, dtype=torch.int32)

    @functools.cached_property
    def apart(self) -> tuple[Tensor, int]:
        """(B, T) column of each step when an empty one stands before every document but a sequence's first, and the
        number of columns that makes, for which the host waits once where it does not know the documents."""
        place = torch.arange(self.row.shape[1], device=self.row.device) + self.document - self.document[:, :1]
        known = self.most_documents
        return place, int(place.max()) + 1 if known is None else self.row.shape[1] + known - 1

    def biased(self, values: Tensor, bias: Tensor) -> Tensor:
        """values (R, W) + the bias of each row's group, of bias (G, W); one bias is every row's."""
        return values + bias if bias.shape[0] == 1 else grouped_bias(values, bias, self.sizes)

    def to_time(self, values: Tensor) -> Tensor:
        """(R, …) → (B, T, …), 0 where there is no token."""
        if self.in_order:
            return values.view(*self.row.shape, *values.shape[1:])
        moved = exchange(values.flatten(1), self.source, self.step, gaps=self.padded, inverse_gaps=self.padded)
        return moved.view(*self.row.shape, *values.shape[1:])

    def to_rows(self, values: Tensor) -> Tensor:
        """(B, T, …) → (R, …), 0 at rows that hold no token."""
        flat = values.reshape(-1, *values.shape[2:])
        if self.in_order:
            return flat
        moved = exchange(flat.flatten(1), self.step, self.source, gaps=self.padded, inverse_gaps=self.padded)
        return moved.view(self.rows, *values.shape[2:])

    def after_window(self, width: int) -> Layout:
        """The same sequences with `width` earlier steps in front, held by B·width more rows at the end, in order."""
        sequences = self.row.shape[0]
        ahead = torch.arange(self.rows, self.rows + sequences * width, device=self.row.device).view(sequences, width)
        return Layout(
            row=torch.cat((ahead, self.row), dim=1),
            ids=torch.cat((self.ids[:, :1].expand(-1, width), self.ids), dim=1),
            first=torch.cat((torch.zeros_like(ahead, dtype=torch.bool), self.first), dim=1),
            count=self.count + width,
            group=torch.cat((self.group, self.group.new_zeros(sequences * width))),
            sizes=self.sizes,
            padded=self.padded,
            in_order=False,
            many_documents=True,
        )


def _lay_out(context: TokenContext, grouping: Grouping) -> Layout:
    device, tokens = context.modality.device, context.modality.numel()
    flat = torch.arange(tokens, device=device).view(context.shape)
    group = torch.zeros(tokens, dtype=torch.int32, device=device)
    row, sizes = flat, grouping.sizes(context)
    if not grouping.tied:
        order = grouping.split(flat.unsqueeze(-1), context)[:, 0]
        row = flat.new_empty(tokens).index_copy(0, order, flat.view(-1)[: order.numel()]).view(context.shape)
        group = torch.cat([group.new_full((size,), g) for g, size in enumerate(sizes)])
    document = context.document
    if context.padded:
        row = row.masked_fill(~context.valid, -1)
        tokens_first = torch.sort(context.valid, dim=1, descending=True, stable=True).indices
        row, document = row.gather(1, tokens_first), document.gather(1, tokens_first)
    first = torch.ones_like(document, dtype=torch.bool)
    first[:, 1:] = document[:, 1:] != document[:, :-1]
    return Layout(
        row=row,
        ids=document,
        first=first & (document >= 0),
        count=context.valid.sum(1),
        group=group,
        sizes=sizes,
        padded=context.padded,
        in_order=grouping.tied and not context.padded,
        many_documents=not context.single_document,
        most_documents=context.most_documents,
    )


def causal_window(x: Tensor, layout: Layout, window: Tensor) -> tuple[Tensor, Layout, Tensor]:
    """Put a decoding window in front of a convolution's input.

    Args:
        x: (R, W).
        window: (B, k − 1, W), the last inputs of each sequence's document, 0 before its beginning.
    Returns:
        the longer input and its layout; and the window after these tokens.
    """
    sequences, width = window.shape[:2]
    rows, longer = torch.cat((x, window.reshape(-1, x.shape[1]).to(x.dtype))), layout.after_window(width)
    last = layout.count[:, None] + torch.arange(width, device=x.device)  # columns of the longer sequences
    after = F.embedding(longer.row.gather(1, last), rows)
    column = torch.arange(longer.row.shape[1], device=x.device)
    begin = torch.where(longer.first, column, 0).amax(1, keepdim=True)
    return rows, longer, after.masked_fill((last < begin).unsqueeze(-1), 0.0)
