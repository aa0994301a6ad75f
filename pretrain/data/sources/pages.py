"""Pages of Markdown, HTML or reStructuredText with the pictures that they show."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Sequence
from html.parser import HTMLParser
from pathlib import Path, PurePath
from types import ModuleType

from pretrain.data.errors import BrokenDocument
from pretrain.data.sources.files import Shard
from pretrain.data.sources.folders import FolderSource
from pretrain.data.sources.interleaved import add_picture, checked
from pretrain.data.sources.media import Folder
from pretrain.data.sources.source import Content, Contents, Document, Loss, Numbered, SourceConfig, text_part
from zoo.extras import extra
from zoo.registry import register

UNSEEN = {"head", "script", "style", "template", "noscript", "svg", "math", "iframe"}
"""Elements whose text is not shown."""
BLOCKS = {
    *("address", "article", "aside", "blockquote", "details", "dialog", "dl", "fieldset", "figure", "footer", "form"),
    *("h1", "h2", "h3", "h4", "h5", "h6", "header", "hr", "main", "nav", "ol", "p", "pre", "section", "table", "ul"),
}
"""Elements with an empty line before and after."""
LINES = {"br", "div", "dt", "dd", "li", "tr", "figcaption", "caption", "summary"}
"""Elements that begin a line."""
SPACE = re.compile(r"[ \t\n\r\f]+")
FRONT = re.compile(r"\A---\n.*?\n(---|\.\.\.)\n", re.DOTALL)
"""The block of keys in front of a Markdown page."""


@register("source", "pages")
class Pages(FolderSource):
    """Markdown, HTML and reStructuredText: their text as a reader sees it, without alternative texts, and between it
    the pictures that lie in the folder. One that lies elsewhere, is missing, or is a drawing (SVG) is left out of its
    page and counted."""

    class Config(SourceConfig):
        files: str = "**/*.{md,markdown,html,htm,rst}"

    @contextlib.contextmanager
    def open(self, shard: Shard, cache: Path) -> Iterator[Sequence[Document]]:
        folder = Folder(Path(shard.url))
        if any(_kind(file) == "rst" for file in shard.files):
            _docutils()

        def make(number: int) -> Document:
            file = shard.files[number]
            return Document(file, lambda: _contents(folder, Path(shard.url), file))

        yield Numbered(len(shard.files), make)


def _contents(folder: Folder, root: Path, file: str) -> Contents:
    try:
        page = (root / file).read_bytes().decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        raise BrokenDocument(f"it is not UTF-8 ({error.reason} at byte {error.start})") from None
    except OSError as error:
        raise BrokenDocument(f"it cannot be read ({error.strerror})") from None
    reader = _Reader()
    reader.feed(_html(page, _kind(file)))
    reader.close()
    parts: list[Content] = []
    losses: list[Loss] = []
    for number, (kind, value) in enumerate(reader.finished()):
        if kind == "text":
            parts.append(text_part(value, number))
        else:
            add_picture(folder, value, parts, losses, str(PurePath(file).parent))
    return checked(parts, losses)


def _kind(file: str) -> str:
    return {"md": "md", "markdown": "md", "rst": "rst"}.get(PurePath(file).suffix[1:].lower(), "html")


def _html(page: str, kind: str) -> str:
    """A page as HTML."""
    if kind == "md":
        from markdown_it import MarkdownIt

        return MarkdownIt("commonmark").enable(["table", "strikethrough"]).render(FRONT.sub("", page))
    if kind == "rst":
        # what a page of a stranger says may read no file and run nothing; what is not understood stays as it is
        settings = {"file_insertion_enabled": False, "raw_enabled": False, "report_level": 5, "halt_level": 5}
        settings["doctitle_xform"] = False  # a title alone at the top is part of the page too
        return _docutils().publish_parts(page, writer="html5", settings_overrides=settings)["body"]
    return page


def _docutils() -> ModuleType:
    with extra("sources", "reading .rst"):
        import docutils.core
    return docutils.core


class _Reader(HTMLParser):
    """The text of a page and the names of its pictures, in order."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self._found: list[tuple[str, str]] = []
        self._written: list[str] = []
        self._lines = 0  # ends of lines that stand before what is written next,
        self._gap = ""  # or what stands there within a line
        self._mark = ""  # what a new item of a list begins with
        self._lists: list[int] = []  # the next number of each list that is open; 0 without numbers
        self._unseen: list[str] = []
        self._verbatim = 0
        self._cell = False

    def finished(self) -> list[tuple[str, str]]:
        """("text", what is written) and ("image", its name)."""
        self._end()
        return self._found

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in UNSEEN:
            self._unseen.append(tag)
        if self._unseen:
            return
        if tag == "img":
            self._end()
            self._found.append(("image", dict(attrs).get("src") or ""))
        elif tag == "br":
            self._lines += 1
        elif tag in ("td", "th"):
            self._gap, self._cell = "\t", True
        else:
            self._break(tag)
        if tag in ("ol", "ul"):
            self._lists.append(int(tag == "ol"))
        elif tag == "pre":
            self._verbatim += 1
        elif tag == "li":
            number = self._lists[-1] if self._lists else 0
            self._mark = f"{number}. " if number else "- "
            if number:
                self._lists[-1] += 1

    def handle_endtag(self, tag: str) -> None:
        if self._unseen:
            if tag in self._unseen:
                del self._unseen[self._unseen.index(tag) :]
            return
        if tag == "pre":
            self._verbatim = max(0, self._verbatim - 1)
        elif tag in ("ol", "ul") and self._lists:
            self._lists.pop()
        self._break(tag)

    def handle_data(self, data: str) -> None:
        if self._unseen:
            return
        if self._verbatim:
            self._write(data if self._written and not self._lines else data.removeprefix("\n"))
            return
        words = SPACE.sub(" ", data)
        if words.startswith(" "):
            self._gap = self._gap or " "
        if words.strip(" "):
            self._write(words.strip(" "))
            self._gap = " " if words.endswith(" ") else ""

    def _break(self, tag: str) -> None:
        """A line ends where a block begins or ends, with an empty one round most of them outside of lists. A paragraph
        in a cell of a table ends none."""
        if tag in ("tr", "table"):
            self._cell = False
        if tag == "p" and self._cell:
            self._gap = self._gap or " "
        elif tag in BLOCKS or tag in LINES:
            self._lines = max(self._lines, 2 if tag in BLOCKS and not self._lists else 1)

    def _write(self, text: str) -> None:
        if self._written:
            self._written.append("\n" * self._lines or self._gap)
        self._written += [self._mark, text]
        self._lines, self._gap, self._mark = 0, "", ""

    def _end(self) -> None:
        text = "".join(self._written).strip("\n ")
        if text:
            self._found.append(("text", text))
        self._written, self._lines, self._gap = [], 0, ""
