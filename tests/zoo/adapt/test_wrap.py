"""What cannot be adapted is refused with the reason."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.zoo.adapt.families import FAMILIES, small_text
from tests.zoo.adapt.test_conformance import METHODS, ROWS
from zoo import ConfigError, UserError
from zoo.adapt import adapt, adaptation, restore

LLAVA = FAMILIES["llava"]


def config(**changes: Any) -> dict[str, Any]:
    return {"layers": [1, 2], "capacity": {"type": "constant", "value": 0.4}, **METHODS["p_mod"], **changes}


def test_without_transformers() -> None:
    """The error says what to install."""
    code = """import importlib.util
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "transformers" else find(name, *rest)
import zoo.adapt"""
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[3])
    assert ended.stderr.endswith("zoo.adapt needs Transformers: pip install -e .[adapt]\n")


def test_a_text_only_model() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    with pytest.raises(UserError, match="LlamaForCausalLM has no image token .* text-only .* give a multimodal one"):
        adapt(LlamaForCausalLM(LlamaConfig(**small_text())), config())
    with pytest.raises(UserError, match="Linear is not a model of Transformers"):
        adapt(torch.nn.Linear(2, 2), config())


def instructblip() -> Any:
    import transformers

    config = transformers.InstructBlipConfig(
        vision_config={"num_hidden_layers": 1},
        qformer_config={"num_hidden_layers": 1},
        text_config={"model_type": "opt", **small_text()},
        image_token_index=63,
    )
    return transformers.InstructBlipForConditionalGeneration(config)


def of_class(name: str, config: str, **options: Any) -> Any:
    import transformers

    return getattr(transformers, name)(getattr(transformers, config)(**options))


def gemma4_sharing() -> Any:
    """Layers 2 and 3 read the keys of 0 and 1."""
    kinds = ["sliding_attention", "full_attention"] * 2
    return FAMILIES["gemma4"].build(layer_types=kinds, num_kv_shared_layers=2)


CONVOLUTIONS = {"model_type": "lfm2", **small_text(), "layer_types": ["full_attention", "conv"] * 2}
REFUSED: dict[str, tuple[Any, str]] = {
    "instructblip": (instructblip, "InstructBlipForConditionalGeneration.generate calls its OPTForCausalLM with embed"),
    "blip2": (
        lambda: of_class("Blip2ForConditionalGeneration", "Blip2Config", image_token_index=63),
        "Blip2ForConditionalGeneration.generate calls its OPTForCausalLM with embeddings",
    ),
    "blip2 as it is": (
        lambda: of_class("Blip2ForConditionalGeneration", "Blip2Config"),
        "sees pictures, but no id stands for their tokens",
    ),
    "kosmos2": (
        lambda: of_class("Kosmos2ForConditionalGeneration", "Kosmos2Config"),
        "Kosmos2ForConditionalGeneration sees pictures, but no id stands for their tokens (config.image_token_id)",
    ),
    "mllama": (
        lambda: of_class("MllamaForConditionalGeneration", "MllamaConfig"),
        "meets pictures by cross-attention (config.cross_attention_layers), so that no token of its stream",
    ),
    "idefics": (
        lambda: of_class("IdeficsForVisionText2Text", "IdeficsConfig"),
        "meets pictures by cross-attention (config.cross_layer_interval)",
    ),
    "florence2": (
        lambda: of_class("Florence2ForConditionalGeneration", "Florence2Config"),
        "meets pictures by cross-attention (it has an encoder, to which pictures are given)",
    ),
    "t5gemma2": (
        lambda: of_class("T5Gemma2ForConditionalGeneration", "T5Gemma2Config"),
        "(it has an encoder, to which pictures are given)",
    ),
    "llama4": (
        lambda: of_class("Llama4ForConditionalGeneration", "Llama4Config"),
        "a Llama4TextAttention takes a token's place to be its number among those it is given",
    ),
    "gemma4": (gemma4_sharing, "layer 1: later layers read its keys and values (num_kv_shared_layers)"),
    "lfm2": (
        lambda: of_class("Lfm2VlForConditionalGeneration", "Lfm2VlConfig", text_config=CONVOLUTIONS),
        "layers: 1 have a sliding window or no cache of their own",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_families_that_cannot_be_adapted(name: str) -> None:
    """Each with its own reason, and the model is left as it was."""
    build, message = REFUSED[name]
    with torch.device("meta"):
        model = build()
    before = [type(module) for module in model.modules()]
    with pytest.raises(UserError, match=re.escape(message)):
        adapt(model, config(layers=[1]))
    assert [type(module) for module in model.modules()] == before


def test_what_a_layer_must_have() -> None:
    """The reason names the key of the config to change, and comes before anything is changed."""
    with torch.device("meta"):
        model = LLAVA.build()
    layer = model.get_decoder().layers[2]
    del layer.input_layernorm
    with pytest.raises(UserError, match="router.input: norm: a LlamaDecoderLayer has no input_layernorm"):
        adapt(model, config(router={"input": "norm"}))
    del layer.mlp
    with pytest.raises(UserError, match="set gate.branch: block"):
        adapt(model, config())
    assert not [name for name, _ in model.named_modules() if "mod_router" in name]


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"layers": [1, 4]}, "layers: 4 is out of range; the decoder has layers 0 to 3; leave it out"),
        ({"layers": [3]}, "3 is the last layer"),
        ({"layers": [0]}, "adapt.layers: [0]: layer 0 stays dense"),
    ],
)
def test_layers(changes: dict[str, Any], message: str) -> None:
    model = LLAVA.build()
    with pytest.raises(ConfigError, match=re.escape(message)):
        adapt(model, config(**changes))
    assert adaptation(model) is None, "a refused model is left as it was"


def test_sliding_windows() -> None:
    """Windows of the family's own kind: Mistral's is in every layer."""
    from transformers import CLIPVisionConfig, LlavaConfig, LlavaForConditionalGeneration, MistralConfig

    vision = CLIPVisionConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    text = MistralConfig(**small_text(), sliding_window=8)
    with torch.device("meta"):
        model = LlavaForConditionalGeneration(LlavaConfig(vision_config=vision, text_config=text, image_token_index=63))
    with pytest.raises(UserError, match=r"layers: 1, 2 have a sliding window .* can route none of its layers\)"):
        adapt(model, config())
    with torch.device("meta"):
        model = FAMILIES["gemma3"].build()
    with pytest.raises(UserError, match=r"layers: 3 have a sliding window .* can route 1, 2\)"):
        adapt(model, config(layers={"first": 1}, last_layer=True))


def test_videos_of_a_model_without_any() -> None:
    with pytest.raises(UserError, match="candidates: video, but LlavaForConditionalGeneration has no video token"):
        adapt(LLAVA.build(), config(candidates="video"))


def test_patched_and_adapted_models() -> None:
    model = LLAVA.build()
    model.get_decoder().layers[2].forward = lambda *args: None
    with pytest.raises(UserError, match="forward of layer 2 was patched"):
        adapt(model, config())
    del model.get_decoder().layers[2].forward
    adapt(model, config())
    with pytest.raises(UserError, match=r"adapted already; zoo\.adapt\.restore"):
        adapt(model, config())
    assert adaptation(model).layers == [1, 2] and adaptation(restore(model)) is None
    assert restore(model) is model


def test_images_of_another_id() -> None:
    model = adapt(LLAVA.build(), config())
    inputs = LLAVA.inputs(model, ROWS)
    with pytest.raises(
        UserError, match="has pictures .* id 63 never occurs in input_ids; .* the model's own processor"
    ):
        model(**inputs | {"input_ids": inputs["input_ids"].clamp(max=62)})
