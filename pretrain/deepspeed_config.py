"""The `deepspeed:` section of a recipe: every key checked, "auto" filled in, cross-checked, completed.

DeepSpeed ignores a misspelt top-level key without a word. Here an unknown key is an error, at the top and inside each
section, before any process group exists. What passes goes to DeepSpeed as written. Only `check_values` imports
deepspeed.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pretrain.deepspeed_keys import REFUSED, SCALARS, SECTIONS
from pretrain.optim import OptimizerConfig
from pretrain.recipe_file import MAX_BYTES, check_bounds, shipped
from zoo.config import ConfigError, explain, suggestion

ROOT = "deepspeed"
NEEDED = ("zero_optimization", "bf16", "fp16", "data_types", "checkpoint", "timers")
"""Sections that what is passed on always has."""


def read(section: Mapping[str, Any] | str | Path | None) -> dict[str, Any]:
    """The section as a dictionary of its own; a string is the path of a DeepSpeed JSON file.

    Raises ConfigError where the file is missing, is not JSON, or repeats a key.
    """
    if section is None:
        return {}
    if isinstance(section, Mapping):
        return copy.deepcopy(dict(section))
    path = shipped(section)
    try:
        if path.stat().st_size > MAX_BYTES:
            raise ConfigError(f"{ROOT}: {str(path)!r} is larger than {MAX_BYTES:,} bytes; give the path of a JSON file")
        data = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_unique)
    except OSError as error:
        reason = f"cannot read {str(path)!r} ({error.strerror}); give the path of a JSON file"
        raise ConfigError(f"{ROOT}: {reason}") from None
    except ConfigError:
        raise
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{ROOT}: {str(path)!r} is not a valid DeepSpeed JSON file: {error}") from None
    if not isinstance(data, dict):
        raise ConfigError(f"{ROOT}: {str(path)!r} holds {type(data).__name__}, not an object of keys")
    check_bounds(data, f"{ROOT}: {str(path)!r}")
    return data


def check_keys(section: Mapping[str, Any]) -> None:
    """Every key must be one that DeepSpeed 0.19.8 reads and this library supports; ConfigError names the others."""
    problems: list[str] = []
    top = [name for name in SECTIONS if "." not in name]
    _check_level(section, "", [*SCALARS, *top], problems)
    for key, types in SCALARS.items():
        value = section.get(key)
        if key not in section or value == "auto":
            continue
        if not isinstance(value, types) or (isinstance(value, bool) and bool not in types):
            wanted = " or ".join("null" if t is type(None) else t.__name__ for t in types)
            problems.append(f"{ROOT}.{key}: {value!r} must be {wanted}")
    if problems:
        raise ConfigError("\n".join(problems))


def effective(
    section: Mapping[str, Any] | str | Path | None,
    *,
    world: int,
    precision: str,
    global_batch: int,
    micro_batch: int,
    clip: float,
    optimizer: OptimizerConfig,
    d_model: int | None = None,
) -> dict[str, Any]:
    """The dictionary DeepSpeed gets.

    Args:
        section: the recipe's `deepspeed` section, or the path of a DeepSpeed JSON file.
        world: number of ranks.
        precision: "fp32" or "bf16".
        global_batch, micro_batch: rows an optimizer step over all ranks, rows a forward on one rank.
        clip: largest gradient norm, 0 for none.
        d_model: width; fills the ZeRO-3 sizes that say "auto".
    Raises:
        ConfigError: naming the key, its value, and the recipe's key and value where the two disagree.
    """
    config = read(section)
    check_keys(config)
    if precision not in ("fp32", "bf16"):
        raise ConfigError(f"train.precision: {precision!r} is not known; known: fp32, bf16 (no fp16)")
    for key in NEEDED:
        config.setdefault(key, {})
    _agree_on_batches(config, world, global_batch, micro_batch)
    _agree(config, "gradient_clipping", float(clip), "train.clip", clip)
    _agree(config, "bf16.enabled", precision == "bf16", "train.precision", precision)
    _refuse_fp16(config["fp16"])
    _fill_zero(config["zero_optimization"], d_model)
    _check_zero(config["zero_optimization"], precision)
    _check_sound(config)
    if optimizer.type == "muon":
        _check_muon(config, precision)
    _fill_defaults(config)
    if optimizer.type == "adamw":
        config["optimizer"] = _adamw(optimizer, offloaded=_offloads(config["zero_optimization"], "offload_optimizer"))
    return config


def _agree_on_batches(config: dict[str, Any], world: int, global_batch: int, micro_batch: int) -> None:
    rows = micro_batch * world
    if global_batch % rows:
        raise ConfigError(
            f"train.global_batch: {global_batch} is not a multiple of train.micro_batch × ranks = {micro_batch} "
            f"× {world} = {rows}; choose a multiple, or another micro_batch"
        )
    _agree(config, "train_batch_size", global_batch, "train.global_batch", global_batch)
    _agree(config, "train_micro_batch_size_per_gpu", micro_batch, "train.micro_batch", micro_batch)
    steps = global_batch // rows
    reason = f"train.global_batch / (train.micro_batch × {world} ranks)"
    _agree(config, "gradient_accumulation_steps", steps, reason, steps)


def _refuse_fp16(section: dict[str, Any]) -> None:
    if section.get("enabled") == "auto":
        section["enabled"] = False
    if section.get("enabled"):
        raise ConfigError(
            f"{ROOT}.fp16.enabled: true is not supported (its loss scale would skip good steps); remove it and "
            "set train.precision: bf16"
        )


def _fill_defaults(config: dict[str, Any]) -> None:
    """Say what the recipe leaves open and DeepSpeed would choose differently."""
    config["data_types"].setdefault("grad_accum_dtype", "fp32")
    config["checkpoint"].setdefault("tag_validation", "Fail")
    # DeepSpeed's throughput timer would synchronize the device at every step.
    config["timers"].setdefault("throughput", {"enabled": False})
    config.setdefault("steps_per_print", None)


def _adamw(optimizer: OptimizerConfig, offloaded: bool) -> dict[str, Any]:
    """DeepSpeed's `optimizer` section.

    Its own Adams are compiled at the first start (1 to 2 minutes, and nvcc on a GPU); only the one for offloading is
    worth that.
    """
    params = {
        "lr": optimizer.lr,
        "betas": list(optimizer.betas),
        "eps": optimizer.eps,
        "weight_decay": optimizer.weight_decay,
        "torch_adam": not offloaded,
    }
    return {"type": "AdamW", "params": params}


def check_values(config: Mapping[str, Any]) -> None:
    """Validate the values inside the sections with DeepSpeed's own models.

    Args:
        config: as `effective` returned it.
    Raises:
        ConfigError: naming the key, the value and the rule.
    """
    import pydantic
    from deepspeed.runtime.precision_config import DeepSpeedBF16Config
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    for key, model in (("zero_optimization", DeepSpeedZeroConfig), ("bf16", DeepSpeedBF16Config)):
        try:
            model(**config.get(key, {}))
        except pydantic.ValidationError as error:
            raise ConfigError(explain(error, f"{ROOT}.{key}", model)) from None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {next(k for k in keys if keys.count(k) > 1)!r} is there twice")
    return result


def _check_level(section: Mapping[str, Any], path: str, known: list[str], problems: list[str]) -> None:
    for key, value in section.items():
        inner = f"{path}.{key}" if path else str(key)
        if inner in REFUSED:
            problems.append(f"{ROOT}.{inner}: not allowed here: {REFUSED[inner]}")
        elif key not in known:
            words = ", ".join(sorted(known))
            problems.append(f"{ROOT}.{inner}: unknown key; known: {words}{suggestion(str(key), known)}")
        elif inner in SECTIONS:
            if isinstance(value, Mapping):
                _check_level(value, inner, list(SECTIONS[inner]), problems)
            elif value is not None or inner.count(".") == 0:
                problems.append(f"{ROOT}.{inner}: {value!r} is not a mapping; write it as `key: value` lines")


def _agree(config: dict[str, Any], key: str, value: Any, theirs: str, shown: Any) -> None:
    """Fill `key` where silent or "auto"; else it must equal what the recipe says."""
    *parents, last = key.split(".")
    place = config
    for parent in parents:
        place = place[parent]
    written = place.get(last, "auto")
    if written == "auto":
        place[last] = value
    elif written != value:
        raise ConfigError(
            f"{ROOT}.{key}: {written!r} contradicts {theirs}: {shown!r}; make them equal, or write {ROOT}.{key}: auto"
        )


def _fill_zero(zero: dict[str, Any], d_model: int | None) -> None:
    """Replace "auto" by the sizes that Hugging Face's integration made customary."""
    zero.setdefault("stage", 0)
    known = d_model or 0
    sizes = {
        "reduce_bucket_size": known * known,
        "stage3_prefetch_bucket_size": int(0.9 * known * known),
        "stage3_param_persistence_threshold": 10 * known,
    }
    for key, value in list(zero.items()):
        if value != "auto":
            continue
        if key not in sizes or d_model is None:
            raise ConfigError(f"{ROOT}.zero_optimization.{key}: 'auto' has no meaning here; write the value")
        zero[key] = max(value if isinstance(value, int) else 0, sizes[key])


