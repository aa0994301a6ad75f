"""Questions → one endless sequence of samples → the batches of each rank.

The order is a pure function of (seed, epoch, position): every epoch is a permutation of its own, and ranks take their
shares of it by arithmetic, so it depends neither on their number nor on the size of a micro-batch.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from torch.utils.data import DataLoader, Dataset

from pretrain.data.errors import DataError
from pretrain.data.shuffle import shuffled
from pretrain.finetune.batcher import Batcher, QuestionBatch
from pretrain.finetune.questions import Question, read_questions
from zoo.config import UserError

NAMED = 10
"""How many unusable samples an error names."""


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
