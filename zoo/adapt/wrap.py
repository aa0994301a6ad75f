"""adapt: give a multimodal LLM of Transformers Mixture-of-Depths layers, in place; restore: take them away again.

Layers are changed by swapping their class for one of the same name with `RoutedDecoderLayer` in front, so that names of
parameters, hooks, output capture and class lookups stay as they are. Routers are children called `mod_router`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
from collections.abc import Iterator, Mapping
from fractions import Fraction
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers.cache_utils import DynamicCache, DynamicLayer

from zoo.adapt.config import AdaptConfig
from zoo.adapt.family import VIDEO, Parts, gated, parts, picture_ids, unwrapped
from zoo.adapt.folder import PRECISIONS
from zoo.adapt.hooks import ContextHook, LabelHook, LossHook
from zoo.adapt.layer import RoutedDecoderLayer, Routing, routed_class
from zoo.adapt.scores import UNLEARNED, unwatch, watch
from zoo.adapt.select import ModRouter
from zoo.config import UserError

ROUTER = "mod_router"
"""Name of the child that a routed layer, or the decoder under `router.shared`, gets."""


@dataclasses.dataclass
class Adaptation:
    """What was done to a model; its attribute `mod_adaptation`."""

    config: AdaptConfig
    handles: list[RemovableHandle]
    """Handles that take the hooks away again."""


def adapt(model: nn.Module, config: AdaptConfig | Mapping[str, Any], seed: int = 0) -> nn.Module:
    """Make some of the decoder's layers Mixture-of-Depths layers, in place.

    From then on the model's forward takes `mod_trace=zoo.Trace()`, which collects decisions, auxiliary losses and
    statistics under `layers.<number>`; for `candidates: image_and_answer`, `mod_answers` (B, T) bool where no `labels`
    are given; and, where it is given `inputs_embeds` of text alone, `mod_pictures=False`. With labels, in training, the
    auxiliary loss is part of the model's `loss`: whole where that is a mean over the batch, and by the batch's share of
    the labels where `num_items_in_batch` makes it a part of a larger mean. `generate` is used as before.

    Args:
        model: a multimodal model of Transformers, or PEFT's wrapper of one.
        config: `AdaptConfig`, or what YAML gives for one.
        seed: of the routers' first weights, which depend on it and their names alone.
    Returns:
        The same model.
    Raises:
        UserError: a text-only or already adapted model; layers out of range, with a sliding window, or patched by
            another library.
    """
    config = AdaptConfig.parse(config, "adapt")
    found = parts(model)
    if _adaptation(model) is not None:
        raise UserError(f"{type(found.top).__name__} is adapted already; zoo.adapt.restore(model) undoes it")
    plan = config.plan(len(found.layers))
    _check_layers(found, plan, config)
    ids = picture_ids(found.top.config, type(found.top).__name__)
    if config.candidates == "video" and VIDEO not in ids.values():
        raise UserError(
            f"candidates: video, but {type(found.top).__name__} has no video token (config.video_token_id): frames are "
            "images to it; choose candidates: image"
        )
    _route(found, plan, config, seed)
    top: Any = found.top
    top.mod_adaptation = Adaptation(config, _hooked(found, config, ids))
    return model


def _route(found: Parts, plan: Mapping[int, Fraction], config: AdaptConfig, seed: int) -> None:
    """Make the layers of the plan routed ones, each with its capacity and its router or the one that all share."""
    width = found.text_config.hidden_size
    if config.router.type == "attention":
        watch(found.layers[min(plan) - 1])
    if config.router.shared:
        found.decoder.add_module(ROUTER, _router(config, width, found.layers[min(plan)], f"{seed}:{ROUTER}"))
    unlearned = None if config.router.learned else UNLEARNED[config.router.type]()
    for number, capacity in plan.items():
        layer: Any = found.layers[number]
        own = config.router.learned and not config.router.shared
        router = _router(config, width, layer, f"{seed}:layers.{number}.{ROUTER}") if own else None
        layer.register_module(ROUTER, router)
        owner = found.decoder if config.router.shared else None
        object.__setattr__(layer, "mod_owner", owner)  # not registered: one copy of its router is saved
        name = gated(layer) if config.gate.branch == "mlp" else ""
        layer.routing = Routing(number, capacity, config, name, unlearned)
        layer.__class__ = routed_class(type(layer))


def _hooked(found: Parts, config: AdaptConfig, ids: dict[int, int]) -> list[RemovableHandle]:
    """Hang the hooks round the model in which ids and pictures meet, and round the one with the head."""
    return [
        found.top.register_forward_pre_hook(LabelHook(config), with_kwargs=True),  # first, where both are one
        found.base.register_forward_pre_hook(ContextHook(config, ids, _names(found.base)), with_kwargs=True),
        found.top.register_forward_hook(LossHook(config), with_kwargs=True),
    ]


def adaptation(model: nn.Module) -> AdaptConfig | None:
    """The config that `model` is adapted by; None where it is dense."""
    done = _adaptation(model)
    return None if done is None else done.config


def _adaptation(model: nn.Module) -> Adaptation | None:
    return getattr(unwrapped(model), "mod_adaptation", None)


def restore(model: nn.Module) -> nn.Module:
    """Undo `adapt`, in place: the dense model, with whatever weights it has by now; the routers are dropped."""
    found, done = parts(model), _adaptation(model)
    if done is None:
        return model
    for handle in done.handles:
        handle.remove()
    for layer in found.layers:
        unwatch(layer)
        if isinstance(layer, RoutedDecoderLayer):
            layer.__class__ = type(layer).__mro__[2]
            layer._modules.pop(ROUTER, None)
            del layer.routing, layer.mod_owner
            vars(layer).pop("returns", None)
    found.decoder._modules.pop(ROUTER, None)
    del found.top.mod_adaptation
    return model


def routers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """(name, router) of each router, by its dotted name below the decoder: `layers.3.mod_router` or `mod_router`. Of
    one under PEFT's `modules_to_save`, the copy that is in use."""
    for name, module in parts(model).decoder.named_modules():
        if name.rpartition(".")[2] == ROUTER:
            copies = getattr(module, "modules_to_save", None)
            yield name, module if copies is None else copies[module.active_adapters[0]]


