"""How items stand in the stream, and that generation follows it."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import zoo
from tests.zoo.helpers import ATTENTION, DENSE
from zoo.generate import Choice, generate
from zoo.modalities import Positions, grammars, parse_modalities, vocabulary

PICTURE = {"image_size": 4, "patch": 2}
IDS = parse_modalities({"text": {"type": "bytes"}, "image": {"type": "patches", "codes": 5, **PICTURE}})
VECTORS = parse_modalities({"text": {"type": "bytes"}, "image": {"type": "continuous_patches", **PICTURE}})


def test_text_has_no_markers_and_any_number_of_positions():
    text = grammars(IDS)["text"]
    assert (text.begin, text.end, text.positions, text.choice) == (None, None, None, Choice(4, 260, 0))
    assert text.tokens([0, 255]).tolist() == [4, 259] and text.tokens([]).tolist() == []
    with pytest.raises(ValueError, match="how many positions an item takes is left to the model"):
        text.choices()


def test_an_image_stands_between_its_markers():
    image, words = grammars(IDS)["image"], vocabulary(IDS)
    assert image.positions == Positions(4, 4)
    tokens = image.tokens(np.array([0, 4, 2, 0]))
    assert (
        tokens.tolist() == [words.begin("image"), 260, 264, 262, 260, words.end("image")] and tokens.dtype == np.int32
    )
    assert image.choices() == [Choice(260, 265, 1)] * 4
    held = grammars(VECTORS)["image"]
    assert held.tokens(np.zeros((4, 12))).tolist() == [2, 260, 260, 260, 260, 3], "one id holds the places"
    with pytest.raises(ValueError, match=r"its positions carry Vectors\(width=12\), no ids"):
        held.choices()


def test_what_is_generated_is_an_image():
    """Whatever the model would rather say; and cached step by step it is the likeliest of the full forward."""
    words, image = vocabulary(IDS), grammars(IDS)["image"]
    config = {"modalities": ["text", "image"], "d_model": 8, "vocab_size": words.size}
    model = zoo.build("model", config | {"layers": [{"mixer": ATTENTION, "feedforward": DENSE}]}).double().eval()
    prompt = torch.tensor([[words.bos, 9, image.begin], [words.bos, 77, image.begin]])
    for temperature in (0.0, 1.0):
        new = generate(
            model, prompt, torch.zeros_like(prompt), image.choices(), temperature, torch.Generator().manual_seed(0)
        )
        assert new.shape == (2, 4) and bool(((new >= 260) & (new < 265)).all())
    greedy = generate(model, prompt, torch.zeros_like(prompt), image.choices(), 0)
    tokens = torch.cat([prompt, greedy], 1)
    modality = torch.tensor([[0, 0, 0, 1, 1, 1, 1]] * 2)
    logits = model(tokens, zoo.TokenContext.from_modality(modality, routing="causal"))
    assert torch.equal(logits[:, 2:-1, 260:265].argmax(-1) + 260, greedy)
