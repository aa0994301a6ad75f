"""Pictures of kept patches: those that a model of each family decided to keep, where they are, in the colours it
saw."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

import zoo.adapt as za
from pretrain.finetune import routing_pictures
from pretrain.finetune.model_folder import open_adapted
from pretrain.finetune.prompts import encode
from pretrain.finetune.questions import Question, read_questions
from tests.pretrain.finetune.processors import LLAVA_TEMPLATE, llava_processor, other_processors, write_questions
from tests.zoo.adapt.families import FAMILIES, chameleon, gemma3, llava, paligemma
from tests.zoo.adapt.pictures import IMAGE as TOKEN
from zoo.adapt.family import IMAGE, picture_ids
from zoo.config import UserError

LINES = [
    {"image": "0.png", "question": "how many $?", "answer": "two"},
    {"images": ["1.png", "2.png"], "question": "are they equal?", "answer": "no"},
]
ROUTED = {"layers": [1, 2], "capacity": {"type": "list", "values": [0.5, 0.25]}}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("adapted")
    za.save_adapted(za.adapt(llava(), ROUTED), folder)
    llava_processor(LLAVA_TEMPLATE).save_pretrained(folder)
    return folder


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_questions(tmp_path / "data", LINES, "validation")


OTHERS = {
    "PaliGemmaProcessor": lambda: paligemma(vocab_size=1300),  # it adds 1152 tokens of its own
    "Gemma3Processor": lambda: gemma3(vocab_size=66),
    "ChameleonProcessor": chameleon,
}


@pytest.mark.parametrize("name", ["LlavaProcessor", *OTHERS])
def test_what_is_drawn_is_what_was_decided(model: Path, data: Path, name: str, tmp_path: Path) -> None:
    if name in OTHERS:
        torch.manual_seed(0)
        model = tmp_path / name
        za.save_adapted(za.adapt(OTHERS[name](), ROUTED), model)
        other_processors(tokens=16)[name].save_pretrained(model)
    adapted, processor = open_adapted(model, None, "cpu")
    assert type(processor).__name__ == name
    question = read_questions(data, "validation")[1]
    pictures, load = routing_pictures.looked_at(adapted, processor, question)
    inputs, trace = encode(question, processor, answers=False), za.Trace()
    with torch.no_grad():
        adapted(**inputs, mod_trace=trace)
    (image,) = [token for token, kind in picture_ids(adapted.config, "").items() if kind == IMAGE]
    places = (inputs["input_ids"][0] == image).nonzero()[:, 0]
    for layer in (1, 2):
        keep = trace.decisions[f"layers.{layer}"].kept[0]
        drawn = np.concatenate([picture.kept[layer].reshape(-1) for picture in pictures])
        assert drawn.tolist() == keep[places].tolist() and pictures[0].kept[layer].shape == (4, 4)
    assert load.tolist() == [[0, 0], [16, 32], [8, 32], [0, 0]]
    side = pictures[1].image.shape[0]
    with Image.open(question.images[1]) as image:
        values = np.asarray(image.convert("RGB").resize((side, side), processor.image_processor.resample)) / 255
    assert np.abs(pictures[1].image - values).max() < 0.002, "normalisation is undone"


def test_a_family_whose_processor_is_not_to_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    """InternVL's wants torchvision: inputs made by hand, of a row with two images."""
    family = FAMILIES["internvl"]
    model = za.adapt(family.build(), ROUTED)
    inputs, trace = family.inputs(model, [[2, 3, 4]]), za.Trace()
    monkeypatch.setattr(routing_pictures, "encode", lambda *_, **__: inputs)
    processor = SimpleNamespace(image_processor=SimpleNamespace(do_normalize=False, do_rescale=False))
    pictures, load = routing_pictures.looked_at(model, processor, Question((), (("what?", ""),), "a line"))
    with torch.no_grad():
        model(**inputs, mod_trace=trace)
    keep = trace.decisions["layers.1"].kept[0, inputs["input_ids"][0] == TOKEN]
    assert np.concatenate([picture.kept[1].reshape(-1) for picture in pictures]).tolist() == keep.tolist()
    assert load.tolist() == [[0, 0], [16, 32], [8, 32], [0, 0]] and pictures[0].image.shape == (16, 16, 3)


@pytest.mark.parametrize("name", ["llava", "paligemma", "gemma3", "internvl"])
def test_image_tokens_are_in_reading_order(name: str) -> None:
    """In a tower whose layers let each patch be itself, a change of one patch changes the token at its place most."""
    torch.manual_seed(0)
    model = FAMILIES[name].build()
    with torch.no_grad():
        for part, parameter in model.model.vision_tower.named_parameters():
            if any(last in part for last in ("out_proj", "projection_layer", "fc2")):
                parameter.zero_()
        if name == "gemma3":
            model.model.multi_modal_projector.mm_input_projection_weight.normal_()
    side = model.config.vision_config.image_size
    side, cell = (side, side // 4) if isinstance(side, int) else (side[0], side[0] // 4)
    pixels = torch.randn(1, 3, side, side)

    def tokens(values: torch.Tensor) -> torch.Tensor:
        features = model.model.get_image_features(values).pooler_output
        return torch.cat(list(features)).reshape(16, -1)

    for place in range(16):
        row, column = (cell * each for each in divmod(place, 4))
        changed = pixels.clone()
        changed[..., row : row + cell, column : column + cell] += torch.randn(3, cell, cell)
        assert int((tokens(changed) - tokens(pixels)).abs().sum(1).argmax()) == place


def test_skipped_patches_are_dark(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figures: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda self, *args, **options: figures.append(self))
    kept = np.array([[True, False], [False, False]])
    picture = routing_pictures.RoutedPicture(np.ones((8, 8, 3)), {3: kept, 5: ~kept}, "which?")
    routing_pictures.draw(picture, tmp_path / "x.png")
    image, first, second = [axis for axis in figures[0].axes if axis.images]
    assert [axis.get_title() for axis in (image, first, second)] == [
        "image",
        "layer 3: 1 of 4 kept",
        "layer 5: 3 of 4 kept",
    ]
    assert (np.asarray(first.images[1].get_array())[..., 3] > 0).tolist() == (~kept).tolist()
    assert first.images[1].get_extent() == first.images[0].get_extent()


@pytest.mark.parametrize(
    ("tokens", "pixels"), [(15, (1, 3, 8, 8)), (33, (2, 3, 8, 8)), (16, (64, 96)), (0, (1, 3, 8, 8))]
)
def test_no_square_grid(tokens: int, pixels: tuple[int, ...]) -> None:
    with pytest.raises(UserError, match=f"a line: {tokens} image tokens of llava .* not one square grid"):
        routing_pictures.grid_side(tokens, pixels, "llava", "a line")
