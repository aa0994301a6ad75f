"""RoutedDecoderLayer: what is put in front of a decoder layer's own class to make it a Mixture-of-Depths layer.

The kept tokens are packed in time order with their original positions, the family's own forward runs on them, and the
result is written back into the full stream; skipped tokens pass by and leave no key or value. Routing happens outside
the region that gradient checkpointing recomputes, so a recomputation meets the decisions and gates of the first pass.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator
from fractions import Fraction
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.adapt.cache import RoutedLayer, routed_layer, slot_mask
from zoo.adapt.config import AdaptConfig
from zoo.adapt.context import AdaptContext
from zoo.adapt.scores import Unlearned
from zoo.adapt.select import select
from zoo.auxiliary import train_auxiliary
from zoo.config import UserError
from zoo.noise import salt
from zoo.routing.scorer import Scorer
from zoo.routing.selection import TokenSelection

UNKNOWN = -1
"""How `RoutedDecoderLayer.returns` begins: the layer has not returned anything yet."""

WHOLE = ("attention_mask", "past_key_values")
"""Arguments of a decoder layer that are not cut to the kept tokens by their shape."""


@dataclasses.dataclass(frozen=True)
class Routing:
    """How one layer routes."""

    layer: int
    capacity: Fraction
    """Share of each pool that is kept."""
    config: AdaptConfig
    gated: str
    """Child of the layer whose output the gate multiplies; empty where it weighs the block."""
    unlearned: Unlearned | None = None
    """The scorer, where it has no weights."""

    @property
    def name(self) -> str:
        """What the trace calls the layer."""
        return f"layers.{self.layer}"


@dataclasses.dataclass(frozen=True)
class Decision:
    """What one layer decided in one forward, for pictures and counts; in `Trace.decisions` by the layer's name."""

    selection: TokenSelection
    candidates: Tensor
    """(n,) flat indices of the tokens that could be skipped."""
    logits: Tensor
    """(n,) log-odds of keeping, fp32; under a scorer without weights its scores."""

    @property
    def kept(self) -> Tensor:
        """(B, T) bool: went through the layer. Padding did not."""
        return self.selection.kept


if TYPE_CHECKING:

    class DecoderLayer(nn.Module):
        """What a decoder layer of Transformers has that routing needs."""

        input_layernorm: nn.Module
        _gradient_checkpointing_func: Callable[..., Any]

        def forward(self, hidden_states: Tensor, **kwargs: Any) -> Any: ...
else:
    DecoderLayer = object


