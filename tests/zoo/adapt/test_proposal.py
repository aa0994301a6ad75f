"""Which layers are proposed, by threshold and by budget, and the reasons."""

from __future__ import annotations

import pytest

from tests.zoo.adapt.families import FAMILIES
from zoo.adapt import adapt
from zoo.adapt.arank import measure
from zoo.adapt.flops import decoder_flops
from zoo.adapt.proposal import Proposal, by_budget, by_threshold, flops_savings, skip_savings
from zoo.config import UserError

RANKS = [0.1, 0.31, 0.6, 0.2, 0.5, 0.2]


def chosen(choices: list[Proposal]) -> list[int]:
    return [layer for layer, choice in enumerate(choices) if choice.chosen]


def test_threshold() -> None:
    choices = by_threshold(RANKS, 0.4)
    assert chosen(choices) == [1, 3]
    assert choices[0].reason.startswith("kept dense: layer 0") and choices[5].reason.startswith("kept dense: the last")
    assert choices[1].reason == "rank_over_length 0.310 below threshold 0.4"
    assert choices[2].reason == "rank_over_length 0.600 not below threshold 0.4"
    assert chosen(by_threshold(RANKS, 0.4, last_layer=True)) == [1, 3, 5]
    assert chosen(by_threshold(RANKS, 0.31)) == [3], "below means below"


def test_budget_takes_the_lowest_and_no_more_than_needed() -> None:
    def layers(skip: float, capacity: float, last: bool = False) -> list[int]:
        return chosen(by_budget(RANKS, skip_savings(6, capacity), skip, "goal", last))

    assert layers(0.01, 0.5) == [3]
    assert layers(1 / 12, 0.5) == [3] and layers(1 / 6, 0.5) == [1, 3], "met exactly is met"
    assert layers(1 / 6 + 1e-3, 0.5) == [1, 3, 4]
    assert layers(0.1, 0.5, last=True) == [3, 5]
    assert layers(0.05, 0.5, last=True) == [5], "of equal ones the deeper"
    choices = by_budget(RANKS, skip_savings(6, 0.5), 1 / 6, "skip ratio 0.167 at capacity 0.5")
    assert choices[1].reason == (
        "rank_over_length 0.310 is number 2 from below; skip ratio 0.167 at capacity 0.5 takes the lowest 2"
    )
    assert (
        choices[4].reason
        == "rank_over_length 0.500: skip ratio 0.167 at capacity 0.5 is met by 2 layers of up to 0.310"
    )
    assert choices[0].reason.startswith("kept dense: layer 0")


def test_budget_out_of_reach() -> None:
    with pytest.raises(
        UserError, match=r"skip 0.5: needs a saving of 0.500, but all 4 layers .* save 0.333; keep less"
    ):
        by_budget(RANKS, skip_savings(6, 0.5), 0.5, "skip 0.5")


def test_savings_are_those_of_the_adapted_model() -> None:
    family = FAMILIES["llava"]
    model = family.build()
    found = measure(model, [family.inputs(model, [[3, 5]])])
    savings = flops_savings(found.layers(), found.tokens, found.image_tokens, capacity=0.25)
    dense = decoder_flops(model, 24).prefill
    adapted = adapt(model, {"layers": [1, 2], "capacity": {"type": "constant", "value": 0.25}})
    assert 1 - decoder_flops(adapted, 24, [16]).prefill / dense == pytest.approx(savings[1] + savings[2])
    assert savings[1] == savings[3] > 0
