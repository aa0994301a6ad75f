"""What a comparison of pretrainings looks like: figures, as SVG and PNG."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tools.sweep.pretrain import savings
from tools.sweep.pretrain.curves import AXES
from tools.sweep.pretrain.study import Study
from tools.sweep.pretrain.tables import Router, routers


def draw(study: Study, folder: Path) -> dict[str, Path]:
    """Title → SVG in `folder`, with a PNG of the same name beside each."""
    folder.mkdir(parents=True, exist_ok=True)
    found = {}
    for size in study.sizes:
        of = f" ({size})" if len(study.sizes) > 1 else ""
        for name, title, figure in (
            ("curves", f"Validation loss{of}", _curves(study, size)),
            ("routers", f"Routers by layer{of}", _routers(study, size)),
        ):
            if figure is not None:
                found[title] = _save(figure, folder / f"{name}-{size}.svg")
    if len(study.sizes) > 1 and (figure := _ladder(study)) is not None:
        found["Loss against training FLOPs over sizes"] = _save(figure, folder / "sizes.svg")
    return found


def _curves(study: Study, size: str) -> Any:
    """Rows: modalities; columns: axes. A line is the mean over seeds, its shade reaches from the least to the most."""
    names = [name for name in study.losses() if any(name in run.curves("tokens") for run in study.runs)]
    if not names:
        return None
    figure, panels = _figure(len(names), len(AXES), 4.2, 2.6)
    for row, name in zip(panels, names, strict=True):
        for axes, (axis, words) in zip(row, AXES.items(), strict=True):
            for color, arm in enumerate(study.arms):
                drawn = [run.curves(axis)[name] for run in study.of(arm, size) if name in run.curves(axis)]
                drawn = [curve for curve in drawn if len(curve.x) == len(drawn[0].x)]
                if not drawn:
                    continue
                mean = savings.mean(drawn)
                losses = np.array([curve.loss for curve in drawn])
                style: Any = {"color": _color(color)}
                line = "--" if arm == study.baseline else "-"
                axes.plot(mean.x, mean.loss, line, marker=".", label=arm, linewidth=1.4, **style)
                axes.fill_between(mean.x, losses.min(0), losses.max(0), alpha=0.15, linewidth=0, **style)
            axes.set(xlabel=words, xscale="log", yscale="log", ylabel="nats a token" if axes is row[0] else "")
            axes.set_title("whole loss" if name == "all" else name, fontsize="medium")
            axes.yaxis.set_minor_formatter("{x:.3g}")
            axes.tick_params(which="both", labelsize="small")
            axes.grid(alpha=0.3, which="both")
    _legend(figure, panels)
    return figure


def _routers(study: Study, size: str) -> Any:
    """Columns: specialisation, entropy and loads by layer; a line an arm and part of its layers, mean over seeds."""
    each = {arm: [routers(run) for run in study.of(arm, size)] for arm in study.arms}
    keys = {key: None for runs in each.values() for found in runs for router in found for key in router.values}
    shown = [key for key in ("specialisation", "entropy") if key in keys]
    shown += sorted(key for key in keys if key.startswith("load/"))
    if not shown:
        return None
    figure, panels = _figure(1, len(shown), 3.6, 2.8)
    for axes, key in zip(panels[0], shown, strict=True):
        for color, (arm, runs) in enumerate(each.items()):
            parts = dict.fromkeys(router.part for found in runs for router in found if key in router.values)
            for style, part in zip(("-", "--", ":", "-."), parts, strict=False):
                x, y = _by_layer(runs, part, key)
                axes.plot(x, y, style, marker="o", markersize=4, color=_color(color), label=f"{arm}, {part}")
        axes.set(xlabel="layer", title=key.replace("load/", "load, "))
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
    _legend(figure, panels)
    return figure


def _by_layer(runs: Sequence[Sequence[Router]], part: str, key: str) -> tuple[list[int], list[float]]:
    found: dict[int, list[float]] = {}
    for router in (router for routed in runs for router in routed):
        if router.part == part and key in router.values:
            found.setdefault(router.layer, []).append(router.values[key])
    layers = sorted(found)
    return layers, [float(np.mean(found[layer])) for layer in layers]


def _ladder(study: Study) -> Any:
    """All curves of all sizes against training FLOPs, with the best size for each budget, and a fit of the ends."""
    if "all" not in study.losses():
        return None
    figure, panels = _figure(1, 1, 7.0, 4.2)
    axes = panels[0][0]
    for color, arm in enumerate(study.arms):
        curves, ends = {}, []
        for size in study.sizes:
            drawn = [run.curves("flops")["all"] for run in study.of(arm, size) if "all" in run.curves("flops")]
            if drawn:
                curves[size] = savings.mean(drawn)
                ends.append((float(curves[size].x[-1]), float(curves[size].loss[-1])))
                axes.plot(curves[size].x, curves[size].loss, color=_color(color), alpha=0.35, linewidth=1)
        if best := savings.optima(curves):
            axes.plot([o.compute for o in best], [o.loss for o in best], ".", color=_color(color), markersize=4)
        if ends:
            axes.plot(*zip(*ends, strict=True), "o", color=_color(color), label=arm)
        if len(ends) > 2:
            law = savings.fit([compute for compute, _ in ends], [loss for _, loss in ends])
            x = np.geomspace(min(ends)[0], max(ends)[0])
            axes.plot(x, [law(each) for each in x], "--", color=_color(color), linewidth=1)
    axes.set(xscale="log", yscale="log", xlabel=AXES["flops"], ylabel="nats a token")
    axes.yaxis.set_minor_formatter("{x:.3g}")
    axes.grid(alpha=0.3, which="both")
    axes.legend(fontsize="small")
    return figure


def _figure(rows: int, columns: int, width: float, height: float) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width * columns, height * rows + 0.6), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False)


def _legend(figure: Any, panels: Any) -> None:
    entries: dict[str, Any] = {}
    for axes in panels.flat:
        handles, labels = axes.get_legend_handles_labels()
        entries |= dict(zip(labels, handles, strict=True))
    if entries:
        figure.legend(
            entries.values(), entries.keys(), loc="outside lower center", ncols=min(5, len(entries)), fontsize="small"
        )


def _color(number: int) -> Any:
    from matplotlib import colormaps

    return colormaps["tab10" if number < 10 else "tab20b"](number % 20)


def _save(figure: Any, path: Path) -> Path:
    import matplotlib

    with matplotlib.rc_context({"svg.hashsalt": path.stem, "svg.fonttype": "path"}):
        figure.savefig(path, metadata={"Date": None})
    figure.savefig(path.with_suffix(".png"), dpi=120)
    return path
