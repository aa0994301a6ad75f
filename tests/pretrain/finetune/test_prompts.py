"""Inputs of a question: labels on answers alone, prompts that are the beginning of what is trained on, batches."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from pretrain.data import DataError
from pretrain.finetune.prompts import IGNORED, collate, encode, padding_id
from pretrain.finetune.questions import Question
from tests.pretrain.finetune import processors
from tests.pretrain.finetune.processors import LLAVA_TEMPLATE, PAD, TURN_TEMPLATE, llava_processor, picture
from zoo.config import UserError

TURNS = (("how many?", "two"), ("and sevens?", "none"))
PLAIN = "USER: (image)\nhow many? ASSISTANT:[ two</s>] USER: and sevens? ASSISTANT:[ none</s>]"
CASES = {
    "none": (None, PLAIN),
    "llava": (LLAVA_TEMPLATE, PLAIN),
    "turns": (
        TURN_TEMPLATE,
        "<s>user\n(image)how many?</s>\n<s>assistant\n[two</s>]\n<s>user\nand sevens?</s>\n<s>assistant\n[none</s>]",
    ),
}
"""Template, and what becomes of a conversation: in brackets what is labelled."""


def question(images: int = 1, turns: tuple[tuple[str, str], ...] = TURNS) -> Question:
    return Question(tuple(picture(n, 8, 12) for n in range(images)), turns, "train.jsonl:7")


@pytest.mark.parametrize("images", [0, 1, 2])
@pytest.mark.parametrize("case", CASES)
def test_labels_stand_on_answers(case: str, images: int) -> None:
    template, form = CASES[case]
    processor = llava_processor(template)
    inputs = encode(question(images), processor)
    ids, labels = inputs["input_ids"][0], inputs["labels"][0]
    assert inputs["input_ids"].shape == inputs["labels"].shape == inputs["attention_mask"].shape
    shown = form.replace("(image)", "<image>" * 16) if images == 1 else None
    marked, last = "", False
    for token, inside in zip(ids.tolist(), (labels != IGNORED).tolist(), strict=True):
        marked += ("[" if inside and not last else "") + ("]" if last and not inside else "")
        marked += processor.tokenizer.decode([token])
        last = inside
    if shown is not None:
        assert marked + "]" == shown
    assert marked.count("<image>") == 16 * images
    assert marked.count("[") == 2 and marked.endswith("none</s>")
    assert torch.equal(ids[labels != IGNORED], labels[labels != IGNORED])
    assert len(inputs.get("pixel_values", ())) == images


@pytest.mark.parametrize("template", [None, LLAVA_TEMPLATE])
def test_a_prompt_is_how_training_begins(template: str | None) -> None:
    processor = llava_processor(template)
    whole, prompt = encode(question(), processor), encode(question(), processor, answers=False)
    assert "labels" not in prompt
    length = prompt["input_ids"].shape[1]
    assert torch.equal(prompt["input_ids"], whole["input_ids"][:, :length])
    assert processor.tokenizer.decode(whole["input_ids"][0, length:]) == " none</s>"


def test_a_template_that_invites_more_than_it_writes() -> None:
    processor = llava_processor(TURN_TEMPLATE)
    prompt = encode(question(0), processor, answers=False)
    assert processor.tokenizer.decode(prompt["input_ids"][0]).endswith(
        "two</s>\n<s>user\nand sevens?</s>\n<s>assistant\nthink. "
    )


@pytest.mark.parametrize(
    "name", ["PaliGemmaProcessor", "Gemma3Processor", "Idefics3Processor", "ChameleonProcessor", "LlavaNextProcessor"]
)
def test_other_processors(name: str) -> None:
    processor = processors.other_processors()[name]
    several = not name.startswith("PaliGemma")
    asked = [question(1, TURNS[:1]), question(2, TURNS) if several else question(1, (("and?", "none"),))]
    samples = [encode(each, processor) for each in asked]
    for each, inputs in zip(asked, samples, strict=True):
        ids, labels = inputs["input_ids"][0], inputs["labels"][0]
        expected = "".join(f"{answer}</s>" for _, answer in each.turns)
        assert processor.tokenizer.decode(ids[labels != IGNORED]).replace(" ", "") == expected
        prompt = encode(each, processor, answers=False)
        length = prompt["input_ids"].shape[1]
        assert "labels" not in prompt and torch.equal(prompt["input_ids"][0], ids[:length])
        assert (labels[:length] == IGNORED)[-1] and (labels[length:] != IGNORED).all()
    batch = collate(samples, PAD)
    assert batch["input_ids"].shape == (2, max(inputs["input_ids"].shape[1] for inputs in samples))
    images = {"Idefics3Processor": 2}.get(name, 1 + len(asked[1].images))  # Idefics has a row a sample
    assert batch["pixel_values"].shape[0] == images
    if not several:
        with pytest.raises(DataError, match="takes one question about at least one image"):
            encode(question(), processor)


def test_batches() -> None:
    processor = llava_processor()
    samples = [
        encode(question(2), processor),
        encode(question(0), processor),
        encode(question(1, TURNS[:1]), processor),
    ]
    padding = padding_id(processor)
    assert padding == PAD
    right, left = collate(samples, padding), collate(samples, padding, side="left")
    assert right["pixel_values"].shape == (3, 3, 8, 8) and right["input_ids"].shape[0] == 3
    for batch in (right, left):
        for row, own in enumerate(samples):
            kept = batch["attention_mask"][row] == 1
            for name in ("input_ids", "labels"):
                assert torch.equal(batch[name][row][kept], own[name][0]), name
            assert (batch["input_ids"][row][~kept] == PAD).all() and (batch["labels"][row][~kept] == IGNORED).all()
    assert right["attention_mask"][1, 0] == 1 == left["attention_mask"][1, -1] and left["attention_mask"][1, 0] == 0


def test_images_of_different_sizes_are_padded() -> None:
    ids = torch.ones(1, 2, dtype=torch.long)
    samples = [{"input_ids": ids, "pixel_values": torch.ones(1, tiles, 3, 4, 4)} for tiles in (3, 5)]
    pixels = collate(samples, 0)["pixel_values"]
    assert pixels.shape == (2, 5, 3, 4, 4) and pixels[0, :3].all() and not pixels[0, 3:].any()


def test_what_cannot_be_encoded(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"train.jsonl:7: the tokens of its answer 'zwölf' read ' zw<unk>lf"):
        encode(question(1, (("how many?", "zwölf"),)), llava_processor())
    strange = question(1, (("two <image> here?", "no"),))
    with pytest.raises(DataError, match=r"train.jsonl:7: LlavaProcessor cannot encode it"):
        encode(strange, llava_processor())
    slow = processors.llava_processor()
    slow.tokenizer.__class__ = type("Slow", (type(slow.tokenizer),), {"is_fast": False})
    with pytest.raises(UserError, match="use a fast tokenizer"):
        encode(question(), slow)
