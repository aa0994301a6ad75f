"""Pages of Markdown, HTML and reStructuredText: the text as a reader sees it, the pictures in their places."""

from __future__ import annotations

from pathlib import Path

import pytest

from pretrain.data.errors import DataError
from tests.pretrain.data.samples import png
from tests.pretrain.data.sources.reading import everything, source

MARKDOWN = """---
title: Not shown
---
# Rivers

A *delta*
is &amp; stays. ![alt text](<pictures/0 a.png>) After it.

1. one
2. two
   - deeper

![](/pictures/1.png)

| a | b |
|---|---|
| 1 | 2 |

```
code  stays
  as it is
```
"""
HTML = """<!doctype html><html><head><title>no</title><style>no</style></head><body><h1>Rivers</h1>
<p>A <em>delta</em>
is &amp; stays. <img src="pictures/0%20a.png?v=1" alt="alt text"> After it.<ol><li>one<li>two
<ul><li>deeper</ul></ol><script>no</script><img src=/pictures/1.png>
<table><tr><td>a</td><td>b<tr><td>1<td>2</table><pre>
code  stays
  as it is
</pre>"""
RST = """Rivers
======

A *delta*
is & stays.

.. image:: pictures/0%20a.png
   :alt: alt text

After it.

1. one
2. two

   - deeper

.. figure:: /pictures/1.png

== ==
a  b
1  2
== ==

::

    code  stays
      as it is

.. include:: secret.txt
.. raw:: html
   :file: secret.txt
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder of pages with two pictures."""
    for n, name in enumerate(("0 a.png", "1.png")):
        (tmp_path / "pages" / "pictures").mkdir(parents=True, exist_ok=True)
        (tmp_path / "pages" / "pictures" / name).write_bytes(png(n))
    (tmp_path / "pages" / "secret.txt").write_text("secret")
    return tmp_path / "pages"


@pytest.mark.parametrize(("name", "page"), [("x.md", MARKDOWN), ("x.html", HTML), ("x.rst", RST)])
def test_a_page(folder: Path, name: str, page: str) -> None:
    (folder / name).write_text(page)
    found = everything(source("pages", folder), folder)
    assert isinstance(found[name], list)
    assert [part if kind == "image" else part.decode() for kind, part in found[name]] == [
        "Rivers\n\nA delta is & stays.",
        png(0),
        "After it.\n\n1. one\n2. two\n- deeper",
        png(1),
        "a\tb\n1\t2\n\ncode  stays\n  as it is",
    ]


def test_what_a_page_cannot_show_is_counted(folder: Path) -> None:
    (folder / "secret.png").write_bytes(png(0))
    (folder / "below").mkdir()
    lines = ["![](https://a.b/c.png)", "![](1.png)", "![](../secret.png)", "![](../../x.png)", '<img alt="nothing">']
    (folder / "below" / "x.md").write_text("words\n\n" + "\n".join(lines))
    (folder / "empty.html").write_text("<p> <img src=none.png>")
    (folder / "odd.html").write_bytes(b"\xff")
    (folder / "deep.html").write_text("<div>" * 100_000 + "deep")
    pages = source("pages", folder)
    found = everything(pages, folder)
    assert found == {
        "below/x.md": [("text", b"words"), ("image", png(0))],
        "deep.html": [("text", b"deep")],
        "empty.html": "nothing of it can be used: image is not in the folder: none.png",
        "odd.html": "it is not UTF-8 (invalid start byte at byte 0)",
    }
    with pages.open(pages.shards()[0], folder) as documents:
        assert [tuple(loss) for loss in documents[0].contents().losses] == [
            ("image is a URL that nobody has fetched", "https://a.b/c.png"),
            ("image is not in the folder", "1.png"),
            ("image lies outside the folder", "../../x.png"),
            ("image has no name", "''"),
        ]


def test_many_pages_are_several_shards(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pretrain.data.sources.folders.GROUP", 4)
    for n in range(10):
        (folder / f"{n}.md").write_text(f"page {n}")
    pages = source("pages", folder)
    assert [len(shard.files) for shard in pages.shards()] == [4, 4, 2]
    assert everything(pages, folder) == {f"{n}.md": [("text", f"page {n}".encode())] for n in range(10)}


def test_a_folder_elsewhere_is_refused() -> None:
    with pytest.raises(
        DataError, match="^path: 'https://a.b/': pages reads a folder on this machine; copy it here first"
    ):
        source("pages", "https://a.b/").shards()
