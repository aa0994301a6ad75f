"""Small documents and shards, written on the spot, for the tests of the data path."""

import contextlib
import io
import json
import resource
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import webdataset
from PIL import Image

from pretrain.data import Data, Documents
from pretrain.data.index import OpenShards

TEXT = {"type": "bytes"}
IMAGE = {"type": "patches", "image_size": 8, "patch": 4, "codes": 4, "channels": 1}


def png(seed: int, side: int = 8) -> bytes:
    """A random grey picture."""
    content = io.BytesIO()
    Image.fromarray(np.random.RandomState(seed).randint(0, 256, (side, side)).astype(np.uint8)).save(content, "PNG")
    return content.getvalue()


def sample(key: str, *parts: str | bytes, **members: bytes) -> dict[str, bytes]:
    """A document: text parts are given as str, image parts as bytes; `members` replace or add files."""
    files = {f"{number}.png": part for number, part in enumerate(parts) if isinstance(part, bytes)}
    listed = [
        {"type": "text", "text": part} if isinstance(part, str) else {"type": "image", "file": f"{number}.png"}
        for number, part in enumerate(parts)
    ]
    return {"__key__": key, "json": json.dumps({"parts": listed}).encode(), **files, **members}


def write_shard(path: Path, samples: list[dict]) -> Path:
    """Write `samples` as they are."""
    with webdataset.TarWriter(str(path), mtime=0, encoder=False) as shard:
        for each in samples:
            shard.write(each)
    return path


@contextlib.contextmanager
def small_files(size: int) -> Iterator[None]:
    """No file may grow beyond `size` bytes: a disk that is full, as the system says it of one file."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def documents(data: Data, split: str = "train") -> Documents:
    """Those of a split whose one source is a folder."""
    mixture = data.train if split == "train" else data.validation
    assert mixture is not None
    (stream,) = mixture.streams.values()
    return stream.documents


def keys(data: Data) -> list[str]:
    """The keys of the training documents."""
    shards = documents(data).shards
    assert isinstance(shards, OpenShards)
    return shards.keys()
