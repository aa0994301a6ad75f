"""What of a model is trained, as a recipe says: all of it, adapters and whole modules beside them, never its frozen
parts."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

import zoo.adapt as za
from pretrain.finetune.recipe import FinetuneRecipe, LoraConfig
from zoo.adapt.family import parts
from zoo.adapt.wrap import ROUTER
from zoo.config import ConfigError

if TYPE_CHECKING:
    import peft


def tuned(model: Any, recipe: FinetuneRecipe) -> nn.Module:
    """Adapters round it, parts of it frozen, its layers checkpointed.

    Raises:
        ConfigError: `lora` or `freeze` do not fit the model.
    """
    if recipe.train.activation_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if recipe.lora is not None:
        import peft

        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(recipe.seed)
            model = peft.get_peft_model(model, lora_config(model, recipe.lora, recipe.freeze))
        for _, router in za.routers(model):
            router.requires_grad_(True)
    freeze(model, recipe.freeze)
    return model


def lora_config(model: nn.Module, lora: LoraConfig, frozen: Sequence[str] = ()) -> peft.LoraConfig:
    """What PEFT is told.

    Args:
        frozen: names that `freeze` gets.
    Raises:
        ConfigError: a target or a module is not there, or a module is not to be trained in full, or is to be frozen.
    """
    import peft

    targets = _targets(model, lora)
    modules = [name for wanted in lora.modules_to_save for name in _modules(model, wanted, targets)]
    for wanted in frozen:
        for name, _ in model.named_parameters():
            if _holds(wanted, name) and any(name.startswith(f"{module}.") for module in modules):
                raise ConfigError(
                    f"freeze: {wanted!r} holds {name}, which lora.modules_to_save: {lora.modules_to_save} has trained "
                    "in full; name it under one of the two (with lora all that is not to be trained is frozen anyway)"
                )
    return peft.LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,  # pyrefly: ignore[bad-argument-type]  # any number will do
        lora_dropout=lora.dropout,
        target_modules=targets,
        modules_to_save=modules or None,
    )


def freeze(model: nn.Module, names: list[str]) -> None:
    """Leave out of the training what a name in `names` is a piece of the dotted name of.

    Raises:
        ConfigError: one is not there, or nothing is left.
    """
    for wanted in names:
        found = [p for name, p in model.named_parameters() if _holds(wanted, name)]
        if not found:
            raise _no_part("freeze", wanted, model)
        for parameter in found:
            parameter.requires_grad_(False)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ConfigError(f"freeze: {names} leaves nothing to train; name fewer parts")


def _holds(wanted: str, name: str) -> bool:
    """Whether a name that `freeze` gets is a piece of a parameter's dotted one."""
    return f".{wanted}." in f".{name}."


def _targets(model: nn.Module, lora: LoraConfig) -> str:
    """The pattern by which PEFT finds the linear maps that get adapters.

    Raises:
        ConfigError: a target is not among them.
    """
    found = parts(model)
    linear = (name for name, module in found.layers.named_modules() if isinstance(module, nn.Linear))
    known = list(dict.fromkeys(name.rpartition(".")[2] for name in linear))
    wanted = known if lora.targets is None else lora.targets
    missing = [name for name in wanted if name not in known]
    if missing:
        raise ConfigError(
            f"lora.targets: {missing[0]!r} is not a linear map of a decoder layer; known: {', '.join(known)}"
        )
    prefix = next(name for name, module in model.named_modules() if module is found.layers)
    return rf"{prefix.replace('.', chr(92) + '.')}\.\d+\.(.*\.)?({'|'.join(wanted)})"


def _modules(model: nn.Module, wanted: str, targets: str) -> list[str]:
    """Dotted names of the modules that `wanted` is the name, or the end of the name, of.

    Args:
        targets: pattern of the maps that get adapters.
    """
    names = [name for name, _ in model.named_modules()]
    found = [name for name in names if f".{name}".endswith(f".{wanted}")]
    if not found:
        raise _no_part("lora.modules_to_save", wanted, model)
    for name in (name for name in names if f"{name}.".startswith(tuple(f"{whole}." for whole in found))):
        if ROUTER in name.split(".") or re.fullmatch(targets, name):
            raise ConfigError(
                f"lora.modules_to_save: {wanted!r} holds {name}, which is a router or gets adapters and so is trained "
                "anyway; name smaller modules, or leave its maps out of lora.targets"
            )
    return found


def _no_part(key: str, wanted: str, model: nn.Module) -> ConfigError:
    kinds = dict.fromkeys(".".join(name.split(".")[:-1][:2]) for name, _ in model.named_parameters())
    return ConfigError(f"{key}: {wanted!r} is not part of the model; among its parts are {', '.join(kinds)}")
