"""Evaluate a trained run on its own validation data, or on any data that the project reads.

    python -m tools.evaluate RUN [DATA ...] [data.path=FOLDER ...] [--measure loss retrieval generation]
    python -m tools.evaluate RUN captions:photos.jsonl --measure loss retrieval
    python -m tools.evaluate RUN --lm-eval TASK ... [--task-folder FOLDER]

DATA is a path of shards of our documents ('FOLDER/*val*.tar'), TYPE:PATH of another type of source, or a YAML file with
sources by name, as `data.sources` of a recipe has them; without it the run's own validation data are read.
key.sub=value is laid over the run's recipe.

`loss`: loss, perplexity and bits a byte of each modality, causal and top-k, and the gap. `retrieval`: captions after
their items by likelihood, and the right one of both among --candidates. `generation`: items made from held-out
captions, judged by a classifier fitted on training items and by the distance to them; with --features FID and KID.
Tables are printed; FOLDER gets `evaluation.json` and `tensorboard/`.
"""

from __future__ import annotations

import argparse
import importlib
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import zoo
from pretrain import metrics, run_folder
from pretrain import recipe as recipes
from pretrain.recipe import Recipe
from tools.evaluate import output
from tools.evaluate.data import Evaluated, named_data, own_data
from tools.evaluate.features import features
from tools.evaluate.generation import Asked, generate
from tools.evaluate.losses import losses
from tools.evaluate.retrieval import retrieve
from tools.generate import add_choosing, chosen, page
from zoo.config import UserError
from zoo.extras import extra
from zoo.files import atomic_write
from zoo.modalities.speech import SoundConfig
from zoo.run import Run
from zoo.sampling import Sampling

LOSS, RETRIEVAL, GENERATION = "loss", "retrieval", "generation"
OVERRIDE = re.compile(r"(imports|[A-Za-z_]\w*(\.\w+)+)=")
"""A word of the command line that is laid over the recipe; paths may have "=" in them, keys have a dot before it."""


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_intermixed_args(arguments)
    try:
        for name in ("rows", "documents", "candidates", "limit"):
            if (value := getattr(options, name)) is not None and value < (2 if name == "candidates" else 1):
                raise UserError(f"--{name} {value}: is too few")
        overrides = [word for word in options.data if OVERRIDE.match(word)]
        run = zoo.load(options.run, imports=options.imports, device=options.device)
        recipe = recipes.load(options.run / run_folder.RECIPE, overrides)
        if recipe.train.precision == "bf16":
            run.model.bfloat16()  # as it was evaluated in training
        words = [word for word in options.data if word not in overrides]
        data = named_data(words, recipe) if words else [own_data(recipe, named=overrides)]
        found: dict[str, Any] = {"run": str(options.run), "step": step_of(options.run), "data": {}}
        for each in data if words or not (options.lm_eval or options.lmms_eval) else []:
            found["data"][each.name] = _measured(run, recipe, each, options)
        found["tasks"] = _tasks(run, options)
        out = options.out or options.run / "report" / "evaluation"
        print(f"{output.write(out, found['step'], found)} is written")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def step_of(run: Path) -> int:
    """The last step that a run has reported; 0 where it has reported none."""
    path = run / "metrics.jsonl"
    return max((item["step"] for item in metrics.read(path)), default=0) if path.exists() else 0


def _measured(run: Run, recipe: Recipe, data: Evaluated, options: argparse.Namespace) -> dict[str, Any]:
    """What is found on some data, by the names of the measures."""
    found: dict[str, Any] = {}
    seed = recipe.seed if options.seed is None else options.seed
    if LOSS in options.measure:
        measured = losses(run, recipe, data, options.rows)
        output.print_losses(data.name, measured, list(run.modalities))
        found[LOSS] = measured.record()
    for modality in _described(run, options) if {RETRIEVAL, GENERATION} & {*options.measure} else []:
        if RETRIEVAL in options.measure:
            retrieved = retrieve(run, data, modality, options.documents, options.candidates, seed)
            output.print_retrieval(data.name, retrieved)
            found.setdefault(RETRIEVAL, {})[modality] = retrieved.record()
        if GENERATION in options.measure:
            found.setdefault(GENERATION, {})[modality] = _generated(run, recipe, data, modality, seed, options)
    return found