class RoutedDecoderLayer(DecoderLayer):
    """Mixin. The class it precedes is a decoder layer of Transformers: `layer(hidden, **kwargs)`, hidden (B, T, D)."""

    routing: Routing
    mod_router: Scorer | None
    """The layer's own router, a child of it; None where all layers share one or none has weights."""
    mod_owner: Any
    """The decoder, where the router of all layers is its child; None where there is none. Asked each time, since PEFT
    may put a copy in the router's place."""
    gradient_checkpointing = False
    """Transformers sets it on a layer that it recomputes."""
    returns: int | None = UNKNOWN
    """How many values the layer returns in a tuple beside its hidden states; None: those alone, without a tuple."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        context = self._context(hidden_states, kwargs.pop("mod_context", None))
        checkpoint = self.gradient_checkpointing and self.training
        if checkpoint:  # the layer's own class would drop the cache too: a recomputation must not fill it again
            kwargs |= {name: off for name, off in (("past_key_values", None), ("use_cache", False)) if name in kwargs}
        cache = kwargs.get("past_key_values")
        slots = None if cache is None else routed_layer(cache, self.routing.layer)
        scores, gate = self._score(hidden_states, context)
        chosen = self._choose(scores, context, slots) if context.routes else None
        if slots is not None:
            slots.last_kind = None if context.kind is None else context.kind[:, -1]
        y = self._packed(hidden_states, gate, chosen, slots, checkpoint, args, kwargs)
        if gate is None and scores is not None and scores.requires_grad:
            # every rank uses every router, whatever its batch holds
            y, rest = _split(y)
            y = _join(y + 0.0 * scores[:0].sum().to(y.dtype), rest)
        return y

    def _context(self, x: Tensor, context: AdaptContext | None) -> AdaptContext:
        """The context, if there is one and it is that of x.

        Raises:
            UserError: the layer is called as if nothing were skipped.
        """
        name = type(self).__name__
        if context is None:
            raise UserError(
                f"{self.routing.name}: this {name} is called without what the adapted model knows of its tokens, as "
                "where a decoder is called by itself; call the model that takes ids and pictures"
            )
        if x.dim() != 3 or x.shape[:2] != context.shape:
            raise UserError(
                f"{self.routing.name}: this {name} is given hidden states of shape {tuple(x.shape)} for "
                f"{context.shape[0]} rows of {context.shape[1]} tokens; its family cannot be adapted"
            )
        return context

    @property
    def router(self) -> Scorer | None:
        """None where it has no weights."""
        return self.mod_router if self.mod_owner is None else self.mod_owner.mod_router

    def _score(self, x: Tensor, context: AdaptContext) -> tuple[Tensor | None, Tensor | None]:
        """Scores of the candidates and then whoever else is gated, None where nobody needs one; the gate (B, T), None
        where it is 1."""
        config, flat = self.routing.config, x.reshape(-1, x.shape[-1])
        if self.routing.unlearned is not None:
            candidates = context.candidates(salt(self.routing.name, 0))
            return self.routing.unlearned(flat, candidates) if context.routes else None, None
        candidates, router = context.everyone() if config.gate.tokens == "all" else context.candidates(), self.router
        assert router is not None
        read = F.embedding(candidates.index, flat)
        scores = router(self.input_layernorm(read) if config.router.input == "norm" else read, candidates)
        if config.gate.activation == "none" or not candidates.index.shape[0]:
            return scores, None
        gate = scores.new_ones(flat.shape[0]).index_copy(0, candidates.index, router.gates(scores)[:, 0])
        return scores, gate.view(context.shape)

    def _choose(self, scores: Tensor | None, context: AdaptContext, slots: RoutedLayer | None) -> TokenSelection:
        config, scorer = self.routing.config, self.router or self.routing.unlearned
        if slots is not None and context.competing.shape[0]:
            _check_parts(config, context, slots)
            slots.routed = True
        assert scorer is not None and scores is not None
        ranking = scorer.ranking(scores[: context.candidates().index.shape[0]])
        chosen = select(context, ranking, self.routing.capacity, config.inference.threshold)
        if context.trace is not None:
            self._report(context, ranking, chosen)
        return chosen

    def _report(self, context: AdaptContext, ranking: Tensor, chosen: TokenSelection) -> None:
        """Tell the trace what was decided, how well the router foresaw it, and its auxiliary loss."""
        name, index, trace = self.routing.name, context.candidates().index, context.trace
        assert trace is not None
        trace.decisions[name] = Decision(chosen, index, ranking[:, 0].detach())
        learns = self.routing.config.auxiliary.type == "membership"
        train_auxiliary(context, name, ranking if learns else ranking.detach(), chosen.taken[:, None])
        trace.add_load(name, sum(chosen.counts) - sum(context.dense_counts), index.shape[0])

    def _packed(
        self,
        x: Tensor,
        gate: Tensor | None,
        chosen: TokenSelection | None,
        slots: RoutedLayer | None,
        checkpoint: bool,
        args: tuple,
        kwargs: dict[str, Any],
    ) -> Any:
        """The layer on the kept tokens of x (B, T, D), gated, among the others as they are; as the layer returns it."""
        (rows, tokens, width), start = x.shape, 0 if slots is None else slots.length
        if chosen is not None and not chosen.index.shape[1]:  # a step of generation in which every token is skipped
            if slots is not None:
                slots.length += tokens
            rest = self._beside(x, args, kwargs)
            return _join(self._unpacked(x[:, :0], x, gate, chosen), rest)
        if chosen is not None and chosen.valid is None and chosen.index.shape[1] == tokens:
            chosen = None  # every token goes
        columns = torch.arange(start, start + tokens, device=x.device).expand(rows, -1)
        packed, weight, ragged = x, gate, False
        if chosen is not None:
            index, ragged = chosen.index, chosen.valid is not None
            packed = F.embedding(chosen.flat_index, x.reshape(-1, width)).view(rows, -1, width)
            columns = index + start if chosen.valid is None else (index + start).masked_fill(~chosen.valid, -1)
            weight = None if gate is None else gate.gather(1, index)
            args, kwargs = _cut(args, kwargs, index, tokens)
        held = columns
        if slots is not None:
            held = slots.announce(columns, tokens, ragged)
            ragged = slots.ragged
        if ragged or held.shape[1] < start + tokens:
            kwargs = kwargs | {"attention_mask": slot_mask(kwargs.get("attention_mask"), columns, held, start, ragged)}
        run, inner = functools.partial(self._run, kwargs), weight if self.routing.gated else None
        given = (packed, inner, *args)  # what a recomputation is given otherwise may lose its gradient
        y, rest = _split(self._gradient_checkpointing_func(run, *given) if checkpoint else run(*given))
        self.returns = None if rest is None else len(rest)
        if weight is not None and not self.routing.gated:
            y = packed + weight.unsqueeze(-1).to(y.dtype) * (y - packed)
        return _join(y if chosen is None else self._unpacked(y, x, gate, chosen), rest)

    def _beside(self, x: Tensor, args: tuple, kwargs: dict[str, Any]) -> tuple | None:
        """What the layer returns beside x (B, T, D) where it is given no token: as many times nothing as it returns
        values. Before its first token it is asked with one that nobody sees."""
        if self.returns == UNKNOWN:
            args, kwargs = _cut(args, kwargs, torch.zeros_like(x[:, :1, 0], dtype=torch.int64), x.shape[1])
            alone = {"attention_mask": None, "past_key_values": None, "use_cache": False}
            with torch.no_grad():
                output = super().forward(x[:, :1], *args, **kwargs | {k: v for k, v in alone.items() if k in kwargs})
            rest = _split(output)[1]
            self.returns = None if rest is None else len(rest)
        return None if self.returns is None else (None,) * self.returns

    def _unpacked(self, y: Tensor, x: Tensor, gate: Tensor | None, chosen: TokenSelection) -> Tensor:
        """(B, T, D): y (B, K, D) of the kept tokens, among the others of x (B, T, D)."""
        width, flat_index, others = x.shape[-1], chosen.flat_index, x
        if self.routing.config.gate.symmetric and gate is not None:
            skipped = chosen.kept.logical_not()
            others = x * torch.where(skipped, gate, 1.0).to(x.dtype).unsqueeze(-1)
        wide = torch.promote_types(x.dtype, y.dtype)  # wider than x where norms are kept in fp32
        others, y = others.reshape(-1, width).to(wide), y.to(wide)
        if chosen.valid is not None:  # the places past a row's count hold tokens that are skipped
            y = torch.where(chosen.valid.unsqueeze(-1), y, F.embedding(flat_index, others).view_as(y))
        return others.index_copy(0, flat_index, y.reshape(-1, width)).view_as(x)

    def _run(self, kwargs: dict[str, Any], x: Tensor, gate: Tensor | None, *args: Any) -> Any:
        """The family's own layer, its MLP branch times the gate (B, K), if there is one."""
        if gate is None:
            return super().forward(x, *args, **kwargs)
        with _weighed(self.get_submodule(self.routing.gated), gate):
            return super().forward(x, *args, **kwargs)


