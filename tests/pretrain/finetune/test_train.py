"""Fine-tuning on real processes: whatever the ranks, stages and stops, one and the same run, and what it leaves
behind."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

import zoo.adapt as za
from pretrain import metrics
from tests.pretrain.finetune.tuning import ADAPT, tuning_recipe, write_base, write_data, write_tuning
from tests.pretrain.ranks import run_ranks
from tests.pretrain.runs import (
    assert_same_metrics,
    assert_tensorboard_agrees,
    launch,
    one_rendezvous,
    start,
    steady,
)

EVERY = {"micro_batch": 1, "evaluate_every": 3, "checkpoint_every": 2}
STAGE_3 = {"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}}
LORA = {"r": 2, "alpha": 4.0, "dropout": 0.1, "modules_to_save": ["multi_modal_projector"]}
ANSWERS = {
    **ADAPT,
    "candidates": "image_and_answer",
    "group": "sample",
    "gate": {"activation": "none"},
    "router": {"shared": True, "bias": True},
}
"""Another way to adapt: the router learns from its auxiliary loss alone, and answers may be skipped too."""


def tune(folder: Path, name: str, *signals: tuple[int, int, int], **changes: Any) -> int:
    """The command in this process; `signals`: (step, rank, signal) sent to itself by that rank."""
    import pretrain.finetune.train

    rank = int(os.environ["RANK"])
    taken = pretrain.finetune.train.FineTuning.batches

    def batches(self: Any, state: Any) -> Any:
        for when, whose, number in signals:
            if (state.step, rank) == (when, whose):
                os.kill(os.getpid(), number)
        return taken(self, state)

    data, broken = folder / changes.pop("data", "mixed"), changes.pop("broken", 0)
    recipe = tuning_recipe(folder / "base", data, folder / name, **changes)
    recipe["data"]["max_broken_samples"] = broken
    path = folder / f"{name}-{rank}.yaml"
    path.write_text(yaml.safe_dump(recipe))
    pretrain.finetune.train.FineTuning.batches = batches  # type: ignore[method-assign]
    try:
        return pretrain.finetune.train.main([str(path)])
    finally:
        pretrain.finetune.train.FineTuning.batches = taken  # type: ignore[method-assign]


def two_ranks(folder: Path) -> list[int]:
    with one_rendezvous(), contextlib.redirect_stdout(io.StringIO()):
        return [
            tune(folder, "whole", train=EVERY),
            tune(folder, "stopped", (3, 1, signal.SIGUSR1), train=EVERY),
            tune(folder, "stopped", train=EVERY),
            tune(folder, "zero3", train=EVERY, deepspeed=STAGE_3),
            tune(folder, "lora", train=EVERY, lora=LORA),
            tune(folder, "broken", data="broken", train={"steps": 4}),
            tune(folder, "skipping", data="broken", broken=1, train=EVERY),
        ]


def one_rank(folder: Path) -> list[int]:
    with one_rendezvous(), contextlib.redirect_stdout(io.StringIO()):
        return [
            tune(folder, "alone", train=EVERY, deepspeed={"zero_optimization": {"stage": 0}}),
            tune(folder, "by two", train={**EVERY, "micro_batch": 2}),
            tune(folder, "dense", adapt=None, data="data", train={"global_batch": 8, "micro_batch": 8, "steps": 30}),
            tune(
                folder, "again", base=str(folder / "by two" / "model"), adapt=None, train={"steps": 1, "micro_batch": 4}
            ),
            tune(folder, "changed base", base=str(folder / "other"), lora=LORA, train={"steps": 1}),
            write_base(folder / "other", initializer_range=0.2) and 0,
            tune(folder, "changed base", base=str(folder / "other"), lora=LORA, train={"steps": 2}),
            tune(folder, "skipping alone", data="broken", broken=1, train={**EVERY, "micro_batch": 2}),
            tune(folder, "repaired", data="repaired", train={**EVERY, "checkpoint_every": 1}),
            write_data(folder / "repaired") and 0,
            tune(folder, "repaired", data="repaired", train=EVERY),
            tune(folder, "frozen", freeze=["vision_tower"], data="data", train={"micro_batch": 4, "steps": 40}),
        ]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tuning")
    write_base(folder / "base")
    write_data(folder / "data")
    write_data(folder / "mixed", texts=3)
    write_base(folder / "other")
    (write_data(folder / "broken") / "train7.png").write_bytes(b"no picture")
    (write_data(folder / "repaired") / "train7.png").write_bytes(b"no picture")
    return folder


@pytest.fixture(scope="module")
def two(folder: Path) -> Path:
    codes = run_ranks("tests.pretrain.finetune.test_train:two_ranks", 2, folder / "two", 280, folder=folder)
    assert codes == [[0, 0, 0, 0, 0, 2, 0]] * 2, (folder / "two" / "output0").read_text()[-3000:]
    return folder


@pytest.fixture(scope="module")
def one(folder: Path) -> Path:
    (codes,) = run_ranks("tests.pretrain.finetune.test_train:one_rank", 1, folder / "one", 280, folder=folder)
    assert codes == [0, 0, 0, 0, 0, 0, 2, 0, 2, 0, 0, 0], (folder / "one" / "output0").read_text()[-3000:]
    return folder


def digests(run: Path) -> dict[str, str]:
    """Checksums of the files of tensors in a run's model, by name."""
    files = sorted((run / "model").glob("*.safetensors"))
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def assert_close_metrics(run: Path, other: Path, rel: float = 1e-5, leave: tuple[str, ...] = ()) -> None:
    ours, theirs = steady(run), steady(other)
    assert len(ours) == len(theirs)
    for mine, reference in zip(ours, theirs, strict=True):
        assert mine.keys() == reference.keys()
        for key, value in mine.items():
            if not key.startswith(leave or "nothing"):
                assert value == pytest.approx(reference[key], rel=rel, abs=1e-6), (mine["step"], key)


