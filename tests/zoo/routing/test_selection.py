"""Every scorer with every chooser, against loops: who is taken, in which order, counted how."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from torch import Tensor

import zoo
from tests.zoo.helpers import D_MODEL, stream, values
from zoo import Place, TokenContext
from zoo.adapt.config import AdaptConfig
from zoo.adapt.select import ModRouter
from zoo.auxiliary import AuxiliaryRouter
from zoo.registry import known, parse_block
from zoo.routing.candidates import Candidates
from zoo.routing.capacity import capacity_count
from zoo.routing.chooser import Chooser, ExpertChoice, Threshold, TokenChoice
from zoo.routing.pool import Pool
from zoo.routing.scorer import Router, Scorer
from zoo.routing.selection import ExpertSelection, TokenSelection

EXPERTS = 3
ROWS = ("ttiit|ittit", "tti|tit....", "...........", "i..........", ".iitt|ttiit")
PLACE = Place(D_MODEL, ("text", "image"), "block.router")
CHOOSERS = [ExpertChoice(Fraction(1, 3)), ExpertChoice(Fraction(1)), TokenChoice(1, EXPERTS), TokenChoice(2, EXPERTS)]
CHOOSERS += [Threshold(), Threshold(0.1)]


def scorers() -> dict[str, tuple[torch.nn.Module, int]]:
    """Whatever gives scores, with the number of its outputs: all registered ones, and those of adapted models."""
    found = {}
    for name in known("router"):
        config = parse_block("router", {"type": name}, "router")
        found[name] = config.block(config, PLACE, EXPERTS), EXPERTS
    adapted = {"layers": [1], "capacity": {"type": "constant", "value": 0.5}}
    for activation in ("softmax", "tanh", "none"):
        options = {"gate": {"activation": activation}, "auxiliary": {"type": "membership"}}
        found[f"adapted, {activation}"] = ModRouter(AdaptConfig.parse(adapted | options, "adapt"), D_MODEL), 1
    found["auxiliary"] = AuxiliaryRouter(PLACE, EXPERTS), EXPERTS
    for scorer, _ in found.values():
        zoo.initialise(scorer.double(), 0)
    return found


def ranking(scorer: torch.nn.Module, x: Tensor, candidates: Candidates) -> Tensor:
    if isinstance(scorer, Scorer):
        return scorer.ranking(scorer(x, candidates)).detach()
    return scorer(x).detach()


def loop(chooser: Chooser, given: Tensor, scopes: tuple[int, ...]) -> list[list[int]]:
    """For each output the candidates it takes, ascending; ties go to the earlier candidate and the lower output."""
    scores, outputs, starts = given.tolist(), given.shape[1], [sum(scopes[:i]) for i in range(len(scopes))]
    if isinstance(chooser, ExpertChoice):
        taken: list[list[int]] = [[] for _ in range(outputs)]
        for expert in range(outputs):
            for start, size in zip(starts, scopes, strict=True):
                best = sorted(range(start, start + size), key=lambda i: (-scores[i][expert], i))  # noqa: B023
                taken[expert] += best[: math.ceil(size * chooser.capacity)]
        return [sorted(own) for own in taken]
    if isinstance(chooser, TokenChoice):
        chosen = [sorted(range(outputs), key=lambda e: (-row[e], e))[: chooser.top_k] for row in scores]
        return [[i for i, own in enumerate(chosen) if expert in own] for expert in range(outputs)]
    assert isinstance(chooser, Threshold)
    return [[i for i, row in enumerate(scores) if row[expert] > chooser.above] for expert in range(outputs)]


def check(chooser: Chooser, scores: Tensor, candidates: Candidates) -> None:
    """The chooser's mask, pairs and counts are those of the loop."""
    expected = loop(chooser, scores, candidates.scopes)
    mask = chooser.mask(scores, candidates)
    assert mask.dtype == torch.bool and mask.shape == scores.shape
    assert [column.nonzero()[:, 0].tolist() for column in mask.T] == expected
    selection = chooser.choose(scores, candidates)
    assert selection.counts == tuple(map(len, expected)) and all(type(count) is int for count in selection.counts)
    assert torch.equal(selection.mask(scores.shape[0]), mask)
    for expert, tokens in enumerate(selection.token.split(list(selection.counts))):
        in_order = sorted(tokens.tolist()) if isinstance(chooser, ExpertChoice) else tokens.tolist()
        assert in_order == expected[expert]
    assert selection.expert.tolist() == [e for e, own in enumerate(expected) for _ in own]
    weight = scores[selection.token, selection.expert]
    assert torch.equal(chooser.weigh(scores, selection), weight)


@pytest.mark.parametrize("levels", [0, 2], ids=["distinct", "ties"])
@pytest.mark.parametrize("scope", ["row", "microbatch"])
@pytest.mark.parametrize("modality", [None, 0, 1])
@pytest.mark.parametrize("chooser", CHOOSERS, ids=str)
def test_every_scorer_with_every_chooser(chooser: Chooser, modality: int | None, scope: str, levels: int) -> None:
    """With few levels most scores tie. Padding is never among the candidates."""
    context = stream(*ROWS)
    candidates = Pool("pool", modality, scope).candidates(context, salt=5)
    x = values(context).detach().reshape(-1, D_MODEL)[candidates.index]
    kinds = context.modality.reshape(-1)[candidates.index]
    assert bool((kinds >= 0).all() if modality is None else (kinds == modality).all())
    assert candidates.index.tolist() == sorted(candidates.index.tolist()), "in row and time order"
    assert sum(candidates.scopes) == sum(candidates.row_counts) == candidates.index.shape[0]
    for name, (scorer, outputs) in scorers().items():
        scores = ranking(scorer, x, candidates)
        assert scores.shape == (candidates.index.shape[0], outputs), name
        assert len(scores.unique()) > 4, name
        if levels:
            scores = (scores > scores.median()).to(scores)
        if not isinstance(chooser, TokenChoice) or outputs == chooser.experts:
            check(chooser, scores, candidates)


