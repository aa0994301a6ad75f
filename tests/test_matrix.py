"""Every mixer × feed-forward × norm placement × depth × untying builds and trains, or is refused with the reason."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

import zoo
from tests.pretrain.ranks import run_ranks
from tests.zoo.helpers import columns, stream
from zoo import ConfigError, Trace
from zoo.batch import Batch

MODALITIES = ("text", "image", "speech")
STEPS = 5
IDS = 8
"""Token ids of each modality."""

BIAS = {"type": "token_choice", "score": "sigmoid", "balance": {"type": "bias", "rate": 0.01}}
EC = {"type": "experts", "experts": 3, "d_ff": 16}
MOMA = {"type": "moma", "experts": {"text": 3, "image": 2, "speech": 1}, "d_ff": 16}
NOOP = {"noop_experts": 1}
MOD = {"type": "mod", "capacity": "1/2"}
TOWERS = {"towers": [["text", "speech"], ["image"]]}
UNTIED = {
    "attention": ["q_proj", "k_proj", "v_proj", "o_proj", "qk_norm"],
    "mamba": ["in_proj", "x_proj", "dt_proj", "out_proj"],
    "mamba2": ["in_proj", "dt_bias", "norm", "out_proj"],
}
FACTORS: dict[str, dict[str, Any]] = {
    "mixer": {
        "attention": {"type": "attention", "heads": 2, "qk_norm": True},
        "mamba": {"type": "mamba", "d_state": 3},
        "mamba2": {"type": "mamba2", "d_state": 3, "head_dim": 8},
    },
    "feedforward": {
        "none": None,
        "dense": {"type": "dense", "d_ff": 16},
        "expert choice": EC | {"shared_experts": 1},
        "expert choice with no-op": EC | NOOP | {"router": {"type": "linear", "activation": "softmax"}},
        "token choice": EC | NOOP | {"router": {"type": "token_choice"}, "gate": "inside"},
        "fitted gate": EC | {"router": {"type": "mixer", "refit_every": 2, "context": "document"}},
        "moma": MOMA,
        "moma token choice": MOMA | {"router": BIAS | {"top_k": 1}},
    },
    "norm": {"pre": "pre", "post": "post"},
    "depth": {
        "none": None,
        "mod by row": MOD | {"scope": "row"},
        "mod by micro-batch": MOD | {"scope": "microbatch"},
        "mod by modality": MOD | {"capacity": {"text": 1.0, "image": 0.25, "speech": "1/2"}},
    },
    "untying": {"none": {}, "all": {"untied": True}, "towers": {"untied": True} | TOWERS},
}
"""Factor → value → what it is in a layer's config."""

REFUSED: dict[str, dict[str, tuple[Any, str]]] = {
    "feedforward": {
        "untied expert choice": (EC | {"untied": True}, "feedforward.untied: unknown key; known: "),
        "no-op beside sigmoid": (EC | NOOP, "feedforward.router.activation: sigmoid; a no-op expert works by"),
        "moma without speech": (
            MOMA | {"experts": {"text": 1, "image": 1}},
            "feedforward.experts: no entry for 'speech'",
        ),
        "more than there are": (MOMA | {"router": BIAS}, "feedforward.router.top_k: 2 of 1 experts"),
        "token choice with a capacity": (
            EC | {"router": BIAS, "capacity": 0.5},
            "feedforward.capacity: 0.5; under router 'token_choice' each token",
        ),
    },
    "depth": {
        "mod by token choice": (MOD | {"router": BIAS}, "depth.router.type: 'token_choice' chooses by itself"),
        "mod by softmax": (
            MOD | {"router": {"type": "linear", "activation": "softmax"}},
            "depth.router.activation: softmax over a single output",
        ),
        "mod without speech": (
            MOD | {"capacity": {"text": 1.0, "image": 0.5}},
            "depth.capacity: no entry for 'speech'",
        ),
    },
    "untying": {
        "towers of nothing": (TOWERS, "mixer.towers: nothing is untied"),
        "speech in no tower": ({"untied": True, "towers": [["text"], ["image"]]}, "towers: speech in no tower"),
    },
}
"""Values that no combination can have, and how the reason begins."""

