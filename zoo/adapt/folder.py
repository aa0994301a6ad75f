"""Folders that somebody else may have written: what an adapted one says, and how models and weights are opened.

Nothing that a folder holds is run: code of its own (`auto_map`) is not asked for, weights are numbers alone. Nor does a
folder choose what is loaded from elsewhere: a base that it names is a folder on this machine, anything else the caller
names.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import pydantic
import torch
import transformers
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers.utils.peft_utils import find_adapter_config_file

from zoo.adapt.config import AdaptConfig
from zoo.config import Config, ConfigError, UserError, shown

WEIGHTS, CONFIG, VERSION = "mod_routers.safetensors", "mod_config.json", 2
ADAPTERS, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"

PRECISIONS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
"""Types of numbers that weights of routers and adapters may have."""

CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""First weights of LoRA that are taken out of the base's."""


class About(Config):
    """What stands in the mod_config.json of an adapted folder."""

    version: int = VERSION
    adapt: AdaptConfig
    """How the model is adapted."""
    model: str = pydantic.Field(alias="class")
    """Name of the model's class in Transformers."""
    base: str | None = None
    """Where the base of adapters was loaded from."""
    base_dtype: Literal["float16", "bfloat16", "float32", "float64"] | None = None
    """The type of numbers in which the base of adapters is loaded."""
    base_sha256: str | None = None
    """Hash of the weights of the base of adapters, see `save.weights_hash`."""
    quantization: dict[str, Any] | None = None
    """How the base of adapters is quantised while it is loaded, as Transformers writes it into a config."""
    prepared: bool = False
    """Whether what is not quantised of that base was then widened to fp32, as PEFT's
    `prepare_model_for_kbit_training` does."""

    @pydantic.model_validator(mode="after")
    def _all_or_nothing_of_a_base(self) -> About:
        given = [value is not None for value in (self.base, self.base_dtype, self.base_sha256)]
        if any(given) and not all(given):
            raise ValueError("base, base_dtype and base_sha256 belong together; give all three or none")
        return self

    @property
    def model_class(self) -> type[transformers.PreTrainedModel]:
        """The model's class.

        Raises:
            UserError: there is none of this name.
        """
        found = getattr(transformers, self.model, None) if self.model in dir(transformers) else None
        if not isinstance(found, type) or not issubclass(found, transformers.PreTrainedModel):
            raise UserError(
                f"class: {shown(self.model)} is no model of Transformers {transformers.__version__}; install the "
                "version that the folder was written with"
            )
        return found


