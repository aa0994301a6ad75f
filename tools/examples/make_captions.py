"""Write captioned pictures from WebDataset shards as questions about images, as `pretrain.finetune` reads them.

    python -m tools.examples.make_captions SHARDS OUT [--train '*train*.tar'] [--held-out '*val*.tar'] [--question TEXT]

SHARDS is a folder of shards whose documents (docs/data.md) hold pictures and a text. OUT gets `train.jsonl`,
`validation.jsonl` (the first half of the held-out documents), `test.jsonl` (the second half), and the pictures' files,
unchanged, in a folder for each. A line is

    {"image": "train/000000.0.jpg", "question": "Describe the picture.", "answer": "A dog on a beach."}

with `images`, a list, where a document has several. The answer is the document's text on one line: runs of whitespace
are one space. Documents that are broken, or have no picture or no text, are passed over and counted.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tqdm

from pretrain.data.errors import BrokenDocument, DataError
from pretrain.data.reading import read_parts
from pretrain.data.shards import find_shards
from pretrain.data.sources import Content, Document, open_shards
from zoo.config import UserError
from zoo.modalities.pictures import open_picture

QUESTION = "Describe the picture."


@dataclasses.dataclass(frozen=True)
class Caption:
    """A document with pictures and a text."""

    pictures: tuple[Content, ...]
    """In order; they can be read as long as the shards are open."""
    text: str


@dataclasses.dataclass(frozen=True)
class Captions:
    """What some shards hold."""

    captions: list[Caption]
    incomplete: int
    """Documents without a picture or without a text."""
    broken: list[str]
    """The others: which, and why."""


def read_captions(shards: Mapping[Path, Sequence[Document]]) -> Captions:
    """All documents of the open shards, in order; every picture is decoded once, to see that it can be."""
    documents = [(shard, document) for shard, each in shards.items() for document in each]
    captions, incomplete, broken = [], 0, []
    for shard, document in tqdm.tqdm(documents, desc="documents", disable=None, leave=False):
        try:
            caption = _read(document)
        except BrokenDocument as error:
            broken.append(f"{shard.name}: {document.key}: {error}")
            continue
        if caption.pictures and caption.text:
            captions.append(caption)
        else:
            incomplete += 1
    return Captions(captions, incomplete, broken)


@dataclasses.dataclass(frozen=True)
class Splits:
    """What has been written."""

    captions: dict[str, int]
    """How many of each split."""
    read: tuple[Captions, Captions]
    """What the training and the held-out shards hold."""


def write(
    shards: Path, out: Path, train: str = "*train*.tar", held_out: str = "*val*.tar", question: str = QUESTION
) -> Splits:
    """Write the folder `out`; nothing is written before all shards have been read.

    Args:
        train, held_out: patterns of the names of the shards of either side.
        question: asked about every picture.
    Raises:
        UserError: `out` holds questions already, no shard matches or one matches both patterns, a shard is damaged, or
            there are too few captions.
    """
    _check(shards, out, question)
    sides = [find_shards(shards, train, "--train"), find_shards(shards, held_out, "--held-out")]
    if both := set(sides[0]) & set(sides[1]):
        raise UserError(
            f"--held-out: {min(both).name} matches {held_out!r} and --train {train!r} alike; give narrower patterns"
        )
    with open_shards(sides[0]) as first, open_shards(sides[1]) as second:
        training, held = read_captions(first), read_captions(second)
        _check_enough("--train", training, 1, shards)
        _check_enough("--held-out", held, 2, shards)
        half = len(held.captions) // 2
        splits = {"train": training.captions, "validation": held.captions[:half], "test": held.captions[half:]}
        for split, captions in splits.items():
            (out / split).mkdir(parents=True, exist_ok=True)
            shown = tqdm.tqdm(captions, desc=split, disable=None, leave=False)
            lines = [_save(caption, out, f"{split}/{number:06d}", question) for number, caption in enumerate(shown)]
            (out / f"{split}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return Splits({split: len(captions) for split, captions in splits.items()}, (training, held))


def _check(shards: Path, out: Path, question: str) -> None:
    """Raise UserError where the shards are not a folder, `out` cannot be written to, or nothing is asked."""
    if not shards.is_dir():
        raise DataError(f"{shards}: does not exist, or is not a folder; give a folder of .tar shards")
    if out.exists() and not out.is_dir():
        raise UserError(f"{out}: is a file; give another folder")
    if there := sorted(each.name for each in out.glob("*.jsonl")):
        raise UserError(f"{out} holds {', '.join(there)} already; give another folder")
    if not question.strip():
        raise UserError("--question: is empty; ask something")


def _check_enough(option: str, side: Captions, least: int, shards: Path) -> None:
    """Raise DataError where fewer than `least` documents of the shards that `option` names have a picture and a
    text."""
    if len(side.captions) >= least:
        return
    total = len(side.captions) + side.incomplete + len(side.broken)
    why = f", such as {side.broken[0]}" if side.broken else ""
    raise DataError(
        f"{option}: {len(side.captions)} of the {total} documents in its shards of {shards} have a picture and a text, "
        f"at least {least} must; {side.incomplete} lack one of them, {len(side.broken)} are broken{why}"
    )


def _read(document: Document) -> Caption:
    texts = [
        part.item for part in read_parts(document, {"text": bytes.decode, "image": open_picture}) if part.type == "text"
    ]
    pictures = tuple(part for part in document.contents().parts if part.type == "image")
    return Caption(pictures, " ".join(" ".join(texts).split()))


def _save(caption: Caption, out: Path, stem: str, question: str) -> dict[str, Any]:
    """Copy the pictures to `<stem>.<file>` in `out`; returns the line."""
    names = [f"{stem}.{picture.name}" for picture in caption.pictures]
    for name, picture in zip(names, caption.pictures, strict=True):
        (out / name).write_bytes(picture.read())
    shown = {"image": names[0]} if len(names) == 1 else {"images": names}
    return {**shown, "question": question, "answer": caption.text}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shards", type=Path, help="folder of captioned shards")
    parser.add_argument("out", type=Path, help="folder to write")
    parser.add_argument("--train", default="*train*.tar", help="names of the training shards (default: %(default)s)")
    parser.add_argument("--held-out", default="*val*.tar", help="names of the held-out shards (default: %(default)s)")
    parser.add_argument("--question", default=QUESTION, help="asked about every picture (default: %(default)s)")
    options = parser.parse_args(arguments)
    try:
        written = write(options.shards, options.out, options.train, options.held_out, options.question)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    broken = [each for side in written.read for each in side.broken]
    print(f"{options.out}: captions: {', '.join(f'{split} {count:,}' for split, count in written.captions.items())}")
    incomplete = sum(side.incomplete for side in written.read)
    print(f"passed over: {incomplete:,} without picture or text, {len(broken):,} broken")
    for each in broken[:5]:
        print(f"  {each}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
