"""One page of HTML about a trained run, which opens without a server.

    python -m tools.report RUN [DATA ...] [data.path=FOLDER ...] [--samples N] [--documents N] [--out FILE]

The page has curves, losses under causal and top-k routing, samples of each modality, how routers use their experts, and
where the tokens of documents went: which patches of a picture each layer kept, which experts took which words. The
documents are DATA, as `tools.evaluate` takes it, else the run's own validation data, or, where those are gone, what the
run itself writes. Samples are kept in RUN/report/samples by the step of the run, so that a later report shows how they
have become better.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import zoo
from pretrain import recipe as recipes
from pretrain import run_folder
from tools.evaluate.__main__ import OVERRIDE
from tools.evaluate.data import documents, named_data, own_data
from tools.generate import add_choosing, chosen
from tools.report.page import COUNTED, Content, write
from zoo.config import UserError
from zoo.generate import Part, check_causal, document
from zoo.run import Run


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_intermixed_args(arguments)
    try:
        if options.samples < 1 or options.documents < 1:
            raise UserError(f"--samples {options.samples}, --documents {options.documents}: both must be at least 1")
        run = zoo.load(options.run, imports=options.imports, device=options.device)
        check_causal(run)
        found, origin = _documents(run, options)
        content = Content(found, origin, options.documents, options.samples, chosen(options))
        path = write(run, content, options.out or options.run / "report" / "report.html")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{path} is written")
    return 0


def _documents(run: Run, options: argparse.Namespace) -> tuple[list[Sequence[Part]], str]:
    """Documents that the run can see whole, those of several modalities first; and where they are from."""
    overrides = [word for word in options.data if OVERRIDE.match(word)]
    words = [word for word in options.data if word not in overrides]
    try:
        recipe = recipes.load(options.run / run_folder.RECIPE, overrides)
        data = named_data(words, recipe) if words else [own_data(recipe, named=overrides)]
        found = [each.parts for source in data for each in documents(run, source, COUNTED, recipe.seed)]
        origin = f"Documents of {', '.join(each.name for each in data)}."
    except UserError as error:
        if options.data:
            raise
        found = [parts for parts in run.generate_all([[]] * COUNTED, **chosen(options)) if parts]
        origin = f"Documents that the run has written itself, since its data cannot be read ({error})."
    whole = [parts for parts in found if len(document(run, parts)) < run.length]
    return sorted(whole, key=lambda parts: -len({part.modality for part in parts})), origin


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="tools.report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, help="folder of the trained run")
    parser.add_argument("data", nargs="*", default=[], metavar="DATA", help="documents to look at; key.sub=value")
    parser.add_argument("--samples", type=int, default=12, metavar="N", help="of each modality (12)")
    parser.add_argument("--documents", type=int, default=6, metavar="N", help="that are shown in full (6)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="the page (RUN/report/report.html)")
    add_choosing(parser)
    return parser


if __name__ == "__main__":
    sys.exit(main())
