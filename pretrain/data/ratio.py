"""A wanted ratio of tokens between modalities: in the long run by the weights of sources, in every step by the deal.

Ranks whose rows hold other shares of text and image take other times, and the slowest one holds up all. MoMa's remedy
(Lin et al. 2024) is a mix of data whose ratio of text to image, on each GPU, is that of the experts.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from pretrain.data.errors import DataError
from pretrain.data.packing import TokenStream


def weights_for(
    ratio: Mapping[str, float], weights: Mapping[str, float], streams: Mapping[str, TokenStream]
) -> dict[str, float]:
    """Weights of the sources under which rows hold modalities in `ratio`, as near to `weights` as can be.

    They are w_s · exp(λ · c_s), where c_s are the tokens by modality of a row of source s and λ makes the ratio true:
    of all weights that do, those with the least relative entropy to w (Kullback 1959).

    Args:
        ratio: wanted tokens of the vocabulary's modalities, relative to each other; one that is left out is free.
    Raises:
        DataError: a modality is not known, or no weights of these sources give the ratio.
    """
    names = next(iter(streams.values())).vocabulary.modalities
    unknown = [name for name in ratio if name not in names]
    if unknown:
        raise DataError(f"data.token_ratio.{unknown[0]}: is no modality of the recipe; they are {', '.join(names)}")
    share = np.array([ratio[name] for name in ratio]) / sum(ratio.values())
    rows = np.array([[stream.documents.counts[name] for name in ratio] for stream in streams.values()], np.float64)
    rows /= np.array([stream.rows_per_epoch for stream in streams.values()])[:, None]
    # what a row of each source has too much of each modality, as a share of the longest row: its mean is to be 0
    excess = (rows - rows.sum(1, keepdims=True) * share) / max(rows.sum(1).max(), 1.0)
    found = _tilted(np.array([weights[name] for name in streams], np.float64), excess)
    if found is None:
        shares = (rows / np.maximum(rows.sum(1, keepdims=True), 1e-9)).tolist()
        held = "; ".join(
            f"{name} {', '.join(f'{part:.1%} {modality}' for modality, part in zip(ratio, row, strict=True))}"
            for name, row in zip(streams, shares, strict=True)
        )
        raise DataError(
            f"data.token_ratio: {dict(ratio)}: no weights of these sources give it ({held}); add a source that holds "
            "more of what is missing, or change the ratio"
        )
    return dict(zip(streams, found.tolist(), strict=True))


def _tilted(weights: np.ndarray, excess: np.ndarray) -> np.ndarray | None:
    """(S,) weights · exp(excess · λ), of sum 1, whose mean of `excess` (S, M) is 0; None where there are none."""
    weights = weights / weights.sum()
    multiplier = np.zeros(excess.shape[1])
    for _ in range(200):
        logits = np.log(weights) + excess @ multiplier
        tilted = np.exp(logits - logits.max())
        tilted /= tilted.sum()
        mean = tilted @ excess
        if np.abs(mean).max() < 1e-9:
            return tilted
        spread = (excess * tilted[:, None]).T @ excess - np.outer(mean, mean)
        step = np.linalg.lstsq(spread + 1e-12 * np.eye(len(spread)), mean, rcond=None)[0]
        multiplier -= step * min(1.0, 10.0 / max(np.abs(step).max(), 1e-12))
    return None


def deal(counts: np.ndarray, batches: int) -> np.ndarray:
    """(batches, rows / batches) which rows go to which micro-batch, so that all hold modalities alike.

    Rows go one by one, those that differ most from the mean first, to the micro-batch that is then nearest its share.
    It depends on the rows alone, so it is the same on every rank and for any number of ranks, whose micro-batches
    are neighbours.

    Args:
        counts: (rows, M) tokens of each modality.
        batches: a divisor of the number of rows.
    """
    rows = len(counts) // batches
    excess = counts - counts.mean(0)
    sums, room = np.zeros((batches, counts.shape[1])), np.full(batches, rows)
    taken: list[list[int]] = [[] for _ in range(batches)]
    for row in np.argsort(-(excess**2).sum(1), kind="stable").tolist():
        worse = ((sums + excess[row]) ** 2 - sums**2).sum(1)
        worse[room == 0] = np.inf
        batch = int(np.argmin(worse))
        taken[batch].append(row)
        sums[batch] += excess[row]
        room[batch] -= 1
    # micro-batches that have too much of the modality that varies most stand beside those that have too little
    order = np.argsort(sums[:, int(excess.var(0).argmax())], kind="stable")
    beside = np.stack([order, order[::-1]], 1).reshape(-1)[:batches]
    return np.sort(np.array(taken, np.int64).reshape(batches, rows), axis=1)[beside]


def imbalance(counts: np.ndarray) -> float:
    """By which share the rank with most tokens of a modality exceeds the mean, the largest over modalities.

    Args:
        counts: (ranks, M) tokens of each modality.
    """
    mean = counts.mean(0)
    return float((counts.max(0) / np.maximum(mean, 1e-9) - 1)[mean > 0].max(initial=0.0))
