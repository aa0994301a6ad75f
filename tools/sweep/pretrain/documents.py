"""What runs would have lost on other validation documents, from what `evaluate.documents: true` keeps of each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from pretrain.document_losses import DocumentLosses
from tools.sweep.pretrain.savings import DRAWS
from zoo.slots import Objective


def redrawn(objective: Objective, kept: Sequence[DocumentLosses]) -> dict[str, np.ndarray]:
    """Losses by name, "all" and the modalities, each (DRAWS, n): after n evaluations, on DRAWS choices of documents.

    A choice draws as many documents as there are, with replacement. The draws depend on the number of documents alone,
    so that runs that were evaluated on the same documents have the same in each draw.

    Args:
        objective: puts together what documents add to its parts.
        kept: of each evaluation, all of the same documents.
    """
    parts, documents = kept[0].parts, len(kept[0].documents)
    times = np.random.default_rng(0).multinomial(documents, np.full(documents, 1 / documents), DRAWS)
    sums = times @ np.stack([each.sums for each in kept])  # (n, DRAWS, P)
    counts = times @ kept[0].counts
    found = []
    for draw in range(DRAWS):
        total: dict[str, np.ndarray] = dict.fromkeys(objective.parts, np.zeros(len(kept)))
        total.update(zip(parts, sums[:, draw].T, strict=True))
        count: dict[str, int] = dict.fromkeys(objective.parts, 0)
        count.update(zip(parts, counts[draw].tolist(), strict=True))
        found.append(_combined(objective, total, count))
    return {name: np.stack([each[name] for each in found]) for name in found[0] if all(name in e for e in found)}


def _combined(objective: Objective, sums: Mapping[str, np.ndarray], counts: Mapping[str, int]) -> dict[str, np.ndarray]:
    """As an evaluation reports them; the arithmetic of an objective is linear and takes arrays as well."""
    whole = objective.combine(sums, counts)  # pyrefly: ignore[bad-argument-type]
    means = objective.report(sums, counts, training=False)  # pyrefly: ignore[bad-argument-type]
    return {"all": np.asarray(whole), **{name: np.asarray(mean) for name, mean in means.items()}}
