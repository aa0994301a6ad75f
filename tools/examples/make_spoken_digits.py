"""Write spoken digits as mixed-modal WebDataset shards: each take with its word, to be read and to be spoken.

    python -m tools.examples.make_spoken_digits FOLDER OUT

FOLDER holds the recordings of the Free Spoken Digit Dataset, `DIGIT_SPEAKER_INDEX.wav`, of which the takes 0 to 4 of
each speaker and digit are held out, as that data set says; or shards `*train*.tar` and `*val*.tar` of documents with a
sound and a text part (docs/data.md). Each take becomes two documents, the sound before its word (to be read) and after
it (to be spoken). Files of sound are copied as they are; the same arguments give the same bytes.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import tqdm
import webdataset

from pretrain.data.errors import BrokenDocument, DataError
from pretrain.data.reading import read_parts
from pretrain.data.shards import find_shards
from pretrain.data.sources import Document, open_shards
from tools.examples.make_digits import NAMES
from zoo.config import UserError

RECORDING = re.compile(r"(\d)_(\w+)_(\d+)\.wav")
HELD_OUT = 5
"""Takes of each speaker and digit, from the first, that are held out."""


class Take(NamedTuple):
    """A spoken word."""

    key: str
    held_out: bool
    word: str
    sound: bytes
    """Content of a file of sound."""


def takes(folder: Path) -> Iterator[Take]:
    """The takes of a folder of recordings or of shards, in the order of their names.

    Raises:
        DataError: there are none, or a document is broken.
    """
    recordings = sorted(path for path in folder.glob("*.wav") if RECORDING.fullmatch(path.name))
    for path in recordings:
        digit, _, index = RECORDING.fullmatch(path.name).groups()  # type: ignore[union-attr]
        yield Take(path.stem, int(index) < HELD_OUT, NAMES[int(digit)], path.read_bytes())
    if recordings:
        return
    if not folder.is_dir():
        raise DataError(f"{folder}: does not exist, or is not a folder; give one of recordings or of shards")
    for pattern, held_out in (("*train*.tar", False), ("*val*.tar", True)):
        with open_shards(find_shards(folder, pattern, str(folder))) as shards:
            for shard, documents in shards.items():
                for document in documents:
                    yield _take(document, shard, held_out)


def _take(document: Document, shard: Path, held_out: bool) -> Take:
    try:
        parts = {part.type: part.item for part in read_parts(document, {"text": bytes.decode, "audio": bytes})}
    except BrokenDocument as error:
        raise DataError(f"{shard.name}: {document.key}: {error}") from None
    if set(parts) != {"text", "audio"}:
        raise DataError(f"{shard.name}: {document.key}: has parts {', '.join(parts)}; a sound and a text are meant")
    return Take(document.key, held_out, parts["text"].strip(), parts["audio"])


def write(folder: Path, out: Path) -> dict[str, int]:
    """Write the shards of both splits; returns the number of documents of each.

    Raises:
        UserError: `out` holds them already, or `folder` has no takes of one of the splits.
    """
    files = {split: out / f"spoken-{split}-000.tar" for split in ("train", "val")}
    for path in files.values():
        if path.exists():
            raise UserError(f"{path} is already there; give another folder")
    found = list(tqdm.tqdm(takes(folder), desc="takes", disable=None, leave=False))
    counts = {split: sum(take.held_out is (split == "val") for take in found) for split in files}
    if not all(counts.values()):
        raise DataError(
            f"{folder}: has {counts['train']} takes to train on and {counts['val']} held out; both are needed"
        )
    out.mkdir(parents=True, exist_ok=True)
    for split, path in files.items():
        with webdataset.TarWriter(str(path), mtime=0) as shard:
            for take in found:
                if take.held_out is (split == "val"):
                    for order in ("read", "speak"):
                        shard.write(_document(take, order))
    return {split: 2 * count for split, count in counts.items()}


def _document(take: Take, order: str) -> dict:
    parts = [{"type": "audio", "file": "wav"}, {"type": "text", "text": take.word}]
    document = {"parts": parts if order == "read" else parts[::-1], "word": take.word}
    return {"__key__": f"{take.key}-{order}", "json": json.dumps(document).encode(), "wav": take.sound}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="of recordings or of shards")
    parser.add_argument("out", type=Path, help="folder to write")
    options = parser.parse_args(arguments)
    try:
        documents = write(options.folder, options.out)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    print(
        f"{options.out}: {' and '.join(f'{count:,} {split} documents' for split, count in documents.items())} written"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
