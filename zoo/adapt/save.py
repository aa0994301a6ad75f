"""Saving and loading adapted models.

A fully tuned model is a Transformers folder like any other, with the routers beside it: plain `from_pretrained` opens
it as the dense model, `load_adapted` as the adapted one. One tuned by adapters of PEFT holds those, the routers and a
hash of the base's weights, without the base.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from zoo.adapt.family import parts
from zoo.adapt.folder import (
    ADAPTERS,
    CONFIG,
    WEIGHTS,
    About,
    cannot_open,
    check_adapters,
    open_whole,
    read_about,
    read_adapter_config,
    read_tensors,
)
from zoo.adapt.wrap import ROUTER, adapt, adaptation, routers
from zoo.config import UserError

INSIDE = (".token_adapter.base_layer.", ".base_layer.", ".original_module.")
"""Where PEFT keeps a module of the base in what it puts round it."""


def save_adapted(model: nn.Module, folder: str | Path, base: str | None = None) -> None:
    """Write an adapted model to `folder`.

    A plain model: its whole checkpoint, without routers, by `save_pretrained`, and the routers. PEFT's wrapper of one:
    adapters and routers alone, and the hash of the base; of a quantised base also how it is quantised.

    Args:
        base: where `load_adapted` finds the base of an adapter by default, a folder or a name; default: where the base
            was loaded from.
    Raises:
        UserError: the model is not adapted, or has adapters that would not be found again.
    """
    config, wrapper = adaptation(model), model
    if config is None:
        raise UserError(f"{type(model).__name__} is not adapted; save a dense model with its own save_pretrained")
    top, of_adapters = parts(model).top, {}
    if top is not model:
        of_adapters = _about_base(model, top, base)
    elif getattr(top, "_hf_peft_config_loaded", False):
        raise UserError("adapters of the model's own add_adapter are not saved with routers; use peft.get_peft_model")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    saved: Any = wrapper
    plain = {name: value for name, value in model.state_dict().items() if not _is_router(name)}
    saved.save_pretrained(folder, **({} if of_adapters else {"state_dict": plain}))
    save_file(router_weights(model), folder / WEIGHTS)
    about = About.parse({"adapt": config, "class": type(top).__name__, **of_adapters})
    given = {key: value for key, value in about.model_dump(by_alias=True).items() if value not in (None, False)}
    (folder / CONFIG).write_text(json.dumps(given, indent=2) + "\n")


def _about_base(wrapper: Any, top: Any, base: str | None) -> dict[str, Any]:
    """What `About` says of adapters and their base."""
    if list(wrapper.peft_config) != ["default"]:
        raise UserError(
            f"adapters {', '.join(wrapper.peft_config)}: only one set, named default, is saved with routers"
        )
    check_adapters("", wrapper.peft_config["default"].to_dict())
    about: dict[str, Any] = {"base": top.config._name_or_path if base is None else base}
    quantization, embedding = getattr(top.config, "quantization_config", None), top.get_input_embeddings().weight
    if quantization is None:
        return about | {"base_dtype": _name(embedding.dtype), "base_sha256": weights_hash(top)}
    values = dict(quantization if isinstance(quantization, Mapping) else quantization.to_dict())
    return about | {
        "base_dtype": _name(top.config.dtype),
        "base_sha256": weights_hash(top, top.config.dtype),
        "quantization": values | {"quant_method": str(values["quant_method"].value)},
        "prepared": embedding.dtype != top.config.dtype,
    }


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def load_adapted(folder: str | Path, base: str | Path | None = None, **options: Any) -> nn.Module:
    """The adapted model that `save_adapted` wrote, bit for bit, in evaluation.

    Args:
        base: of an adapter: a folder or name to load instead of the one it was saved with; it must hold the same
            weights. Required where that one is no folder on this machine.
        options: for `from_pretrained` (device_map apart: adapt first, then dispatch).
    Returns:
        The model; PEFT's wrapper of one where adapters were saved.
    Raises:
        UserError: no adapted folder, it is damaged or lacks weights, or the base's have changed.
    """
    folder = Path(folder)
    about = read_about(folder)
    if about.base_sha256 is None:
        model = adapt(open_whole(about.model_class, folder, **options), about.adapt)
    else:
        model = _with_adapters(folder, about, base, options)
    load_routers(model, folder)
    return model.eval()


def _with_adapters(folder: Path, about: About, base: str | Path | None, options: dict[str, Any]) -> nn.Module:
    """The base of the adapters in a folder, adapted, and the adapters round it."""
    read_adapter_config(folder)
    weights = read_tensors(folder / ADAPTERS)
    if base is None and not Path(str(about.base)).is_dir():
        raise UserError(
            f"{folder}: its base {about.base!r} is no folder on this machine, and what a folder names is not fetched; "
            "give the base, a folder or a name on the hub, with base="
        )
    source, dtype = str(base or about.base), getattr(torch, str(about.base_dtype))
    options = {"dtype": dtype} | ({"quantization_config": about.quantization} if about.quantization else {}) | options
    top: Any = open_whole(about.model_class, source, **options)
    found = weights_hash(top, dtype if about.quantization else None)
    if found != about.base_sha256:
        raise UserError(
            f"{folder}: made for a base with weights {str(about.base_sha256)[:12]}…, but {source} in "
            f"{options['dtype']} has {found[:12]}…; give the unchanged base with base="
        )
    import peft

    if about.prepared:
        peft.prepare_model_for_kbit_training(top, use_gradient_checkpointing=False)
    try:
        model = peft.PeftModel.from_pretrained(adapt(top, about.adapt), str(folder))
    except UserError:
        raise
    except Exception as error:  # PEFT raises anything for adapters that do not fit
        raise cannot_open(folder, error) from None
    model.peft_config["default"].base_model_name_or_path = source  # what it is, not what the folder says
    missing = sorted(peft.get_peft_model_state_dict(model, save_embedding_layers=False).keys() - weights.keys())
    if missing:
        raise UserError(f"{folder}: {ADAPTERS} has no weights {', '.join(missing[:3])} ({len(missing)} are missing)")
    return model


def router_weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """Weights of the routers, on the host, by name below the decoder."""
    return {
        f"{name}.{part}": parameter.detach().cpu().contiguous()
        for name, router in routers(model)
        for part, parameter in router.named_parameters()
    }


def load_routers(model: nn.Module, folder: str | Path) -> None:
    """Set the routers of an adapted model from a folder's, in the type of numbers that they were saved in; float64 is
    kept in a float64 model alone.

    Raises:
        UserError: the folder has routers for other layers, or of another shape, or they are damaged.
    """
    weights = read_tensors(Path(folder) / WEIGHTS)
    own = {f"{name}.{part}": p for name, router in routers(model) for part, p in router.named_parameters()}
    if {n: p.shape for n, p in own.items()} != {n: w.shape for n, w in weights.items()}:
        raise UserError(f"{folder}: {WEIGHTS} has {sorted(weights)}, the model {sorted(own)}; shapes must agree too")
    for name, parameter in own.items():
        weight = weights[name]
        if weight.dtype == torch.float64 != parameter.dtype:
            weight = weight.float()  # scores are computed in fp32 then
        parameter.data = weight.to(parameter.device)


def weights_hash(model: nn.Module, dtype: torch.dtype | None = None) -> str:
    """sha256 over names, types, shapes and bytes of the weights, those of routers and adapters left out.

    It is the same for a base that adapters were put round, and differs where the type of the numbers does.

    Args:
        dtype: of a quantised model: the type it was loaded in, to which what is not quantised is brought, since PEFT
            widens and bitsandbytes narrows it as they go; the scales of its codes are left out, since bitsandbytes
            rounds them on a CPU.
    """
    digest, state = hashlib.sha256(), model.state_dict()
    wrapped = tuple(
        f"{name}."
        for name, module in model.named_modules()
        if {"base_layer", "original_module"} & set(dict(module.named_children()))
    )
    named = {_base_name(name): value for name, value in state.items() if _belongs(name, wrapped)}
    for name in sorted(named):
        value = named[name].detach().cpu().contiguous()
        if dtype is not None and name.rpartition(".")[0] in named:
            continue
        if dtype is not None and value.is_floating_point():
            value = value.to(dtype)
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _is_router(name: str) -> bool:
    return ROUTER in name.split(".")


def _belongs(name: str, wrapped: tuple[str, ...]) -> bool:
    """Whether a weight is one of the base.

    Args:
        wrapped: beginnings of the names of all that PEFT has put round a module of the base.
    """
    inside = [name.removeprefix(part) for part in wrapped if name.startswith(part)]
    return not _is_router(name) and all(f".{rest}".startswith(INSIDE) for rest in inside)


def _base_name(name: str) -> str:
    for part in INSIDE:
        name = name.replace(part, ".")
    return name.removeprefix("base_model.model.")
