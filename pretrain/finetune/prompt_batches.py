"""The questions a sweep judges by, encoded once for all models of a run."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from pretrain.finetune.generation import each_answer
from pretrain.finetune.prompts import IGNORED, collate, encode, padding_id
from pretrain.finetune.questions import Question
from zoo.adapt import AdaptConfig, AdaptContext
from zoo.adapt.family import picture_ids

Shapes = Counter[tuple[int, tuple[int, ...]]]
"""How often a prompt of so many tokens, with candidates in groups of these sizes, is asked."""


@dataclasses.dataclass(frozen=True)
class PromptBatch:
    """B questions as a model takes them."""

    inputs: dict[str, Tensor]
    """The prompts, padded on the left."""
    questions: list[Question]
    """B questions, each of which asks for its last answer."""
    answers: Tensor | None
    """(B, A) int64: the right answers with what ends them, IGNORED after that; None where nobody reads them."""

    @property
    def lengths(self) -> list[int]:
        """Tokens of each prompt, padding apart."""
        return self.inputs["attention_mask"].sum(1).tolist()


@dataclasses.dataclass(frozen=True)
class Prompts:
    """Batches of questions about images."""

    batches: list[PromptBatch]
    processor: Any

    @classmethod
    def encode(cls, questions: Sequence[Question], processor: Any, size: int, answers: bool = False) -> Prompts:
        """`size` a batch; every answer of a conversation is asked for, given the right ones before it.

        Args:
            answers: encode the right ones too.
        """
        single = each_answer([question for question in questions if question.images])
        chunks = [single[start : start + size] for start in range(0, len(single), size)]
        return cls([_batch(chunk, processor, answers) for chunk in chunks], processor)

    def shapes(self, config: AdaptConfig, model_config: Any) -> Shapes:
        """How many prompts there are of each shape; see `Shapes`."""
        pictures = picture_ids(model_config, type(model_config).__name__)
        found: Shapes = Counter()
        for batch in self.batches:
            ids = batch.inputs["input_ids"]
            made = AdaptContext.build(config, pictures, batch.inputs, ids, model_config=model_config)
            pairs = list(zip(made.pool_rows, made.pools, strict=True))
            for row, tokens in enumerate(batch.lengths):
                found[tokens, tuple(size for own, size in pairs if own == row)] += 1
        return found


def _batch(questions: list[Question], processor: Any, answers: bool) -> PromptBatch:
    inputs = collate(
        [encode(question, processor, answers=False) for question in questions], padding_id(processor), "left"
    )
    right = None
    if answers:
        right = pad_sequence(
            [_answer(encode(question, processor)["labels"][0]) for question in questions], True, IGNORED
        )
    return PromptBatch(inputs, questions, right)


def _answer(labels: Tensor) -> Tensor:
    """The last run of labels (T,), of a conversation's last answer."""
    columns = (labels != IGNORED).nonzero()[:, 0]
    breaks = (columns.diff() > 1).nonzero()[:, 0]
    return labels[columns[int(breaks[-1]) + 1 if breaks.numel() else 0 :]]
