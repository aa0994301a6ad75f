"""Write scikit-learn's handwritten digits as mixed-modal WebDataset shards: a small real data set without a
download.

    python -m tools.examples.make_digits FOLDER [--shifts 4]

Each of the 1,797 pictures (8×8, grey) becomes two documents, its name in English before the picture (to be drawn) and
after it (to be read). Training pictures are repeated, those to be read shifted by one pixel. The split, 1,500 for
training and 297 for validation, is fixed and stratified; the same arguments give the same bytes.
"""

from __future__ import annotations

import argparse
import io
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import webdataset
from PIL import Image

from zoo.config import UserError

NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
SHIFTS = ((0, 1), (0, -1), (1, 0), (-1, 0), (1, 1), (1, -1), (-1, 1), (-1, -1))
"""(down, right) in pixels."""
TRAIN = 1500


def load_digits_split() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """(train_images, train_labels, val_images, val_labels): (n, 8, 8) uint8 grey as in the shards, (n,)
    int64."""
    images, labels, indices = _digits()
    train, validation = _split(labels)
    assert np.array_equal(indices, np.arange(len(labels)))
    return images[train], labels[train], images[validation], labels[validation]


def to_grey(values: np.ndarray) -> np.ndarray:
    """Intensities 0..16 → uint8 0..255."""
    return np.rint(values * (255 / 16)).astype(np.uint8)


def from_grey(grey: np.ndarray) -> np.ndarray:
    """The inverse of `to_grey`."""
    return np.rint(grey * (16 / 255)).astype(np.int64)


def shift(image: np.ndarray, down: int, right: int) -> np.ndarray:
    """`image` (8, 8) moved by up to one pixel; what comes in is black."""
    moved = np.zeros_like(image)
    rows, columns = (slice(max(0, d), image.shape[0] + min(0, d)) for d in (down, right))
    from_rows, from_columns = (slice(max(0, -d), image.shape[0] + min(0, -d)) for d in (down, right))
    moved[rows, columns] = image[from_rows, from_columns]
    return moved


def write(folder: Path, shifts: int) -> dict[str, int]:
    """Write the shards; returns the number of documents of each split.

    Args:
        shifts: shifted copies of each training picture to be read, 0 to 8; one to be drawn is repeated as often.
    Raises:
        UserError: `shifts` out of range, or the folder holds digits made with another one.
    """
    if not 0 <= shifts <= len(SHIFTS):
        raise UserError(f"--shifts {shifts}: must be 0 to {len(SHIFTS)}")
    marker = folder / "digits.json"
    if marker.exists():
        made = json.loads(marker.read_text())
        if made["shifts"] != shifts:
            raise UserError(f"{folder} holds digits made with --shifts {made['shifts']}; give that or another folder")
        return made["documents"]
    folder.mkdir(parents=True, exist_ok=True)
    images, labels, _ = _digits()
    documents = {}
    for split, indices in zip(("train", "val"), _split(labels), strict=True):
        with webdataset.TarWriter(str(folder / f"digits-{split}-000.tar"), mtime=0) as shard:
            documents[split] = 0
            for index in indices.tolist():
                for copy, moved in enumerate([(0, 0), *(_shifts_of(index, shifts) if split == "train" else [])]):
                    # only a picture to be read is moved: one to be drawn belongs where its caption puts it
                    for order, shown in (("caption", (0, 0)), ("picture", moved)):
                        shard.write(_sample(images[index], int(labels[index]), split, index, copy, shown, order))
                        documents[split] += 1
    marker.write_text(json.dumps({"shifts": shifts, "documents": documents}))  # last: where it is, the shards are whole
    return documents


def _digits() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    from sklearn.datasets import load_digits  # slow to import

    digits: Any = load_digits()
    return to_grey(digits.images), digits.target.astype(np.int64), np.arange(len(digits.target))


def _split(labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    from sklearn.model_selection import train_test_split

    train, validation = train_test_split(np.arange(len(labels)), train_size=TRAIN, stratify=labels, random_state=0)
    return np.sort(train), np.sort(validation)


def _shifts_of(index: int, count: int) -> list[tuple[int, int]]:
    """`count` different shifts of picture `index`; over all pictures every shift is equally frequent."""
    return [SHIFTS[(index * count + k) % len(SHIFTS)] for k in range(count)]


def _sample(
    image: np.ndarray, label: int, split: str, index: int, copy: int, moved: tuple[int, int], order: str
) -> dict:
    picture = io.BytesIO()
    Image.fromarray(shift(image, *moved)).save(picture, format="PNG")
    parts = [{"type": "text", "text": NAMES[label]}, {"type": "image", "file": "png"}]
    document = {
        "parts": parts if order == "caption" else parts[::-1],
        "label": label,
        "split": split,
        "index": index,
        "shift": list(moved),
    }
    key = f"{index:04d}-{copy}-{order}"
    return {"__key__": key, "json": json.dumps(document).encode(), "png": picture.getvalue()}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument(
        "--shifts", type=int, default=4, help="shifted copies of each training picture to be read (default: 4)"
    )
    options = parser.parse_args(arguments)
    there = (options.folder / "digits.json").exists()
    try:
        documents = write(options.folder, options.shifts)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    counts = " and ".join(f"{count:,} {split} documents" for split, count in documents.items())
    print(f"{options.folder}: {counts}{' are already there' if there else ' written'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
