"""Questions about images: reading them from JSON lines or shards. `prompts.py` turns them into a model's inputs.

A folder holds `train.jsonl`, `validation.jsonl`, `test.jsonl`. A line is a question about images of the folder

    {"image": "images/0.png", "question": "How many sevens?", "answer": "two"}

or a conversation: `"images": ["a.png", "b.png"]` for `image`, `"turns": [{"question": …, "answer": …}, …]` for the
pair. A line without an image is a text-only question. Other keys are kept beside it.
"""

from __future__ import annotations

import dataclasses
import json
import random
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any

from PIL import Image

from pretrain.data.errors import BrokenDocument, DataError
from pretrain.data.reading import read_parts
from pretrain.data.shards import find_shards
from pretrain.data.sources import Document, open_shards
from zoo.modalities.pictures import open_picture

KEYS = ("image", "images", "question", "answer", "turns")


@dataclasses.dataclass(frozen=True)
class Question:
    """One sample: images, and a conversation about them."""

    images: tuple[Path | Image.Image, ...]
    """They stand before the first question."""
    turns: tuple[tuple[str, str], ...]
    """(question, answer); at least one."""
    source: str
    """Where it comes from, for messages: file and line."""
    extra: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """What else its line says."""

    def pictures(self) -> list[Image.Image]:
        """The images in RGB, upright and on white, as `open_picture` gives them.

        Raises:
            DataError: a file is no picture, or none that can be used.
        """
        opened = []
        for image in self.images:
            try:
                opened.append((open_picture(image) if isinstance(image, Path) else image).convert("RGB"))
            except Exception as error:  # Pillow raises anything for bytes it cannot read
                raise DataError(f"{self.source}: {image} does not decode ({type(error).__name__}: {error})") from None
        return opened


def read_questions(folder: Path, split: str = "train") -> list[Question]:
    """All questions of `<folder>/<split>.jsonl`, in order. Images are only checked for being there.

    Raises:
        DataError: no such file, no line in it, or a line that is not a question; names file, line and what is wrong.
    """
    path = folder / f"{split}.jsonl"
    if not path.is_file():
        there = sorted(each.name for each in folder.glob("*.jsonl"))
        raise DataError(f"{path}: does not exist; {folder} holds {', '.join(there) or 'no .jsonl file'}")
    known: set[Path] = set()
    questions = []
    with open(path, encoding="utf-8-sig") as lines:
        try:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    questions.append(_question(line, folder, f"{path}:{number}", known))
        except UnicodeDecodeError as error:
            raise DataError(f"{path}: is not UTF-8 text ({error})") from None
    if not questions:
        raise DataError(f"{path}: is empty; write one JSON object a line")
    return questions


def sample_questions(data: Path, split: str, count: int, seed: int = 0) -> list[Question]:
    """`count` questions with images, or all there are, drawn at random: from JSON lines (a folder of them, or one
    file), or from the documents of a folder of WebDataset shards, each of whose texts becomes a question without an
    answer.

    Args:
        data: the folder, or a .jsonl file.
        split: of a folder: `<split>.jsonl`, or the shards whose names contain it.
        seed: of the drawing; the same gives the same questions.
    Raises:
        DataError: nothing of the kind is there, it is broken, or no sample has an image.
    """
    if data.is_file():
        if data.suffix != ".jsonl":
            raise DataError(f"{data}: unknown extension {data.suffix!r}; give a .jsonl file, or a folder")
        data, split = data.parent, data.stem
    elif not data.is_dir():
        raise DataError(f"{data}: does not exist; give a folder of .jsonl files or of .tar shards")
    if not any(data.glob("*.jsonl")):
        if not any(data.glob("*.tar")):
            raise DataError(f"{data}: holds neither .jsonl files nor .tar shards")
        return _sample_shards(data, split, count, seed)
    asked = read_questions(data, split)
    questions = [question for question in asked if question.images]
    if not questions:
        raise DataError(
            f"{data / split}.jsonl: none of its {len(asked)} lines has an image; some must: "
            '{"image": "a.png", "question": …, "answer": …}'
        )
    random.Random(seed).shuffle(questions)
    return questions[:count]


