"""Untrained runs as run folders, and exported."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import save_file

from pretrain.export import export
from tests.zoo.test_generate import make_recipe, make_run
from zoo import Run
from zoo.kept import keep_modalities


def write_run(folder: Path, kind: str, layers: Any = "dense", length: int = 40) -> Run:
    """A run folder, as training leaves it; the run is in float64, its weights are fp32 numbers."""
    run = make_run(kind, layers, length)
    run.model.float().double()
    folder.mkdir(parents=True)
    (folder / "recipe.yaml").write_text(yaml.safe_dump(json.loads(json.dumps(make_recipe(kind, layers, length)))))
    weights = {name: v.float() if v.is_floating_point() else v for name, v in run.model.state_dict().items()}
    save_file({name: value.contiguous() for name, value in weights.items()}, folder / "model.safetensors")
    keep_modalities(folder, run.modalities)
    return dataclasses.replace(run, folder=folder)


def exported(folder: Path, kind: str, layers: Any = "dense", length: int = 40, **options: Any) -> Run:
    """Write a run below `folder`, and its export into `folder`/out."""
    run = write_run(folder / "run", kind, layers, length)
    export(folder / "run", folder / "out", **options)
    return run


def opened(folder: Path, dtype: torch.dtype = torch.float64) -> Any:
    """The model and the processor of an export, as a stranger opens them."""
    import transformers

    import zoo.hf  # noqa: F401  registers

    out = folder / "out"
    model = transformers.AutoModelForCausalLM.from_pretrained(out, dtype=dtype)
    return model, transformers.AutoProcessor.from_pretrained(out)
