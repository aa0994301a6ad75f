"""What cannot be adapted is refused with the reason."""

from __future__ import annotations

import re
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


def test_a_text_only_model() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    with pytest.raises(UserError, match="LlamaForCausalLM has no image token .* text-only .* give a multimodal one"):
        adapt(LlamaForCausalLM(LlamaConfig(**small_text())), config())
    with pytest.raises(UserError, match="Linear is not a model of Transformers"):
        adapt(torch.nn.Linear(2, 2), config())


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
