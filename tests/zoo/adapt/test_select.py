"""Selection against a loop, ties, and the order of packed tokens."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch

from tests.zoo.adapt.test_context import context
from zoo.adapt.select import select

ROWS = ["tiiiitiiit", "...tiittii", "..tttttttt"]


@pytest.mark.parametrize("keep", [Fraction(1, 3), Fraction(1, 2), Fraction(1, 10), Fraction(1)])
@pytest.mark.parametrize("levels", [2, 1000])
def test_top_k_of_each_group(keep: Fraction, levels: int) -> None:
    """With few levels most tokens tie, and the earlier are kept."""
    built = context(ROWS)
    logits = torch.randint(levels, (built.competing.shape[0],), generator=torch.Generator().manual_seed(3)).float()
    chosen = select(built, logits[:, None], keep, None)
    score = dict(zip(built.competing.tolist(), logits.tolist(), strict=True))
    kept: list[list[int]] = []
    for row, letters in enumerate(ROWS):
        columns, group = [], []
        for column, letter in enumerate(letters + "t"):
            if letter == "i":
                group.append(column)
                continue
            best = sorted(group, key=lambda c: (-score[row * 10 + c], c))  # noqa: B023
            columns += sorted(best[: math.ceil(len(group) * keep)])
            group = []
            columns += [column] if letter == "t" and column < 10 else []
        kept.append(columns)
    assert chosen.counts == tuple(map(len, kept))
    assert chosen.kept.nonzero().tolist() == [[r, c] for r, columns in enumerate(kept) for c in columns]
    for row, columns in enumerate(kept):
        assert chosen.index[row, : len(columns)].tolist() == columns, "in time order"
        if chosen.valid is not None:
            assert chosen.valid[row].tolist() == [i < len(columns) for i in range(chosen.valid.shape[1])]
    assert chosen.index.shape[1] == max(map(len, kept))
    assert [bool(taken) for taken in chosen.taken] == [m % 10 in kept[m // 10] for m in built.competing.tolist()]


def test_tokens_that_do_not_compete_pass_above_the_threshold() -> None:
    built = context(ROWS, inference={"rule": "threshold", "threshold": 0.6})
    assert not built.pools and built.competing.numel() == 0
    logits = torch.linspace(-1, 1, built.by_threshold.shape[0])
    chosen = select(built, logits[:, None], Fraction(1, 2), 0.6)
    assert torch.equal(chosen.taken, logits.sigmoid() > 0.6)
    assert chosen.counts == tuple(chosen.kept.sum(1).tolist())
