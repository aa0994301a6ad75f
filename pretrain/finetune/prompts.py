"""From a question to a multimodal model's inputs, through the model's own processor of Transformers.

The text is the processor's chat template, or, where it has none, "USER: <image>\\nquestion ASSISTANT: answer</s>".
Labels stand on answers and on what ends them, and nowhere else.
"""

from __future__ import annotations

import dataclasses
import os.path
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from pretrain.data.errors import DataError
from pretrain.finetune.questions import Question
from zoo.config import UserError

IGNORED = -100
"""The label of a token that is not predicted."""
PER_TOKEN = {"attention_mask": 0, "labels": IGNORED, "token_type_ids": 0, "mm_token_type_ids": 0}
"""What pads the inputs, besides input_ids, that hold one value a token. All others belong to images."""
OPTIONS: dict[str, dict[str, Any]] = {"ChameleonProcessor": {"return_for_text_completion": True}}
"""By processor: without it Chameleon's ends every text with the separator that follows a question."""

ANSWER = "\N{OBJECT REPLACEMENT CHARACTER}"
"""Stands for an answer, to find its place in a template's text."""


def encode(question: Question, processor: Any, answers: bool = True) -> dict[str, Tensor]:
    """Inputs of one sample: input_ids and attention_mask (1, T), the processor's tensors for its images, and with
    `answers` labels (1, T), IGNORED but on the answers.

    Args:
        processor: of the model, as AutoProcessor opens it.
        answers: False ends the text where the last answer would begin: the prompt that a generation starts from.
    Raises:
        DataError: an image does not decode, or the processor cannot encode the sample; names its source.
        UserError: the tokenizer is not a fast one.
    """
    images = question.pictures()
    if type(processor).__name__.startswith("PaliGemma"):
        return _encode_prefix(question, images, processor, answers)
    text, spans = _conversation(question, processor, answers)
    if not answers:
        return _process(processor, text, images, question)
    if not getattr(processor.tokenizer, "is_fast", False):
        raise UserError(
            f"{type(processor.tokenizer).__name__} tells no token's place in the text; use a fast tokenizer"
        )
    inputs = _process(processor, text, images, question, return_offsets_mapping=True)
    offsets = inputs.pop("offset_mapping")[0]  # (T, 2), of the text in which an image's token was repeated
    starts, ends = offsets.unbind(1)
    ids = inputs["input_ids"]
    labels = torch.full_like(ids, IGNORED)
    shift = int(ends.max()) - len(text)  # images come before all answers
    for (start, end), (_, answer) in zip(spans, question.turns, strict=True):
        inside = (starts < end + shift) & (ends > start + shift) & (ends > starts)
        labels[0, inside] = ids[0, inside]
        if _plain(answer) not in _plain(processor.tokenizer.decode(ids[0, inside])):
            raise DataError(
                f"{question.source}: the tokens of its answer {answer!r} read "
                f"{processor.tokenizer.decode(ids[0, inside])!r}; the tokenizer lacks its letters, or the processor "
                f"{type(processor).__name__} changes the text after the images"
            )
    return inputs | {"labels": labels}


def collate(
    samples: Sequence[Mapping[str, Tensor]], padding: int, side: Literal["left", "right"] = "right"
) -> dict[str, Tensor]:
    """One batch: what holds a value a token is padded to the longest sample (B, T), images follow each other.

    Args:
        samples: as `encode` gives them; text-only ones may be among them.
        padding: id of padding, see `padding_id`.
        side: "right" to train, "left" to generate.
    """
    length = max(sample["input_ids"].shape[1] for sample in samples)
    batch = {}
    for name in dict.fromkeys(name for sample in samples for name in sample):
        if name == "input_ids" or name in PER_TOKEN:
            value = padding if name == "input_ids" else PER_TOKEN[name]
            rows = [sample.get(name, torch.full_like(sample["input_ids"], value)) for sample in samples]
            room = [length - row.shape[1] for row in rows]
            sides = [(0, free) if side == "right" else (free, 0) for free in room]
            padded = [F.pad(row, pad, value=value) for row, pad in zip(rows, sides, strict=True)]
        else:
            parts = [sample[name] for sample in samples if name in sample]
            sizes = [max(part.shape[dim] for part in parts) for dim in range(1, parts[0].dim())]
            padded = [_grown(part, sizes) for part in parts]
        batch[name] = torch.cat(padded)
    return batch


