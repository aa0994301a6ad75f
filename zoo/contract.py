"""What every block promises, tried out on small ones: `python -m tools.check RECIPE --run`; docs/blocks.md explains.

Each kind of layer of a model is built once, as narrow as its blocks allow, in float64, and given rows of several
documents with padding. A promise is tried on the mixer, the feed-forward and the whole layer apart, so that what breaks
it has a name.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from zoo.batch import Batch
from zoo.build import build_block, build_model
from zoo.carries import Channels, Vectors
from zoo.config import ConfigError
from zoo.context import CAUSAL, TOPK, TokenContext
from zoo.model import Model, ModelConfig, initialise
from zoo.recompute import recomputed
from zoo.registry import BlockConfig
from zoo.slots import Component
from zoo.trace import Trace

NARROWEST = 16
"""Least width of the stream; narrower ones are not tried."""
TOKENS, IDS = 20, 64
"""Tokens of a row, and ids of the vocabulary."""
NEAR = 1e-7
"""How far apart two computations of the same numbers may be, relative to the largest of them."""


@dataclasses.dataclass(frozen=True)
class Finding:
    """Whether a block keeps a promise."""

    key: str
    """Dotted key of the block in the recipe."""
    promise: str
    fault: str = ""
    """How it is broken; empty where it is kept."""


class Broken(Exception):
    """A promise is broken; the text says how."""


def examine(
    config: ModelConfig, objective: BlockConfig, two_way: Sequence[str] = (), kernels: dict[str, str] | None = None
) -> list[Finding]:
    """Try all promises on every kind of layer, on stems and heads, and on the model under its objective.

    Args:
        two_way: modalities whose positions see all of their item.
    """
    small = narrowed(config)
    findings = []
    for number, (index, _) in enumerate(small.pattern()):
        for key, build in _parts(small, number, index, kernels or {}):
            findings += _examine_component(f"model.layers[{_place(config, index, small)}]{key}", build, small, two_way)
    return findings + _examine_model(small, objective, two_way, kernels or {})


def narrowed(config: ModelConfig) -> ModelConfig:
    """The model with each kind of layer once, as narrow as its blocks allow, and few ids."""
    kinds = list({layer.model_copy(update={"repeat": 1}).model_dump_json(): layer for layer in config.layers}.values())
    layers = [layer.model_copy(update={"repeat": 1}) for layer in kinds]
    changes = {"layers": layers, "repeat": 1, "vocab_size": IDS}
    for width in (w for w in range(min(NARROWEST, config.d_model), config.d_model + 1) if not config.d_model % w):
        small = config.model_copy(update={**changes, "d_model": width})
        with contextlib.suppress(ConfigError, ValueError, RuntimeError, AssertionError), torch.device("meta"):
            small.check()
            build_model(small, seed=None)
            return small
    return config.model_copy(update=changes)


def _place(config: ModelConfig, index: int, small: ModelConfig) -> int:
    """Index in the recipe's list of the layer that stands at `index` in the small model."""
    wanted = small.layers[index]
    return next(i for i, layer in enumerate(config.layers) if layer.model_copy(update={"repeat": 1}) == wanted)


Build = Callable[[tuple[str, ...]], Component]
"""Makes a component for a model of some modalities, with its first weights."""


def _parts(config: ModelConfig, number: int, index: int, kernels: dict[str, str]) -> Iterator[tuple[str, Build]]:
    """Mixer, feed-forward and layer, by the end of their key."""
    layer = config.layers[index]

    def part(slot: str, block: BlockConfig) -> Build:
        return lambda modalities: build_block(
            slot,
            block,
            d_model=config.d_model,
            modalities=modalities,
            name=f"layers.{number}.{slot}",
            norm=layer.norm,
            layers=len(config.pattern()),
            kernels=kernels,
        )

    def whole(modalities: tuple[str, ...]) -> Component:
        place = dataclasses.replace(config.place(kernels), modalities=modalities)
        layer.check(place, f"model.layers[{index}]")
        built = layer.build(place.child(f"layers.{number}", layer=number))
        initialise(built, 0)
        return built

    yield ".mixer", part("mixer", layer.mixer)
    if layer.feedforward is not None:
        yield ".feedforward", part("feedforward", layer.feedforward)
    yield "", whole


# --------------------------------------------------------------------------------------------------------- the stream