# ---------------------------------------------------------------------------------------------------- one and the same


def test_resumed_is_uninterrupted(two: Path) -> None:
    assert_same_metrics(two / "stopped", two / "whole")
    assert digests(two / "stopped") == digests(two / "whole")
    assert_tensorboard_agrees(two / "stopped")


@pytest.mark.parametrize("name", ["alone", "by two"])
def test_two_ranks_are_one(two: Path, one: Path, name: str) -> None:
    """With text-only samples among the others: at a micro-batch of 1, a rank's whole forward. One rank at stage 0 sums
    the same micro-batches; the other has them larger."""
    assert_close_metrics(one / name, two / "whole")
    ours, theirs = (load_file(run / "model" / "model.safetensors") for run in (one / name, two / "whole"))
    for key, value in ours.items():
        torch.testing.assert_close(value, theirs[key], rtol=0, atol=2e-4, msg=key)


def test_stage_3_is_stage_2(two: Path) -> None:
    assert_close_metrics(two / "zero3", two / "whole")


def test_text_only_samples_count_as_text(two: Path) -> None:
    """They are in the data, skip nothing, and leave the routers' counts alone."""
    steps = [item for item in metrics.read(two / "whole" / "metrics.jsonl") if "loss" in item]
    lines = [json.loads(line) for line in (two / "mixed" / "train.jsonl").read_text().splitlines()]
    assert sum("image" not in line for line in lines) > 4
    for item in steps:
        assert item["skip"] == item["skip/layers.1"] == item["skip/layers.2"] == 0.5, (
            "16 tokens an image, 8 of them kept"
        )
        assert item["auxiliary/always_skip"] == 0.5


def test_metrics(two: Path) -> None:
    items = metrics.read(two / "whole" / "metrics.jsonl")
    names = {"step", "tokens", "flops", "loss", "auxiliary/loss", "skip", "skip/layers.1", "skip/layers.2", "epoch"}
    names |= {f"auxiliary/{rate}" for rate in ("accuracy", "precision", "recall", "always_skip")}
    names |= {"truncated", "unusable", "lr", "grad_norm", "bad_steps", "seconds", "tokens_per_second", "memory"}
    assert all(set(item) == names for item in items if "loss" in item)
    evaluations = [item for item in items if "eval/loss" in item]
    assert [item["step"] for item in evaluations] == [3, 6]
    assert {"eval/accuracy", "eval/accuracy/grey", "eval/accuracy/text", "eval/skip/layers.1"} <= set(evaluations[0])
    assert 0.8 < evaluations[0]["eval/flops_ratio"] < 1
    best = (two / "whole" / "checkpoints" / "best").read_text().strip()
    assert best == "step-6", "the only evaluated one among the checkpoints"


# --------------------------------------------------------------------------------------------------------- what is left


def batch(folder: Path, split: str = "validation") -> dict[str, torch.Tensor]:
    from pretrain.finetune.prompts import collate, encode
    from pretrain.finetune.questions import read_questions
    from tests.pretrain.finetune.processors import PAD, llava_processor

    asked = read_questions(folder / "data", split)[:3]
    made = collate([encode(question, llava_processor()) for question in asked], PAD)
    return {name: value for name, value in made.items() if name != "labels"}