Combination = tuple[str, ...]
"""The value of each factor."""


def layer(mixer: str, parts: Mapping[str, Any]) -> dict[str, Any]:
    """A layer's config from what the values of its factors are."""
    untying = dict(parts["untying"])
    names = UNTIED[mixer] if untying.pop("untied", False) else []
    result = {"mixer": parts["mixer"] | {"untied": names} | untying, "norm": parts["norm"]}
    if names:
        result |= {"untied_norms": True} | untying
    result |= {key: parts[key] for key in ("feedforward", "depth") if parts[key] is not None}
    if parts["feedforward"] == FACTORS["feedforward"]["dense"] and names:
        result["feedforward"] = parts["feedforward"] | {"untied": True} | untying
    return result


def model_config(combination: Combination, refused: tuple[str, Any] | None = None) -> dict[str, Any]:
    """Two layers, the first without its depth router: where nothing has been mixed yet, equal tokens score equally.

    Args:
        refused: a factor, and what stands there in place of its value.
    """
    parts = {factor: FACTORS[factor][value] for factor, value in zip(FACTORS, combination, strict=True)}
    parts |= dict([refused] if refused else [])
    layers = [layer(combination[0], parts | {"depth": None}), layer(combination[0], parts)]
    return {"modalities": list(MODALITIES), "d_model": 16, "vocab_size": IDS * len(MODALITIES), "layers": layers}


def name_of(combination: Combination) -> str:
    return ", ".join(f"{factor} {value}" for factor, value in zip(FACTORS, combination, strict=True))


def product() -> list[Combination]:
    return list(itertools.product(*FACTORS.values()))


def pairs(combination: Combination) -> set[tuple[tuple[int, str], ...]]:
    """Every two (factor, value) of a combination."""
    return set(itertools.combinations(enumerate(combination), 2))


def pairwise() -> list[Combination]:
    """Combinations among which any two values of different factors meet: always the one that adds most, the first of
    equals."""
    everything = {combination: pairs(combination) for combination in product()}
    left, chosen = set().union(*everything.values()), []
    while left:
        best = max(everything, key=lambda combination: len(everything[combination] & left))
        chosen.append(best)
        left -= everything[best]
    return chosen


# ------------------------------------------------------------------------------------------------------------- building


@pytest.mark.parametrize("feedforward", FACTORS["feedforward"])
@pytest.mark.parametrize("mixer", FACTORS["mixer"])
def test_everything_builds(mixer: str, feedforward: str) -> None:
    for combination in product():
        if combination[:2] == (mixer, feedforward):
            with torch.device("meta"):
                model = zoo.build("model", model_config(combination), seed=None)
            assert all(cost > 0 and math.isfinite(cost) for cost in model.cost(16).flops), name_of(combination)


@pytest.mark.parametrize(("factor", "value"), [(factor, value) for factor in REFUSED for value in REFUSED[factor]])
def test_the_rest_is_refused_with_the_reason(factor: str, value: str) -> None:
    """Whatever it is combined with."""
    part, reason = REFUSED[factor][value]
    at = list(FACTORS).index(factor)
    others = {c[:at] + c[at + 1 :]: c for c in pairwise()}
    for combination in others.values():
        with pytest.raises(ConfigError, match=r"^model\.layers\[[01]\]\." + re.escape(reason)):
            zoo.build("model", model_config(combination, (factor, part)), seed=None)


