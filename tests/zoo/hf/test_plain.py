"""Dense runs as models of Transformers' own classes: equal logits, or the part that prevents it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from pretrain.export import export
from tests.zoo.hf.exports import exported, opened, write_run
from zoo import UserError

FF = {"feedforward": {"type": "dense", "d_ff": 24}}
LAYERS: dict[str, dict[str, Any]] = {
    "LlamaForCausalLM": {"mixer": {"type": "attention", "heads": 4, "kv_heads": 2, "rope_theta": 500.0}, **FF},
    "Qwen3ForCausalLM": {"mixer": {"type": "attention", "heads": 2, "head_dim": 6, "qk_norm": True}, **FF},
}


@torch.no_grad()
@pytest.mark.parametrize("architecture", LAYERS)
def test_logits_are_equal(tmp_path: Path, architecture: str) -> None:
    run = exported(tmp_path, "ids", [LAYERS[architecture]] * 2)
    done = export(tmp_path / "run", tmp_path / "plain", plain=True)
    assert done.architecture == architecture and done.tokenizer
    ours, processor = opened(tmp_path)
    with torch.random.fork_rng():
        plain, info = transformers.AutoModelForCausalLM.from_pretrained(
            tmp_path / "plain", dtype=torch.float64, output_loading_info=True
        )
    assert type(plain).__name__ == architecture and not any(info.values())
    inputs = processor([["ab", "c"], ["a longer text"]])
    expected, found = ours(**inputs).logits, plain(**inputs).logits
    seen = inputs["attention_mask"].bool()
    # Transformers makes its rotary tables in fp32
    torch.testing.assert_close(found[seen], expected[seen], rtol=0, atol=2e-5)
    assert run.model.cost(8).flops[0] > 0
    ours.config.grammar = False
    assert torch.equal(plain.generate(**inputs, max_new_tokens=8), ours.generate(**inputs, max_new_tokens=8))
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "plain")
    assert tokenizer(["a longer text"])["input_ids"] == processor([["a longer text"]])["input_ids"].tolist()


DENSE = LAYERS["LlamaForCausalLM"]
PREVENTS: dict[str, tuple[str, list[dict[str, Any]], str]] = {
    "mamba": ("ids", [DENSE, {"mixer": {"type": "mamba"}}], "model.layers[1].mixer.type: mamba: Llama has attention"),
    "moma": (
        "ids",
        [DENSE | {"feedforward": {"type": "moma", "experts": {"text": 1, "x": 1}, "d_ff": 8}}],
        "model.layers[0].feedforward: moma: Llama has one SwiGLU",
    ),
    "no feedforward": ("ids", [{"mixer": DENSE["mixer"]}], "model.layers[0].feedforward: None"),
    "depth": ("ids", [DENSE, DENSE | {"depth": {"type": "mod"}}], "model.layers[1].depth: mod: every token passes"),
    "post": ("ids", [DENSE | {"norm": "post"}], "model.layers[0].norm: post: Llama normalises before"),
    "untied": ("ids", [DENSE | {"untied_norms": True}], "model.layers[0].untied_norms: true"),
    "untied weights": (
        "ids",
        [DENSE | {"feedforward": FF["feedforward"] | {"untied": True}}],
        "model.layers[0].feedforward.untied: true",
    ),
    "unlike": ("ids", [DENSE, LAYERS["Qwen3ForCausalLM"]], "model.layers[1].mixer: differs from the first layer's"),
    "vectors": ("vectors", [DENSE], "modalities.x: carries no ids"),
}


@pytest.mark.parametrize("what", PREVENTS)
def test_what_prevents_it_is_said(tmp_path: Path, what: str) -> None:
    kind, layers, reason = PREVENTS[what]
    write_run(tmp_path / "run", kind, layers)
    with pytest.raises(UserError) as caught:
        export(tmp_path / "run", tmp_path / "plain", plain=True)
    assert str(caught.value).startswith(reason.split(":")[0]) and reason in str(caught.value)
    assert str(caught.value).endswith("leave out --plain") and not (tmp_path / "plain").exists()