def _check_parts(config: AdaptConfig, context: AdaptContext, slots: RoutedLayer) -> None:
    """Refuse a prompt in parts whose groups are not all in one part."""
    if slots.routed and (config.group == "sample" or config.router.type == "attention"):
        what = "group: sample" if config.group == "sample" else "router.type: attention"
        raise UserError(
            f"{what} ranks all image tokens of a sample together, and some of this one were chosen in an earlier "
            "forward; give all its images in one forward, or choose group: image or frame and another router"
        )
    assert context.kind is not None
    first = context.kind[:, 0]
    if slots.last_kind is None or slots.last_kind.shape != first.shape or config.inference.rule == "threshold":
        return
    for row in (
        ((slots.last_kind == first) & torch.isin(first, torch.tensor(context.indivisible))).nonzero()[:, 0].tolist()
    ):
        raise UserError(
            f"row {row}: the prompt is given in parts, and one begins with image tokens right after those of the "
            f"part before; group: {config.group} ranks an image's (or video's) tokens together, so end a part between "
            "two of them, or leave prefill_chunk_size out"
        )


@contextlib.contextmanager
def _weighed(module: nn.Module, gate: Tensor) -> Iterator[None]:
    """While it lasts the module's output (B, K, D) is multiplied by the gate."""

    def weigh(module: nn.Module, args: Any, output: Any) -> Any:
        y, rest = _split(output)
        return _join(y * gate.unsqueeze(-1).to(y.dtype), rest)

    handle = module.register_forward_hook(weigh)
    try:
        yield
    finally:
        handle.remove()


def _split(output: Any) -> tuple[Tensor, tuple | None]:
    return (output[0], output[1:]) if isinstance(output, tuple) else (output, None)


def _join(first: Tensor, rest: tuple | None) -> Any:
    return first if rest is None else (first, *rest)


def _cut(args: tuple, kwargs: dict[str, Any], index: Tensor, tokens: int) -> tuple[tuple, dict[str, Any]]:
    """A layer's arguments for the columns index (B, K) of `tokens`."""
    cut = {name: value if name in WHOLE else _taken(value, index, tokens) for name, value in kwargs.items()}
    return tuple(_taken(value, index, tokens) for value in args), cut


def _taken(value: Any, index: Tensor, tokens: int) -> Any:
    """The columns index (B, K) of what goes by token: a tensor (B or 1, tokens, …), or several, such as rotary tables,
    positions or a layer's own inputs. Anything else as it is."""
    if isinstance(value, tuple):
        return tuple(_taken(part, index, tokens) for part in value)
    rows = index.shape[0]
    if not isinstance(value, Tensor) or value.dim() < 2 or value.shape[0] not in (1, rows) or value.shape[1] != tokens:
        return value
    wide = index.view(*index.shape, *(1,) * (value.dim() - 2)).expand(*index.shape, *value.shape[2:])
    return value.expand(rows, *value.shape[1:]).gather(1, wide)


@functools.cache
def routed_class(cls: type) -> type:
    """The class of a routed layer whose own class is `cls`: the same name and module, for whoever matches by them."""
    routed: Any = type(cls.__name__, (RoutedDecoderLayer, cls), {"__module__": cls.__module__})
    routed.forward = RoutedDecoderLayer.forward  # not the checkpointing wrapper: that is called round the layer alone
    return routed
