"""`python -m tools.describe`: figures for programs, a tree for people, memory by ZeRO stage; nothing is allocated."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import zoo
from pretrain import recipe as recipes
from pretrain.describe import blueprint
from tests.pretrain.runs import write_recipe
from tools.describe import __main__ as describe
from tools.describe import tree


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return write_recipe(tmp_path, "nowhere", tmp_path / "run")


def figures(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> dict[str, Any]:
    assert describe.main([*map(str, arguments), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_figures_are_the_models(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    facts = figures(capsys, file)
    model: Any = zoo.build("model", recipes.load(file).model, seed=0)
    cost = model.cost(72)
    assert facts["parameters"]["total"] == sum(p.numel() for p in model.parameters())
    assert facts["parameters"]["active"] == round(max(cost.active)) < facts["parameters"]["total"]
    assert (
        facts["parameters"]["auxiliary"] == sum(p.numel() for n, p in model.named_parameters() if "auxiliary" in n) > 0
    )
    assert facts["flops_per_token"] == {"text": cost.flops[0], "image": cost.flops[1]}
    assert set(facts["router_flops_per_token"]) == set(facts["auxiliary_flops_per_token"]) == {"text", "image"}


def test_the_vocabulary(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    speech = {"text": {"type": "bytes"}, "speech": {"type": "dmel"}}
    experts = {"type": "moma", "experts": {"text": 2, "speech": 2}, "d_ff": 32}
    model = {"layers": [{"mixer": {"type": "attention", "heads": 2}, "feedforward": experts}]}
    path = write_recipe(tmp_path, "nowhere", tmp_path / "run", model=model, data={"sequence_length": 700})
    recipe = yaml.safe_load(path.read_text()) | {"modalities": speech}
    path.write_text(yaml.safe_dump(recipe, sort_keys=False))
    facts = figures(capsys, path)["vocabulary"]
    assert facts["special"] == {"<bos>": 0, "<eos>": 1, "<begin_speech>": 2, "<end_speech>": 3}
    assert facts["ranges"] == {"text": [4, 260], "speech": [260, 261]} and facts["size"] == 261
    monkeypatch.setenv("COLUMNS", "200")
    assert describe.main([str(path)]) == 0
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    for line in ("261 ids", "3 <end_speech>", "4–259 text bytes one of 256 ids"):
        assert line in lines
    assert "260 speech dmel 80 channels of 16 levels 40 positions a second" in lines


def test_the_share_of_the_ends(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Transfusion's small model with a U-Net: what stands between pixels and the Transformer is counted apart."""
    recipe = "recipes/models/transfusion_unet_0.16b.yaml"
    facts, model = figures(capsys, recipe), blueprint(recipes.load(recipe))
    held = {name: sum(p.numel() for n, p in model.named_parameters() if f".{name}." in f".{n}") for name in ("image",)}
    ids = model.embedding.weight.numel() + model.head.weight.numel()
    assert facts["end_parameters"] == {"ids": ids, "image": held["image"]}
    monkeypatch.setenv("COLUMNS", "200")
    assert describe.main([recipe]) == 0
    share = f"image {tree.count(held['image'])} ({held['image'] / facts['parameters']['total']:.1%})"
    assert share in capsys.readouterr().out