def test_the_subset_covers_all_pairs() -> None:
    chosen = pairwise()
    for one, other in itertools.combinations(range(len(FACTORS)), 2):
        met = {(combination[one], combination[other]) for combination in chosen}
        values = list(FACTORS.values())
        assert met == set(itertools.product(values[one], values[other]))
    assert len(set(chosen)) == len(chosen) < len(product()) / 10


# ------------------------------------------------------------------------------------------------------------- decoding


KINDS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "ids": ("ids", "ids", {}),
    "vectors": ("vectors", "vectors", {"width": 3}),
    "channels": ("channels", "channels", {"count": 2, "size": 4}),
    "vectors that see all of their item": ("noisy_vectors", "vectors", {"width": 3}),
}
"""What the positions of images carry: stem, head, and the keys of both."""
ROWS = {
    True: ("tt[ii]sst|[ii]t", "..stt|t[ii]ss", "ts[iii]......"),
    False: ("ttiisst|iit", "..stt|tiiss", "tsiii......"),
}
"""By whether an image sees all of itself."""


@torch.no_grad()
def decode(combination: Combination, kind: str) -> None:
    """Causal, a state carried from piece to piece, packed documents, padding: as the whole rows at once."""
    stem, head, keys = KINDS[kind]
    ends = (
        {} if kind == "ids" else {"stem": {"image": {"type": stem, **keys}}, "head": {"image": {"type": head, **keys}}}
    )
    model: Any = zoo.build("model", model_config(combination) | ends).double().eval()
    context = stream(*ROWS["all" in kind], modalities=MODALITIES, routing="causal")
    tokens = torch.arange(context.modality.numel()).view(context.shape) % (IDS * len(MODALITIES))
    column, count = context.index(1) % context.shape[1], context.totals[1]
    images = torch.randn(count, 3).double() if "vectors" in kind else torch.randint(4, (count, 2))

    def say(start: int, stop: int, states: Any) -> tuple[torch.Tensor, torch.Tensor]:
        content = {"image": images[(column >= start) & (column < stop)]} if ends else {}
        part = columns(context, start, stop) if states is not None else context
        read = {"image": part.index(1)} if ends else {}
        logits, predicted = model(tokens[:, start:stop], part, states, content, read=read)
        return logits, predicted.get("image", logits.new_zeros(0, 3))

    full, heads = say(0, context.shape[1], None)
    states = model.init_state(*context.shape)
    cuts = [0, 1, 2, 5, 6, context.shape[1]]  # no image is cut
    pieces = [say(start, stop, states) for start, stop in itertools.pairwise(cuts)]
    torch.testing.assert_close(torch.cat([logits for logits, _ in pieces], dim=1), full, rtol=0, atol=1e-10)
    if ends:  # row by row there, piece by piece here
        place = torch.cat([torch.nonzero((column >= a) & (column < b))[:, 0] for a, b in itertools.pairwise(cuts)])
        torch.testing.assert_close(torch.cat([each for _, each in pieces]), heads[place], rtol=0, atol=1e-10)


@pytest.mark.parametrize(
    ("combination", "kind"),
    [(combination, list(KINDS)[number % len(KINDS)]) for number, combination in enumerate(pairwise())],
    ids=lambda value: value if isinstance(value, str) else name_of(value),
)
def test_it_decodes(combination: Combination, kind: str) -> None:
    decode(combination, kind)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mixer", FACTORS["mixer"])
def test_everything_decodes(mixer: str, kind: str) -> None:
    for combination in product():
        if combination[0] == mixer:
            decode(combination, kind)


# ------------------------------------------------------------------------------------------------------------- training


def batch(rank: int, step: int) -> Batch:
    """The same tokens in every step; rank 0 has no speech and rank 1 no images."""
    rows = [("tttttiiiiii|tttiiiii", "iiiiittt|ttttiiii.."), ("ssssssttttt|ttttss", "..tttttttsssssss|sss")][rank]
    context = stream(*rows, modalities=MODALITIES, step=step)
    tokens = context.modality.clamp(min=0) * IDS + (context.position + torch.arange(2)[:, None]) % 5
    return Batch(tokens, context)


