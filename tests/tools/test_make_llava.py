"""`python -m tools.make_llava`: a folder that Transformers' own classes open, whose first weights are what they claim."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, LlavaForConditionalGeneration, LlavaProcessor

from pretrain.data.prompts import IGNORED, encode
from pretrain.data.questions import read_questions
from tools import make_llava
from tools.make_llava import LlavaFolderConfig

SIZES: dict[str, Any] = {
    "image_size": 32,
    "patch": 4,
    "vision": {"d_model": 24, "layers": 2, "heads": 3, "d_ff": 48},
    "decoder": {"d_model": 48, "layers": 3, "heads": 3, "d_ff": 64, "positions": 128},
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    grey = np.random.default_rng(0).integers(0, 256, (32, 32), np.uint8)
    Image.fromarray(grey).save(folder / "a.png")
    turns = [("What is at row 2, column 3?", "seven"), ("Which row has an eight?", "row 2"), ("How many sixes?", "0")]
    line = {"image": "a.png", "turns": [{"question": asked, "answer": answer} for asked, answer in turns]}
    (folder / "train.jsonl").write_text(json.dumps(line) + "\n")
    return folder


@pytest.fixture(scope="module")
def folder(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("llava") / "model"
    config = out.parent / "sizes.yaml"
    config.write_text(yaml.safe_dump(SIZES))
    assert make_llava.main([str(config), str(data), str(out)]) == 0
    return out


def test_transformers_opens_it(folder: Path) -> None:
    model, processor = AutoModelForImageTextToText.from_pretrained(folder), AutoProcessor.from_pretrained(folder)
    assert isinstance(model, LlavaForConditionalGeneration) and isinstance(processor, LlavaProcessor)
    picture = Image.fromarray(np.zeros((32, 32), np.uint8)).convert("RGB")
    prompt = processor.apply_chat_template(
        [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "How many sixes?"}]}], tokenize=False
    )
    inputs = processor(text=prompt, images=picture, return_tensors="pt")
    assert int((inputs["input_ids"] == model.config.image_token_id).sum()) == 64
    assert processor.decode(model.generate(**inputs, max_new_tokens=2, min_new_tokens=2, do_sample=False)[0, -2:])
    assert model.config.eos_token_id == processor.tokenizer.eos_token_id != processor.tokenizer.pad_token_id


def test_words(folder: Path) -> None:
    tokenizer = AutoProcessor.from_pretrained(folder).tokenizer
    tokens = tokenizer.tokenize("What is at ROW 2, column 3?")
    assert tokens == ["what", "is", "at", "row 2, column 3"]
    assert tokenizer.tokenize("Which row has an eight?") == ["which", "row", "has", "an", "eight"]
    ids = tokenizer("which row has an eight</s>").input_ids
    assert tokenizer.decode(ids) == "<s> which row has an eight </s>"
    assert ids[0] == tokenizer.bos_token_id and ids[-1] == tokenizer.eos_token_id
    assert tokenizer("unheard").input_ids[1:] == [tokenizer.unk_token_id]


def test_the_trainer_encodes_it(folder: Path, data: Path) -> None:
    processor = AutoProcessor.from_pretrained(folder)
    sample = encode(read_questions(data)[0], processor)
    said = sample["labels"][sample["labels"] != IGNORED]
    assert processor.tokenizer.decode(said) == "seven </s> row 2 </s> 0 </s>"
    grey = torch.tensor(np.asarray(Image.open(data / "a.png"))) / 255
    torch.testing.assert_close(sample["pixel_values"], grey.expand(1, 3, 32, 32))


def test_several_images_are_frames(folder: Path) -> None:
    processor = AutoProcessor.from_pretrained(folder)
    content = [{"type": "image"}, {"type": "image"}, {"type": "text", "text": "How many sixes?"}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], tokenize=False)
    assert text == "frame 1 <image>frame 2 <image>How many sixes? "


def test_same_seed_same_weights() -> None:
    config = LlavaFolderConfig.parse(SIZES)
    state = torch.get_rng_state()
    first, second = (make_llava.make_model(config, 20) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), state)
    other = make_llava.make_model(config.model_copy(update={"seed": 1}), 20)
    for name, weight in first.named_parameters():
        assert torch.equal(weight, second.get_parameter(name)), name
    assert not torch.equal(first.lm_head.weight, other.lm_head.weight)


def test_towers_heads_prefer_near_patches() -> None:
    near, anywhere = (
        _mass_on_neighbours(LlavaFolderConfig.parse(SIZES | {"vision": SIZES["vision"] | {"local": local}}))
        for local in (2.0, 0.0)
    )
    assert near > 2 * anywhere


def _mass_on_neighbours(config: LlavaFolderConfig) -> float:
    tower = make_llava.make_model(config, 20).model.vision_tower
    tower.set_attn_implementation("eager")
    seen = tower(torch.rand(2, 3, 32, 32), output_attentions=True).attentions[0][
        :, :, 1:, 1:
    ]  # without the class token
    place = torch.stack(torch.meshgrid(torch.arange(8), torch.arange(8), indexing="ij"), -1).reshape(64, 2)
    near = (place[:, None] - place[None]).abs().amax(-1) <= 1
    return (seen * near).sum(-1).mean().item()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["patch=5"], "patch: 5 must divide image_size"),
        (["decoder.heads=5"], "decoder.d_model: 48 must be a multiple of 2 * heads"),
        (["vision.heads=5"], "vision.d_model: 24 must be a multiple of heads"),
        (["decoder.positions=64"], "decoder.positions: 64 must exceed the 64 tokens"),
        (["decoder.depth=2"], "decoder.depth: unknown key"),
    ],
)
def test_bad_sizes(overrides: list[str], message: str, data: Path, tmp_path: Path, capsys: Any) -> None:
    config = tmp_path / "sizes.yaml"
    config.write_text(yaml.safe_dump(SIZES))
    assert make_llava.main([str(config), str(data), str(tmp_path / "out"), *overrides]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_folder_with_a_model_is_kept(folder: Path, data: Path, tmp_path: Path, capsys: Any) -> None:
    config = folder.parent / "sizes.yaml"
    assert make_llava.main([str(config), str(data), str(folder)]) == 2
    assert "holds a model already" in capsys.readouterr().err
    assert make_llava.main([str(config), str(tmp_path), str(tmp_path / "out")]) == 2
    assert "train.jsonl" in capsys.readouterr().err
