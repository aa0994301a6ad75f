"""`python -m tools.examples.make_llava`: a folder that Transformers' own classes open.

Its first weights are what they claim to be.
"""

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

from pretrain import recipe
from pretrain.finetune.prompts import IGNORED, encode
from pretrain.finetune.questions import read_questions
from tools.examples import make_llava
from tools.examples.make_llava import LlavaFolderConfig

SIZES: dict[str, Any] = {
    "image_size": 32,
    "patch": 4,
    "vision": {"d_model": 24, "layers": 2, "heads": 3, "d_ff": 48},
    "decoder": {"d_model": 48, "layers": 3, "heads": 3, "d_ff": 64, "positions": 128},
}

RECIPES = Path(__file__).parents[3] / "recipes" / "examples" / "llava"
CAPTIONS = [
    "A dog\u2019s \u201cfirst\u201d walk, 3.5 km; a DOG\u2019S last.",
    "  Two lines:\n\n the Caf\u00e9 of Brnabi\u0107 \u2014 \u65e5\u672c \U0001f600\ufffd ",
    "\nA dog\u00a0walks\twith 2 dogs & <b>.",
]


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
    assert text == "frame 1 <image>frame 2 <image>How many sixes?\n"


@pytest.fixture(scope="module")
def captions(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("captions")
    (folder / "a.png").write_bytes((data / "a.png").read_bytes())
    turns = [{"question": "Describe the picture. ", "answer": caption} for caption in CAPTIONS]
    lines = [{"image": "a.png", **turn} for turn in turns] + [{"image": "a.png", "turns": turns}]
    (folder / "train.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_pieces_of_words(captions: Path, tmp_path: Path) -> None:
    make_llava.write(LlavaFolderConfig.parse(SIZES | {"vocabulary": 300}), captions, tmp_path)
    processor, model = AutoProcessor.from_pretrained(tmp_path), AutoModelForImageTextToText.from_pretrained(tmp_path)
    tokenizer = processor.tokenizer
    assert len(tokenizer) == model.config.text_config.vocab_size == 300
    assert tokenizer.convert_ids_to_tokens(range(5)) == list(make_llava.SPECIAL.values())
    ids = tokenizer("Unheard \u00df </s>").input_ids
    assert tokenizer.decode(ids) == "<s>Unheard \u00df </s>" and tokenizer.unk_token_id not in ids
    assert len(tokenizer.tokenize("Describe the picture.")) < 10
    for question in read_questions(captions):
        whole, prompt = (encode(question, processor, answers) for answers in (True, False))
        start = prompt["input_ids"].shape[1]
        assert torch.equal(whole["input_ids"][:, :start], prompt["input_ids"])
        labels = whole["labels"][0]
        said = "".join(f"{answer}</s>" for _, answer in question.turns)
        assert tokenizer.decode(labels[labels != IGNORED]) == said
        assert torch.equal(labels[start:], whole["input_ids"][0, start:]), "the last answer is not all of the end"


def test_same_texts_same_pieces(captions: Path) -> None:
    config, texts = LlavaFolderConfig.parse(SIZES | {"vocabulary": 300}), make_llava.texts_of(captions)
    first, second = (make_llava.make_tokenizer(config, texts).to_str() for _ in range(2))
    assert first == second
    assert make_llava.make_tokenizer(config, ["ab"]).get_vocab_size() == 262  # all there is to learn


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
        (["vocabulary=260"], "vocabulary: 260: must be greater than or equal to 261"),
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


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_recipes(path: Path) -> None:
    config = LlavaFolderConfig.parse(recipe.read(path))
    config.check()
    with torch.device("meta"):
        model = make_llava.make_model(config, config.vocabulary or 100)
    embedding = model.model.vision_tower.get_input_embeddings()
    assert embedding.kernel_size == (config.patch,) * 2 and config.image_tokens in (64, 256)
