"""Rows brought into another order or picked out, with backward passes that know no row was taken twice.

The gradient of a general gather adds up what came back to each row. For that `embedding` sorts the indices on a GPU,
which takes ten times as long as the gather itself. The blocks of this library mostly move rows without repeating one:
each row's gradient is then one row, which is gathered where the inverse of the move is known, and put back where it is
not.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


def exchange(x: Tensor, index: Tensor, inverse: Tensor, *, gaps: bool = False, inverse_gaps: bool = False) -> Tensor:
    """Rows in another order: y_i = x_{index[i]}, and x_j has become y_{inverse[j]}.

    Args:
        x: (N, W).
        index: (n,) in [0, N], no row twice; N where no row comes from anywhere, which gives zeros.
        inverse: (N,) in [0, n]; n where a row of x goes nowhere.
        gaps: whether N stands in `index`.
        inverse_gaps: whether n stands in `inverse`.
    Returns:
        (n, W).
    """
    return _Exchange.apply(x, index, inverse, gaps, inverse_gaps)


def pick(x: Tensor, index: Tensor) -> Tensor:
    """The rows of x (N, W) at `index` (n,), which repeats none: (n, W). Wrong gradients where it does."""
    return _Pick.apply(x, index)


def spread(table: Tensor, group: Tensor) -> Tensor:
    """The row of `table` (G, W) that each of many places has, by `group` (…): (…, W). For few rows, such as one a
    modality: the gradient compares every place with every row."""
    return _Spread.apply(table, group)


class _Spread(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, table: Tensor, group: Tensor) -> Tensor:
        ctx.save_for_backward(group)
        ctx.count = table.shape[0]
        return F.embedding(group, table)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:  # pyrefly: ignore[bad-override]
        (group,) = ctx.saved_tensors
        if dy.device.type == "cpu":
            return torch.ops.aten.embedding_dense_backward(dy, group, ctx.count, -1, False), None
        return by_product(dy, group, ctx.count), None


def by_product(dy: Tensor, group: Tensor, count: int) -> Tensor:
    """Sums of dy (…, W) over the places of each of `count` groups, (count, W): one product, with nothing to sort."""
    belongs = torch.arange(count, device=group.device)[:, None] == group.reshape(1, -1)
    return belongs.to(dy.dtype) @ dy.reshape(-1, dy.shape[-1])


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor, inverse: Tensor, gaps: bool, inverse_gaps: bool) -> Tensor:
        ctx.save_for_backward(index, inverse)
        ctx.gaps = gaps, inverse_gaps
        if gaps:
            x = torch.cat((x, x.new_zeros(1, x.shape[1])))
        return x.index_select(0, index)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None, None, None]:  # pyrefly: ignore[bad-override]
        index, inverse = ctx.saved_tensors
        gaps, inverse_gaps = ctx.gaps
        return exchange(dy, inverse, index, gaps=inverse_gaps, inverse_gaps=gaps), None, None, None, None


class _Pick(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor) -> Tensor:
        ctx.save_for_backward(index)
        ctx.size = x.shape[0]
        return x.index_select(0, index)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:  # pyrefly: ignore[bad-override]
        (index,) = ctx.saved_tensors
        return _Put.apply(dy, index, ctx.size), None


class _Put(torch.autograd.Function):
    """The transpose of `pick`."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, index: Tensor, size: int) -> Tensor:
        ctx.save_for_backward(index)
        whole = rows.new_zeros(size, *rows.shape[1:])
        # the same values; adding is the faster of the two on a CPU, and takes twice as long on a GPU
        on_host = rows.device.type == "cpu"
        return whole.index_add_(0, index, rows) if on_host else whole.index_copy_(0, index, rows)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:  # pyrefly: ignore[bad-override]
        (index,) = ctx.saved_tensors
        return pick(dy, index), None, None
