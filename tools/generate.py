"""Let a trained run go on: text, images and sounds in, text, images and sounds out.

    python -m tools.generate RUN --prompt "seven" --then image --out out/
    python -m tools.generate RUN --image in.png --then text --out out/ --temperature 0
    python -m tools.generate RUN --prompt "a heart" --out out/ --samples 8

The prompt's parts stand in the order in which they are given. `--then` names what follows, in order, by modality or
by type of part (text, image, audio); without it the model decides, until it ends the document. FOLDER gets a file for
every part, and index.html, which shows prompts and what followed, pictures and sounds included.
"""

from __future__ import annotations

import argparse
import html
import mimetypes
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import zoo
from tools.pages import data_url
from zoo.config import UserError
from zoo.files import atomic_write
from zoo.generate import Part, modality_of_part
from zoo.modality import PARTS
from zoo.run import Run
from zoo.sampling import Sampling

STYLE = """body{font:16px/1.5 sans-serif;max-width:60em;margin:2em auto;padding:0 1em}
section{border-top:1px solid #ccc;padding:.7em 0}
.given{color:#777}.given img{opacity:.75}
img{image-rendering:pixelated;min-width:96px;max-width:100%;vertical-align:middle;border:1px solid #ccc}
span{white-space:pre-wrap}"""


class InOrder(argparse.Action):
    """Collects the prompt's parts of all kinds in the order in which they are given, as (option, value)."""

    def __call__(self, parser: Any, namespace: argparse.Namespace, value: Any, option: str | None = None) -> None:
        namespace.parts = [*namespace.parts, ((option or "").lstrip("-"), value)]


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    try:
        if options.samples < 1 or options.batch < 1:
            raise UserError(f"--samples {options.samples}, --batch {options.batch}: both must be at least 1")
        drawing = Sampling.parse({"steps": options.steps, "eta": options.eta, "clip": options.clip}, "drawing")
        run = zoo.load(options.run, imports=options.imports, device=options.device)
        prompt = [
            Part(run.vocabulary.text, value) if kind == "prompt" else run.read(kind, value)
            for kind, value in options.parts
        ]
        rows = run.generate_all(
            [prompt] * options.samples,
            None if options.then is None else [_name(run, each) for each in options.then],
            max_tokens=options.max_tokens,
            stop=options.stop,
            drawing=drawing,
            batch=options.batch,
            progress=True,
            **chosen(options),
        )
        options.out.mkdir(parents=True, exist_ok=True)
        files = write_parts(run, rows, options.out)
        title = f"{options.run.name}: {options.samples} generated"
        atomic_write(options.out / "index.html", page(run, title, [prompt] * len(rows), rows))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for number, row in enumerate(rows):
        shown = [part.item if part.modality == run.vocabulary.text else f"[{part.modality}]" for part in row]
        print(f"{number}: {' '.join(shown)}")
    print(f"{len(files)} files and index.html are in {options.out}")
    return 0


def write_parts(run: Run, rows: Sequence[Sequence[Part]], folder: Path) -> list[Path]:
    """A file for every part, `SAMPLE-PART.suffix`."""
    files = []
    for sample, row in enumerate(rows):
        for number, part in enumerate(row):
            modality = run.modalities[part.modality]
            files.append(folder / f"{sample:03}-{number}{modality.config.suffix}")
            atomic_write(files[-1], modality.write(part.item))
    return files


def page(run: Run, title: str, prompts: Sequence[Sequence[Part]], rows: Sequence[Sequence[Part]]) -> str:
    """One HTML page that needs no other file: each prompt, as the model sees it, and what followed."""
    sections = []
    for prompt, row in zip(prompts, rows, strict=True):
        given = " ".join(_shown(run, part) for part in as_seen(run, prompt))
        made = " ".join(_shown(run, part) for part in row)
        sections.append(f'<section><div class="given">{given}</div><div>{made}</div></section>')
    head = f'<meta charset="utf-8"><title>{html.escape(title)}</title><style>{STYLE}</style>'
    body = f"<h1>{html.escape(title)}</h1>{''.join(sections)}"
    return f"<!doctype html><html><head>{head}</head><body>{body}</body></html>\n"


