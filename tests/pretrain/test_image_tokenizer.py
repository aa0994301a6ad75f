"""Training an image tokenizer: it learns, its codes are used, dead ones are revived, its files are read again."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from pretrain import metrics
from pretrain.image_tokenizer import ImageTokenizerRecipe, evaluate, read_pictures, train
from tests.pretrain.data.samples import sample, write_shard
from tools import train_image_tokenizer
from zoo.config import UserError
from zoo.modalities import VQ
from zoo.modalities.vq import Autoencoder, AutoencoderConfig

VQ_16 = {"type": "vq", "codes": 16, "dimension": 4}


def ramp(seed: int) -> bytes:
    """A picture that grows brighter to one side."""
    across, down, level = np.random.RandomState(seed).uniform(-1, 1, 3)
    place = np.linspace(-1, 1, 8)
    grey = 127.5 + 60 * (across * place[None] + down * place[:, None]) + 60 * level
    content = io.BytesIO()
    Image.fromarray(grey.clip(0, 255).astype(np.uint8)).save(content, "PNG")
    return content.getvalue()


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    for split, first, count in (("train", 0, 40), ("val", 100, 8)):
        documents = [sample(f"{n:03d}", "words", ramp(n)) for n in range(first, first + count)]
        documents.append(sample("broken", b"no picture"))
        write_shard(folder / f"{split}.tar", documents)
    return folder


def recipe(shards: Path, folder: Path, **changes: Any) -> dict[str, Any]:
    return {
        "name": "small",
        "run_dir": str(folder),
        "sizes": [[8, 8]],
        "network": {"patch": 4, "width": 8, "quantizer": VQ_16},
        "data": {"path": str(shards)},
        "optimizer": {"lr": 3e-3, "steps": 40, "batch": 8, "log_every": 1, "device": "cpu"},
    } | changes


@pytest.mark.parametrize("quantizer", [VQ_16, {"type": "fsq", "levels": [4, 4]}], ids=["vq", "fsq"])
def test_it_learns_and_leaves_what_a_recipe_names(shards: Path, tmp_path: Path, quantizer: Any) -> None:
    changes = recipe(shards, tmp_path / "run", network={"patch": 4, "width": 8, "quantizer": quantizer})
    parsed = ImageTokenizerRecipe.parse(changes)
    said: list[str] = []
    values = train(parsed, said.append)
    assert said == [
        "training: 40 pictures; 1 broken documents passed over",
        "validation: 8 pictures; 1 broken documents passed over",
    ]
    losses = [item["loss"] for item in metrics.read(tmp_path / "run" / "metrics.jsonl") if "loss" in item]
    assert losses[-1] < losses[0]
    assert values["eval/psnr"] > 8 and 2 < values["eval/perplexity"] <= 16 and 0.2 < values["eval/used"] <= 1
    kind = VQ(parsed.modality)
    picture = parsed.modality.read(ramp(100))
    assert kind.decode(kind.encode(picture)).shape == (8, 8, 3)
    held_out = read_pictures(shards, "*val*.tar", "data.validation", parsed.modality, 100)
    assert evaluate(kind.model, held_out) == pytest.approx(values, rel=1e-5)
    shown = np.asarray(Image.open(tmp_path / "run" / "report" / "reconstructions.png"))
    assert shown.ndim == 3 and shown.shape[0] > 50
    with pytest.raises(UserError, match="image.safetensors is already there; choose another name or run_dir"):
        train(parsed, said.append)


def test_figures_are_what_they_say() -> None:
    """PSNR, perplexity and use against their definitions, on a network whose codes are known."""
    from pretrain.image_tokenizer import Pictures

    class Known(Autoencoder):
        def forward(self, x: torch.Tensor) -> Any:
            codes = torch.tensor([[[0, 1], [1, 3]]]).expand(len(x), -1, -1)
            return x + 0.2, codes, x.new_zeros(())

    model = Known(AutoencoderConfig.parse({"patch": 4, "width": 8, "quantizer": VQ_16}))
    values = evaluate(model, Pictures({(8, 8): np.full((3, 8, 8, 3), 100, np.uint8)}, []))
    assert values["eval/psnr"] == pytest.approx(20, abs=1e-4)  # 0.2 of 2 is a tenth
    share = np.array([0.25, 0.5, 0.25])
    assert values["eval/perplexity"] == pytest.approx(np.exp(-(share * np.log(share)).sum()))
    assert values["eval/used"] == 3 / 16


def test_dead_codes_are_revived() -> None:
    """Codes far from all squares are replaced with squares, so that they come into use."""
    torch.manual_seed(0)
    used = {}
    for dead_below in (0.0, 2.0):
        quantizer = VQ_16 | {"codes": 64, "dead_below": dead_below}
        model = Autoencoder(AutoencoderConfig.parse({"patch": 4, "width": 8, "quantizer": quantizer}))
        x = torch.rand(16, 3, 16, 16) * 2 - 1
        model(x)
        codebook = model.quantizer._codebook
        with torch.no_grad():  # all but one code point the same way
            codebook.embed[:, 1:] = torch.nn.functional.normalize(torch.ones_like(codebook.embed[:, 1:]), dim=-1)
            codebook.embed_avg.copy_(codebook.embed)
            codebook.cluster_size.fill_(1.0)
        for _ in range(12):
            codes = model(x)[1]
        used[dead_below] = len(codes.unique())
    assert used[2.0] > 2 * used[0.0]


def test_several_sizes_are_drawn_by_how_many_there_are(shards: Path) -> None:
    from pretrain.image_tokenizer import Pictures

    pictures = Pictures({(8, 8): np.zeros((9, 8, 8, 3), np.uint8), (4, 12): np.zeros((3, 4, 12, 3), np.uint8)}, [])
    drawn = [pictures.batch(step, 5, seed=0).shape for step in range(200)]
    assert 30 < sum(shape == (5, 4, 12, 3) for shape in drawn) < 70
    assert drawn == [pictures.batch(step, 5, seed=0).shape for step in range(200)]


def test_the_command(shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe(shards, tmp_path / "run"), sort_keys=False))
    assert train_image_tokenizer.main([str(path), "optimizer.steps=3"]) == 0
    printed = capsys.readouterr().out
    assert "of 16 codes" in printed and "patch: 4, codes: 16, type" not in printed.replace("{type: vq", "")
    line = yaml.safe_load(printed.splitlines()[-1])
    assert line["image"]["type"] == "vq" and VQ(
        VQ.Config.parse({k: v for k, v in line["image"].items() if k != "type"})
    )
    for change, message in (
        ("network.patch=3", "network: patch 3: must be a power of two"),
        ("network.quantizer={type: fsq, levels: [1, 2]}", "quantizer.levels: [1, 2]: each must be 2 or more"),
        ("network.quantizer={type: rvq}", "network.quantizer: "),
        ("data.train=nothing*.tar", "data.train"),
        ("optimizer.stepz=3", "optimizer.stepz: unknown key"),
    ):
        assert train_image_tokenizer.main([str(path), f"run_dir={tmp_path / 'other'}", change]) == 2
        assert message in capsys.readouterr().err
