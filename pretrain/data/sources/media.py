"""Pictures and sounds that a record names: as files of the source's folder, as bytes, or written into the text."""

from __future__ import annotations

import base64
import binascii
import dataclasses
import io
import re
import urllib.parse
from pathlib import Path
from typing import Any

from PIL import Image

from pretrain.data.errors import shown
from pretrain.data.sources.source import Content
from zoo.modalities.pictures import FORMATS

DATA_URL = re.compile(r"data:[\w.+-]*/[\w.+-]*(;[^,;]*)*;base64,", re.ASCII)


class NotThere(Exception):
    """Something that a record names cannot be had.

    Args:
        kind: the reason, the same for all such.
        example: what was named.
    """

    def __init__(self, kind: str, example: str) -> None:
        super().__init__(f"{kind}: {example}" if example else kind)
        self.kind, self.example = kind, example


@dataclasses.dataclass(frozen=True)
class Folder:
    """The folder that a source may read from; names lead nowhere else."""

    root: Path | None
    """None where the source lies on another machine: names then lead nowhere."""

    def content(self, kind: str, value: Any, below: str = "") -> Content:
        """What a record's value stands for.

        Args:
            kind: type of the part, image or audio.
            value: a name, bytes, a `data:` URL, or, as Hugging Face has them, a mapping with `bytes` or `path`.
            below: folder of the page or record that names it; a name with a slash in front counts from the root.
        Raises:
            NotThere: it is none of these, or leads to no file of the folder.
        """
        if isinstance(value, dict):
            value = value.get("bytes") or value.get("path")
        if isinstance(value, bytes):
            return Content(kind, f"its {kind}", lambda: value)
        if not isinstance(value, str) or not value:
            raise NotThere(f"{kind} has no name", "" if value is None else shown(repr(value)))
        if value.startswith("data:"):
            content = _written(kind, value)
            return Content(kind, f"its {kind}", lambda: content)
        path = self.path(kind, value, below)
        return Content(kind, shown(value), path.read_bytes)

    def path(self, kind: str, name: str, below: str = "") -> Path:
        """The file that a name leads to; raises `NotThere`."""
        if "://" in name or name.startswith("//"):
            raise NotThere(f"{kind} is a URL that nobody has fetched", shown(name))
        if self.root is None:
            raise NotThere(f"{kind} is named by a file that lies on another machine", shown(name))
        root = self.root.resolve()
        start = root if name.startswith("/") else root / below
        bare = name.split("#")[0].split("?")[0]
        for spelled in dict.fromkeys((name, urllib.parse.unquote(bare))):
            try:
                path = (start / spelled.lstrip("/")).resolve()
                inside, there = path.is_relative_to(root), path.is_file()
            except (OSError, ValueError):  # a name that is too long, or holds a zero byte
                continue
            if not inside:
                raise NotThere(f"{kind} lies outside the folder", shown(name))
            if there:
                return path
        raise NotThere(f"{kind} is not in the folder", shown(name))


def check_picture(content: Content) -> Content:
    """The picture with its bytes read, if they begin like one.

    Raises:
        NotThere: they do not.
    """
    held = content.read()
    try:
        Image.open(io.BytesIO(held), formats=FORMATS).close()
    except Exception as error:  # Pillow raises anything for bytes that it cannot read
        kind = "image is a drawing (SVG)" if b"<svg" in held[:4096] else "image is no picture that can be opened"
        raise NotThere(kind, f"{content.name} ({type(error).__name__})") from None
    return content._replace(read=lambda: held)


def _written(kind: str, url: str) -> bytes:
    found = DATA_URL.match(url)
    try:
        return (
            base64.b64decode(url[found.end() :], validate=True)
            if found
            else urllib.parse.unquote_to_bytes(url.partition(",")[2])
        )
    except binascii.Error:
        raise NotThere(f"{kind} is a data: URL that does not decode", shown(url, 40)) from None
