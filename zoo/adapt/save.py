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
import transformers
from safetensors.torch import load_file, save_file
from torch import nn

from zoo.adapt.config import AdaptConfig
from zoo.adapt.family import parts
from zoo.adapt.wrap import ROUTER, adapt, adaptation, routers
from zoo.config import UserError

WEIGHTS, CONFIG, VERSION = "mod_routers.safetensors", "mod_config.json", 2


def save_adapted(model: nn.Module, folder: str | Path, base: str | None = None) -> None:
    """Write an adapted model to `folder`.

    A plain model: its whole checkpoint, without routers, by `save_pretrained`, and the routers. PEFT's wrapper of one:
    adapters and routers alone, and the hash of the base.

    Args:
        base: where `load_adapted` finds the base of an adapter by default, a folder or a name; default: where the base
            was loaded from.
    Raises:
        UserError: the model is not adapted.
    """
    config = adaptation(model)
    if config is None:
        raise UserError(f"{type(model).__name__} is not adapted; save a dense model with its own save_pretrained")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    top = parts(model).top
    about: dict[str, Any] = {"version": VERSION, "adapt": config.model_dump(), "class": type(top).__name__}
    if top is model:
        plain = {name: value for name, value in model.state_dict().items() if not _is_router(name)}
        top.save_pretrained(folder, state_dict=plain)
    else:
        wrapper: Any = model
        wrapper.save_pretrained(folder)
        source = top.config._name_or_path if base is None else base
        dtype = str(next(p for p in top.parameters() if p.is_floating_point()).dtype).removeprefix("torch.")
        about |= {"base": source, "base_dtype": dtype, "base_sha256": weights_hash(top)}
    save_file(router_weights(model), folder / WEIGHTS)
    (folder / CONFIG).write_text(json.dumps(about, indent=2) + "\n")


def load_adapted(folder: str | Path, base: str | Path | None = None, **options: Any) -> nn.Module:
    """The adapted model that `save_adapted` wrote, bit for bit, in evaluation.

    Args:
        base: of an adapter: a folder or name to load instead of the one it was saved with; it must hold the same
            weights.
        options: for `from_pretrained` (device_map apart: adapt first, then dispatch).
    Returns:
        The model; PEFT's wrapper of one where adapters were saved.
    Raises:
        UserError: no adapted folder, it lacks weights, or the base's have changed.
    """
    folder = Path(folder)
    about, config = read_about(folder)
    cls = getattr(transformers, about["class"])
    if "base_sha256" not in about:
        model, loaded = cls.from_pretrained(folder, output_loading_info=True, **options)
        check_complete(str(folder), loaded)
        adapt(model, config)
    else:
        source = base or about["base"]
        options = {"dtype": getattr(torch, about["base_dtype"])} | options
        model = cls.from_pretrained(source, **options)
        found = weights_hash(model)
        if found != about["base_sha256"]:
            raise UserError(
                f"{folder}: made for a base with weights {about['base_sha256'][:12]}…, but {source} in "
                f"{options['dtype']} has {found[:12]}…; give the unchanged base with base="
            )
        from peft import PeftModel

        model = PeftModel.from_pretrained(adapt(model, config), folder)
    load_routers(model, folder)
    return model.eval()


def read_about(folder: Path) -> tuple[dict[str, Any], AdaptConfig]:
    """What stands in the mod_config.json of an adapted folder, and how its model is adapted.

    Version 1 had the capacities under `keep`.

    Raises:
        UserError: there is none, or another version's.
    """
    path = folder / CONFIG
    if not path.is_file():
        raise UserError(f"{folder}: no {CONFIG} in it; save_adapted writes one, tools.arank starts from a dense model")
    about = json.loads(path.read_text())
    if about.get("version") not in (1, VERSION):
        raise UserError(f"{path}: version {about.get('version')!r}; this library reads 1 and {VERSION}")
    capacity = about["adapt"]["capacity"]
    if about["version"] == 1 and "keep" in capacity:
        capacity["values" if capacity["type"] == "list" else "value"] = capacity.pop("keep")
    return about, AdaptConfig.parse(about["adapt"], f"{path}: adapt")


def check_complete(what: str, loaded: Mapping[str, Any]) -> None:
    """Raise UserError where Transformers would begin with random weights.

    Args:
        what: was loaded.
        loaded: `from_pretrained`'s loading info.
    """
    names = sorted(loaded["missing_keys"])
    if names:
        raise UserError(f"{what} has no weights {', '.join(names[:3])} ({len(names)} are missing); save it anew")


def router_weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """Weights of the routers, on the host, by name below the decoder."""
    return {
        f"{name}.{part}": parameter.detach().cpu().contiguous()
        for name, router in routers(model)
        for part, parameter in router.named_parameters()
    }


def load_routers(model: nn.Module, folder: str | Path) -> None:
    """Set the routers of an adapted model from a folder's.

    Raises:
        UserError: the folder has routers for other layers, or of another shape.
    """
    weights = load_file(Path(folder) / WEIGHTS)
    own = {f"{name}.{part}": p for name, router in routers(model) for part, p in router.named_parameters()}
    if {n: p.shape for n, p in own.items()} != {n: w.shape for n, w in weights.items()}:
        raise UserError(f"{folder}: {WEIGHTS} has {sorted(weights)}, the model {sorted(own)}; shapes must agree too")
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.data = weights[name].to(parameter.device)


def weights_hash(model: nn.Module) -> str:
    """sha256 over names, types, shapes and bytes of the weights, those of routers and adapters left out.

    It is the same for a base that adapters were put round, and differs where the type of the numbers does.
    """
    digest = hashlib.sha256()
    named = {_base_name(name): value for name, value in model.state_dict().items() if _belongs(name)}
    for name in sorted(named):
        value = named[name].detach().cpu().contiguous()
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _is_router(name: str) -> bool:
    return ROUTER in name.split(".")


def _belongs(name: str) -> bool:
    return not _is_router(name) and "lora_" not in name and "modules_to_save" not in name


def _base_name(name: str) -> str:
    return name.replace(".base_layer.", ".").replace(".original_module.", ".").removeprefix("base_model.model.")