def test_memory_by_stage(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def held(stage: int, ranks: int, *more: str) -> dict[str, Any]:
        arguments = [
            file,
            f"deepspeed.zero_optimization.stage={stage}",
            "train.micro_batch=1",
            *more,
            "--ranks",
            str(ranks),
        ]
        return figures(capsys, *arguments)["memory_per_rank"]

    total = figures(capsys, file)["parameters"]["total"]
    plain = held(0, 1)
    assert (plain["weights"], plain["gradients"], plain["optimizer"]) == (4 * total, 4 * total, 8 * total)
    for stage in (1, 2, 3):
        alone, shared = held(stage, 1), held(stage, 4)
        assert shared["optimizer"] == alone["optimizer"] // 4
        assert shared["gradients"] == (alone["gradients"] // 4 if stage > 1 else 5 * total)
        assert shared["weights"] == alone["weights"] // (4 if stage > 2 else 1)
    assert held(1, 1, "train.precision=bf16")["weights"] == 2 * total
    offloaded = held(2, 2, "deepspeed.zero_optimization.offload_optimizer={device: cpu}")
    assert offloaded["on_device"] == sum(offloaded[key] for key in ("weights", "gradients", "buckets"))
    activations = plain["activations"]
    assert 0 < activations["held"] < activations["peak"] < plain["peak"] - plain["on_device"] + 1


def test_a_model_larger_than_this_machine(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    facts = figures(capsys, file, "model.d_model=16384", "model.repeat=100")
    assert facts["parameters"]["total"] > 2e11
    parameters = blueprint(recipes.load(file)).parameters()
    assert all(p.device == torch.device("meta") for p in parameters)


def test_the_tree(file: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    assert describe.main([str(file), "model.repeat=3"]) == 0
    printed = capsys.readouterr().out
    parts = ["tiny  ", "layers.0,2…4  ", "layers.1,3…5  MixtureOfDepths", "capacity 0.5 of each row"]
    parts += [
        "FLOPs a token",
        "memory a rank, ZeRO stage 2 on 1 rank(s)",
        "activations of a micro-batch",
        "left out of FLOPs: norms",
    ]
    for part in parts:
        assert part in printed, part


def test_wrong_recipe(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert describe.main([str(file), "model.d_modl=3"]) == 2
    assert capsys.readouterr().err.startswith("error: model.d_modl: unknown key")


def test_a_folder_is_a_table(file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (file.parent / "wide.yaml").write_text(f"extends: {file.name}\nname: wide\nmodel: {{d_model: 128}}\n")
    every: Any = {facts["name"]: facts for facts in figures(capsys, file.parent)}
    assert list(every) == ["tiny", "wide"]
    total = every["wide"]["parameters"]["total"]
    papers = tmp_path / "papers" / "papers.yaml"
    papers.parent.mkdir()
    papers.write_text("title: Sizes\nnotes: Ours.\nrecipes:\n  wide: {printed: 1.5M, source: a paper}\n")
    assert describe.main([str(file.parent), "--papers", str(papers)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[:3] == ["# Sizes", "", "Ours."]
    wide, tiny = ([cell.strip() for cell in line.strip("|").split("|")] for line in lines[-2:])
    assert wide[0] == "wide" and wide[1].endswith("× 128") and wide[2] == f"{total / 1e6:,.1f}M"
    assert wide[5:] == ["1.5M total", f"{total / 1.5e6 - 1:+.1%}", "a paper"]
    assert tiny[0] == "tiny" and tiny[5:] == ["–", "–", "–"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "title: T\nnotes: N\nrecipes: {tinny: {source: a paper}}",
            "recipes.tinny: no recipe of this name; known: tiny",
        ),
        ("title: T\nnotes: N\nrecipes: {tiny: {printed: 90 M, source: x}}", "recipes.tiny.printed: '90 M': "),
        ("title: T", "notes: this key is required; add it"),
        ("[", "--papers: "),
    ],
)
def test_wrong_papers(file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, message: str) -> None:
    papers = tmp_path / "papers.txt"
    papers.write_text(text)
    assert describe.main([str(file.parent), "--papers", str(papers)]) == 2
    assert capsys.readouterr().err.startswith(f"error: {message}")
    assert describe.main([str(file), "--papers", str(papers)]) == 2
    assert "is not a folder" in capsys.readouterr().err


def test_a_folder_without_recipes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert describe.main([str(tmp_path)]) == 2
    assert "no *.yaml in this folder" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("numbers", "text"),
    [([0], "0"), ([0, 1], "0,1"), ([0, 1, 2], "0–2"), ([1, 3, 5, 7], "1,3…7"), ([0, 1, 3], "0,1,3")],
)
def test_ranges(numbers: list[int], text: str) -> None:
    assert tree.ranges(numbers) == text


def test_units() -> None:
    assert [tree.count(n) for n in (0, 999, 1_234, 1_234_567, 2.5e9)] == ["0", "999", "1.23k", "1.23M", "2.5B"]
    assert tree.size(2**20) == "1.0 MiB" and tree.size(3 * 2**30) == "3.00 GiB"
