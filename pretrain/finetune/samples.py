"""Questions → one endless sequence of samples → the batches of each rank.

The order is a pure function of (seed, epoch, position): every epoch is a permutation of its own, and ranks take their
shares of it by arithmetic, so it depends neither on their number nor on the size of a micro-batch.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
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

NAMED = 10
"""How many unusable samples an error names."""


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
            return self.batcher.batch([question for _, question in items], items[0][0], skip=True)
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


def usable(questions: Sequence[Question], batcher: Batcher, limit: int, log: Callable[[str], None]) -> list[Question]:
    """The questions without those that cannot be used, which are named.

    Args:
        limit: how many these may be, see `recipe.QuestionsConfig.max_broken_samples`.
    Raises:
        DataError: there are more, or nothing else.
    """
    found, reasons = [], []
    for question in questions:
        try:
            batcher.sample(question)
            found.append(question)
        except DataError as error:
            reasons.append(str(error))
    if len(reasons) > limit or not found:
        raise too_many(limit, len(reasons), len(reasons), reasons)
    for reason in reasons:
        log(f"skipped {reason}")
    return found


def too_many(limit: int, count: int, needed: int, reasons: Sequence[str]) -> DataError:
    """What to say where more samples than `limit` cannot be used.

    Args:
        count: how many there are.
        needed: the limit that they would take.
        reasons: where they stand and why; a few of them are shown.
    """
    lines = [*reasons[:NAMED], *([f"… and {len(reasons) - NAMED} more"] if len(reasons) > NAMED else [])]
    return DataError(
        f"data.max_broken_samples: {limit}: {count} sample{'s' * (count != 1)} cannot be used; repair what is wrong, or"
        f" set it to at least {needed}, and give the same command again:\n  " + "\n  ".join(lines)
    )


def fingerprint(questions: Sequence[Question]) -> str:
    """Hash of the questions, their order, and the names of their images."""
    digest = hashlib.sha256()
    for question in questions:
        images = [image.name for image in question.images if isinstance(image, Path)]
        digest.update(repr((images, question.turns)).encode())
    return digest.hexdigest()


def fingerprint_images(questions: Sequence[Question]) -> str:
    """Hash of the sizes of the images' files: another one where a picture was repaired or exchanged."""
    digest = hashlib.sha256()
    for image in (image for question in questions for image in question.images if isinstance(image, Path)):
        digest.update(f"{image.stat().st_size} ".encode())
    return digest.hexdigest()
