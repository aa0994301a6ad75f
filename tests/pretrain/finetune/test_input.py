"""Fine-tuning: every mistake a user can make ends with exit code 2, one clear message, and nothing written to the run
folder."""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import yaml
from transformers import LlavaForConditionalGeneration

import pretrain.finetune.train
import zoo.adapt as za
from pretrain.data import DataError
from pretrain.finetune import recipe as finetune_recipe
from pretrain.finetune.batcher import Batcher
from pretrain.finetune.evaluate import predict
from pretrain.finetune.prompts import IGNORED
from pretrain.finetune.questions import Question, read_questions
from pretrain.finetune.samples import Batches, Samples, usable
from pretrain.finetune.task import FineTuning
from pretrain.process_group import Ranks
from pretrain.sums import Sums
from pretrain.task import Step
from tests.pretrain.finetune.processors import IMAGE, llava_processor, other_processors, picture
from tests.pretrain.finetune.tuning import ADAPT, tuning_recipe, write_base, write_data
from tests.pretrain.runs import ROOT
from tests.zoo.adapt.families import FAMILIES
from zoo.adapt import AdaptConfig
from zoo.config import ConfigError, UserError


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Bases and data, right and wrong ones."""
    folder = tmp_path_factory.mktemp("wrong")
    write_base(folder / "base")
    write_data(folder / "data")
    for name in ("no processor", "adapters", "another id", "adapted", "empty"):
        (folder / name).mkdir()
    shutil.copy(folder / "base" / "config.json", folder / "no processor")
    (folder / "adapters" / "adapter_config.json").write_text("{}")
    shutil.copytree(folder / "base", folder / "another id", dirs_exist_ok=True)
    config = json.loads((folder / "base" / "config.json").read_text())
    (folder / "another id" / "config.json").write_text(json.dumps(config | {"image_token_id": 62}))
    shutil.copytree(folder / "base", folder / "adapted", dirs_exist_ok=True)
    (folder / "adapted" / "mod_config.json").write_text(
        json.dumps({"version": 2, "adapt": ADAPT, "class": "LlavaForConditionalGeneration"})
    )
    from transformers import LlamaConfig

    LlamaConfig(num_hidden_layers=1).save_pretrained(folder / "text only")
    (folder / "no images").mkdir()
    (folder / "no images" / "train.jsonl").write_text(json.dumps({"question": "a?", "answer": "b"}) + "\n")
    shutil.copytree(folder / "data", folder / "lost image")
    (folder / "lost image" / "train3.png").unlink()
    shutil.copytree(folder / "data", folder / "no validation")
    (folder / "no validation" / "validation.jsonl").unlink()
    return folder


@pytest.fixture
def refused(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., str]:
    """Runs the command on a wrong recipe and returns its message."""

    def launched(*arguments: Any) -> None:
        raise AssertionError("the run was launched")

    monkeypatch.setattr(pretrain.finetune.train, "FineTuning", launched)
    monkeypatch.setattr(pretrain.finetune.train, "prepare_environment", lambda *given, **named: None)
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    monkeypatch.chdir(folder)

    def run(*overrides: str, **changes: Any) -> str:
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump(tuning_recipe("base", "data", tmp_path / "run", **changes)))
        assert pretrain.finetune.train.main([str(path), *overrides]) == 2
        error = capsys.readouterr().err
        error = error[error.index("error: ") :]  # Transformers may have said something before
        assert "Traceback" not in error and not (tmp_path / "run").exists()
        return error.removeprefix("error: ").rstrip("\n")

    return run


WRONG = {
    "nmae=x": ("nmae: unknown key; known: name, run_dir,", "did you mean 'name'?"),
    "train.rows=3": ("train.rows: unknown key",),
    "train.micro_batch=3": ("train.micro_batch: 3 does not divide train.global_batch 4",),
    "lora={r: 0, alpha: 1}": ("lora.r: 0: must be greater than 0",),
    "data.maximum_length=0": ("data.maximum_length: 0: must be greater than 1",),
    "deepspeed.zero_optimisation={}": ("deepspeed.zero_optimisation: unknown key", "did you mean 'zero_optimization'?"),
    "deepspeed.zero_optimization.stage=4": ("deepspeed.zero_optimization.stage: 4 must be 0, 1, 2 or 3",),
    "base=nowhere": ("base: 'nowhere' is not a folder; give one with a model of Transformers and its processor",),
    "base=empty": ("base: 'empty' holds no config.json; give a folder that `save_pretrained` wrote",),
    "base=adapters": ("base: 'adapters' holds only adapters, not the model they belong to",),
    "base=text only": (
        "base: 'text only' (LlamaConfig) has no image token",
        "a text-only model",
        "give a multimodal one",
    ),
    "base=no processor": ("base: 'no processor' ",),
    "base=another id": (
        "train.jsonl:1: has an image, but the image token 62 of the model's config never occurs",
        "give the model's own processor",
    ),
    "adapt.layers=[1, 4]": ("adapt: layers: 4 is out of range; the decoder has layers 0 to 3; leave it out",),
    "adapt.layers=[0, 1]": ("adapt.layers: [0, 1]: layer 0 stays dense", "leave it out"),
    "adapt.layers=[1, 3]": ("adapt: layers: 3 is the last layer", "set last_layer: true"),
    "adapt.capacity.value=0": ("adapt.capacity.constant.value: 0: must be above 0 and at most 1",),
    "adapt.capacity.kept=1": ("kept: unknown key",),
    "freeze=[vision]": ("freeze: 'vision' is not part of the model; among its parts are model.vision_tower",),
    "freeze=[model, lm_head]": ("freeze: ['model', 'lm_head'] leaves nothing to train",),
    "lora={r: 2, alpha: 4, targets: [q_proj, query]}": (
        "lora.targets: 'query' is not a linear map of a decoder layer; known: q_proj, k_proj",
    ),
    "lora={r: 2, alpha: 4, modules_to_save: [projector]}": (
        "lora.modules_to_save: 'projector' is not part of the model; among its parts are model.vision_tower",
    ),
    "lora={r: 2, alpha: 4, modules_to_save: [layers.0.mlp]}": (
        "lora.modules_to_save: 'layers.0.mlp' holds model.language_model.layers.0.mlp.gate_proj, which",
        "name smaller modules, or leave its maps out of lora.targets",
    ),
    "lora={r: 2, alpha: 4, modules_to_save: [mod_router]}": ("holds model.language_model.layers.1.mod_router, which",),
    "data.path=nowhere": ("data.path: 'nowhere' is not a folder; give one with train.jsonl",),
    "data.path=no images": (
        'data.path: none of the 1 lines of no images/train.jsonl has an image; a multimodal model needs some: {"image"',
    ),
    "data.path=lost image": ("lost image/train.jsonl:4: its image 'lost image/train3.png' does not exist",),
    "data.path=no validation": ("no validation/validation.jsonl: does not exist",),
    "evaluate.split=tset": ("data/tset.jsonl: does not exist; data holds train.jsonl, validation.jsonl",),
    "evaluate.samples=0": ("evaluate.samples: 0: must be greater than 0",),
}


@pytest.mark.parametrize("override", WRONG)
def test_wrong_entries(refused: Callable[..., str], override: str) -> None:
    message = refused(override)
    for part in WRONG[override]:
        assert part in message, message


@pytest.mark.parametrize(
    "part, weight", [("multi_modal_projector", "linear_1.weight"), ("linear_2", "linear_2.weight")]
)
def test_a_part_that_is_frozen_and_trained_in_full(refused: Callable[..., str], part: str, weight: str) -> None:
    lora = {"r": 2, "alpha": 4, "modules_to_save": ["multi_modal_projector"]}
    message = refused(lora=lora, freeze=["vision_tower", part])
    assert message.startswith(
        f"freeze: '{part}' holds model.multi_modal_projector.{weight}, which lora.modules_to_save: "
    )
    assert "['multi_modal_projector'] has trained in full; name it under one of the two" in message


def test_a_base_that_is_adapted_in_another_way(refused: Callable[..., str]) -> None:
    message = refused("base=adapted", "adapt.capacity.value=0.25")
    assert message.startswith("adapt: the base 'adapted' is adapted already, in another way; leave adapt out")


def test_an_attention_router_in_training(refused: Callable[..., str]) -> None:
    adapt = {**ADAPT, "group": "sample", "router": {"type": "attention"}, "gate": {"activation": "none"}}
    message = refused(adapt=adapt | {"auxiliary": {"type": "none"}})
    for part in ("adapt.router.type: 'attention'", "the end of its answer", "choose linear"):
        assert part in message, message


def test_batches_that_do_not_divide_over_the_ranks(
    refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert "train.global_batch: 4 is not a multiple of train.micro_batch × ranks = 2 × 3 = 6" in refused()


EXAMPLES = sorted((ROOT / "recipes" / "examples").glob("*.yaml"))
SHIPPED = [path for path in EXAMPLES if "pretrain.finetune" in path.read_text() or "\nbase:" in path.read_text()]


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_recipes(path: Path) -> None:
    """Each loads, says what it shows and how it is run, and routes layers of a decoder of 8."""
    head = "".join(line for line in path.read_text().splitlines(keepends=True) if line.startswith("#"))
    assert "What it shows:" in head and "Command:" in head
    recipe = finetune_recipe.load(path, ["base=elsewhere"])
    assert recipe.base == "elsewhere" and recipe.name == path.stem
    assert (recipe.adapt is not None) == path.stem.endswith("_mod")
    assert recipe.adapt is None or recipe.adapt.plan(8)
    assert finetune_recipe.FinetuneRecipe.parse(recipe.dump()) == recipe


# ------------------------------------------------------------------------------------------------------------- samples


def batcher(folder: Path, training: bool = True, limit: int | None = None, **adapt: Any) -> Batcher:
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(folder / "base")
    filler = read_questions(folder / "data")[0]
    adapted = AdaptConfig.parse({**ADAPT, **adapt})
    return Batcher(llava_processor(), filler, config, {IMAGE: 1}, adapted, training, limit)


def order(folder: Path, world: int, micro: int, steps: int, since: int = 0) -> list[list[int]]:
    """Numbers of the lines of each step, in the order of ranks and micro-batches, by their file names."""
    asked = read_questions(folder / "data")
    found = []
    streams = [Batches(Samples(asked, 3), batcher(folder), 8, micro, rank, world).since(since) for rank in range(world)]
    for _ in range(steps):
        found.append(
            [value for s in streams for b in next(s) for value in b.inputs["pixel_values"].sum((1, 2, 3)).tolist()]
        )
    return found


def test_the_order_depends_on_the_seed_alone(folder: Path) -> None:
    """Not on ranks, micro-batches or where a run began; every epoch is another permutation."""
    whole = order(folder, 1, 8, 6)
    assert order(folder, 2, 2, 6) == whole and order(folder, 4, 1, 2, since=4) == whole[4:]
    flat = [value for step in whole for value in step]
    first, second = flat[:22], flat[22:44]
    assert sorted(first) == sorted(second) and first != second


def test_workers_give_the_same(folder: Path) -> None:
    asked = read_questions(folder / "data")
    plans = [Batches(Samples(asked, 3), batcher(folder), 4, 2, 0, 1, workers) for workers in (0, 1)]
    plain, ahead = (plan.since(5) for plan in plans)
    for _ in range(2):
        for one, other in zip(next(plain), next(ahead), strict=True):
            assert all((value == other.inputs[name]).all() for name, value in one.inputs.items())
            assert one.first == other.first and one.groups == other.groups == ((16,), (16,))


def test_text_only_batches_get_a_filler(tmp_path: Path, folder: Path) -> None:
    asked = read_questions(write_data(tmp_path, texts=2))
    texts, images = ([q for q in asked if bool(q.images) == wanted][:2] for wanted in (False, True))
    mixed = batcher(folder).batch([texts[0], images[0]])
    assert not mixed.filler and mixed.groups == ((), (16,)) and mixed.candidates == 16
    alone = batcher(folder).batch(texts)
    assert alone.filler and alone.inputs["input_ids"].shape[0] == 3 and len(alone.tokens) == 2
    assert (alone.labels[2] == IGNORED).all() and alone.candidates == 0
    answers = batcher(folder, candidates="image_and_answer").batch(texts)
    assert answers.groups == ((3,),) * 2, "a space, a digit and the end"


def test_unusable_samples_are_left_out(tmp_path: Path, folder: Path) -> None:
    """The others are as without them; of a batch of nothing else the loss is zero, and so are the gradients."""
    good, bad = read_questions(write_data(tmp_path, train=2))
    (tmp_path / "train1.png").write_bytes(b"no picture")
    stray = dataclasses.replace(good, turns=(("what is <image>?", "dark"),), source="train.jsonl:9")
    maker = batcher(folder)
    batch, alone = maker.batch([bad, good, stray], skip=True), maker.batch([good])
    assert all((value == batch.inputs[name]).all() for name, value in alone.inputs.items())
    assert (batch.tokens, batch.groups, batch.answers) == (alone.tokens, alone.groups, alone.answers)
    assert [reason.split(" ")[0] for reason in batch.unusable] == [f"{tmp_path}/train.jsonl:2:", "train.jsonl:9:"]
    assert "its text holds '<image>', which stands for an image" in batch.unusable[1]
    for question in (bad, stray):
        with pytest.raises(DataError, match=question.source):
            maker.batch([question])
    for candidates in ("image", "image_and_answer"):
        adapt = {**ADAPT, "candidates": candidates}
        model = za.adapt(LlavaForConditionalGeneration.from_pretrained(folder / "base"), adapt).train()
        nothing = batcher(folder, candidates=candidates).batch([bad, stray], skip=True)
        assert (nothing.tokens, nothing.answers, nothing.candidates) == ((), 0, 0)
        logits, labels = predict(model, nothing, za.Trace())
        loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="sum")
        loss.backward()
        assert float(loss.detach()) == 0 and all(
            float(p.grad.abs().sum()) == 0 for p in model.parameters() if p.grad is not None
        )


@pytest.mark.parametrize("turns", [(("what is <image>?", "white"),), (("what?", "an <image> tag"),)])
@pytest.mark.parametrize("pictures", [0, 1])
def test_an_image_token_in_the_text(turns: tuple[tuple[str, str], ...], pictures: int) -> None:
    """A processor that does not count them lets it through, and the model would look for its picture."""
    pixels = picture(0)
    question = Question((pixels,) * pictures, turns, "train.jsonl:3")
    maker = Batcher(
        other_processors(16)["Gemma3Processor"],
        Question((pixels,), (("what?", "a"),), "filler"),
        FAMILIES["gemma3"].build(vocab_size=70).config,
        {IMAGE: 1},
        None,
        True,
    )
    with pytest.raises(DataError, match=r"train.jsonl:3: its text holds '<image>'"):
        maker.batch([question])


def test_held_out_samples_are_looked_at_before_the_run(tmp_path: Path, folder: Path) -> None:
    asked = read_questions(write_data(tmp_path), "validation")
    for number in (1, 4):
        (tmp_path / f"validation{number}.png").write_bytes(b"no picture")
    said: list[str] = []
    assert usable(asked, batcher(folder), 2, said.append) == [asked[n] for n in (0, 2, 3, 5)]
    assert [line.split(":")[1] for line in said] == ["2", "5"] and all(line.startswith("skipped ") for line in said)
    with pytest.raises(DataError, match="data.max_broken_samples: 1: 2 samples cannot be used; .* to at least 2, and"):
        usable(asked, batcher(folder), 1, said.append)
    with pytest.raises(DataError, match="1 sample cannot be used"):
        usable(asked[1:2], batcher(folder), 9, said.append)


@pytest.mark.parametrize("group", ["image", "sample"])
@pytest.mark.parametrize("candidates", ["image", "image_and_answer"])
@pytest.mark.parametrize("texts", [1, 2], ids=["texts alone", "texts among images"])
def test_micro_batches_of_any_size_are_one_step(
    tmp_path: Path, folder: Path, candidates: str, group: str, texts: int
) -> None:
    """8 × 1 = 4 × 2 = 1 × 8: losses, counts, what the routers report, and the gradient of each weight."""
    asked = read_questions(write_data(tmp_path, texts=texts))[:8]
    adapt = {**ADAPT, "candidates": candidates, "group": group}
    maker = batcher(folder, candidates=candidates, group=group)
    model = za.adapt(LlavaForConditionalGeneration.from_pretrained(folder / "base"), adapt).train()
    names = [layer.routing.name for layer in za.routed_layers(model)]
    run = SimpleNamespace(
        engine=SimpleNamespace(module=model, device="cpu", dtype=torch.float32),
        recipe=SimpleNamespace(seed=0),
        layers=names,
        weight=ADAPT["auxiliary"]["weight"],
        base=SimpleNamespace(blueprint=model),
    )
    steps = []
    for size in (8, 2, 1):
        batches = [maker.batch(asked[first : first + size], first) for first in range(0, 8, size)]
        step = Step(0, batches, FineTuning.count(run, batches))
        whole, sums = 0.0, Sums()
        model.zero_grad()
        for batch in batches:
            forward = FineTuning.forward(run, batch, step, True)
            forward.loss.backward()
            whole, sums = whole + float(forward.loss.detach()), sums + forward.sums
        totals = sums.over(Ranks(), "cpu")
        found = [whole, totals.loss, totals.auxiliary, *totals.routing.flat().tolist()]
        steps.append((step.counts, found, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}))
    (counts, (_, loss, auxiliary, *_), gradients), *others = steps
    assert loss > 0 and (candidates == "image" and texts == 1) == (counts.candidates == 0 == auxiliary)
    for counted, found, theirs in others:
        assert counted == counts and found == pytest.approx(steps[0][1], rel=1e-6)
        for name, gradient in gradients.items():
            torch.testing.assert_close(theirs[name], gradient, rtol=0, atol=1e-6, msg=name)


def test_long_samples_are_cut_or_refused(folder: Path) -> None:
    asked = read_questions(folder / "data")[:2]
    length = batcher(folder).batch(asked[:1]).tokens[0]
    cut = batcher(folder, limit=length - 1).batch(asked[:1])
    assert cut.tokens == (length - 1,) and cut.truncated == 1 and cut.answers > 0
    with pytest.raises(UserError, match="its images do not fit into data.maximum_length: 12 tokens, of which it has 5"):
        batcher(folder, limit=12).batch(asked)
    with pytest.raises(UserError, match="its question does not fit into data.maximum_length: 30 tokens"):
        batcher(folder, limit=30).batch(asked)


def test_extends_several(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(yaml.safe_dump(tuning_recipe("base", "data", "run", adapt=None)))
    (tmp_path / "b.yaml").write_text(
        "adapt: {layers: [1], capacity: {type: constant, value: 0.25}, gate: {activation: sigmoid}}\n"
    )
    (tmp_path / "c.yaml").write_text("extends: [a.yaml, b.yaml]\nname: c\nadapt: {layers: [2]}\n")
    recipe = finetune_recipe.load(tmp_path / "c.yaml")
    assert recipe.name == "c" and recipe.adapt.layers == [2] and recipe.adapt.capacity.value == 0.25
    (tmp_path / "d.yaml").write_text("extends: [a.yaml, e.yaml]\n")
    with pytest.raises(ConfigError, match="e.yaml' does not exist"):
        finetune_recipe.load(tmp_path / "d.yaml")


def test_the_old_command_names_the_new_one() -> None:
    done = subprocess.run([sys.executable, "-m", "pretrain.adapt", "a.yaml"], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("error: pretrain.adapt is now pretrain.finetune")
