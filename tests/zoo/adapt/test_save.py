"""Saved adapters hold adapters, routers and the hash of their base; what has changed is refused."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from tests.zoo.adapt.families import FAMILIES
from tests.zoo.adapt.test_conformance import METHODS, ROWS
from zoo import UserError
from zoo.adapt import adapt, adaptation, load_adapted, routers, save_adapted
from zoo.adapt.save import weights_hash

LLAVA = FAMILIES["llava"]


def config(method: str = "gamma_mod", **changes: Any) -> dict[str, Any]:
    return {"layers": [1, 2], "capacity": {"type": "constant", "value": 0.4}, **METHODS[method], **changes}


@pytest.fixture
def base(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    LLAVA.build().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def with_adapters(base: Path, method: str) -> nn.Module:
    from peft import LoraConfig, get_peft_model
    from transformers import LlavaForConditionalGeneration

    model = adapt(LlavaForConditionalGeneration.from_pretrained(base), config(method))
    lora = LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    return get_peft_model(model, lora).eval()


@pytest.mark.parametrize("method", ["gamma_mod", "p_mod"])
def test_adapters_and_routers(base: Path, tmp_path: Path, method: str) -> None:
    model = with_adapters(base, method)
    with torch.no_grad():
        for _, router in routers(model):
            router.weight += 1.0
    inputs = LLAVA.inputs(model, ROWS)
    before = model(**inputs).logits
    save_adapted(model, tmp_path / "out")
    assert not list((tmp_path / "out").glob("model*.safetensors")), "the base stays where it is"
    again = load_adapted(tmp_path / "out")
    assert torch.equal(again(**inputs).logits, before)
    assert adaptation(again) == adaptation(model)
    moved = base.rename(tmp_path / "moved")
    assert torch.equal(load_adapted(tmp_path / "out", base=moved)(**inputs).logits, before)


def test_a_changed_base_is_refused(base: Path, tmp_path: Path) -> None:
    from transformers import LlavaForConditionalGeneration

    model = with_adapters(base, "gamma_mod")
    save_adapted(model, tmp_path / "out")
    other = LlavaForConditionalGeneration.from_pretrained(base)
    other.lm_head.weight.data[3, 4] += 1e-6
    other.save_pretrained(tmp_path / "other")
    found, expected = weights_hash(other)[:12], weights_hash(model)[:12]
    out, changed = (re.escape(str(tmp_path / name)) for name in ("out", "other"))
    said = (
        f"^{out}: made for .* weights {expected}…, but {changed} .* has {found}…; give the unchanged base with base=$"
    )
    with pytest.raises(UserError, match=said):
        load_adapted(tmp_path / "out", base=tmp_path / "other")


def test_the_hash_is_of_the_base_alone(base: Path) -> None:
    from transformers import LlavaForConditionalGeneration

    plain = LlavaForConditionalGeneration.from_pretrained(base)
    expected = weights_hash(plain)
    assert weights_hash(with_adapters(base, "p_mod")) == expected
    assert weights_hash(plain.bfloat16()) != expected


@pytest.mark.parametrize("now, former", [("constant", 0.4), ("list", [0.4, "1/4"])])
def test_a_folder_from_before_capacities_had_their_name(base: Path, tmp_path: Path, now: str, former: Any) -> None:
    from transformers import LlavaForConditionalGeneration

    key = "values" if now == "list" else "value"
    capacity = {"type": now, key: former}
    model = adapt(LlavaForConditionalGeneration.from_pretrained(base), config(capacity=capacity))
    save_adapted(model, tmp_path / "out")
    file = tmp_path / "out" / "mod_config.json"
    about = json.loads(file.read_text())
    assert about["version"] == 2 and about["adapt"]["capacity"] == capacity
    about["adapt"]["capacity"] = {"type": now, "keep": former}
    file.write_text(json.dumps(about | {"version": 1}))
    assert adaptation(load_adapted(tmp_path / "out")) == adaptation(model)
    file.write_text(json.dumps(about))
    with pytest.raises(UserError, match=rf"mod_config\.json: adapt\.capacity\.{now}: keep is called {key} now"):
        load_adapted(tmp_path / "out")


def test_what_cannot_be_saved_or_loaded(base: Path, tmp_path: Path) -> None:
    from transformers import LlavaForConditionalGeneration

    model = LlavaForConditionalGeneration.from_pretrained(base)
    with pytest.raises(UserError, match="is not adapted"):
        save_adapted(model, tmp_path / "out")
    with pytest.raises(UserError, match=r"no mod_config\.json"):
        load_adapted(base)
    save_adapted(adapt(model, config()), tmp_path / "out")
    about = json.loads((tmp_path / "out" / "mod_config.json").read_text())
    changed = about | {"adapt": about["adapt"] | {"router": about["adapt"]["router"] | {"shared": False}}}
    (tmp_path / "out" / "mod_config.json").write_text(json.dumps(changed))
    with pytest.raises(UserError, match=r"mod_routers\.safetensors has .* shapes must agree"):
        load_adapted(tmp_path / "out")
    (tmp_path / "out" / "mod_config.json").write_text(json.dumps(about | {"version": 9}))
    with pytest.raises(UserError, match="version 9"):
        load_adapted(tmp_path / "out")
    (tmp_path / "out" / "mod_config.json").write_text(json.dumps(about))
    weights = load_file(tmp_path / "out" / "model.safetensors")
    del weights[next(name for name in weights if name.endswith("layers.0.mlp.up_proj.weight"))]
    save_file(weights, tmp_path / "out" / "model.safetensors", {"format": "pt"})
    with pytest.raises(
        UserError, match=r"out' has no weights model\.language_model\.layers\.0\.mlp\.up_proj\.weight \(1 are"
    ):
        load_adapted(tmp_path / "out")