def one_an_image(questions: Sequence[Question], count: int) -> list[Question]:
    """The first `count` questions about images that none before was about."""
    first: dict[tuple[Path | Image.Image, ...], Question] = {}
    for question in questions:
        if question.images:
            first.setdefault(question.images, question)
    return list(first.values())[:count]


def about_other_images(questions: Sequence[Question], count: int | None = None) -> list[Question]:
    """The first `count` questions (None: all), each with the images of the next question, after the last the first,
    that has as many and others: what is still answered right was not read off its own images.

    Args:
        questions: each has images.
    Raises:
        DataError: there is no such one for a question.
    """
    result = []
    for number, question in enumerate(questions[:count]):
        own = question.images
        following = (questions[(number + step) % len(questions)].images for step in range(1, len(questions)))
        images = next((other for other in following if other != own and len(other) == len(own)), None)
        if images is None:
            raise DataError(f"{question.source}: no other question has {len(own)} other images; add some")
        result.append(dataclasses.replace(question, images=images))
    return result


def _question(line: str, folder: Path, source: str, known: set[Path]) -> Question:
    try:
        item = json.loads(line)
    except ValueError as error:
        raise DataError(f"{source}: is not JSON ({error})") from None
    if not isinstance(item, dict):
        raise DataError(f"{source}: is {type(item).__name__}, not an object")
    if "image" in item and "images" in item:
        raise DataError(f"{source}: has both 'image' and 'images'; give one of them")
    names = [item["image"]] if "image" in item else item.get("images", [])
    if not isinstance(names, list) or not all(isinstance(name, str) and name for name in names):
        raise DataError(f"{source}: 'image' must be the name of a file, 'images' a list of such names")
    for name in names:
        if PurePath(name).is_absolute() or ".." in PurePath(name).parts:
            raise DataError(f"{source}: its image {name!r} is outside the folder {str(folder)!r}; put it inside")
    images = tuple(folder / name for name in names)
    for image in images:
        if image not in known and not image.is_file():
            raise DataError(f"{source}: its image {str(image)!r} does not exist; names are relative to the folder")
        known.add(image)
    extra = {key: value for key, value in item.items() if key not in KEYS}
    return Question(images, tuple(_turns(item, source)), source, extra)


def _turns(item: Mapping[str, Any], source: str) -> Iterator[tuple[str, str]]:
    if "turns" in item and ("question" in item or "answer" in item):
        raise DataError(f"{source}: has both 'turns' and 'question' or 'answer'; give one of them")
    turns = item.get("turns", [item])
    if not isinstance(turns, list) or not turns:
        raise DataError(f"{source}: 'turns' must be a list of objects with 'question' and 'answer'")
    for number, turn in enumerate(turns):
        where = f"turns[{number}]: " if "turns" in item else ""
        for key in ("question", "answer"):
            value = turn.get(key) if isinstance(turn, dict) else None
            if not isinstance(value, str) or not value.strip():
                raise DataError(f"{source}: {where}{key!r} must be a text that is not empty, got {value!r}")
        yield turn["question"], turn["answer"]


def _sample_shards(folder: Path, split: str, count: int, seed: int) -> list[Question]:
    """Documents are drawn from all shards; those without an image, or broken, are passed over."""
    questions: list[Question] = []
    broken: list[str] = []
    with open_shards(find_shards(folder, f"*{split}*.tar", "split")) as shards:
        documents = [(shard, document) for shard, each in shards.items() for document in each]
        random.Random(seed).shuffle(documents)
        for shard, document in documents:
            if len(questions) == count:
                break
            try:
                question = _question_of(shard, document)
            except BrokenDocument as error:
                broken.append(f"{shard.name}: {document.key}: {error}")
                continue
            if question.images:
                questions.append(question)
    if not questions:
        why = f"; {len(broken)} are broken, such as {broken[0]}" if broken else ""
        raise DataError(
            f"{folder}: none of the {len(documents)} documents of *{split}*.tar has an image that can be read{why}; "
            "some must"
        )
    return questions


def _question_of(shard: Path, document: Document) -> Question:
    texts, images = [], []
    for part in read_parts(document, {"text": bytes.decode, "image": open_picture}):
        if part.type == "text":
            texts.append(part.item)
        elif part.type == "image":
            images.append(part.item)
    return Question(tuple(images), (("\n".join(texts), ""),), f"{shard.name}: {document.key}")