def test_the_model_left_behind(two: Path) -> None:
    """It opens as the adapted model, which evaluates to what the run said, and as a dense one."""
    from transformers import AutoProcessor, LlavaForConditionalGeneration

    from pretrain.finetune.batcher import Batcher
    from pretrain.finetune.evaluate import EvaluatedModel, evaluate
    from pretrain.finetune.questions import read_questions
    from zoo.adapt.family import picture_ids

    model = za.load_adapted(two / "whole" / "model", dtype=torch.float32)
    processor = AutoProcessor.from_pretrained(two / "whole" / "model")
    questions = read_questions(two / "mixed", "validation")
    picture = next(question for question in questions if question.images)
    config = za.adaptation(model)
    batcher = Batcher(processor, picture, model.config, picture_ids(model.config, ""), config, training=False)
    subject = EvaluatedModel(model, model, model, "cpu", torch.float32)
    values = evaluate(subject, batcher, questions[:5], 1).values()
    said = metrics.read(two / "whole" / "metrics.jsonl")[-1]
    assert said["step"] == 6 and set(said) == {"step", "tokens", "flops", "seconds", *values}
    assert values == pytest.approx({name: said[name] for name in values}, rel=1e-6)

    dense = LlavaForConditionalGeneration.from_pretrained(two / "whole" / "model")
    routed = {name for name, _ in model.named_parameters() if "mod_router" in name}
    assert routed and {n for n, _ in model.named_parameters()} - routed == {n for n, _ in dense.named_parameters()}
    inputs = batch(two)
    assert not torch.allclose(dense(**inputs).logits, model(**inputs).logits)


def test_adapters(two: Path) -> None:
    """A LoRA run leaves adapters, routers and the hash of the base, not the base; routers have learned, and so has what
    was to be trained in full."""
    left = two / "lora" / "model"
    names = {file.name for file in left.iterdir()}
    assert {"adapter_model.safetensors", "mod_routers.safetensors"} <= names and "model.safetensors" not in names
    assert len(json.loads((left / "mod_config.json").read_text())["base_sha256"]) == 64
    model = za.load_adapted(left)
    assert model(**batch(two)).logits.isfinite().all()
    fresh = za.adapt(write_model(two), ADAPT)
    first = {name: router.weight for name, router in za.routers(fresh)}
    assert all(not torch.equal(router.weight, first[name]) for name, router in za.routers(model))
    weights = model.state_dict()
    projector = "base_model.model.model.multi_modal_projector.{}.linear_1.weight"
    assert not torch.equal(
        weights[projector.format("modules_to_save.default")], weights[projector.format("original_module")]
    )
    names = [name for name, _ in model.named_parameters() if "lora_A" in name]
    assert len(names) == 4 * 7 and all("language_model.layers" in name for name in names)
    assert (two / "lora" / "checkpoints" / "step-6").exists()


def write_model(folder: Path) -> Any:
    from transformers import LlavaForConditionalGeneration

    return LlavaForConditionalGeneration.from_pretrained(folder / "base")


def test_a_dense_base_learns(one: Path) -> None:
    """From random weights to answers: both ways of counting them agree."""
    run = one / "dense"
    items = metrics.read(run / "metrics.jsonl")
    assert items[0]["loss"] > 2 and not any(key.startswith(("skip", "auxiliary")) for key in items[0])
    last = items[-1]
    assert last["eval/accuracy"] == last["eval/forced_accuracy"] == last["eval/accuracy/grey"] > 0.7
    assert last["eval/flops_ratio"] == 1
    assert not (run / "model" / "mod_config.json").exists()


def test_an_adapted_base_goes_on(one: Path) -> None:
    """With its own layers and routers: its first loss is about what it ended with."""
    before, first = (metrics.read(one / run / "metrics.jsonl") for run in ("by two", "again"))
    assert first[0]["skip"] == 0.5 and first[0]["loss"] < before[4]["loss"]
    assert za.adaptation(za.load_adapted(one / "again" / "model")) == za.AdaptConfig.parse(ADAPT)


def test_frozen_parts_stay(one: Path) -> None:
    base, tuned = (load_file(f / "model.safetensors") for f in (one / "base", one / "frozen" / "model"))
    moved = {name for name, value in tuned.items() if not torch.equal(value, base[name])}
    assert moved and not any("vision_tower" in name for name in moved)
    assert any("projector" in name for name in moved)


def test_routed_answers(one: Path) -> None:
    """A model with routed layers says in generation, with its cache, what it says in one pass."""
    last = metrics.read(one / "frozen" / "metrics.jsonl")[-1]
    assert last["eval/accuracy"] == last["eval/forced_accuracy"] > 0.7 and last["eval/skip"] == 0.5


def test_a_broken_picture_ends_the_run(two: Path) -> None:
    """On both ranks, though one of them alone has met it."""
    printed = (two / "two" / "output0").read_text()
    wanted = "data.max_broken_samples: 0: 1 sample cannot be used; repair what is wrong, or set it to at least 1, and "
    assert wanted in printed and "train.jsonl:8: " in printed and "train7.png does not decode" in printed
    assert "Traceback" not in printed


