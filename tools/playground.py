"""A page in the browser on which a trained run can be tried.

    python -m tools.playground RUN [--port 7860]

Type, drop a picture or a sound, choose what follows, and see what comes, and which layers and experts each token of the
document used. The server answers this machine alone. It needs the extra `playground`.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import zoo
from tools.generate import as_seen, as_shown
from tools.report.drawing import draw, style_and_script
from tools.report.routing import look
from zoo.config import UserError
from zoo.extras import extra
from zoo.generate import Part, check_causal
from zoo.run import Run
from zoo.sampling import Sampling

STYLE = """.made img{image-rendering:pixelated;min-width:112px;border:1px solid #ccc;vertical-align:middle}
.made .given{opacity:.6}
.made span{white-space:pre-wrap}"""
DECIDES = "as the model likes"


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    try:
        with extra("playground", "playground"):
            import gradio  # noqa: F401  a run is not read where it is missing
        run = zoo.load(options.run, imports=options.imports, device=options.device)
        check_causal(run)
        style, script = style_and_script()
        build(run).launch(
            server_name="127.0.0.1",
            server_port=options.port,
            head=f"<style>{style}{STYLE}</style><script>{script}</script>",
            quiet=True,
            prevent_thread_lock=True,
        )
        print(f"{options.run} is at http://127.0.0.1:{options.port}; Ctrl-C ends it", flush=True)
        _wait()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: --port {options.port}: {error}; choose another", file=sys.stderr)
        return 2
    return 0


def build(run: Run) -> Any:
    """The page of a run, as `gradio.Blocks`."""
    import gradio

    parts = [modality.config.part for modality in run.modalities.values()]
    with gradio.Blocks(title=run.folder.resolve().name, analytics_enabled=False) as page:
        gradio.Markdown(f"# {run.folder.resolve().name}\n{', '.join(run.modalities)}; {run.length:,} tokens of context")
        with gradio.Row():
            with gradio.Column():
                text = gradio.Textbox(label="Text", elem_id="text")
                shown = {"image": gradio.Image, "audio": gradio.Audio}
                files = [
                    shown[part](label=part.capitalize(), type="filepath", elem_id=part)
                    for part in shown
                    if part in parts
                ]
                first = gradio.Checkbox(label="The text stands first", value=True)
                then = gradio.Dropdown([DECIDES, *run.modalities], value=DECIDES, label="What follows", elem_id="then")
                with gradio.Accordion("How it is chosen", open=False):
                    temperature = gradio.Slider(0, 2, 0.8, label="Temperature")
                    top_p = gradio.Slider(0.05, 1, 1, label="Top-p")
                    guidance = gradio.Slider(0, 8, 1, label="Guidance")
                    steps = gradio.Slider(1, 200, 50, step=1, label="Steps from noise")
                    tokens = gradio.Slider(1, run.length, run.length, step=1, label="Most tokens")
                    seed = gradio.Number(0, precision=0, minimum=0, label="Seed")
                go = gradio.Button("Go on", variant="primary", elem_id="go")
            with gradio.Column(scale=2):
                made = gradio.HTML(label="What comes", elem_id="made")
                routed = gradio.HTML(label="Where its tokens went", elem_id="routed")
        names = [part for part in shown if part in parts]

        def answer(words: str, *given: Any) -> tuple[str, str]:
            paths = dict(zip(names, given, strict=False))
            text_first, follows, *choosing = given[len(names) :]
            try:
                prompt = _prompt(run, words, paths, text_first)
                return _answered(run, prompt, follows, choosing)
            except UserError as error:
                raise gradio.Error(str(error), duration=None, print_exception=False) from None

        inputs = [text, *files, first, then, temperature, top_p, guidance, steps, tokens, seed]
        go.click(answer, inputs, [made, routed], api_name="answer")
        text.submit(answer, inputs, [made, routed], api_name=False)
    return page


def _prompt(run: Run, text: str, files: dict[str, str | None], text_first: bool) -> list[Part]:
    items = [run.read(part, path) for part, path in files.items() if path]
    words = [Part(run.vocabulary.text, text)] if text else []
    return [*words, *items] if text_first else [*items, *words]


def _answered(run: Run, prompt: list[Part], follows: str, choosing: Sequence[Any]) -> tuple[str, str]:
    """What comes after a prompt, and where all of its tokens went, as HTML."""
    temperature, top_p, guidance, steps, tokens, seed = choosing
    made = run.generate(
        prompt,
        None if follows == DECIDES else follows,
        temperature=temperature,
        top_p=top_p,
        guidance=guidance,
        seed=int(seed),
        drawing=Sampling.parse({"steps": int(steps)}, "drawing"),
        max_tokens=int(tokens),
    )
    given = "".join(f'<span class="given">{_html(run, part)}</span> ' for part in as_seen(run, prompt))
    page = f'<div class="made">{given}{" ".join(_html(run, part) for part in made) or "<i>nothing</i>"}</div>'
    return page, str(draw(run, look(run, [*prompt, *made])))


def _html(run: Run, part: Part) -> str:
    modality = run.modalities[part.modality]
    return as_shown(modality.write(part.item), modality.config.suffix, part.modality)


def _wait() -> None:
    """Wait until Ctrl-C."""
    try:
        while True:
            time.sleep(3600)
    except KeyboardInterrupt:
        return


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="tools.playground", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, help="folder of the trained run")
    parser.add_argument("--port", type=int, default=7860, help="on which the page is (7860)")
    parser.add_argument("--imports", nargs="+", default=[], metavar="MODULE", help="modules with blocks of your own")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1 … (cpu)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
