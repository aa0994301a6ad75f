"""`python -m tools.evaluate_answers`: figures of a tiny LLaVA that has learned to tell dark pictures from white
ones."""

from __future__ import annotations

import io
import json
import math
import shutil
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import tqdm
import yaml
from safetensors.torch import load_file, save_file
from transformers import AutoProcessor, LlavaForConditionalGeneration

import zoo.adapt as za
from pretrain.finetune.prompts import collate, encode, padding_id
from pretrain.finetune.questions import read_questions
from tests.pretrain.finetune.tuning import ADAPT, write_base, write_data
from tests.pretrain.runs import ROOT
from tools.evaluate_answers import main

ONE_TOKEN = ROOT / "recipes" / "adapt" / "one_token.yaml"
HALF = {"capacity": {"type": "constant", "value": 0.5}, "gate": {"activation": "none"}}
RECIPES = {
    "random": {"layers": [1, 2], **HALF, "router": {"type": "random", "seed": 3}},
    "attention": {"layers": [2, 3], **HALF, "group": "sample", "router": {"type": "attention"}},
    "learned": ADAPT,
}
LIES = 4
"""Lines of the test split, from its end, whose answer is the wrong one."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`base` has learned the 12 pictures of `data` by heart; `data/test.jsonl` has the last of them wrong, and a
    text."""
    folder = tmp_path_factory.mktemp("answers")
    data = write_data(folder / "data", train=2, validation=12)
    lines = [json.loads(line) for line in (data / "validation.jsonl").read_text().splitlines()]
    for line in lines[-LIES:]:
        line |= {"answer": {"dark": "white", "white": "dark"}[line["answer"]], "kind": "lie"}
    text = {"question": "say 3", "answer": "3", "kind": "text"}
    (data / "test.jsonl").write_text("".join(json.dumps(line) + "\n" for line in (*lines, text)))
    base = write_base(folder / "base")
    model, processor = LlavaForConditionalGeneration.from_pretrained(base), AutoProcessor.from_pretrained(base)
    samples = [encode(question, processor) for question in read_questions(data, "validation")]
    batch = collate(samples, padding_id(processor))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(25):
        loss = model(**batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.save_pretrained(base)
    for name, adapt in RECIPES.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump({"adapt": adapt}))
    za.save_adapted(za.adapt(model.eval(), RECIPES["random"]), folder / "adapted")
    processor.save_pretrained(folder / "adapted")
    return folder


def call(folder: Path, *arguments: Any, model: str = "base", data: str = "data", code: int = 0) -> dict[str, Any]:
    """What --json has of a call; {} where it fails."""
    out = folder / "out.json"
    out.unlink(missing_ok=True)
    given = [folder / model, folder / data, "--batch", 5, *arguments, "--device", "cpu"]
    assert main([*map(str, given), *(["--json", str(out)] if "--json" not in arguments else [])]) == code
    return json.loads(out.read_text()) if out.exists() else {}


