"""How a model says an answer of its own, and when that is right. All figures of generated answers are made by these."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from pretrain.finetune.prompts import padding_id
from pretrain.finetune.questions import Question


def kinds_of(question: Question) -> list[str]:
    """The kind of each answer, as the key `kind` of the question's line says it (one, or one an answer); "" where there
    is no such key."""
    kind = question.extra.get("kind", "")
    count = len(question.turns)
    return [str(each) for each in kind] if isinstance(kind, list) and len(kind) == count else [str(kind)] * count


def each_answer(questions: Sequence[Question]) -> list[Question]:
    """One question for every answer of a conversation, with the turns before it, answered right, and its own `kind`."""
    return [
        dataclasses.replace(question, turns=question.turns[: turn + 1], extra={**question.extra, "kind": kind})
        for question in questions
        for turn, kind in enumerate(kinds_of(question))
    ]


def longest_answer(questions: Sequence[Question], processor: Any) -> int:
    """Tokens of the longest last answer, without what ends it."""
    tokenizer = processor.tokenizer
    return max(len(tokenizer(question.turns[-1][1], add_special_tokens=False).input_ids) for question in questions)


def generate(model: Any, processor: Any, inputs: Mapping[str, Tensor], tokens: int, together: bool = False) -> Any:
    """Let a model answer greedily, with its cache.

    Args:
        inputs: of the prompts, padded on the left, on the model's device.
        tokens: the most that it may say.
        together: whether all ranks must call the model equally often (ZeRO-3).
    Returns:
        What Transformers' `generate` returns as a record: `sequences` (B, T + n), `past_key_values` and, where `tokens`
        is 1, `logits`, a tuple of one tensor (B, V).
    """
    return model.generate(
        **inputs,
        max_new_tokens=tokens,
        do_sample=False,
        num_beams=1,
        synced_gpus=together,
        eos_token_id=_ends(model, processor.tokenizer),
        pad_token_id=padding_id(processor),
        return_dict_in_generate=True,
        output_logits=tokens == 1,
    )


def texts(made: Any, inputs: Mapping[str, Tensor], processor: Any) -> list[str]:
    """What `generate` has added to each of its prompts, special tokens left out."""
    said = made.sequences[:, inputs["input_ids"].shape[1] :]
    return processor.tokenizer.batch_decode(said, skip_special_tokens=True)


def is_right(text: str, question: Question) -> bool:
    """Whether the text is the question's last answer exactly, spaces at the ends apart."""
    return text.strip() == question.turns[-1][1].strip()


def _ends(model: Any, tokenizer: Any) -> list[int]:
    """Ids after which an answer is over."""
    own = model.generation_config.eos_token_id
    own = own if isinstance(own, list) else [own]
    return sorted({token for token in (*own, tokenizer.eos_token_id) if token is not None})