def routed_layers(model: nn.Module) -> list[RoutedDecoderLayer]:
    """The routed layers, in order; `layer.routing` says how each routes."""
    return [layer for layer in parts(model).layers if isinstance(layer, RoutedDecoderLayer)]


def _names(module: nn.Module) -> tuple[str, ...]:
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    parameters = inspect.signature(module.forward).parameters.values()
    return tuple(parameter.name for parameter in parameters if parameter.kind in kinds)


def _router(config: AdaptConfig, width: int, layer: nn.Module, name: str) -> ModRouter:
    """A router beside the weights of `layer`, of their type; its first weights depend on `name` alone."""
    beside = next(p for p in layer.parameters() if p.dtype in PRECISIONS)  # not a quantised one
    router = ModRouter(config, width)
    digest = hashlib.sha256(name.encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))
    with torch.no_grad():
        for part, parameter in router.named_parameters():
            router.initialise(part, parameter, generator)
    return router.to(device=beside.device, dtype=beside.dtype)


def _check_layers(found: Parts, plan: Mapping[int, Fraction], config: AdaptConfig) -> None:
    for layer in found.layers:
        name = type(getattr(layer, "self_attn", None)).__name__
        if hasattr(getattr(layer, "self_attn", None), "attn_temperature_tuning"):
            raise UserError(
                f"a {name} takes a token's place to be its number among those it is given (attn_temperature_tuning), "
                "which of kept tokens is another; this family cannot be adapted"
            )
    caches = DynamicCache(config=found.top.config).layers
    plain = [number for number, cache in enumerate(caches) if type(cache) is DynamicLayer]
    windows = [number for number in plan if number not in plain]
    if windows:
        whole = [number for number in plain[plain[:1] == [0] :] if not _read_later(found.layers[number])]
        routable = ", ".join(map(str, whole)) or "none of its layers"
        raise UserError(
            f"layers: {', '.join(map(str, windows))} have a sliding window or no cache of their own, and a window would"
            f" count kept tokens instead of tokens; leave them out (list layers; this model can route {routable})"
        )
    before = min(plan) - 1
    if config.router.type == "attention" and before not in plain:
        raise UserError(
            f"router.type: attention: layer {before}, before the first routed one, has a sliding window, outside which "
            "no image token receives attention; begin after a layer without one"
        )
    for number in plan:
        _check_layer(number, found.layers[number], config)


def _read_later(layer: Any) -> bool:
    """Whether later layers use a layer's keys and values."""
    return getattr(getattr(layer, "self_attn", None), "store_full_length_kv", False)


def _check_layer(number: int, layer: Any, config: AdaptConfig) -> None:
    """Raise `UserError` where leaving tokens out would change what a layer does to the others, or it lacks a part."""
    name, attention = type(layer).__name__, getattr(layer, "self_attn", None)
    if "forward" in vars(layer):
        raise UserError(
            f"layers: the forward of layer {number} was patched by another library (device maps of accelerate do "
            "so); adapt the model first"
        )
    if attention is None:
        raise UserError(
            f"layers: layer {number} is a {name} without self-attention, whose tokens meet by their places, and of the "
            "kept ones these are others; leave it out"
        )
    if _read_later(layer):
        raise UserError(
            f"layers: layer {number}: later layers read its keys and values (num_kv_shared_layers), and need those of "
            "every token; leave it out"
        )
    if config.router.input == "norm" and not hasattr(layer, "input_layernorm"):
        raise UserError(f"router.input: norm: a {name} has no input_layernorm; set it to residual")
    if config.gate.branch == "mlp":
        gated(layer)
