"""What is trained beside adapters, and that it is saved with them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import zoo.adapt as za
from pretrain.finetune import model as models
from pretrain.finetune.recipe import FinetuneRecipe
from tests.pretrain.finetune.tuning import tuning_recipe, write_base
from tests.zoo.adapt.families import FAMILIES

WHOLE = ["multi_modal_projector", "lm_head", "layers.1.input_layernorm"]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_modules_trained_in_full_come_back_bit_for_bit(tmp_path: Path, precision: str) -> None:
    """They and the adapters alone get gradients and are saved; the base stays what it was."""
    write_base(tmp_path / "base")
    lora = {"r": 2, "alpha": 4.0, "modules_to_save": WHOLE}
    recipe = FinetuneRecipe.parse(
        tuning_recipe(tmp_path / "base", "data", tmp_path / "run", lora=lora, train={"precision": precision})
    )
    base = models.open_base(recipe)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    model = models.first_model(recipe, base, dtype).train()
    inputs = FAMILIES["llava"].inputs(model.get_base_model(), [[3, 5]])
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    moved = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    with torch.no_grad():
        for parameter in moved.values():
            parameter -= 0.1 * parameter.grad if parameter.grad.any() else 0.01
    whole = {name for name in moved if "modules_to_save.default." in name}
    assert all(any(part in name for name in whole) for part in WHOLE)
    assert all("lora_" in name or "mod_router" in name for name in moved.keys() - whole)

    folder = models.save(recipe, base, model.state_dict(), tmp_path / "out")
    again = za.load_adapted(folder)
    assert torch.equal(again(**inputs).logits, model.eval()(**inputs).logits)
    there = dict(again.named_parameters())
    assert all(torch.equal(there[name], parameter) for name, parameter in moved.items())
    saved = load_file(folder / "adapter_model.safetensors")
    assert len(saved) == len([name for name in moved if "mod_router" not in name])
    assert torch.equal(
        saved["base_model.model.lm_head.weight"], there["base_model.model.lm_head.modules_to_save.default.weight"]
    )