def padding_id(processor: Any) -> int:
    """What `collate` pads with: the tokenizer's padding or end token, or 0."""
    tokenizer = processor.tokenizer
    ids = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
    return next(each for each in ids if each is not None)


def _conversation(question: Question, processor: Any, answers: bool) -> tuple[str, list[tuple[int, int]]]:
    """The text, and where in it [start, end) each answer and what ends it stand. Without `answers` it ends where the
    last one would begin."""
    whole = _render(question, processor, len(question.turns), False)
    text, spans, done = "", [], 0
    for number, (_, answer) in enumerate(question.turns):
        prompt = _render(question, processor, number, True)
        if number == len(question.turns) - 1 and not answers:
            return text + prompt[done:], spans
        start = len(prompt) if whole.startswith(prompt) else _place(question, processor, number)
        end = len(os.path.commonprefix([_render(question, processor, number + 1, False).rstrip(), whole]))
        text += whole[done:start]
        first = len(text)
        text += whole[start:end]
        if text.endswith(answer.strip()):  # the template does not say that the answer is over
            text += processor.tokenizer.eos_token or ""
        spans.append((first, len(text)))
        done = end
    return text, spans


def _place(question: Question, processor: Any, number: int) -> int:
    """Where answer `number` begins, under a template that prompts with more than it writes into the past."""
    turns = (*question.turns[:number], (question.turns[number][0], ANSWER))
    return _render(dataclasses.replace(question, turns=turns), processor, number + 1, False).index(ANSWER)


def _render(question: Question, processor: Any, answered: int, prompt: bool) -> str:
    """The conversation up to `answered` answers; with `prompt` also the next question, and what invites its answer."""
    turns = question.turns[: answered + prompt]
    if getattr(processor, "chat_template", None):
        messages = []
        for number, (asked, answer) in enumerate(turns):
            pictures = [{"type": "image"}] * (len(question.images) if number == 0 else 0)
            messages.append({"role": "user", "content": [*pictures, {"type": "text", "text": asked}]})
            if number < answered:
                messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
        return processor.apply_chat_template(messages, add_generation_prompt=prompt, tokenize=False)
    parts = []
    for number, (asked, answer) in enumerate(turns):
        pictures = f"{processor.image_token}\n" * (len(question.images) if number == 0 else 0)
        parts.append(f"USER: {pictures}{asked} ASSISTANT:" + (f" {answer}" if number < answered else ""))
    return " ".join(parts)


def _process(processor: Any, text: str, images: list, question: Question, **options: Any) -> dict[str, Tensor]:
    start = processor.tokenizer.bos_token
    if start and text.startswith(start):  # written by the template
        options["add_special_tokens"] = False
    options |= OPTIONS.get(type(processor).__name__, {})
    try:
        result = processor(text=[text], images=[images] if images else None, return_tensors="pt", **options)
    except Exception as error:  # processors raise anything for what they do not take
        raise DataError(
            f"{question.source}: {type(processor).__name__} cannot encode it ({type(error).__name__}: {error})"
        ) from error
    return {name: value for name, value in result.items() if isinstance(value, Tensor)}


def _encode_prefix(question: Question, images: list, processor: Any, answers: bool) -> dict[str, Tensor]:
    """PaliGemma's way: the question is a prefix that sees itself whole, the answer its suffix."""
    if len(question.turns) > 1 or not images:
        raise DataError(f"{question.source}: {type(processor).__name__} takes one question about at least one image")
    asked, answer = question.turns[0]
    suffix = {"suffix": [answer]} if answers else {}
    inputs = _process(processor, processor.image_token * len(images) + asked, images, question, **suffix)
    return inputs if answers else {name: value for name, value in inputs.items() if name != "labels"}


def _grown(images: Tensor, sizes: Sequence[int]) -> Tensor:
    """`images` padded with zeros to `sizes` in all dimensions but the first: an image's tiles, or an Idefics sample's
    images, whose number differs."""
    free = [size - have for size, have in zip(sizes, images.shape[1:], strict=True)]
    return F.pad(images, [pad for size in reversed(free) for pad in (0, size)]) if any(free) else images


def _plain(text: str) -> str:
    """Without what normalisation of a tokenizer may change."""
    return "".join(unicodedata.normalize("NFKC", text).casefold().split())
