"""FLOPs of the decoder, dense and adapted: nominal, by the shares of the config, and real, by what a trace saw.

Forward only, 2 a multiply-add; causal scores, n (n + 1) / 2 of them for n tokens (a family whose image tokens see each
other both ways does up to twice that for them); routers apart, on the candidates alone. Left out: the vision tower and
projector, embedding, language head, norms, activations, rotary embedding, softmax, top-k and gathers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from zoo.adapt.family import Parts, parts
from zoo.adapt.layer import RoutedDecoderLayer
from zoo.adapt.wrap import ROUTER
from zoo.config import UserError
from zoo.routing.capacity import capacity_count
from zoo.trace import Trace


@dataclasses.dataclass(frozen=True)
class Flops:
    """FLOPs of the decoder's layers."""

    prefill: float
    decode: float
    """FLOPs of all generated tokens."""
    router: float
    """Not in the others."""

    @property
    def total(self) -> float:
        return self.prefill + self.decode + self.router

    def __add__(self, other: Flops) -> Flops:
        return Flops(self.prefill + other.prefill, self.decode + other.decode, self.router + other.router)


def layer_flops(weights: int, width: int, tokens: float) -> float:
    """FLOPs of one decoder layer over a prompt.

    Args:
        weights: of its linear maps.
        width: see `attention_width`.
        tokens: that go through it.
    """
    return 2 * weights * tokens + 4 * width * tokens * (tokens + 1) / 2


def attention_width(config: Any) -> int:
    """Heads × head width, of the decoder with this config."""
    heads = config.num_attention_heads
    return heads * (getattr(config, "head_dim", None) or config.hidden_size // heads)


def decoder_flops(model: nn.Module, tokens: int, groups: Sequence[int] = (), generated: int = 0) -> Flops:
    """FLOPs of one sample, with the nominal share of each group kept.

    Args:
        model: dense or adapted.
        tokens: of the prompt, those of pictures included.
        groups: candidates of each group, as the config groups them; without any nothing is skipped, and the figure is
            the dense model's.
        generated: tokens that are fed back one by one after the prompt; they skip nothing.
    Raises:
        UserError: groups of more than `tokens` tokens, or a layer with weights other than those of linear maps.
    """
    if sum(groups) > tokens:
        raise UserError(f"groups: {sum(groups)} candidates among {tokens} tokens; tokens counts the whole prompt")
    found = parts(model)
    kept = {}
    for layer in found.layers:
        if isinstance(layer, RoutedDecoderLayer):
            chosen = sum(capacity_count(size, layer.routing.capacity) for size in groups)
            kept[layer.routing.layer] = tokens - sum(groups) + chosen
    return _flops(found, tokens, kept, sum(groups), generated)


def traced_flops(model: nn.Module, trace: Trace, tokens: Sequence[int]) -> Flops:
    """FLOPs of one traced forward that continues no cache, summed over its rows.

    Args:
        trace: what it was called with.
        tokens: of each row, padding apart.
    """
    found = parts(model)
    numbers = {
        layer.routing.name: layer.routing.layer for layer in found.layers if isinstance(layer, RoutedDecoderLayer)
    }
    counts = {numbers[name]: decision.selection.counts for name, decision in trace.decisions.items() if name in numbers}
    candidates = max((decision.candidates.shape[0] for decision in trace.decisions.values()), default=0)
    result = Flops(0.0, 0.0, 0.0)
    for row, length in enumerate(tokens):
        kept = {number: rows[row] for number, rows in counts.items()}
        result += _flops(found, length, kept, candidates if row == 0 else 0, 0)  # candidates: of all rows
    return result


def _flops(found: Parts, tokens: int, kept: Mapping[int, int], candidates: int, generated: int) -> Flops:
    prefill = decode = 0.0
    width = attention_width(found.text_config)
    for number, layer in enumerate(found.layers):
        weights, n = _weights(layer), kept.get(number, tokens)
        prefill += layer_flops(weights, width, n)
        decode += layer_flops(weights, width, n + generated) - layer_flops(weights, width, n)
    scorers = [layer.router for layer in found.layers if isinstance(layer, RoutedDecoderLayer)]
    scoring = sum(2.0 * router.weights for router in scorers if router is not None)
    return Flops(prefill, decode, scoring * candidates)


def _weights(layer: nn.Module) -> int:
    """Weights of the linear maps of a decoder layer, adapters, copies of PEFT and router apart."""
    total = 0
    for name, module in layer.named_modules():
        own = [part for part, p in module.named_parameters(recurse=False) if p.dim() > 1]
        path = name.split(".")
        if ROUTER in path or any(part.startswith(("lora_", "modules_to_save")) for part in path) or not own:
            continue
        if not isinstance(module, nn.Linear):
            raise UserError(
                f"{type(layer).__name__}.{name}: weights {own} of a {type(module).__name__} are not those of a linear "
                "map that every token meets; its FLOPs are not counted here"
            )
        total += module.in_features * module.out_features
    return total
