"""The architecture of a recipe as a tree on the screen, and numbers and sizes as people read them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.tree import Tree
from torch import nn

import zoo
from pretrain.recipe import Recipe
from tools.describe.papers import UNITS
from zoo.auxiliary import AuxiliaryRouter
from zoo.carries import Carries, Channels, Ids, Vectors
from zoo.experts import StackedSwiGLU
from zoo.routing.scorer import Scorer
from zoo.slots import Component, Depth

SHOWN = (Component, Scorer, AuxiliaryRouter, StackedSwiGLU)
"""What has a branch of its own; the projections inside a mixer are part of it."""


def show(recipe: Recipe, model: zoo.Model, facts: dict[str, Any]) -> None:
    """The tree and the totals on the screen."""
    length = recipe.data.sequence_length
    parameters = facts["parameters"]
    root = Tree(
        f"[bold]{recipe.name}[/bold]  {count(parameters['total'])} parameters, {count(parameters['active'])} active"
    )
    _grow(root, model, length)
    console = Console()
    console.print(root)
    _vocabulary(console, recipe, facts["vocabulary"])
    ends = [f"{name} {count(n)} ({n / parameters['total']:.1%})" for name, n in facts["end_parameters"].items()]
    console.print(f"parameters in stems and heads, and their share: {', '.join(ends)}")
    console.print(f"at {length} tokens a row, forward, 2 FLOPs a multiply-add:")
    for modality in recipe.model.modalities:
        console.print(
            f"  {modality}: {count(facts['flops_per_token'][modality])} FLOPs a token, and "
            f"{count(facts['router_flops_per_token'][modality])} in routers, "
            f"{count(facts['auxiliary_flops_per_token'][modality])} in auxiliary routers"
        )
    held = facts["memory_per_rank"]
    console.print(
        f"memory a rank, ZeRO stage {held['zero_stage']} on {held['ranks']} rank(s): weights "
        f"{size(held['weights'])}, gradients {size(held['gradients'])}, optimizer {size(held['optimizer'])}"
        + (" (offloaded to the host)" if held["optimizer_offloaded"] else "")
    )
    kept = held["activations"]
    console.print(
        "activations of a micro-batch: not known, a block's shapes depend on the data"
        if kept is None
        else f"activations of a micro-batch with a GPU's kernels: {size(kept['held'])} after the forward pass, "
        f"{size(kept['peak'])} at most; logits {size(kept['logits'])}, made in parts where they are large; "
        f"all together {size(held['peak'])}"
    )
    console.print(
        "left out of FLOPs: norms, activations, rotary embedding, softmax, top-k, gathers; active: weights a token "
        "meets on average, MoD layers by their capacity, embedding and head whole"
    )


def _vocabulary(console: Console, recipe: Recipe, words: dict[str, Any]) -> None:
    """The ids of the stream: special tokens, then a range for each modality, with what its positions are."""
    table = Table(title=f"{words['size']:,} ids", title_justify="left", box=None, pad_edge=False)
    for heading in ("ids", "what", "kind", "a position carries", ""):
        table.add_column(heading)
    for name, number in words["special"].items():
        table.add_row(str(number), name)
    for name, (start, stop) in words["ranges"].items():
        modality = recipe.modalities[name]
        table.add_row(
            f"{start}–{stop - 1}" if stop - start > 1 else f"{start}",
            name,
            modality.type_name,
            carried(modality.carries),
            modality.pace,
        )
    console.print(table)


def carried(carries: Carries) -> str:
    """What a position carries, in words."""
    match carries:
        case Ids(size):
            return f"one of {size:,} ids"
        case Vectors(width):
            return f"{width:,} numbers"
        case Channels(channels, size):
            return f"{channels:,} channels of {size:,} levels"


def _grow(tree: Tree, module: nn.Module, length: float, top: bool = True) -> None:
    """A branch for every child that has a cost or routes tokens; layers that are alike share one."""
    for name, child in module.named_children():
        if isinstance(child, nn.ModuleList):
            alike: dict[str, list[int]] = {}
            for index, entry in enumerate(child):
                alike.setdefault(_label(entry, length) + repr(entry), []).append(index)
            for indices in alike.values():
                _branch(tree, f"{name}.{ranges(indices)}", child[indices[0]], length)
        elif isinstance(child, nn.ModuleDict):
            for key, entry in child.items():
                _branch(tree, f"{name}.{key}", entry, length)
        elif top or isinstance(child, SHOWN):
            _branch(tree, name, child, length)


def _branch(tree: Tree, name: str, module: nn.Module, length: float) -> None:
    inner = length * float(module.capacity) if isinstance(module, Depth) else length
    _grow(tree.add(f"{name}  {_label(module, length)}"), module, inner, top=False)


def ranges(numbers: Sequence[int]) -> str:
    """[0, 1, 2, 5] → "0–2,5"; evenly spaced ones → "1,3…7"."""
    steps = {b - a for a, b in zip(numbers, numbers[1:], strict=False)}
    if len(numbers) > 2 and len(steps) == 1:
        step = steps.pop()
        return f"{numbers[0]}–{numbers[-1]}" if step == 1 else f"{numbers[0]},{numbers[1]}…{numbers[-1]}"
    return ",".join(map(str, numbers))


def _label(module: nn.Module, length: float) -> str:
    parameters = sum(p.numel() for p in module.parameters())
    text = f"[cyan]{type(module).__name__}[/cyan]  {count(parameters)}"
    if isinstance(module, Component):
        flops = sorted(set(module.cost(length).flops))
        text += "  " + " / ".join(count(value) for value in flops) + " FLOPs a token"
    if isinstance(module, StackedSwiGLU):
        text += f"  {module.w_in.shape[0]} experts"
    if isinstance(module, Depth):
        text += f"  capacity {float(module.capacity):g} of each {module.scope}"
    return text


def count(value: float) -> str:
    """1,234,567 → 1.23M."""
    for unit, limit in UNITS.items():
        if abs(value) >= limit:
            return f"{value / limit:.3g}{unit}"
    return f"{value:.3g}"


def size(value: float) -> str:
    """Bytes as MiB or GiB."""
    return f"{value / 2**30:.2f} GiB" if value >= 2**30 else f"{value / 2**20:.1f} MiB"