def _described(run: Run, options: argparse.Namespace) -> list[str]:
    """The modalities whose items are described by texts."""
    if options.modality is not None:
        return [options.modality]
    names = [name for name in run.modalities if name != run.vocabulary.text]
    if not names:
        raise UserError(f"--measure: {options.run} has no modality beside text, which texts could describe")
    return names


def _generated(
    run: Run, recipe: Recipe, data: Evaluated, modality: str, seed: int, options: argparse.Namespace
) -> dict[str, Any]:
    config = run.modalities[modality].config if modality in run.modalities else None
    rate = config.rate if isinstance(config, SoundConfig) else None
    asked = Asked(
        modality,
        options.documents,
        seed,
        chosen(options),
        Sampling.parse({"steps": options.steps, "eta": options.eta, "clip": options.clip}, "drawing"),
        options.labels,
        None if options.features is None else features(options.features, rate),
    )
    measured, made = generate(run, own_data(recipe, "train", options.data), data, asked)
    output.print_generation(data.name, measured)
    out = options.out or options.run / "report" / "evaluation"
    out.mkdir(parents=True, exist_ok=True)
    shown = made[:64]
    captions, rows = [[zoo.Part(run.vocabulary.text, text)] for text, _ in shown], [[part] for _, part in shown]
    atomic_write(out / f"{data.name}-{modality}.html", page(run, f"{run.folder.name}: {modality}", captions, rows))
    return measured.record()


def _tasks(run: Run, options: argparse.Namespace) -> dict[str, Mapping[str, float]]:
    """What harnesses find."""
    found: dict[str, Mapping[str, float]] = {}
    for tasks, module, name in (
        (options.lm_eval, "harness", "lm-evaluation-harness"),
        (options.lmms_eval, "multimodal_harness", "lmms-eval"),
    ):
        if tasks:
            with extra(name, "evaluate"):
                harness = importlib.import_module(f"tools.evaluate.{module}")
            values = harness.run_tasks(run, tasks, options.task_folder, options.shots, options.limit)
            output.print_tasks(values)
            found |= values
    return found


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="tools.evaluate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, help="folder of the trained run")
    parser.add_argument("data", nargs="*", default=[], metavar="DATA", help="what to evaluate on; key.sub=value")
    parser.add_argument(
        "--measure", nargs="+", default=[LOSS], choices=(LOSS, RETRIEVAL, GENERATION), help="what is measured (loss)"
    )
    parser.add_argument("--rows", type=int, metavar="N", help="rows of loss (evaluate.rows of the recipe)")
    parser.add_argument("--documents", type=int, default=200, metavar="N", help="of retrieval and generation (200)")
    parser.add_argument("--candidates", type=int, default=20, metavar="N", help="of retrieval (20)")
    parser.add_argument("--modality", help="of what texts describe (all beside text)")
    parser.add_argument("--labels", type=Path, metavar="FILE", help="JSON: key of a document → label (its text)")
    parser.add_argument(
        "--features", metavar="WHAT", help="for FID and KID: folder of an encoder of Transformers, or MODULE:FUNCTION"
    )
    parser.add_argument("--lm-eval", nargs="+", metavar="TASK", help="tasks of lm-evaluation-harness")
    parser.add_argument("--lmms-eval", nargs="+", metavar="TASK", help="tasks of lmms-eval")
    parser.add_argument("--task-folder", type=Path, metavar="FOLDER", help="YAML files with tasks of your own")
    parser.add_argument(
        "--shots", type=int, metavar="N", help="solved examples before each question (as the task says)"
    )
    parser.add_argument("--limit", type=int, metavar="N", help="questions of each task (all)")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="what is written (RUN/report/evaluation)")
    add_choosing(parser)
    return parser


if __name__ == "__main__":
    sys.exit(main())
