"""Hooks round an adapted model: what its layers must know of the tokens, and the auxiliary loss beside the model's own.

A training step that would go on without something the config asks for is an error.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from zoo.adapt.config import AdaptConfig
from zoo.adapt.context import AdaptContext
from zoo.adapt.family import IGNORED, has_pictures
from zoo.config import UserError
from zoo.trace import Trace

OWN = ("mod_trace", "mod_answers", "mod_pictures")
"""Arguments of an adapted model that its own forward does not know."""


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
