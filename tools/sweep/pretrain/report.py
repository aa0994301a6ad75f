"""The report of a comparison of pretrainings: a page that needs no other file, the same as Markdown, figures, and runs
as TensorBoard's HParams view shows them."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

from markdown_it import MarkdownIt

from pretrain.recipe import Recipe
from tools.pages import environment
from tools.sweep import report
from tools.sweep.pretrain.curves import losses
from tools.sweep.pretrain.figures import draw
from tools.sweep.pretrain.study import Run, Study
from tools.sweep.pretrain.tables import tables
from zoo.files import atomic_write

TEMPLATES = Path(__file__).with_name("templates")
FIGURES, HPARAMS = "figures", "hparams"


def write(study: Study, out: Path) -> list[Path]:
    """`report.html`, `report.md`, `figures/` and `hparams/` in `out`; returns their paths."""
    out.mkdir(parents=True, exist_ok=True)
    rows = tables(study)
    drawn = draw(study, out / FIGURES)
    found = {"study": study, "tables": rows, "figures": {t: p.relative_to(out) for t, p in drawn.items()}}
    pictures = {title: base64.b64encode(path.read_bytes()).decode() for title, path in drawn.items()}
    html, plain = (environment(TEMPLATES, escaped) for escaped in (True, False))
    costs = [MarkdownIt("commonmark", {"html": False}).enable("table").render(text) for text in study.costs]
    page = html.get_template("report.html").render(**found, pictures=pictures, costs=costs)
    text = plain.get_template("report.md").render(**found, table=report.table)
    atomic_write(out / "report.html", page)
    atomic_write(out / "report.md", text)
    for run in study.runs:
        write_hparams(run, out / HPARAMS / run.name)
    return [out / name for name in ("report.html", "report.md", FIGURES, HPARAMS)]


def write_hparams(run: Run, folder: Path) -> None:
    """One line of TensorBoard's HParams view: `tensorboard --logdir OUT/hparams`; written once."""
    if folder.exists() or not run.evaluations:
        return
    from torch.utils.tensorboard import SummaryWriter
    from torch.utils.tensorboard.summary import hparams

    found = {f"eval/causal/loss/{name}": value for name, value in losses(run.evaluations[-1].values).items()}
    with SummaryWriter(str(folder)) as writer:
        file: Any = writer.file_writer
        for summary in hparams(_hyperparameters(run, run.recipe), found):
            file.add_summary(summary)
        for name, value in found.items():
            writer.add_scalar(name, value, int(run.evaluations[-1].used["steps"]))


def _hyperparameters(run: Run, recipe: Recipe) -> dict[str, Any]:
    values: dict[str, Any] = {"arm": run.arm, "size": run.size, "seed": run.seed}
    values |= {"layers": len(recipe.model.layers), "d_model": recipe.model.d_model, "steps": recipe.train.steps}
    return values | {key: _plain(value) for key, value in recipe.optimizer.model_dump(mode="json").items()}


def _plain(value: Any) -> Any:
    return value if isinstance(value, bool | int | float | str) else json.dumps(value)
