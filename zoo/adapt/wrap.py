"""adapt: give a multimodal LLM of Transformers Mixture-of-Depths layers, in place; restore: take them away again.

Layers are changed by swapping their class for one of the same name with `RoutedDecoderLayer` in front, so that names of
parameters, hooks, output capture and class lookups stay as they are. Routers are children called `mod_router`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
import sys
from collections.abc import Iterator, Mapping
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache, DynamicLayer

from zoo.adapt.config import AdaptConfig
from zoo.adapt.context import AdaptContext
from zoo.adapt.family import IGNORED, VIDEO, Parts, gated, has_pictures, parts, picture_ids, unwrapped
from zoo.adapt.folder import PRECISIONS
from zoo.adapt.layer import RoutedDecoderLayer, Routing, routed_class
from zoo.adapt.scores import UNLEARNED, unwatch, watch
from zoo.adapt.select import ModRouter
from zoo.config import UserError
from zoo.trace import Trace

ROUTER = "mod_router"
"""Name of the child that a routed layer, or the decoder under `router.shared`, gets."""

OWN = ("mod_trace", "mod_answers", "mod_pictures")
"""Arguments of an adapted model that its own forward does not know."""


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


def auxiliary_loss(trace: Trace, config: AdaptConfig) -> Tensor | float:
    """weight · Σ over layers of the mean over candidates of the membership cross-entropy (γ-MoD's 0.01 · Σ).

    Args:
        trace: of one forward. 0.0 where nothing was routed or the config has no auxiliary loss.
    """
    if config.auxiliary.type == "none" or not trace.losses:
        return 0.0
    means = [total / max(1, count) for total, count in trace.losses.values()]
    return config.auxiliary.weight * sum(mean.to(means[0].device) for mean in means)


@dataclasses.dataclass(frozen=True)
class ContextHook:
    """Before the model in which ids and pictures meet: builds the context and hands it on by keyword."""

    config: AdaptConfig
    ids: dict[int, int]
    names: tuple[str, ...]
    """Names of the forward's positional parameters."""

    def __call__(self, module: PreTrainedModel, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        inputs = dict(zip(self.names, args, strict=False)) | kwargs
        like = inputs["input_ids"] if inputs.get("input_ids") is not None else inputs.get("inputs_embeds")
        if like is None:
            return args, kwargs  # the model says itself what is missing
        if inputs.get("input_ids") is None and not has_pictures(inputs) and kwargs.get("mod_pictures") is not False:
            raise UserError(
                "inputs_embeds without input_ids and without pictures: nothing says which tokens are those of pictures;"
                " give input_ids and the pictures themselves, or, where all is text, mod_pictures=False"
            )
        context = AdaptContext.build(
            self.config,
            self.ids,
            inputs,
            like,
            model_config=module.config,
            training=module.training,
            embed=module.get_input_embeddings(),
            answers=kwargs.get("mod_answers"),
            trace=kwargs.get("mod_trace"),
        )
        rest = {name: value for name, value in kwargs.items() if name not in OWN}
        return args, rest | {"mod_context": context}


@dataclasses.dataclass(frozen=True)
class LabelHook:
    """Before the model with the head: which tokens have labels, and somewhere to put the auxiliary loss."""

    config: AdaptConfig

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        if getattr(module, "_is_replica", False):
            raise UserError(
                "an adapted model does not run under torch.nn.DataParallel, whose copies would share one router; start "
                "a process for each device (torchrun, accelerate launch, deepspeed)"
            )
        _check_expert_loss(module, kwargs)
        labels = kwargs.get("labels")
        if not module.training:
            return args, kwargs
        if torch.is_grad_enabled():
            self._check_loss(labels, kwargs)
        if labels is None:
            return args, kwargs
        given = {"mod_trace": kwargs.get("mod_trace") or Trace()}
        if self.config.candidates == "image_and_answer" and kwargs.get("mod_answers") is None:
            given["mod_answers"] = labels != IGNORED
        return args, kwargs | given

    def _check_loss(self, labels: Tensor | None, kwargs: Mapping[str, Any]) -> None:
        """Raise `UserError` where a training step would go on without what the config asks for."""
        auxiliary = self.config.auxiliary.type
        if auxiliary != "none" and kwargs.get("mod_trace") is None and (labels is None or kwargs.get("fused_lm_head")):
            why = "is given no labels (Trainer's label_smoothing_factor and compute_loss_func take them away)"
            if labels is not None:
                why = "gives log-probabilities of which TRL makes a loss of its own (fused_lm_head)"
            raise UserError(
                f"auxiliary.type: {auxiliary}: the model is in training and {why}, so that the loss would lack the "
                "auxiliary one; use Trainer's own loss, or give mod_trace=zoo.Trace() and add "
                "zoo.adapt.auxiliary_loss(trace, config), or set auxiliary.type: none"
            )
        if self.config.candidates == "image_and_answer" and labels is None and kwargs.get("mod_answers") is None:
            raise UserError(
                "candidates: image_and_answer: the model is in training but nothing says which tokens are answers; "
                "give labels, or mod_answers (B, T) bool"
            )


@dataclasses.dataclass(frozen=True)
class LossHook:
    """After the model with the head: the auxiliary loss joins the model's own."""

    config: AdaptConfig

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
        if kwargs.get("labels") is None or not module.training or self.config.auxiliary.type == "none":
            return output
        context = kwargs.get("mod_context")  # there where ids and pictures meet in this very model
        trace = kwargs["mod_trace"] if context is None else context.trace
        own = output[0] if isinstance(output, tuple) else output["loss"]
        loss = own + torch.as_tensor(auxiliary_loss(trace, self.config) * _share(kwargs)).to(own.device)
        if isinstance(output, tuple):
            return (loss, *output[1:])
        output["loss"] = loss
        return output


def _share(kwargs: Mapping[str, Any]) -> Tensor | float:
    """What part of the loss a batch is: 1, or, where Transformers' Trainer has the sum of the losses divided by the
    labels of all batches of the step (`num_items_in_batch`), the batch's share of those."""
    items, shifted = kwargs.get("num_items_in_batch"), kwargs.get("shift_labels")
    if items is None:
        return 1.0
    labels = kwargs["labels"][..., 1:] if shifted is None else shifted
    own = (labels != IGNORED).sum()
    return own / (items.to(own.device) if isinstance(items, Tensor) else items)


def _check_expert_loss(module: Any, kwargs: Mapping[str, Any]) -> None:
    """Raise `UserError` where the family balances its experts by one mask for all layers, whatever each was given."""
    asked = kwargs.get("output_router_logits")
    if asked is None:
        asked = getattr(module.config.get_text_config(decoder=True), "output_router_logits", False)
    family = sys.modules[type(module).__module__]
    balances = hasattr(family, "load_balancing_loss_func") or kwargs.get("fused_lm_head")  # the latter: TRL
    if asked and balances and kwargs.get("attention_mask") is not None:
        raise UserError(
            f"output_router_logits: {type(module).__name__} balances its experts over the tokens of attention_mask, but"
            " routed layers are given fewer; leave it out, or, where nothing is padded, leave attention_mask out"
        )


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
    caches = DynamicCache(config=found.top.config).layers
    plain = [number for number, cache in enumerate(caches) if type(cache) is DynamicLayer]
    windows = [number for number in plan if number not in plain]
    if windows:
        routable = ", ".join(map(str, plain[plain[:1] == [0] :])) or "none of its layers"
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
    if hasattr(attention, "attn_temperature_tuning"):
        raise UserError(
            f"layers: layer {number}: a {type(attention).__name__} takes a token's place to be its number among those "
            "it is given (attn_temperature_tuning), which of kept tokens is another; this family cannot be adapted"
        )
    if getattr(attention, "store_full_length_kv", False):
        raise UserError(
            f"layers: layer {number}: later layers read its keys and values (num_kv_shared_layers), and need those of "
            "every token; leave it out"
        )
    if config.router.input == "norm" and not hasattr(layer, "input_layernorm"):
        raise UserError(f"router.input: norm: a {name} has no input_layernorm; set it to residual")
    if config.gate.branch == "mlp":
        gated(layer)