def test_a_broken_picture_is_skipped(one: Path, two: Path) -> None:
    """Named and counted; whatever the ranks and micro-batches, the other samples are trained on alike."""
    printed = [(two / "two" / f"output{rank}").read_text() for rank in range(2)]
    said = "skipped " + str(two / "broken" / "train.jsonl:8: ")
    assert sum(text.count(said) for text in printed) == 2, "once by each of two runs"
    assert [line["unusable"] for line in metrics.read(one / "skipping" / "metrics.jsonl") if "loss" in line][-1] == 1
    assert_close_metrics(one / "skipping", one / "skipping alone")


def test_a_repaired_picture_lets_the_run_go_on(one: Path) -> None:
    printed = (one / "one" / "output0").read_text()
    assert "repaired/train.jsonl:8: " in printed
    steps = [line["step"] for line in metrics.read(one / "repaired" / "metrics.jsonl") if "loss" in line]
    assert steps == list(range(1, 7))


def test_adapters_of_a_base_that_has_changed(one: Path) -> None:
    printed = (one / "one" / "output0").read_text()
    assert (
        f"base: the weights of '{one / 'other'}' are no longer those" in printed
        and "restore them, or choose" in printed
    )


# ------------------------------------------------------------------------------------------------------- longer stories


def more_ranks(folder: Path) -> list[int]:
    with one_rendezvous(), contextlib.redirect_stdout(io.StringIO()):
        codes = []
        for name, changes in STORIES.items():
            train = {
                **EVERY,
                "precision": changes.get("precision", "fp32"),
                "activation_checkpointing": name == "lora 3",
            }
            rest = {key: value for key, value in changes.items() if key != "precision"}
            codes.append(tune(folder, f"{name} whole", train=train, **rest))
            codes.append(tune(folder, name, (3, 0, signal.SIGTERM), train=train, **rest))
            codes.append(tune(folder, name, train=train, **rest))
    return codes


STORIES: dict[str, dict[str, Any]] = {
    "zero 3": {"deepspeed": STAGE_3},
    "lora 3": {"deepspeed": STAGE_3, "lora": LORA},
    "lora 2": {"lora": LORA},
    "bf16": {"precision": "bf16", "deepspeed": {"zero_optimization": {"stage": 1}}},
    "bf16 3": {"precision": "bf16", "deepspeed": STAGE_3},
    "answers": {"adapt": ANSWERS},
    "dense 3": {"adapt": None, "deepspeed": STAGE_3, "freeze": ["vision_tower"]},
}


@pytest.fixture(scope="module")
def more(folder: Path) -> Path:
    codes = run_ranks("tests.pretrain.finetune.test_train:more_ranks", 2, folder / "more", 560, folder=folder)
    assert codes == [[0] * 3 * len(STORIES)] * 2, (folder / "more" / "output0").read_text()[-3000:]
    return folder


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", STORIES)
def test_every_kind_resumes(more: Path, name: str) -> None:
    assert_same_metrics(more / name, more / f"{name} whole")
    assert digests(more / name) == digests(more / f"{name} whole") != {}


def three_steps_more(folder: Path, name: str, story: str) -> int:
    with one_rendezvous(), contextlib.redirect_stdout(io.StringIO()):
        return tune(folder, name, train={**EVERY, "steps": 9}, **STORIES[story])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["zero 3", "lora 2"])
def test_another_number_of_ranks(more: Path, name: str) -> None:
    """Two ranks have brought it to step 6; one takes it to 9 as two would."""
    for world, run in ((1, name), (2, f"{name} whole")):
        scratch = more / f"{run} {world}"
        target = "tests.pretrain.finetune.test_train:three_steps_more"
        assert run_ranks(target, world, scratch, 280, folder=more, name=run, story=name) == [0] * world
    assert_close_metrics(more / name, more / f"{name} whole")


@pytest.mark.slow
def test_the_launcher(folder: Path, tmp_path: Path) -> None:
    """`deepspeed --num_accelerators 2`, killed, resumed: as if nothing had happened."""
    path = write_tuning(tmp_path, folder / "base", folder / "mixed", tmp_path / "run", train={**EVERY, "steps": 12})
    saved = tmp_path / "run" / "checkpoints" / "step-4"
    processes = launch([path], tmp_path / "printed", module="pretrain.finetune")
    assert processes.wait_until(saved.exists), processes.printed()
    processes.kill()
    again = start([path], tmp_path / "again", ranks=2, module="pretrain.finetune")
    assert again.wait() == [0, 0], again.printed()
    other = write_tuning(tmp_path, folder / "base", folder / "mixed", tmp_path / "w", train={**EVERY, "steps": 12})
    whole = start([other], tmp_path / "whole", ranks=2, module="pretrain.finetune")
    assert whole.wait() == [0, 0], whole.printed()
    assert_same_metrics(tmp_path / "run", tmp_path / "w")
    assert digests(tmp_path / "run") == digests(tmp_path / "w")