def trained(combinations: list[Combination], stage: int = 2) -> dict[str, dict[str, Any]]:
    """What each rank does: a few steps of each model on the fixed batch.

    Returns, by name: losses over both ranks, gradient norms, and, on rank 0, parameters that stayed what they were.
    """
    from pretrain.deepspeed_config import effective
    from pretrain.engine import Engine
    from pretrain.optim import AUXILIARY_SCALE, OptimizerConfig
    from pretrain.process_group import prepare_environment
    from pretrain.updates import Updates

    prepare_environment("cpu")
    optimizer = OptimizerConfig.parse({"lr": 1e-2, "weight_decay": 0.0})
    config = effective(
        {"zero_optimization": {"stage": stage}},
        world=2,
        precision="fp32",
        global_batch=4,
        micro_batch=2,
        clip=1.0,
        optimizer=optimizer,
    )
    objective: Any = zoo.build("objective", {"type": "autoregressive"}, modalities=MODALITIES)
    each = [objective.counts(batch(rank, 0)) for rank in range(2)]
    counts = {name: sum(c[name] for c in each) for name in MODALITIES}
    results = {}
    for combination in combinations:
        engine = Engine(
            lambda c=combination: zoo.build("model", model_config(c), seed=None),
            zoo.initialise,
            config,
            optimizer,
            seed=0,
            device="cpu",
            timeout_seconds=60,
        )
        updates = Updates(engine.module, engine.device, engine.ranks.sum)
        before, losses, norms = engine.full_state_dict(), [], []
        engine.train()
        for step in range(STEPS):
            mine, trace = batch(engine.ranks.rank, step), Trace()
            parts = objective(engine.module, mine.under(trace=trace))
            main = objective.combine(parts, counts)
            auxiliary = [total / sum(counts.values()) * AUXILIARY_SCALE for total, _ in trace.losses.values()]
            updates.add(trace.updates)
            engine.backward((main + sum(auxiliary) + sum(trace.penalties.values()) / 2) * 2)
            result = engine.step(1.0)
            updates.apply(step, result.applied)
            losses.append(float(engine.ranks.sum(main.detach().clone())))
            norms.append(result.grad_norm)
        after = engine.full_state_dict()
        names = {name for name, _ in engine.module.module.named_parameters()} & after.keys()  # on rank 0 alone
        still = sorted(name for name in names if after[name].equal(before[name]))
        results[name_of(combination)] = {"losses": losses, "norms": norms, "still": still}
        print(f"{len(results)} of {len(combinations)}: {name_of(combination)}: {losses} {still}", flush=True)
        engine.destroy()
    return results


def launch(combinations: list[Combination], scratch: Path, seconds: float, stage: int = 2) -> None:
    """One launch, two ranks: every loss falls, the same on both ranks, and no parameter is left out."""
    results = run_ranks("tests.test_matrix:trained", 2, scratch, seconds, combinations=combinations, stage=stage)
    assert list(results[0]) == [name_of(combination) for combination in combinations]
    for name, result in results[0].items():
        losses, norms = result["losses"], result["norms"]
        assert (losses, norms) == (results[1][name]["losses"], results[1][name]["norms"]), name
        assert all(map(math.isfinite, losses + norms)) and losses[-1] < 0.85 * losses[0], (name, losses)
        assert not result["still"], (name, result["still"])


@pytest.mark.timeout(900)
def test_the_subset_trains(tmp_path: Path) -> None:
    launch(pairwise(), tmp_path, 800)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("stage", [0, 1, 3])
def test_a_rank_without_speech_or_images_under_every_stage(tmp_path: Path, stage: int) -> None:
    launch(pairwise()[::6], tmp_path, 800, stage)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_everything_trains(tmp_path: Path) -> None:
    launch(product(), tmp_path, 3500)