def test_an_empty_pool_and_a_pool_of_one() -> None:
    for rows in (("ttt", "t.."), ("i..", "ttt")):
        candidates = Pool("images", 1, "row").candidates(stream(*rows))
        for chooser in CHOOSERS:
            check(chooser, torch.rand(candidates.index.shape[0], EXPERTS), candidates)


@pytest.mark.parametrize("least", [0, 1])
@pytest.mark.parametrize("scope", ["row", "microbatch"])
@pytest.mark.parametrize(
    "chooser", [ExpertChoice(Fraction(2, 5)), ExpertChoice(Fraction(1)), Threshold(), Threshold(9.0)]
)
def test_a_selection_of_tokens_is_packed_in_time_order(chooser: Chooser, scope: str, least: int) -> None:
    context = stream(*ROWS)
    candidates = Pool("images", 1, scope).candidates(context)
    taken = chooser.mask(torch.randn(candidates.index.shape[0], 1), candidates)[:, 0]
    kept = context.valid.reshape(-1).index_copy(0, candidates.index, taken).view(context.shape)
    selection = TokenSelection.of_rows(taken, kept, tuple(kept.sum(1).tolist()), least)
    expected = [
        [t for t in range(context.shape[1]) if passes(context, b, t, candidates, taken)] for b in range(len(ROWS))
    ]
    assert selection.counts == tuple(map(len, expected))
    assert selection.index.shape[1] == max(least, *selection.counts)
    flat = selection.flat_index.view_as(selection.index)
    for row, columns in enumerate(expected):
        assert selection.index[row, : len(columns)].tolist() == columns == sorted(columns)
        assert flat[row, : len(columns)].tolist() == [row * context.shape[1] + t for t in columns]
        if selection.valid is not None:
            assert selection.valid[row].tolist() == [i < len(columns) for i in range(selection.index.shape[1])]
        else:
            assert len(columns) == selection.index.shape[1]


def passes(context: TokenContext, row: int, column: int, candidates: Candidates, taken: Tensor) -> bool:
    places, flat = candidates.index.tolist(), row * context.shape[1] + column
    if flat in places:
        return bool(taken[places.index(flat)])
    return bool(context.modality[row, column] >= 0)


def test_equal_rows_need_no_mask() -> None:
    kept = torch.tensor([[True, False, True], [False, True, True]])
    assert TokenSelection.of_rows(kept.reshape(-1), kept, (2, 2)).valid is None


def test_no_op_experts_come_last_and_are_dropped() -> None:
    selection = ExpertSelection.of_columns(torch.tensor([[2, 0], [1, 2], [2, 1]]), 3)
    assert selection.counts == (1, 2, 3) and selection.token.tolist() == [0, 1, 2, 0, 1, 2]
    left = selection.first(2)
    assert (left.counts, left.token.tolist(), left.expert.tolist()) == ((1, 2), [0, 1, 2], [0, 1, 1])


def test_token_choice_weighs_by_shares_where_asked() -> None:
    gates = torch.tensor([[0.5, 0.25, 0.1], [0.2, 0.2, 0.6]])
    candidates = Pool("all", None, "row").candidates(stream("tt"))
    chooser = TokenChoice(2, 3, normalise=True)
    weight = chooser.weigh(gates, chooser.choose(gates, candidates))
    torch.testing.assert_close(weight, torch.tensor([2 / 3, 1 / 4, 1 / 3, 3 / 4]))
    plain = TokenChoice(2, 3)
    assert plain.weigh(gates, plain.choose(gates, candidates)).tolist() == gates[[0, 1, 0, 1], [0, 0, 1, 2]].tolist()


def test_a_router_brings_its_chooser_and_a_scorer_none() -> None:
    """What Mixture-of-Depths and adapted layers can take is a matter of type."""
    routers = {name: scorer for name, (scorer, _) in scorers().items() if isinstance(scorer, Router)}
    assert set(routers) == {"token_choice", "mixer"}
    assert all(not router.chooser.looks_ahead for router in routers.values())
    assert ExpertChoice(Fraction(1, 2)).looks_ahead
    assert TokenChoice(1, 4).capacity == Fraction(1, 4) and Threshold().capacity is None


@pytest.mark.parametrize(
    ("tokens", "capacity", "kept"),
    [
        (8, "1/4", 2),
        (9, "1/4", 3),
        (25, 0.28, 7),
        (50, 0.14, 7),
        (49, "1/49", 1),
        (3, "1/3", 1),
        (0, 1, 0),
        (1, 0.1, 1),
    ],
)
def test_capacity_rounds_up_in_exact_arithmetic(tokens: int, capacity: float | str, kept: int) -> None:
    assert capacity_count(tokens, Fraction(str(capacity))) == kept
