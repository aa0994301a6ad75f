"""Rows → micro-batches of a rank, by arithmetic on the global row numbers."""

from __future__ import annotations

import numpy as np
import torch

from pretrain.data.packing import TokenStream
from zoo.batch import Batch
from zoo.context import TokenContext
from zoo.noise import token_keys


def micro_batches(
    stream: TokenStream,
    first_row: int,
    rows_per_step: int,
    micro_batch: int,
    rank: int,
    world: int,
    step: int,
    seed: int,
    end: int | None = None,
) -> list[Batch]:
    """The share of `rank` in rows [first_row, first_row + rows_per_step), cut into batches of `micro_batch`
    rows.

    The share of rank r of W is the contiguous stretch r·G/W to (r + 1)·G/W of the G rows. Tokens, documents
    and noise keys of a row depend on its number alone.

    Args:
        step: handed on to the contexts.
        seed: of the noise keys.
        end: rows from this number on are all padding, so that a stream that ends fills the last step.
    Raises:
        ValueError: rows_per_step is not a multiple of micro_batch · world.
    """
    if rows_per_step % (micro_batch * world):
        raise ValueError(
            f"{rows_per_step} rows a step do not divide into micro-batches of {micro_batch} on {world} ranks"
        )
    share = rows_per_step // world
    begin = first_row + rank * share
    return [
        _batch(stream, np.arange(start, start + micro_batch), step, seed, end)
        for start in range(begin, begin + share, micro_batch)
    ]


def _batch(stream: TokenStream, numbers: np.ndarray, step: int, seed: int, end: int | None) -> Batch:
    rows = [stream.row(n) if end is None or n < end else stream.padding_row() for n in numbers.tolist()]
    tokens, modality, document, position, item = (
        torch.from_numpy(np.stack([getattr(row, name) for row in rows]).astype(np.int64))
        for name in ("tokens", "modality", "document", "position", "item")
    )
    context = TokenContext.from_modality(
        modality,
        document=document,
        position=position,
        item=item if int(item.max()) >= 0 else None,
        modalities=stream.documents.vocabulary.modalities,
        step=step,
        key=torch.from_numpy(token_keys(seed, numbers, stream.sequence_length)),
    )
    content = {name: np.concatenate([row.content[name] for row in rows]) for name in rows[0].content}
    return Batch(tokens, context, {name: _tensor(values) for name, values in content.items()})


def _tensor(values: np.ndarray) -> torch.Tensor:
    """Vectors as float32, channels as int64."""
    return torch.from_numpy(values.astype(np.float32 if values.dtype.kind == "f" else np.int64))