def _offloads(zero: Mapping[str, Any], what: str) -> bool:
    return (zero.get(what) or {}).get("device", "none") != "none"


def _check_zero(zero: Mapping[str, Any], precision: str) -> None:
    stage = zero["stage"]
    key = f"{ROOT}.zero_optimization"
    if isinstance(stage, bool) or stage not in (0, 1, 2, 3):
        raise ConfigError(f"{key}.stage: {stage!r} must be 0, 1, 2 or 3")
    if stage == 0 and precision == "bf16":
        raise ConfigError(
            f"{key}.stage: 0 does not go with train.precision: 'bf16' (without ZeRO DeepSpeed keeps neither fp32 "
            "master weights nor fp32 gradients); use stage 1, or fp32"
        )
    for what, stages in (("offload_optimizer", (1, 2, 3)), ("offload_param", (3,))):
        if _offloads(zero, what) and stage not in stages:
            raise ConfigError(
                f"{key}.{what}.device: {zero[what]['device']!r} needs stage {' or '.join(map(str, stages))}, "
                f"and stage is {stage}; change the stage, or remove {what}"
            )
    if zero.get("compute_grad_norm") is False:
        raise ConfigError(f"{key}.compute_grad_norm: false would let non-finite gradients pass; remove it")


def _check_sound(config: Mapping[str, Any]) -> None:
    if config["bf16"].get("check_grad_overflow") is False:
        raise ConfigError(f"{ROOT}.bf16.check_grad_overflow: false would let non-finite gradients pass; remove it")
    if config["bf16"].get("immediate_grad_update") is True:
        raise ConfigError(f"{ROOT}.bf16.immediate_grad_update: true is not supported; remove it")
    accumulation = config["data_types"].get("grad_accum_dtype", "fp32")
    allowed = ("fp32", "bf16") if config["bf16"]["enabled"] else ("fp32",)
    if accumulation not in allowed:
        raise ConfigError(f"{ROOT}.data_types.grad_accum_dtype: {accumulation!r} must be {' or '.join(allowed)}")


def _check_muon(config: Mapping[str, Any], precision: str) -> None:
    """Only where DeepSpeed clips the gradient *before* Muon orthogonalizes it, and a skip leaves no trace."""
    stage = config["zero_optimization"]["stage"]
    if _offloads(config["zero_optimization"], "offload_optimizer"):
        raise ConfigError("optimizer.type: 'muon' does not go with offload_optimizer; remove one of them")
    if config["data_types"].get("grad_accum_dtype", "fp32") != "fp32":
        raise ConfigError(f"optimizer.type: 'muon' needs {ROOT}.data_types.grad_accum_dtype: 'fp32'")
    if (stage, precision) not in ((0, "fp32"), (1, "bf16")):
        raise ConfigError(
            f"optimizer.type: 'muon' does not go with {ROOT}.zero_optimization.stage: {stage} and "
            f"train.precision: {precision!r}; there DeepSpeed 0.19.8 clips and measures the orthogonalized update "
            "instead of the gradient. Use stage 0 with fp32 or stage 1 with bf16, or type: adamw"
        )
