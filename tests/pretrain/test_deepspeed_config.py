"""The `deepspeed:` section: unknown keys, contradictions, "auto", defaults, what is refused and why."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pretrain.deepspeed_config import effective
from pretrain.deepspeed_keys import REFUSED, SCALARS, SECTIONS
from pretrain.optim import OptimizerConfig
from zoo.config import ConfigError


def build(section: Any = None, **keys: Any) -> dict[str, Any]:
    arguments: dict[str, Any] = {
        "world": 2,
        "precision": "fp32",
        "global_batch": 16,
        "micro_batch": 2,
        "clip": 1.0,
        "optimizer": OptimizerConfig(lr=0.01),
        "d_model": 64,
    }
    return effective(section, **(arguments | keys))


def test_silent_section_gets_our_defaults() -> None:
    config = build({"zero_optimization": {"stage": 2}}, precision="bf16")
    assert (config["train_batch_size"], config["train_micro_batch_size_per_gpu"]) == (16, 2)
    assert config["gradient_accumulation_steps"] == 4
    assert config["gradient_clipping"] == 1.0
    assert config["bf16"] == {"enabled": True}
    assert config["data_types"] == {"grad_accum_dtype": "fp32"}
    assert config["checkpoint"] == {"tag_validation": "Fail"}
    assert config["optimizer"]["params"]["torch_adam"] is True
    json.dumps(config)


def test_what_is_written_is_passed_as_written() -> None:
    section = {
        "zero_optimization": {"stage": 3, "overlap_comm": False, "offload_optimizer": {"device": "cpu"}},
        "data_types": {"grad_accum_dtype": "bf16"},
        "checkpoint": {"tag_validation": "Warn"},
        "steps_per_print": 7,
    }
    before = json.dumps(section)
    config = build(section, precision="bf16")
    assert json.dumps(section) == before
    for key, value in section.items():
        assert config[key] == value
    assert config["optimizer"]["params"]["torch_adam"] is False


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"gradient_cliping": 1.0}, r"^deepspeed.gradient_cliping: unknown key; known: .*mean 'gradient_clipping'"),
        ({"zero_optimisation": {"stage": 1}}, "did you mean 'zero_optimization'"),
        ({"zero_optimization": {"stage": 1, "overlap_com": True}}, "overlap_com: unknown.*'overlap_comm'"),
        ({"zero_optimization": {"offload_optimizer": {"devise": "cpu"}}}, "devise: unknown.*'device'"),
        ({"bf16": True}, "deepspeed.bf16: True is not a mapping"),
        ({"bf16": None}, "deepspeed.bf16: None is not a mapping"),
        ({"train_batch_size": 8}, "train_batch_size: 8 contradicts train.global_batch: 16"),
        ({"train_micro_batch_size_per_gpu": 4}, "contradicts train.micro_batch: 2"),
        ({"gradient_accumulation_steps": 1}, "gradient_accumulation_steps: 1 contradicts .*2 ranks.*: 4"),
        ({"gradient_clipping": 0.5}, "gradient_clipping: 0.5 contradicts train.clip: 1.0"),
        ({"gradient_clipping": "1"}, "gradient_clipping: '1' must be int or float"),
        ({"bf16": {"enabled": True}}, "bf16.enabled: True contradicts train.precision: 'fp32'"),
        ({"fp16": {"enabled": True}}, "fp16.enabled: true is not supported"),
        ({"optimizer": {"type": "Adam"}}, "deepspeed.optimizer: not allowed here: the recipe's own"),
        ({"scheduler": {"type": "WarmupLR"}}, "deepspeed.scheduler: not allowed here"),
        ({"zero_optimization": {"stage": 4}}, "stage: 4 must be 0, 1, 2 or 3"),
        ({"zero_optimization": {"stage": True}}, "stage: True must be"),
        ({"zero_optimization": {"stage": 0, "offload_optimizer": {"device": "cpu"}}}, "needs stage 1 or 2 or 3"),
        ({"zero_optimization": {"stage": 2, "offload_param": {"device": "cpu"}}}, "offload_param.*needs stage 3"),
        ({"zero_optimization": {"stage": 1, "compute_grad_norm": False}}, "compute_grad_norm: false would let"),
        ({"zero_optimization": {"stage": "auto"}}, "'auto' has no meaning here"),
        ({"bf16": {"check_grad_overflow": False}}, "check_grad_overflow: false would let"),
        ({"data_types": {"grad_accum_dtype": "fp16"}}, "grad_accum_dtype: 'fp16' must be fp32"),
    ],
)
def test_refused_with_the_reason(section: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build(section)


def test_every_wrong_key_is_named() -> None:
    with pytest.raises(ConfigError) as caught:
        build({"a": 1, "zero_optimization": {"b": 1}})
    keys = [line.split(":")[0] for line in str(caught.value).splitlines()]
    assert keys == ["deepspeed.a", "deepspeed.zero_optimization.b"]


def test_recipe_side_errors() -> None:
    with pytest.raises(ConfigError, match="train.global_batch: 15 is not a multiple of .* = 2 × 2 = 4"):
        build(global_batch=15)
    with pytest.raises(ConfigError, match="train.precision: 'fp16' is not known"):
        build(precision="fp16")
    with pytest.raises(ConfigError, match="stage: 0 does not go with train.precision: 'bf16'.*use stage 1"):
        build(precision="bf16")


def test_auto_is_filled() -> None:
    config = build(
        {
            "train_batch_size": "auto",
            "train_micro_batch_size_per_gpu": "auto",
            "gradient_accumulation_steps": "auto",
            "gradient_clipping": "auto",
            "bf16": {"enabled": "auto"},
            "fp16": {"enabled": "auto"},
            "zero_optimization": {
                "stage": 3,
                "reduce_bucket_size": "auto",
                "stage3_prefetch_bucket_size": "auto",
                "stage3_param_persistence_threshold": "auto",
            },
        }
    )
    assert "auto" not in json.dumps(config)
    assert config["zero_optimization"]["reduce_bucket_size"] == 64 * 64
    assert config["zero_optimization"]["stage3_param_persistence_threshold"] == 640


def test_section_may_be_a_file(tmp_path: Path) -> None:
    path = tmp_path / "zero.json"
    path.write_text('{"zero_optimization": {"stage": 1}}')
    assert build(str(path))["zero_optimization"] == {"stage": 1}
    with pytest.raises(ConfigError, match="cannot read .*absent.json"):
        build(str(tmp_path / "absent.json"))
    path.write_text('{"steps_per_print": 1, "steps_per_print": 2}')
    with pytest.raises(ConfigError, match="'steps_per_print' is there twice"):
        build(str(path))
    path.write_text("[1]")
    with pytest.raises(ConfigError, match="holds list"):
        build(str(path))


@pytest.mark.parametrize(("stage", "precision"), [(1, "fp32"), (2, "fp32"), (3, "fp32"), (2, "bf16"), (3, "bf16")])
def test_muon_is_refused_where_it_is_not_sound(stage: int, precision: str) -> None:
    with pytest.raises(ConfigError, match="Use stage 0 with fp32 or stage 1 with bf16"):
        build(
            {"zero_optimization": {"stage": stage}},
            precision=precision,
            optimizer=OptimizerConfig(lr=0.1, type="muon", muon_lr=0.02),
        )


def test_validation_needs_no_deepspeed() -> None:
    names = "pretrain.deepspeed_config, pretrain.checkpoint, pretrain.optim"
    code = f"import sys, {names}; assert 'deepspeed' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])


def test_tables_hold_what_deepspeed_knows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each key is DeepSpeed's, and each of DeepSpeed's is either known or refused with a reason."""
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    from deepspeed.monitor.config import CSVConfig, TensorBoardConfig, WandbConfig
    from deepspeed.runtime.precision_config import DeepSpeedBF16Config
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    from deepspeed.runtime.zero.leaf_module_config import DeepSpeedZeroLeafModuleConfig
    from deepspeed.runtime.zero.offload_config import (
        DeepSpeedZeroOffloadOptimizerConfig,
        DeepSpeedZeroOffloadParamConfig,
    )

    models = {
        "zero_optimization": DeepSpeedZeroConfig,
        "zero_optimization.offload_param": DeepSpeedZeroOffloadParamConfig,
        "zero_optimization.offload_optimizer": DeepSpeedZeroOffloadOptimizerConfig,
        "zero_optimization.leaf_module": DeepSpeedZeroLeafModuleConfig,
        "bf16": DeepSpeedBF16Config,
        "tensorboard": TensorBoardConfig,
        "csv_monitor": CSVConfig,
        "wandb": WandbConfig,
    }
    outdated = {"cpu_offload_use_pin_memory", "stage3_gather_fp16_weights_on_model_save"}
    outdated |= {"save_muon_momentum_buffer_in_memory"}
    for path, model in models.items():
        theirs = {field.alias or name for name, field in model.model_fields.items()} - outdated
        refused = {key.rpartition(".")[2] for key in REFUSED if key.rpartition(".")[0] == path}
        assert set(SECTIONS[path]) <= theirs, path
        assert theirs - set(SECTIONS[path]) <= refused, path

    import deepspeed.runtime.constants as constants

    words = {value for value in vars(constants).values() if isinstance(value, str)}
    assert set(SCALARS) <= words


def test_wrong_values_are_reported_in_our_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    from pretrain.deepspeed_config import check_values

    message = "^deepspeed.zero_optimization.overlap_comm: 'maybe': must be a valid boolean"
    with pytest.raises(ConfigError, match=message):
        check_values({"zero_optimization": {"stage": 1, "overlap_comm": "maybe"}})
