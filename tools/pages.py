"""Pages of HTML that need no other file: templates of Jinja over one common page."""

from __future__ import annotations

import base64
from pathlib import Path

import jinja2

SHARED = Path(__file__).with_name("templates")


def environment(folder: Path, html: bool = True) -> jinja2.Environment:
    """Renders the templates of a folder, which may extend `page.html`.

    Args:
        html: what is filled in is escaped.
    """
    return jinja2.Environment(
        loader=jinja2.FileSystemLoader([folder, SHARED]),
        autoescape=html,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )


def data_url(content: bytes, kind: str) -> str:
    """The content of a file as the address of it.

    Args:
        kind: its media type, such as "image/png".
    """
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"