def as_seen(run: Run, parts: Sequence[Part]) -> list[Part]:
    """Parts as the model gets them: a picture in its size and its codes."""
    modalities = run.modalities
    return [Part(name, modalities[name].decode(modalities[name].encode(item))) for name, item in parts]


def _shown(run: Run, part: Part) -> str:
    modality = run.modalities[part.modality]
    if part.modality == run.vocabulary.text:
        return f"<span>{html.escape(part.item)}</span>"
    return as_shown(modality.write(part.item), modality.config.suffix, part.modality)


def as_shown(content: bytes, suffix: str, name: str = "") -> str:
    """The content of a file as HTML: a text, a picture, a sound to be played, or anything else to be saved.

    Args:
        suffix: ending of the file.
        name: what a picture is said to be, for those who do not see it.
    """
    if suffix == ".txt":
        return f"<span>{html.escape(content.decode(errors='replace'))}</span>"
    kind = mimetypes.types_map.get(suffix, "application/octet-stream")
    data = data_url(content, kind)
    if kind.startswith("image/"):
        return f'<img src="{data}" alt="{html.escape(name)}">'
    if kind.startswith("audio/"):
        return f'<audio controls src="{data}"></audio>'
    return f'<a download="{html.escape(name + suffix)}" href="{data}">{html.escape(name) or "file"}</a>'


def _name(run: Run, word: str) -> str:
    """A modality that the user calls by its name or by the type of part it reads."""
    return modality_of_part(run, word) if word in PARTS and word not in run.modalities else word


def add_choosing(parser: argparse.ArgumentParser) -> None:
    """Options for how what follows is chosen or drawn, for blocks of one's own, and for the device."""
    parser.add_argument("--temperature", type=float, help="0 takes the likeliest (1)")
    parser.add_argument("--top-k", type=int, metavar="K", help="only the K likeliest")
    parser.add_argument("--top-p", type=float, metavar="P", help="only the likeliest that together reach P (1)")
    parser.add_argument("--repetition-penalty", type=float, metavar="R", help="against text that repeats itself (1)")
    parser.add_argument(
        "--guidance", type=float, metavar="W", help="of items by what stands before them; 1 is none (1)"
    )
    parser.add_argument("--seed", type=int, help="everything drawn is a function of it (0)")
    parser.add_argument("--steps", type=int, default=50, metavar="N", help="from noise to an item (50)")
    parser.add_argument("--eta", type=float, default=0.0, help="fresh noise in each of them: 0 none, 1 as DDPM (0)")
    parser.add_argument(
        "--clip", type=float, metavar="C", help="bound of an item's numbers while it is drawn; 1 for pixels"
    )
    parser.add_argument("--imports", nargs="+", default=[], metavar="MODULE", help="modules with blocks of your own")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1 … (cpu)")


def chosen(options: argparse.Namespace) -> dict[str, Any]:
    """The keys of `zoo.choosing.Choosing` that `add_choosing` was given."""
    return {key: getattr(options, key) for key in CHOOSING if getattr(options, key) is not None}


CHOOSING = ("temperature", "top_k", "top_p", "repetition_penalty", "guidance", "seed")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="tools.generate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.set_defaults(parts=[])
    parser.add_argument("run", type=Path, help="folder of the trained run")
    parser.add_argument("--prompt", action=InOrder, metavar="TEXT", help="a text of the prompt; may be repeated")
    parser.add_argument("--image", action=InOrder, metavar="FILE", help="a picture of the prompt")
    parser.add_argument("--audio", action=InOrder, metavar="FILE", help="a sound of the prompt")
    parser.add_argument(
        "--then", nargs="+", metavar="MODALITY", help="what follows, in order; default: as the model likes"
    )
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--samples", type=int, default=1, metavar="N", help="how many continuations (1)")
    parser.add_argument(
        "--batch", type=int, default=32, metavar="N", help="so many at the same time; changes nothing (32)"
    )
    parser.add_argument(
        "--max-tokens", type=int, metavar="N", help="most tokens to write (as the model's context allows)"
    )
    parser.add_argument("--stop", nargs="+", default=[], metavar="TEXT", help="texts that end a text")
    add_choosing(parser)
    return parser


if __name__ == "__main__":
    sys.exit(main())
