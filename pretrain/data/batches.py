"""Rows → micro-batches of a rank, by arithmetic on the global row numbers."""

from __future__ import annotations

import numpy as np
import torch

from pretrain.data.mixture import Mixture
from pretrain.data.ratio import deal
from pretrain.process_group import ALONE, Ranks
from zoo.batch import Batch
from zoo.context import TokenContext
from zoo.noise import token_keys


def micro_batches(
    stream: Mixture,
    rows: range,
    micro_batch: int,
    ranks: Ranks = ALONE,
    *,
    step: int = 0,
    seed: int = 0,
    end: int | None = None,
    balanced: bool = False,
) -> list[Batch]:
    """This rank's share of `rows`, the rows of one step, cut into batches of `micro_batch` rows.

    The share of rank r of W is the contiguous stretch r·G/W to (r + 1)·G/W of the G rows, or of the micro-batches.
    Tokens, documents and noise keys of a row depend on its number alone.

    Args:
        rows: numbers of the rows; one stretch.
        ranks: among which they are dealt out, and which of them this is.
        step: handed on to the contexts.
        seed: of the noise keys.
        end: rows from this number on are all padding, so that a stream that ends fills the last step.
        balanced: rows are dealt to the micro-batches so that each holds about as many tokens of each modality, instead
            of in their order.
    Raises:
        ValueError: the number of rows is not a multiple of micro_batch · world.
    """
    if len(rows) % (micro_batch * ranks.world):
        raise ValueError(
            f"{len(rows)} rows a step do not divide into micro-batches of {micro_batch} on {ranks.world} ranks"
        )
    share = len(rows) // micro_batch // ranks.world
    numbers = np.array(rows).reshape(-1, micro_batch)
    if balanced:
        numbers = numbers.reshape(-1)[deal(np.array([stream.counts(n) for n in rows]), len(numbers))]
    own = numbers[ranks.rank * share : (ranks.rank + 1) * share]
    return [_batch(stream, each, step, seed, end) for each in own]


def tokens_by_rank(stream: Mixture, rows: range, micro_batch: int, world: int, balanced: bool) -> np.ndarray:
    """(world, M) int64: tokens of each modality that each rank has of `rows`, known without reading them."""
    counts = np.array([stream.counts(number) for number in rows])
    order = deal(counts, len(rows) // micro_batch).reshape(-1) if balanced else np.arange(len(rows))
    return counts[order].reshape(world, -1, counts.shape[1]).sum(1)


def _batch(stream: Mixture, numbers: np.ndarray, step: int, seed: int, end: int | None) -> Batch:
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
        modalities=stream.vocabulary.modalities,
        step=step,
        key=torch.from_numpy(token_keys(seed, numbers, stream.sequence_length)),
    )
    content = {name: np.concatenate([row.content[name] for row in rows]) for name in rows[0].content}
    sources = torch.tensor([stream.source(n) for n in numbers.tolist()]) if len(stream.streams) > 1 else None
    return Batch(tokens, context, {name: _tensor(values) for name, values in content.items()}, sources)


def _tensor(values: np.ndarray) -> torch.Tensor:
    """Vectors as float32, channels as int64."""
    return torch.from_numpy(values.astype(np.float32 if values.dtype.kind == "f" else np.int64))
