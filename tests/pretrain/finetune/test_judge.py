"""How models are asked: answers they are told cost what they cost in generation; thresholds."""

from __future__ import annotations

import types
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import zoo.adapt as za
from pretrain.finetune.asking import Forced
from pretrain.finetune.batcher import Batcher
from pretrain.finetune.evaluate import predict
from pretrain.finetune.judge import judge
from pretrain.finetune.prompt_batches import PromptBatch, Prompts
from pretrain.finetune.prompts import IGNORED
from pretrain.finetune.questions import read_questions
from tests.pretrain.finetune.processors import TURN_TEMPLATE, llava_processor, write_questions
from tests.pretrain.finetune.tuning import write_base, write_data
from tests.zoo.adapt.families import FAMILIES, llava
from tests.zoo.adapt.pictures import PAD, UNSAID
from tools.sweep.adapt.threshold import tune_threshold
from zoo.adapt.family import picture_ids

HALF = {"type": "constant", "value": 0.5}
UNLEARNED = {"group": "sample", "capacity": HALF, "gate": {"activation": "none"}}
ADAPTED: dict[str, dict[str, Any] | None] = {
    "dense": None,
    "topk": {"layers": [1, 2], "capacity": HALF},
    "attention": UNLEARNED | {"layers": [2], "router": {"type": "attention"}},
    "random": UNLEARNED | {"layers": [1, 2], "router": {"type": "random", "seed": 1}},
}
LINES = [
    {"image": "0.png", "question": "what is it?", "answer": "a white cat"},
    {"images": ["1.png", "2.png"], "question": "how many are there of them?", "answer": "2"},
    {
        "image": "3.png",
        "turns": [{"question": "who?", "answer": "a dog"}, {"question": "where is it?", "answer": "on a mat."}],
    },
    {"question": "no image?", "answer": "none"},
    {"image": "0.png", "question": "and?", "answer": "grey"},
]
ANSWERS = ["a white cat", "2", "a dog", "on a mat.", "grey"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_questions(tmp_path_factory.mktemp("questions"), LINES)


@pytest.mark.parametrize("template", [None, TURN_TEMPLATE])
def test_answers_are_encoded_with_what_ends_them(data: Path, template: str | None) -> None:
    processor = llava_processor(template)
    prompts = Prompts.encode(read_questions(data), processor, 3, answers=True)
    assert [len(batch.questions) for batch in prompts.batches] == [3, 2]
    rows = [row[row != IGNORED] for batch in prompts.batches for row in batch.answers]
    assert [processor.tokenizer.decode(row).strip() for row in rows] == [f"{answer}</s>" for answer in ANSWERS]


@pytest.mark.parametrize("name", ["dense", "topk"])
def test_told_answers_lose_what_one_pass_says(data: Path, name: str) -> None:
    """Each sample alone, prompt and answer at once, against batches of padded prompts and answers on their cache."""
    torch.manual_seed(0)
    model, processor = llava(), llava_processor()
    if ADAPTED[name]:
        za.adapt(model, ADAPTED[name])
    prompts = Prompts.encode(read_questions(data), processor, 3, answers=True)
    found = judge(model, prompts, "perplexity")
    assert found["tokens"] == [len(f" {answer}") + 1 for answer in ANSWERS]
    losses = []
    for batch in prompts.batches:
        for question in batch.questions:
            batcher = Batcher(
                processor,
                question,
                model.config,
                picture_ids(model.config, type(model).__name__),
                za.adaptation(model),
                False,
            )
            with torch.no_grad():
                logits, labels = predict(model, batcher.batch([question]), za.Trace() if ADAPTED[name] else None)
            own = found["tokens"][len(losses)]
            losses.append(float(F.cross_entropy(logits[0, -own:], labels[0, -own:], reduction="sum")))
    assert found["losses"] == pytest.approx(losses, abs=1e-4)
    assert found["loss"] == pytest.approx(sum(losses) / sum(found["tokens"])) and "accuracy" not in found
    assert found["questions"] == 5
    read = judge(model, prompts, None)
    assert {"flops", "skip", "keys_and_values"} < read.keys() and all(
        read[k] == found[k] for k in ("flops", "keys_and_values")
    )


@pytest.mark.parametrize("name", ADAPTED)
@pytest.mark.parametrize("family", [pytest.param(f, marks=[] if f == "llava" else pytest.mark.slow) for f in FAMILIES])
def test_told_answers_lose_what_generation_says(family: str, name: str) -> None:
    """A model that is told, in one forward, what it has generated, a token a step, gives it the same probabilities."""
    torch.manual_seed(0)
    model = FAMILIES[family].build().float()
    if ADAPTED[name]:
        za.adapt(model, ADAPTED[name])
    rows = [row for row in FAMILIES[family].rows if len(row) > 1]
    inputs = FAMILIES[family].inputs(model, rows)
    model.generation_config.eos_token_id = None
    made = model.generate(
        **inputs,
        max_new_tokens=5,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
        suppress_tokens=[*UNSAID, PAD],
        pad_token_id=PAD,
    )
    said = made.sequences[:, inputs["input_ids"].shape[1] :]
    lengths = torch.tensor([3, 5, 1])[: len(rows)]
    right = said.masked_fill(torch.arange(5) >= lengths[:, None], IGNORED)
    chances = torch.stack(made.logits, 1).log_softmax(-1).gather(-1, said[..., None])[..., 0]  # (B, A)
    assert told(model, inputs, right) == pytest.approx(-(chances * (right != IGNORED)).sum(1), abs=1e-4)
    assert told(model, inputs, right[:, :1]) == pytest.approx(-chances[:, 0], abs=1e-4), "answers of one token"


@torch.no_grad()
def told(model: Any, inputs: dict[str, Tensor], right: Tensor) -> list[float]:
    tokenizer = types.SimpleNamespace(pad_token_id=PAD, eos_token_id=None)
    answering = Forced(model, Prompts([], types.SimpleNamespace(tokenizer=tokenizer)))
    answering.read(PromptBatch(inputs, [], right), None)
    assert answering.tokens == (right != IGNORED).sum(1).tolist()
    return answering.losses


def test_a_threshold_meets_the_target(tmp_path: Path) -> None:
    """Judged as it was tuned, with the weights it had."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    write_base(tmp_path / "base")
    asked = read_questions(write_data(tmp_path / "data", train=1, validation=12), "validation")
    prompts = Prompts.encode(asked, AutoProcessor.from_pretrained(tmp_path / "base"), 5)
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "base")
    assert judge(model, prompts)["flops"] == 1
    za.adapt(model, {"layers": [1, 2], "capacity": {"type": "constant", "value": 0.5}})
    weights = {name: router.weight.clone() for name, router in za.routers(model)}
    topk = judge(model, prompts)
    assert topk["skip"] == {"layers.1": 0.5, "layers.2": 0.5} and topk["logits"].numel() == 2 * 12 * 16
    found = tune_threshold(model, prompts, topk["flops"], 0.02, 10)
    assert found["reached"] and found["flops"] == pytest.approx(topk["flops"], rel=0.02)
    assert za.adaptation(model).inference.threshold == found["threshold"]
    assert judge(model, prompts)["flops"] == found["flops"]
    assert all(torch.equal(router.weight, weights[name]) for name, router in za.routers(model))
    assert not tune_threshold(model, prompts, 0.1, 0.02, 4)["reached"]
