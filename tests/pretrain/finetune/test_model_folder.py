"""Folders of models that somebody else wrote: opened without a question, and nothing of them runs."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest

from pretrain.finetune import model as models
from pretrain.finetune.model_folder import open_model
from pretrain.finetune.recipe import FinetuneRecipe
from tests.pretrain.finetune.tuning import tuning_recipe, write_base
from tests.zoo.adapt.test_folder import Payload, nothing_outside, plant
from zoo import UserError

__all__ = ["nothing_outside"]


@pytest.mark.usefixtures("nothing_outside")
def test_code_of_a_base_never_runs(tmp_path: Path) -> None:
    """A known kind of model opens without it; one that is known by its code alone is refused."""
    mark, base = tmp_path / "mark", write_base(tmp_path / "base")
    plant(base, mark)
    assert "auto_map" in json.loads((base / "config.json").read_text())
    open_model(str(base))
    recipe = FinetuneRecipe.parse(tuning_recipe(base, "data", tmp_path / "run"))
    models.first_model(recipe, models.open_base(recipe))
    (base / "model.safetensors").unlink()
    with open(base / "pytorch_model.bin", "wb") as file:
        pickle.dump({"lm_head.weight": Payload(mark)}, file)
    with pytest.raises(UserError, match="cannot be opened"):
        open_model(str(base))
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"model_type": "mine"}))
    with pytest.raises(UserError, match="cannot be opened"):
        open_model(str(base))
    assert not mark.exists()


@pytest.mark.usefixtures("nothing_outside")
def test_adapters_do_not_choose_their_base(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base")
    (base / "adapter_config.json").write_text('{"base_model_name_or_path": "some/model", "peft_type": "LORA"}')
    with pytest.raises(UserError, match="holds adapters beside a model"):
        open_model(str(base))
    (base / "config.json").unlink()
    with pytest.raises(UserError, match="holds only adapters, not the model they belong to"):
        open_model(str(base))