def read_about(folder: Path) -> About:
    """What an adapted folder says about itself. Version 1 had the capacities under `keep`.

    Raises:
        UserError: it has no mod_config.json, another version's, or one that is damaged.
    """
    path = folder / CONFIG
    if not path.is_file():
        raise UserError(f"{folder}: no {CONFIG} in it; save_adapted writes one, tools.arank starts from a dense model")
    values = read_json(path)
    if values.get("version") not in (1, VERSION):
        raise UserError(f"{path}: version {shown(values.get('version'))}; this library reads 1 and {VERSION}")
    adapt = values.get("adapt")
    capacity = adapt.get("capacity") if isinstance(adapt, dict) else None
    if values["version"] == 1 and isinstance(capacity, dict) and "keep" in capacity:
        capacity["values" if capacity.get("type") == "list" else "value"] = capacity.pop("keep")
    try:
        about = About.parse(values)
        about.model_class  # noqa: B018  # raises where there is none
    except UserError as error:
        raise ConfigError("\n".join(f"{path}: {line}" for line in str(error).splitlines())) from None
    return about


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
        UserError: the file holds none.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError, OSError) as error:
        raise UserError(f"{path}: cannot be read as JSON ({_first_line(error)}); copy the folder anew") from None
    if not isinstance(values, dict):
        raise UserError(f"{path}: holds a {type(values).__name__}, not an object {{…}}; copy the folder anew")
    return values


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The weights in a safetensors file, of routers or adapters, on the host.

    Raises:
        UserError: there is none, it is damaged, or it holds what is no finite number of floating point.
    """
    if not path.is_file():
        raise UserError(f"{path.parent}: no {path.name} in it; copy the folder anew")
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: is damaged ({_first_line(error)}); copy the folder anew") from None
    for name, value in tensors.items():
        if value.dtype not in PRECISIONS:
            raise UserError(f"{path}: {name} is of {value.dtype}, no numbers of floating point; save it anew")
        if not bool(value.isfinite().all()):
            raise UserError(f"{path}: {name} holds NaN or infinite numbers; take an earlier checkpoint")
    return tensors


def open_whole(kind: Any, source: str | Path, **options: Any) -> nn.Module:
    """A model by `kind.from_pretrained`, kind a class of Transformers: complete, and without anything of it run.

    Args:
        source: a folder with a whole model, or a name on the hub that the caller gave.
        options: for `from_pretrained`.
    Raises:
        UserError: it cannot be opened, or lacks weights.
    """
    check_whole(source)
    try:
        model, loaded = kind.from_pretrained(source, output_loading_info=True, trust_remote_code=False, **options)
    except UserError:
        raise
    except Exception as error:  # Transformers raises anything for a folder it does not take
        raise cannot_open(source, error) from None
    names = sorted(loaded["missing_keys"])
    if names:  # Transformers would begin with random ones
        raise UserError(
            f"{str(source)!r} has no weights {', '.join(names[:3])} ({len(names)} are missing); save it anew"
        )
    return model


def check_whole(source: str | Path) -> None:
    """Raise `UserError` where `source` is neither a folder with a whole model nor a name on the hub, or holds adapters,
    which would have Transformers load a base that they name."""
    folder, name = Path(source), repr(str(source))
    adapters, local = folder / ADAPTER_CONFIG, folder.is_dir()
    if not local and (folder.is_absolute() or str(source).count("/") != 1):  # no name on the hub
        raise UserError(f"{name} is not a folder; give one with a model of Transformers and its processor")
    if local and not (folder / "config.json").is_file():
        what = "only adapters, not the model they belong to" if adapters.is_file() else "no config.json"
        raise UserError(f"{name} holds {what}; give a folder that `save_pretrained` wrote for a whole model")
    try:
        beside = adapters.is_file() if local else find_adapter_config_file(str(source)) is not None
    except Exception as error:  # whatever a hub answers
        raise cannot_open(source, error) from None
    if beside:
        raise UserError(
            f"{name} holds adapters beside a model ({ADAPTER_CONFIG}), which name a base of their own; give the whole "
            "model alone"
        )


def read_adapter_config(folder: Path) -> dict[str, Any]:
    """What PEFT is told of the adapters in a folder.

    Raises:
        UserError: there are none, or others than LoRA's, whose config names nothing to be loaded from elsewhere.
    """
    path = folder / ADAPTER_CONFIG
    if not path.is_file():
        raise UserError(f"{folder}: no {ADAPTER_CONFIG} in it; copy the folder anew")
    values = read_json(path)
    check_adapters(f"{path}: ", values)
    return values


def check_adapters(what: str, config: Mapping[str, Any]) -> None:
    """Raise `UserError` where adapters are not LoRA's, change their base, or have modules imported by name.

    Args:
        what: begins the message.
        config: PEFT's.
    """
    kind, first = config.get("peft_type"), config.get("init_lora_weights")
    if kind != "LORA":
        raise UserError(
            f"{what}peft_type: {shown(kind)}; adapted models are saved with LoRA's adapters alone, DoRA's too"
        )
    if isinstance(first, str) and first.startswith(CHANGES_BASE):
        raise UserError(
            f"{what}init_lora_weights: {first} changes the base, which would not be known again; convert the adapters "
            "to plain ones first (PEFT's path_initial_model_for_weight_conversion)"
        )
    if config.get("megatron_config"):
        raise UserError(f"{what}megatron_config: has a module imported that it names; leave it out")


def cannot_open(name: str | Path, error: Exception) -> UserError:
    """What to say where Transformers fails at a model, with anything it likes to raise."""
    return UserError(f"{str(name)!r} cannot be opened ({_first_line(error)})")


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__