def said(folder: Path, adapt: dict[str, Any] | None = None) -> list[float]:
    """For each question of the test split whether the model's answer to it alone is the right one."""
    model, processor = (
        kind.from_pretrained(folder / "base") for kind in (LlavaForConditionalGeneration, AutoProcessor)
    )
    if adapt is not None:
        za.adapt(model, adapt)
    marks = []
    for question in read_questions(folder / "data", "test"):
        inputs = encode(question, processor, answers=False)
        ids = model.generate(**inputs, max_new_tokens=10, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        marks.append(float(processor.tokenizer.decode(ids, skip_special_tokens=True).strip() == question.turns[0][1]))
    return marks


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def test_a_dense_model(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = call(folder)
    values, marks = result["values"], said(folder)
    assert marks == [1.0] * (12 - LIES) + [0.0] * (LIES + 1)
    assert values["eval/accuracy"] == mean(marks) == values["eval/forced_accuracy"]
    assert values["eval/accuracy/grey"] == 1 and values["eval/accuracy/lie"] == 0 == values["eval/accuracy/text"]
    assert result["answers"] == {"grey": 12 - LIES, "lie": LIES, "text": 1} and result["adapt"] is None

    model, processor = (
        kind.from_pretrained(folder / "base") for kind in (LlavaForConditionalGeneration, AutoProcessor)
    )
    samples = [encode(question, processor) for question in read_questions(folder / "data", "test")]
    counts = [int((sample["labels"] != -100).sum()) for sample in samples]
    with torch.no_grad():
        losses = [float(model(**sample).loss) * count for sample, count in zip(samples, counts, strict=True)]
    assert values["eval/loss"] == pytest.approx(sum(losses) / sum(counts), rel=1e-5)

    printed = capsys.readouterr().out.splitlines()
    rows = {line[: printed[0].index("13")].strip(): line[printed[0].index("13") :].strip() for line in printed}
    assert rows["questions"] == "13" and rows["accuracy"] == "61.5% (8 of 13)" and rows["lie"] == "0.0% (0 of 4)"
    assert rows["perplexity"] == f"{math.exp(values['eval/loss']):.4g}" and rows["decoder FLOPs / dense"] == "1.000"
    assert not any(line.startswith("skipped") for line in printed)


def test_samples_and_one_pass(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = call(folder, "--samples", 9, "--no-generate")
    assert result["answers"] == {"grey": 8, "lie": 1} and "eval/accuracy" not in result["values"]
    assert result["values"]["eval/forced_accuracy"] == pytest.approx(8 / 9)
    assert "accuracy in one pass    88.9% (8 of 9)" in capsys.readouterr().out


def test_exchanged_images_are_what_is_read(folder: Path) -> None:
    """Each answer is what the next picture shows, that of the last the first; the text has none and is left out."""
    seen = [question.turns[0][1] for question in read_questions(folder / "data", "validation")]
    wanted = [question.turns[0][1] for question in read_questions(folder / "data", "test")][:12]
    right = [float(answer == picture) for answer, picture in zip(wanted, [*seen[1:], seen[0]], strict=True)]
    assert 0 < mean(right) < 1
    assert call(folder, "--exchange-images")["values"]["eval/accuracy"] == mean(right)
    assert call(folder, "--exchange-images", "--samples", 3)["values"]["eval/accuracy"] == mean(right[:3])


def test_adapting_on_the_fly_is_the_saved_model(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    here = call(folder, "--adapt", folder / "random.yaml")
    assert "untrained" not in capsys.readouterr().out
    saved = call(folder, model="adapted")
    assert here["values"] == saved["values"] and here["adapt"] == saved["adapt"]
    values, marks = here["values"], said(folder, RECIPES["random"])
    assert values["eval/accuracy"] == mean(marks) and 0.5 < values["eval/flops_ratio"] < 1
    assert values["eval/skip/layers.1"] == values["eval/skip/layers.2"] == 0.5
    printed = capsys.readouterr().out
    assert "layer  1              50.0%\n  layer  2              50.0%" in printed


def test_adapters_find_their_base(folder: Path) -> None:
    """Fresh ones change nothing."""
    model = za.adapt(LlavaForConditionalGeneration.from_pretrained(folder / "base"), RECIPES["random"])
    za.save_adapted(peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"])), folder / "adapters")
    assert not (folder / "adapters" / "model.safetensors").exists()
    assert call(folder, model="adapters")["values"] == pytest.approx(call(folder, model="adapted")["values"])


def test_untrained_routers_are_said_to_be(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    values = call(folder, "--adapt", folder / "learned.yaml", "adapt.capacity.value=0.25", "adapt.layers=[2]")["values"]
    assert values["eval/skip/layers.2"] == 0.75 and "eval/skip/layers.1" not in values
    assert "note: these routers are untrained" in capsys.readouterr().out


def test_attention_sees_the_prompt_alone(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its one pass would rank by what the end of the right answer attends to: no figure of that is given."""
    values = call(folder, "--adapt", folder / "attention.yaml")["values"]
    assert values["eval/accuracy"] == mean(said(folder, RECIPES["attention"]))
    assert not any("loss" in name or "forced" in name for name in values) and values["eval/skip"] == 0.5
    printed = capsys.readouterr().out
    assert "note: an attention router ranks by the last token" in printed and "perplexity" not in printed


def test_the_recipe_keeps_one_token(folder: Path) -> None:
    """One token of 16 here, of 256 in the grids of digits."""
    values = call(folder, "--adapt", ONE_TOKEN, "adapt.layers=[2, 3]")["values"]
    assert values["eval/skip/layers.2"] == values["eval/skip/layers.3"] == 15 / 16
    adapt = za.AdaptConfig.parse(yaml.safe_load(ONE_TOKEN.read_text())["adapt"])
    assert {math.ceil(256 * keep) for keep in adapt.plan(8).values()} == {1} and list(adapt.plan(8)) == [*range(1, 8)]


def test_progress_ends_at_its_total(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bars = []

    class Bar(tqdm.tqdm):
        def __init__(self, **options: Any) -> None:
            super().__init__(**options | {"disable": False, "file": io.StringIO()})
            bars.append(self)

    monkeypatch.setattr(tqdm, "tqdm", Bar)
    call(folder)
    call(folder, "--no-generate")
    assert [(bar.n, bar.total) for bar in bars] == [(26, 26), (13, 13)]


BAD: dict[str, tuple[dict[str, Any], tuple[Any, ...], str]] = {
    "model": ({"model": "nowhere"}, (), "is not a folder; give one with a model of Transformers"),
    "weights": ({"model": "partly"}, (), "partly' has no weights model.language_model.norm.weight (1 are missing)"),
    "broken": ({"model": "broken"}, (), "broken/mod_routers.safetensors: is damaged"),
    "data": ({"data": "nowhere"}, (), "nowhere: is not a folder; give one with test.jsonl"),
    "images": ({"data": "texts"}, (), "texts/test.jsonl: none of its 1 lines has an image"),
    "split": ({}, ("--split", "tset"), "tset.jsonl: does not exist"),
    "samples": ({}, ("--samples", 0), "--samples 0: must be at least 1"),
    "batch": ({}, ("--batch", 0), "--batch 0: must be at least 1"),
    "no recipe": (
        {},
        ("adapt.layers=[1]",),
        "'adapt.layers=[1]': is a key of a recipe, and there is none; give --adapt",
    ),
    "section": ({}, ("--adapt", ONE_TOKEN, "train.steps=1"), "'train.steps=1': only keys of the section adapt"),
    "no section": (
        {},
        ("--adapt", ROOT / "recipes/examples/digits_base.yaml"),
        "digits_base.yaml: has no section adapt",
    ),
    "key": ({}, ("--adapt", ONE_TOKEN, "adapt.layer=1"), "adapt.layer: unknown key"),
    "depth": ({}, ("--adapt", ONE_TOKEN), "adapt: layers: 7 is out of range; the decoder has layers 0 to 3"),
    "adapted": ({"model": "adapted"}, ("--adapt", ONE_TOKEN), "is adapted already; leave --adapt out"),
    "one pass": ({}, ("--adapt", "attention.yaml", "--no-generate"), "--no-generate: an attention router ranks"),
    "json": ({}, ("--json", "nowhere/out.json"), "--json nowhere/out.json: must be a file in a folder that exists"),
}


@pytest.fixture(scope="module")
def bad(folder: Path) -> Path:
    shutil.copytree(folder / "base", folder / "partly")
    weights = load_file(folder / "base" / "model.safetensors")
    del weights[next(name for name in weights if name.endswith("model.norm.weight"))]
    save_file(weights, folder / "partly" / "model.safetensors", {"format": "pt"})
    shutil.copytree(folder / "adapted", folder / "broken")
    (folder / "broken" / "mod_routers.safetensors").write_bytes(b"broken")
    (folder / "texts").mkdir()
    (folder / "texts" / "test.jsonl").write_text('{"question": "a?", "answer": "b"}\n')
    return folder


@pytest.mark.parametrize("name", BAD)
def test_bad_input(bad: Path, name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(bad)
    where, arguments, message = BAD[name]
    assert call(bad, *arguments, **where, code=2) == {}
    said = capsys.readouterr()
    assert message in said.err and said.err[said.err.index("error: ") :].count("\n") == 1 and "accuracy" not in said.out
