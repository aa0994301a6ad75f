"""Generation: prefill and decoding against the dense model, against Transformers' Llama of the same size, and what
Mixture-of-Depths saves of the keys and values."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

import zoo
from tools.bench import packages
from tools.bench.benchmark import HIGHER, LOWER, Comparison, Goal, Group, Settings, TableRow, benchmark
from tools.bench.depth import layer
from tools.bench.measure import FORWARD, Task
from zoo import TokenContext, Trace
from zoo.batch import Batch
from zoo.context import CAUSAL
from zoo.states import AttentionState, State

TEXT = ("text",)
WIDTH, HIDDEN, LAYERS, VOCABULARY = 512, 1344, 4, 1024
PROMPT, STEPS = 1024, 32
"""Tokens that stand there, and tokens that are written."""
CAPACITIES = (0.5, 0.25, 0.125)
FOLLOWS = 1.15
"""How much more than its FLOPs say a model may take."""
Models = Mapping[str, zoo.Model]


def build(settings: Settings) -> dict[str, zoo.Model]:
    """A dense decoder, and the same under Mixture-of-Depths in every layer, whose auxiliary routers let as many tokens
    pass as its capacity says."""
    models = {}
    for capacity in (None, *CAPACITIES):
        model = zoo.build("model", config(settings, capacity)).eval()
        name = "dense" if capacity is None else f"MoD {capacity:.1%}"
        if capacity is not None:
            zoo.calibrate(model, [Batch(tokens(settings, row), context(0, settings.size(PROMPT))) for row in range(2)])
        models[name] = model
    return models


def config(settings: Settings, capacity: float | None = None) -> dict[str, Any]:
    """Section `model` of a recipe."""
    depth = {} if capacity is None else {"depth": {"type": "mod", "capacity": capacity}}
    return {
        "modalities": list(TEXT),
        "d_model": settings.size(WIDTH),
        "vocab_size": VOCABULARY,
        "repeat": LAYERS,
        "layers": [layer(settings.size(HIDDEN)) | depth],
    }


def tokens(settings: Settings, seed: int = 0, more: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(VOCABULARY, (1, settings.size(PROMPT) + more), generator=generator)


def context(start: int, count: int, trace: Trace | None = None) -> TokenContext:
    """One row of text, `count` tokens from position `start` on."""
    modality = torch.zeros(1, count, dtype=torch.int64)
    position = torch.arange(start, start + count).unsqueeze(0)
    return TokenContext.from_modality(modality, position=position, modalities=TEXT, routing=CAUSAL, trace=trace)


@torch.no_grad()
def prefill(model: zoo.Model, prompt: Tensor) -> list[State | None]:
    """The states after a prompt (1, T); logits of its last token are computed, too."""
    states = model.init_state(1, prompt.shape[1] + STEPS)
    last = torch.tensor([prompt.shape[1] - 1])
    model(prompt, context(0, prompt.shape[1]), states, logits_at=last)
    return states


@torch.no_grad()
def decode(model: zoo.Model, states: list[State | None], following: Tensor, start: int) -> None:
    """Go on token by token, from a copy of the states."""
    states = [None if state is None else state.clone() for state in states]
    for n in range(following.shape[1]):
        model(following[:, n : n + 1], context(start + n, 1), states)


@torch.no_grad()
def used(model: zoo.Model, row: Tensor, prompt: int) -> tuple[float, float]:
    """FLOPs a token of the prompt, and of those after it, with the shares of tokens that its layers let pass there."""
    result = []
    for start, stop, length in ((0, prompt, float(prompt)), (prompt, row.shape[1], 2.0 * prompt)):
        trace = Trace()
        whole = row[:, :stop]
        model(whole, context(0, stop, trace))
        shares = trace.statistics.shares()
        if start and shares:
            before = Trace()
            model(row[:, :start], context(0, start, before))
            early = before.statistics.shares()
            shares = {name: (share * stop - early[name] * start) / (stop - start) for name, share in shares.items()}
        cost = model.cost(length, shares or None)
        head = 0.0 if start else model.head.cost().flops[0]  # of a prompt's tokens the last alone gets logits
        result.append(cost.flops[0] + cost.router[0] + cost.auxiliary[0] - head)
    return result[0], result[1]


def _group(models: Models, tasks: dict[str, Task], flops: Mapping[str, float]) -> Group:
    pairs = [
        Comparison(
            name,
            "dense",
            LOWER,
            {FORWARD: Goal(FOLLOWS)},
            flops[name] / flops["dense"],
            note="FLOPs of the tokens that passed, routers and causal scores",
        )
        for name in models
        if name != "dense"
    ]
    pairs.append(Comparison("dense", "Transformers' Llama", HIGHER))
    return Group({FORWARD: tasks}, pairs)


@benchmark("generate.prefill")
def prefills(settings: Settings) -> Group:
    """A prompt of T=1024 through 4 layers, D=512 H=8 F=1344, causal, into decoding states; Llama's into a
    DynamicCache."""
    models, prompt = build(settings), tokens(settings)
    llama = packages.llama(settings.size(WIDTH), settings.size(HIDDEN), LAYERS, VOCABULARY, heads=8)
    tasks: dict[str, Task] = {name: _bind(prefill, model, prompt) for name, model in models.items()}
    tasks["Transformers' Llama"] = lambda: packages.llama_prefill(llama, prompt)
    flops = {name: used(model, tokens(settings, more=STEPS), prompt.shape[1])[0] for name, model in models.items()}
    group = _group(models, tasks, flops)
    return Group(group.tasks, group.comparisons, kept(models, prompt))


@benchmark("generate.decode")
def decodes(settings: Settings) -> Group:
    """32 tokens one by one after 1024, one row, the same model, from a copy of the states."""
    models, row = build(settings), tokens(settings, more=STEPS)
    length = row.shape[1] - STEPS
    prompt, following = row[:, :length], row[:, length:]
    llama = packages.llama(settings.size(WIDTH), settings.size(HIDDEN), LAYERS, VOCABULARY, heads=8)
    cache = packages.llama_prefill(llama, prompt)
    tasks: dict[str, Task] = {
        name: _bind(decode, model, prefill(model, prompt), following, length) for name, model in models.items()
    }
    tasks["Transformers' Llama"] = lambda: packages.llama_decode(llama, copy.deepcopy(cache), following)
    flops = {name: used(model, row, length)[1] for name, model in models.items()}
    return _group(models, tasks, flops)


@benchmark("generate.transformers")
def against_generate(settings: Settings) -> Group:
    """Transformers' `generate`, greedy, 32 tokens after 1024: the zoo's dense model as it is exported, beside a Llama
    of the same size."""
    exported = packages.exported(config(settings), settings.size(PROMPT) + STEPS)
    llama = packages.llama(settings.size(WIDTH), settings.size(HIDDEN), LAYERS, VOCABULARY, heads=8)
    prompt = tokens(settings).clamp_min(2)  # ids of text
    tasks: dict[str, Task] = {
        "ours": lambda: exported.generate(prompt, max_new_tokens=STEPS, min_new_tokens=STEPS),
        "Transformers' Llama": lambda: llama.generate(prompt, max_new_tokens=STEPS, min_new_tokens=STEPS),
    }
    return Group({FORWARD: tasks}, [Comparison("ours", "Transformers' Llama", HIGHER)])


def kept(models: Models, prompt: Tensor) -> list[TableRow]:
    """Bytes of the keys and values that are kept of the prompt, and of the memory that is taken for them, over the
    dense model's."""
    sizes = {name: _bytes(prefill(model, prompt)) for name, model in models.items()}
    rows = []
    for name, capacity in zip(list(models)[1:], CAPACITIES, strict=True):
        for what, mine, dense in zip(("kept", "taken"), sizes[name], sizes["dense"], strict=True):
            rows.append(
                TableRow(
                    f"keys and values {what}, {name} / dense",
                    FORWARD,
                    None,
                    None,
                    mine / dense,
                    LOWER,
                    round(capacity * FOLLOWS, 3) if what == "kept" else None,
                    None,
                    note=f"{mine:,} of {dense:,} bytes",
                )
            )
    return rows


def _bytes(states: list[Any]) -> tuple[int, int]:
    """Bytes of keys and values in use, and taken."""
    own = [state for state in states if isinstance(state, AttentionState)]
    slot = [2 * state.key[0, 0].numel() * state.key.element_size() if state.key.shape[1] else 0 for state in own]
    in_use = sum(size * sum(state.counts) for size, state in zip(slot, own, strict=True))
    return in_use, sum(2 * state.key.numel() * state.key.element_size() for state in own)


def _bind(function: Callable[..., object], *arguments: object) -> Task:
    return lambda: function(*arguments)
