"""Questions → one batch: encoded, padded, with what is counted of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from pretrain.data.errors import DataError
from pretrain.finetune.prompts import IGNORED, collate, encode, padding_id
from pretrain.finetune.questions import Question
from zoo.adapt import AdaptConfig, AdaptContext
from zoo.adapt.family import has_pictures
from zoo.config import UserError


@dataclasses.dataclass(frozen=True)
class QuestionBatch:
    """B rows, padded to T tokens. The last one is a filler where no sample has an image."""

    inputs: dict[str, Tensor]
    """Arguments of the model's forward: input_ids, attention_mask (B, T), pictures."""
    labels: Tensor
    """(B, T), IGNORED where nothing is to be said."""
    filler: bool
    """Whether there is one; nothing of it is counted below."""
    first: int
    """Position of the first sample."""
    tokens: tuple[int, ...]
    """Tokens of each sample, padding not counted."""
    groups: tuple[tuple[int, ...], ...]
    """For each sample the sizes of the groups of its tokens that compete; empty where the model is dense."""
    truncated: int
    """Samples of which the end was cut off."""
    unusable: tuple[str, ...] = ()
    """Where each sample that was left out stands, and why it was."""

    @property
    def answers(self) -> int:
        """Tokens to be predicted."""
        return int((self.labels[:, 1:] != IGNORED).sum())

    @property
    def candidates(self) -> int:
        """Tokens that a routed layer may skip."""
        return sum(map(sum, self.groups))

    def to(self, device: torch.device | str, dtype: torch.dtype) -> QuestionBatch:
        """On `device`, pictures in `dtype`."""
        labels = self.labels.to(device, non_blocking=True)
        return dataclasses.replace(self, inputs=moved(self.inputs, device, dtype), labels=labels)


class Batcher:
    """Encodes samples and puts them together.

    Every rank must run every weight in every forward (ZeRO reduces and gathers them in order), so a batch without
    images gets one more row, a prompt with an image and no labels: its gradients are zeros.

    Args:
        processor: of the model.
        filler: a question with an image.
        config: of the model, Transformers' own.
        pictures: placeholder id → what it stands for.
        adapt: how the model is adapted; None for a dense one.
        training: whether candidates are those of training; evaluation lets answers be kept.
        maximum_length: tokens of a sample; None: any number.
    """

    def __init__(
        self,
        processor: Any,
        filler: Question,
        config: Any,
        pictures: Mapping[int, int],
        adapt: AdaptConfig | None,
        training: bool,
        maximum_length: int | None = None,
    ) -> None:
        self.processor, self.config, self.pictures, self.adapt = processor, config, dict(pictures), adapt
        self.training, self.maximum_length = training, maximum_length
        self.padding = padding_id(processor)
        self.filler = encode(filler, processor, answers=False)
        if not any(bool((self.filler["input_ids"] == token).any()) for token in self.pictures):
            names = " or ".join(map(str, self.pictures))
            raise UserError(
                f"{filler.source}: has an image, but the image token {names} of the model's config never occurs in what"
                f" {type(processor).__name__} makes of it; model and processor do not belong together: give the model's"
                " own processor"
            )
        self.answers = training and adapt is not None and adapt.candidates == "image_and_answer"

    def batch(self, questions: Sequence[Question], first: int = 0, skip: bool = False) -> QuestionBatch:
        """Samples with their answers, padded on the right.

        Args:
            first: the position of the first of them.
            skip: leave out what cannot be used, and say so in the batch, which may be left with no sample.
        Raises:
            DataError: without `skip`, see `sample`.
        """
        samples, truncated, unusable = [], 0, []
        for question in questions:
            try:
                sample, cut = self.sample(question)
            except DataError as error:
                if not skip:
                    raise
                unusable.append(str(error))
                continue
            samples.append(sample)
            truncated += cut
        filled = self._filled(samples)
        batch = collate(filled, self.padding)
        labels = batch.pop("labels") if samples else torch.full_like(batch["input_ids"], IGNORED)
        return QuestionBatch(
            batch,
            labels,
            len(filled) > len(samples),
            first,
            tuple(sample["input_ids"].shape[1] for sample in samples),
            self._groups(batch, labels, len(samples), len(filled) > len(samples)),
            truncated,
            tuple(unusable),
        )

    def sample(self, question: Question) -> tuple[dict[str, Tensor], bool]:
        """A sample with its answers, and whether its end was cut off.

        Raises:
            DataError: an image that does not decode, an image token in the text, what the processor refuses, or what
                does not fit into `maximum_length`.
        """
        self._check_text(question)
        sample = encode(question, self.processor)
        cut = self.maximum_length is not None and sample["input_ids"].shape[1] > self.maximum_length
        return (self._cut(sample, question) if cut else sample), cut

    def prompts(self, questions: Sequence[Question]) -> dict[str, Tensor]:
        """What generation of the last answers starts from, padded on the left; a filler is the last row, if there is
        one."""
        samples = [encode(question, self.processor, answers=False) for question in questions]
        return collate(self._filled(samples), self.padding, side="left")

    def _check_text(self, question: Question) -> None:
        """Raises DataError where a text holds what stands for an image: the model would look for one more of them."""
        for text in (text for turn in question.turns for text in turn):
            ids = self.processor.tokenizer(text, add_special_tokens=False).input_ids
            found = next((token for token in self.pictures if token in ids), None)
            if found is not None:
                raise DataError(
                    f"{question.source}: its text holds {self.processor.tokenizer.convert_ids_to_tokens(found)!r}, "
                    "which stands for an image; images are put before the first question without it: leave it out"
                )

    def _filled(self, samples: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
        if any(map(has_pictures, samples)):
            return samples
        filler = dict(self.filler)
        if self.answers:  # the others' answers compete, and are counted: nothing of the filler may be among them
            found = torch.isin(filler["input_ids"], torch.tensor(list(self.pictures)))
            filler["attention_mask"] = filler["attention_mask"] * ~found
        return [*samples, filler]

    def _cut(self, sample: dict[str, Tensor], question: Question) -> dict[str, Tensor]:
        ids, limit = sample["input_ids"], self.maximum_length
        cut = {name: value[:, :limit] if value.shape[:2] == ids.shape else value for name, value in sample.items()}
        gone = sum(int((ids[:, limit:] == token).sum()) for token in self.pictures)
        if gone or not bool((cut["labels"] != IGNORED).any()):
            what = "its images do" if gone else "its question does"
            raise DataError(
                f"{question.source}: {what} not fit into data.maximum_length: {limit} tokens, of which it has "
                f"{ids.shape[1]}; raise data.maximum_length, or leave it out of the file"
            )
        return cut

    def _groups(
        self, inputs: Mapping[str, Tensor], labels: Tensor, rows: int, filler: bool
    ) -> tuple[tuple[int, ...], ...]:
        if self.adapt is None or (filler and not self.answers):
            return ((),) * rows
        context = AdaptContext.build(
            self.adapt,
            self.pictures,
            inputs,
            inputs["input_ids"],
            model_config=self.config,
            training=self.training,
            answers=labels != IGNORED if self.answers else None,
        )
        pairs = list(zip(context.pool_rows, context.pools, strict=True))
        return tuple(tuple(size for row, size in pairs if row == wanted) for wanted in range(rows))


def moved(inputs: Mapping[str, Tensor], device: torch.device | str, dtype: torch.dtype) -> dict[str, Tensor]:
    """On `device`, what is of floating point (pictures) in `dtype`."""
    return {
        name: value.to(device, dtype if value.is_floating_point() else value.dtype, non_blocking=True)
        for name, value in inputs.items()
    }
