"""Whole Mamba mixers: untied by modality over tied, and against Transformers' mixers."""

from __future__ import annotations

from tools.bench import packages
from tools.bench.benchmark import HIGHER, Comparison, Goal, Group, Settings, benchmark, goals, leaf
from tools.bench.blocks import alternating, build, variant, variants
from tools.bench.measure import Variant, both_modes

UNTIED = {
    "mamba": ["in_proj", "x_proj", "dt_proj", "out_proj"],
    "mamba2": ["in_proj", "dt_bias", "norm", "out_proj"],
}
GOAL = Goal(1.10, 1.05)


@benchmark("mamba.512", kind="mamba", rows=2, length=1024, width=512)
@benchmark("mamba.256", kind="mamba", rows=4, length=2048, width=256)
@benchmark("mamba2.512", kind="mamba2", rows=2, length=1024, width=512)
@benchmark("mamba2.256", kind="mamba2", rows=4, length=2048, width=256)
def untied_over_tied(settings: Settings, kind: str, rows: int, length: int, width: int) -> Group:
    """Mixture-of-Mamba, every projection untied, over the same mixer tied; alternating runs of 128 tokens."""
    configs = {"dense": config(kind, settings), "untied": config(kind, settings) | {"untied": UNTIED[kind]}}
    shape = (rows, settings.size(length), settings.size(width))
    pair = Comparison("untied", "dense", goals=goals(both=GOAL))
    return Group(both_modes(variants(configs, "mixer", shape)), [pair])


def config(kind: str, settings: Settings) -> dict:
    """A tied mixer; Mamba-2's heads shrink with the shapes."""
    return {"type": kind} if kind == "mamba" else {"type": kind, "head_dim": min(64, 2 * settings.size(256))}


@benchmark("mamba.transformers", kind="mamba")
@benchmark("mamba2.transformers", kind="mamba2")
def against_transformers(settings: Settings, kind: str) -> Group:
    """Transformers' mixer without a GPU's kernels against ours, tied, B=2 T=256 D=256."""
    rows, length, width = 2, settings.size(256), settings.size(256)
    options = config(kind, settings)
    theirs = packages.mixer(kind, width, length, options.get("head_dim", 64))
    x, context = leaf(rows, length, width), alternating(rows, length)
    both = {
        "ours": variant(build("mixer", options, width), x, context),
        "Transformers": Variant(lambda: theirs(x), [x, *theirs.parameters()]),
    }
    return Group(both_modes(both), [Comparison("ours", "Transformers", HIGHER)])