def stream(
    modalities: tuple[str, ...], two_way: Sequence[str] = (), without: int | None = None, **options: Any
) -> TokenContext:
    """Three rows: two documents, one with padding at its end, one with padding at its beginning.

    Args:
        without: number of a modality that has no token; those of another stand in its place.
    """
    runs = [[m] * n for m in range(len(modalities)) for n in ((2, 1) if m == 0 else (3,))]
    order = [m for run in runs for m in run]
    line = np.resize(order, TOKENS + 7)
    modality = np.stack([line[:TOKENS], line[3 : TOKENS + 3], line[7 : TOKENS + 7]])
    if without is not None:
        modality[modality == without] = (without + 1) % len(modalities)
    document = np.zeros_like(modality)
    document[0, TOKENS // 2 - 1 :] = 1
    for row, place in ((1, slice(TOKENS - 3, None)), (2, slice(0, 2))):
        modality[row, place] = document[row, place] = -1
    here = np.isin(modality, [modalities.index(name) for name in two_way])
    begins = here.copy()
    begins[:, 1:] &= (modality[:, 1:] != modality[:, :-1]) | (document[:, 1:] != document[:, :-1])
    item = torch.from_numpy(np.where(here, begins.cumsum(1) - 1, -1)) if here.any() else None
    return TokenContext.from_modality(
        torch.from_numpy(modality), torch.from_numpy(document), modalities=modalities, item=item, **options
    )


def columns(context: TokenContext, start: int, stop: int) -> TokenContext:
    """The tokens of some columns, with their positions and documents."""
    part = slice(start, stop)
    return TokenContext.from_modality(
        context.modality[:, part],
        context.document[:, part],
        context.position[:, part],
        modalities=context.modalities,
        routing=context.routing,
        key=context.key[:, part],
        item=None if context.item is None else context.item[:, part],
    )


def _cuts(context: TokenContext) -> list[int]:
    """Columns between which a row may be fed: one by one where no item is cut, then the rest at once."""
    width = context.shape[1]
    free = list(range(1, width))
    if context.item is not None:
        inside = (context.item[:, 1:] == context.item[:, :-1]) & (context.item[:, 1:] >= 0)
        free = [t + 1 for t in range(width - 1) if not inside[:, t].any()]
    return [0, *[t for t in free if t not in (4, 5, 9)], width]


def _input(width: int, context: TokenContext) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(*context.shape, width, dtype=torch.float64, generator=generator)
    return x.masked_fill(~context.valid.unsqueeze(-1), 0.0)


def _same(found: Tensor, expected: Tensor, fault: str) -> None:
    """Raise Broken(fault) where two computations differ."""
    scale = float(expected.detach().abs().max()) if expected.numel() else 0.0
    difference = float((found - expected).detach().abs().max()) if expected.numel() else 0.0
    if not difference <= NEAR * max(scale, 1e-6):
        raise Broken(f"{fault} (by {difference:.1e}, of numbers up to {scale:.1e})")


# ------------------------------------------------------------------------------------------------------- a component


def _examine_component(key: str, build: Build, config: ModelConfig, two_way: Sequence[str]) -> list[Finding]:
    modalities, width = tuple(config.modalities), config.d_model

    def fresh() -> Component:
        return build(modalities).double()

    promises: dict[str, Callable[[], None]] = {
        "shapes": lambda: _keeps_shapes(fresh().eval(), _causal(modalities, two_way), width),
        "documents apart": lambda: _keeps_documents_apart(fresh().eval(), _causal(modalities, two_way), width),
        "causal": lambda: _is_causal(fresh().eval(), _causal(modalities, two_way), width),
        "cached = uncached": lambda: _decodes(fresh().eval(), _causal(modalities, two_way), width),
        "every parameter in every step": lambda: _uses_every_parameter(fresh, modalities, two_way, width),
        "recomputed the same": lambda: _recomputes(fresh().train(), modalities, two_way, width),
        "cost": lambda: _counts(build, modalities),
    }
    return [Finding(key, promise, _fault(tried)) for promise, tried in promises.items()]


def _causal(modalities: tuple[str, ...], two_way: Sequence[str]) -> TokenContext:
    return stream(modalities, two_way, routing=CAUSAL)


def _fault(tried: Callable[[], None]) -> str:
    """How a promise is broken; blocks of other people raise anything."""
    try:
        tried()
    except Broken as broken:
        return str(broken)
    except Exception as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        return f"raises {type(error).__name__}: {first}"
    return ""


@torch.no_grad()
def _keeps_shapes(block: Component, context: TokenContext, width: int) -> None:
    x = _input(width, context)
    y = block(x, context)
    if y.shape != x.shape or y.dtype != x.dtype:
        raise Broken(f"gives {tuple(y.shape)} {y.dtype} for {tuple(x.shape)} {x.dtype}")
    if not y.isfinite().all():
        raise Broken("gives numbers that are not finite")
    if y[~context.valid].any():
        raise Broken("gives something at padding, where its output must be 0")


@torch.no_grad()
def _keeps_documents_apart(block: Component, context: TokenContext, width: int) -> None:
    x = _input(width, context)
    first = (context.document == 0) & (torch.arange(3)[:, None] == 0)
    other = torch.where(first.unsqueeze(-1), x + 1, x)
    kept = ~first & context.valid
    _same(block(other, context)[kept], block(x, context)[kept], "a document sees another of its row, or of the batch")


@torch.no_grad()
def _is_causal(block: Component, context: TokenContext, width: int) -> None:
    x = _input(width, context)
    y, column = block(x, context), torch.arange(TOKENS)
    for t in range(1, TOKENS, 3):
        first = torch.full((3, 1), t)
        if context.item is not None:  # what belongs to the item at t sees all of it
            of_item = (context.item == context.item[:, t : t + 1]) & (context.item[:, t : t + 1] >= 0)
            first = torch.minimum(first, torch.where(of_item, column, TOKENS).amin(1, keepdim=True))
        other = torch.where(((column >= t) & context.valid).unsqueeze(-1), x + 1, x)
        before = (column < first) & context.valid
        _same(block(other, context)[before], y[before], f"what stands at t ≥ {t} moves what stands before it")


@torch.no_grad()
def _decodes(block: Component, context: TokenContext, width: int) -> None:
    x = _input(width, context)
    expected, state = block(x, context), block.init_state(3, TOKENS, x)
    cuts, parts, aside = _cuts(context), [], None
    for start, stop in zip(cuts, cuts[1:], strict=False):
        if state is not None and start == cuts[len(cuts) // 2]:
            aside = state.clone()
        parts.append(block(x[:, start:stop], columns(context, start, stop), state))
    _same(torch.cat(parts, 1), expected, "piece by piece, with its state, it gives something else than at once")
    if aside is None:
        return
    turned = torch.tensor([2, 0, 1])
    aside.reorder(turned)
    start, stop = cuts[len(cuts) // 2 : len(cuts) // 2 + 2]
    there = columns(_rows(context, turned), start, stop)
    again = block(x[turned, start:stop], there, aside)
    _same(again, expected[turned, start:stop], "a state that was cloned, and its rows reordered, goes on otherwise")


def _rows(context: TokenContext, order: Tensor) -> TokenContext:
    return TokenContext.from_modality(
        context.modality[order],
        context.document[order],
        context.position[order],
        modalities=context.modalities,
        routing=context.routing,
        key=context.key[order],
        item=None if context.item is None else context.item[order],
    )


def _loss(y: Tensor, trace: Trace) -> Tensor:
    return y.square().sum() + sum(total for total, _ in trace.losses.values()) + sum(trace.penalties.values())


def _uses_every_parameter(
    fresh: Callable[[], Component], modalities: tuple[str, ...], two_way: Sequence[str], width: int
) -> None:
    """Otherwise a rank that has no such token waits for the others for ever, or trains something else."""
    absent: list[int | None] = [None, *range(len(modalities))] if len(modalities) > 1 else [None]
    for without in absent:
        block, trace = fresh().train(), Trace()
        context = stream(modalities, two_way, without, routing=TOPK, trace=trace)
        _loss(block(_input(width, context).requires_grad_(), context), trace).backward()
        unused = [name for name, parameter in block.named_parameters() if parameter.grad is None]
        if unused:
            where = "" if without is None else f" where a batch has no {modalities[without]}"
            raise Broken(f"{unused[0]} is not joined to the output{where}; {len(unused)} parameter(s) in all")


def _recomputes(block: Component, modalities: tuple[str, ...], two_way: Sequence[str], width: int) -> None:
    """Under activation checkpointing the backward pass computes the layer again: it must draw the same noise."""
    found = []
    for again in (False, True):
        block.zero_grad()
        trace = Trace()
        context = stream(modalities, two_way, routing=TOPK, trace=trace, step=3)
        x = _input(width, context).requires_grad_()
        torch.manual_seed(7)
        y = recomputed(block, x, context) if again else block(x, context)
        torch.rand(5)
        _loss(y, trace).backward()
        found.append([x.grad, *(parameter.grad for parameter in block.parameters())])
    for plain, repeated in zip(*found, strict=True):
        if plain is not None and repeated is not None:
            _same(
                repeated,
                plain,
                "its gradients are others under activation checkpointing: it draws noise that the recomputation does "
                "not draw again; leave counter_noise=True away, or draw by zoo.noise",
            )


def _counts(build: Build, modalities: tuple[str, ...]) -> None:
    """For this model's modalities, and for one, two and three where the block can be built for them."""
    for count in dict.fromkeys([len(modalities), 1, 2, 3]):
        others = modalities if count == len(modalities) else tuple(f"m{i}" for i in range(count))
        try:
            block = build(others)
        except (ConfigError, KeyError):
            if others == modalities:
                raise
            continue  # its config names modalities
        cost = block.cost(TOKENS)
        for part in cost.expand(count).parts():
            if len(part) != count or not all(np.isfinite(each) and each >= 0 for each in part):
                raise Broken(f"for {count} modalities its cost is {part}")
        total = sum(parameter.numel() for parameter in block.parameters())
        if max(cost.active) > total:
            raise Broken(f"it counts {max(cost.active):,.0f} active parameters, and has {total:,}")


# --------------------------------------------------------------------------------------------------------- the model


def _examine_model(
    config: ModelConfig, objective: BlockConfig, two_way: Sequence[str], kernels: dict[str, str]
) -> list[Finding]:
    """The model with its stems and heads, whole."""

    def fresh() -> Model:
        return build_model(config, kernels=kernels).double()

    def goal() -> Any:
        return build_block(
            "objective",
            objective,
            d_model=config.d_model,
            modalities=tuple(config.modalities),
            heads=config.own_heads,
            bidirectional=tuple(two_way),
        ).double()

    promises: dict[str, Callable[[], None]] = {
        "shapes": lambda: _gives_logits(fresh().eval(), two_way),
        "cached = uncached": lambda: _model_decodes(fresh().eval(), two_way),
        "every parameter in every step": lambda: _trains(fresh, goal, two_way),
    }
    return [Finding("model", promise, _fault(tried)) for promise, tried in promises.items()]


def _batch(model: Model, context: TokenContext) -> Batch:
    generator = torch.Generator().manual_seed(2)
    tokens = torch.randint(IDS, context.shape, generator=generator).masked_fill(~context.valid, 0)
    content = {}
    for name, carries in model.carries.items():
        count = context.totals[model.modalities.index(name)]
        if isinstance(carries, Vectors):
            content[name] = torch.randn(count, carries.width, dtype=torch.float64, generator=generator)
        elif isinstance(carries, Channels):
            content[name] = torch.randint(carries.size, (count, carries.count), generator=generator)
    return Batch(tokens, context, content)


@torch.no_grad()
def _gives_logits(model: Model, two_way: Sequence[str]) -> None:
    batch = _batch(model, _causal(model.modalities, two_way))
    logits = model(batch.tokens, batch.context, content=batch.content)
    if logits.shape != (*batch.tokens.shape, IDS) or not logits.isfinite().all():
        raise Broken(f"gives logits {tuple(logits.shape)}, or some that are not finite")
    cost = model.cost(TOKENS)
    if not all(np.isfinite(each) for part in cost.parts() for each in part):
        raise Broken(f"its cost is {cost}")


@torch.no_grad()
def _model_decodes(model: Model, two_way: Sequence[str]) -> None:
    batch = _batch(model, _causal(model.modalities, two_way))
    context, cuts, parts = batch.context, _cuts(batch.context), []
    expected, states = model(batch.tokens, context, content=batch.content), model.init_state(3, TOKENS)
    for start, stop in zip(cuts, cuts[1:], strict=False):
        content = {}
        for name, values in batch.content.items():
            number = model.modalities.index(name)
            column = context.index(number) % TOKENS
            content[name] = values[(column >= start) & (column < stop)]
        parts.append(model(batch.tokens[:, start:stop], columns(context, start, stop), states, content))
    _same(torch.cat(parts, 1), expected, "token by token, with its states, it says something else than at once")


def _trains(fresh: Callable[[], Model], goal: Callable[[], Any], two_way: Sequence[str]) -> None:
    """One forward and backward pass under the objective, with all modalities, and with each of them absent."""
    names = fresh().modalities
    absent: list[int | None] = [None, *range(1, len(names))]
    for without in absent:
        model, objective, trace = fresh().train(), goal(), Trace()
        batch = objective.prepare(_batch(model, stream(names, two_way, without)))
        counts = objective.counts(batch)
        sums = objective(model, batch.under(trace=trace))
        if set(sums) != set(objective.parts) or set(counts) != set(objective.parts):
            raise Broken(f"the objective has the parts {sorted(objective.parts)}, but gives {sorted(sums)}")
        loss = objective.combine(sums, counts)
        if loss.shape != () or not loss.isfinite():
            raise Broken(f"its loss is {loss}")
        (loss + sum(total for total, _ in trace.losses.values()) + sum(trace.penalties.values())).backward()
        parameters = [*model.named_parameters(), *objective.named_parameters()]
        unused = [name for name, parameter in parameters if parameter.grad is None]
        if unused:
            where = "" if without is None else f" where a batch has no {names[without]}"
            raise Broken(f"{unused[0]} is not joined to the loss{where}; {len(unused)} parameter(s) in all")
