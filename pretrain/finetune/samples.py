"""Questions → one endless sequence of samples → the batches of each rank.

The order is a pure function of (seed, epoch, position): every epoch is a permutation of its own, and ranks take their
shares of it by arithmetic, so it depends neither on their number nor on the size of a micro-batch.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from pretrain.data.errors import DataError
from pretrain.data.packing import shuffled
from pretrain.finetune.prompts import IGNORED, collate, encode, padding_id
from pretrain.finetune.questions import Question, read_questions
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
            raise DataError(
                f"{filler.source}: has an image, but the image token {names} of the model's config never occurs in what"
                f" {type(processor).__name__} makes of it; model and processor do not belong together: give the model's"
                " own processor"
            )
        self.answers = training and adapt is not None and adapt.candidates == "image_and_answer"

    def batch(self, questions: Sequence[Question], first: int = 0) -> QuestionBatch:
        """Samples with their answers, padded on the right.

        Raises:
            DataError: an image that does not decode, or does not fit into `maximum_length`.
        """
        samples, truncated = [], 0
        for question in questions:
            sample = encode(question, self.processor)
            cut = self.maximum_length is not None and sample["input_ids"].shape[1] > self.maximum_length
            samples.append(self._cut(sample, question) if cut else sample)
            truncated += cut
        filled = self._filled(samples)
        batch = collate(filled, self.padding)
        labels = batch.pop("labels")
        return QuestionBatch(
            batch,
            labels,
            len(filled) > len(samples),
            first,
            tuple(sample["input_ids"].shape[1] for sample in samples),
            self._groups(batch, labels, len(samples), len(filled) > len(samples)),
            truncated,
        )

    def prompts(self, questions: Sequence[Question]) -> dict[str, Tensor]:
        """What generation of the last answers starts from, padded on the left; a filler is the last row, if there is
        one."""
        samples = [encode(question, self.processor, answers=False) for question in questions]
        return collate(self._filled(samples), self.padding, side="left")

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


class Samples(Dataset):
    """The endless sequence: item i is the question at position i, the same on every rank."""

    def __init__(self, questions: Sequence[Question], seed: int) -> None:
        self.questions, self.seed = questions, seed
        self._epoch, self._order = 0, shuffled(len(questions), seed, 0)

    def __getitem__(self, index: int) -> tuple[int, Question]:
        epoch, place = divmod(index, len(self.questions))
        if epoch != self._epoch:
            self._epoch, self._order = epoch, shuffled(len(self.questions), self.seed, epoch)
        return index, self.questions[int(self._order[place])]


@dataclasses.dataclass(frozen=True)
class Batches:
    """The micro-batches of a rank, step after step.

    Args:
        samples: what they are made of.
        batcher: makes them.
        global_batch, micro_batch: samples a step over all ranks, samples a forward on one.
        rank, world: this rank, and how many there are.
        workers: processes that work ahead.
    """

    samples: Samples
    batcher: Batcher
    global_batch: int
    micro_batch: int
    rank: int
    world: int
    workers: int = 0

    def since(self, step: int) -> Iterator[list[QuestionBatch]]:
        """Those of step `step`, of the one after it, and so on without end.

        Raises:
            DataError: while iterating, where a sample cannot be used.
        """
        share = self.global_batch // self.world
        loader = DataLoader(
            self.samples, batch_sampler=_Positions(self, step), collate_fn=self._collate, num_workers=self.workers
        )
        batches = iter(loader)
        while True:
            step_batches = []
            for _ in range(share // self.micro_batch):
                batch = next(batches)
                if isinstance(batch, UserError):  # a worker's exception would come with its traceback as its text
                    raise batch
                step_batches.append(batch)
            yield step_batches

    def _collate(self, items: list[tuple[int, Question]]) -> QuestionBatch | UserError:
        try:
            return self.batcher.batch([question for _, question in items], items[0][0])
        except UserError as error:
            return error


@dataclasses.dataclass(frozen=True)
class _Positions:
    """What each micro-batch of a rank consists of: positions of samples."""

    batches: Batches
    step: int

    def __iter__(self) -> Iterator[list[int]]:
        plan, step = self.batches, self.step
        share = plan.global_batch // plan.world
        while True:
            begin = step * plan.global_batch + plan.rank * share
            for start in range(begin, begin + share, plan.micro_batch):
                yield list(range(start, start + plan.micro_batch))
            step += 1


def open_questions(path: str, split: str) -> list[Question]:
    """Questions of a split, some of them about images.

    Raises:
        DataError: there are none, or no image is among them.
    """
    if not Path(path).is_dir():
        raise DataError(
            f"data.path: {path!r} is not a folder; give one with train.jsonl, validation.jsonl and the images"
        )
    questions = read_questions(Path(path), split)
    if not any(question.images for question in questions):
        raise DataError(
            f"data.path: none of the {len(questions)} lines of {path}/{split}.jsonl has an image; a multimodal model"
            ' needs some: {"image": "a.png", "question": …, "answer": …}'
        )
    return questions


def fingerprint(questions: Sequence[Question]) -> str:
    """Hash of the questions, their order, and the names and sizes of their images."""
    digest = hashlib.sha256()
    for question in questions:
        images = [(image.name, image.stat().st_size) for image in question.images if isinstance(image, Path)]
        digest.update(repr((images, question.turns)).encode())
    return digest.hexdigest()
