"""Print the architecture a recipe assembles: parameters, FLOPs a token, memory a rank; nothing is allocated.

python -m tools.describe RECIPE [key.sub=value ...] [--ranks N] [--json]
python -m tools.describe FOLDER [--papers FILE]    a table of all recipes in it, as Markdown
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.tree import Tree
from torch import nn

import zoo
from pretrain import recipe as recipes
from pretrain.recipe import Recipe
from tools.papers import UNITS, Papers, table
from zoo.auxiliary import AuxiliaryRouter
from zoo.config import UserError
from zoo.experts import StackedSwiGLU
from zoo.flops import Cost
from zoo.routing.scorer import Scorer
from zoo.untied import ModalityLinear

BYTES = {"fp32": 4, "bf16": 2}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="tools.describe", description=__doc__.splitlines()[0])
    parser.add_argument("recipe", help="or a folder of recipes, for a table")
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value")
    parser.add_argument("--ranks", type=int, default=1, help="for the memory a rank (default 1)")
    parser.add_argument("--json", action="store_true", help="for programs")
    parser.add_argument("--papers", metavar="FILE", help="YAML of what papers print, for a folder's table")
    options = parser.parse_intermixed_args(arguments)
    try:
        if options.papers and not Path(options.recipe).is_dir():
            raise UserError(
                f"--papers: {options.recipe!r} is not a folder; papers stand beside the recipes of a folder"
            )
        if Path(options.recipe).is_dir():
            every = [describe(r, build(r), options.ranks) for r in folder(options.recipe, options.overrides)]
            print(
                json.dumps(every, indent=1) + "\n" if options.json else table(every, Papers.read(options.papers)),
                end="",
            )
            return 0
        recipe = recipes.load(options.recipe, options.overrides)
        model = build(recipe)
        facts = describe(recipe, model, options.ranks)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if options.json:
        print(json.dumps(facts, indent=1))
    else:
        show(recipe, model, facts)
    return 0


def build(recipe: Recipe) -> zoo.Model:
    """The recipe's model on the meta device."""
    with torch.device("meta"):
        return zoo.build("model", recipe.model, kernels=recipe.kernels, seed=None)


def describe(recipe: Recipe, model: zoo.Model, ranks: int) -> dict[str, Any]:
    """Figures of the model at the recipe's sequence length; `memory_per_rank` in bytes for its ZeRO stage."""
    cost = model.cost(recipe.data.sequence_length)
    total = sum(p.numel() for p in model.parameters())
    modalities = recipe.model.modalities
    return {
        "name": recipe.name,
        "layers": len(model.layers),
        "d_model": recipe.model.d_model,
        "tokens": recipe.data.sequence_length,
        "parameters": {"total": total, "active": round(max(cost.active)), "auxiliary": _auxiliary(model)},
        "active_parameters": dict(zip(modalities, map(round, cost.active), strict=True)),
        "flops_per_token": dict(zip(modalities, cost.flops, strict=True)),
        "router_flops_per_token": dict(zip(modalities, cost.router, strict=True)),
        "auxiliary_flops_per_token": dict(zip(modalities, cost.auxiliary, strict=True)),
        "memory_per_rank": memory(recipe, total, ranks),
    }


def memory(recipe: Recipe, parameters: int, ranks: int) -> dict[str, Any]:
    """Bytes of weights, gradients and optimizer state on one rank under the recipe's ZeRO stage; activations apart.

    fp32 weights are their own master copy at stage 0; ZeRO keeps a partitioned fp32 copy for the optimizer.
    """
    zero = recipes.launch_config(recipe, ranks)["zero_optimization"]
    stage = zero["stage"]
    element = BYTES[recipe.train.precision]
    offloaded = zero.get("offload_optimizer", {}).get("device", "none") != "none"
    states = parameters * 4 * (2 if recipe.optimizer.type == "adamw" else 1)
    master = parameters * 4 if stage > 0 or recipe.train.precision == "bf16" else 0
    share = ranks if stage >= 1 else 1
    result = {
        "weights": parameters * element // (ranks if stage == 3 else 1),
        "gradients": parameters * 4 // (ranks if stage >= 2 else 1),
        "optimizer": (states + master) // share,
    }
    device = sum(result.values()) - (result["optimizer"] if offloaded else 0)
    return {"zero_stage": stage, "ranks": ranks, **result, "optimizer_offloaded": offloaded, "on_device": device}


def folder(path: str, overrides: Sequence[str]) -> list[Recipe]:
    """The recipes of a folder, by name.

    Raises:
        UserError: there is none, or one is wrong.
    """
    files = sorted(Path(path).glob("*.yaml"))
    if not files:
        raise UserError(f"{path}: no *.yaml in this folder; give a folder of recipes")
    return [recipes.load(file, overrides) for file in files]


def show(recipe: Recipe, model: zoo.Model, facts: dict[str, Any]) -> None:
    """The tree and the totals on the screen."""
    length = recipe.data.sequence_length
    parameters = facts["parameters"]
    root = Tree(
        f"[bold]{recipe.name}[/bold]  {count(parameters['total'])} parameters, {count(parameters['active'])} active"
    )
    _grow(root, model, length, recipe.model.modalities)
    console = Console()
    console.print(root)
    console.print(f"at {length} tokens a row, forward, 2 FLOPs a multiply-add:")
    for modality in recipe.model.modalities:
        console.print(
            f"  {modality}: {count(facts['flops_per_token'][modality])} FLOPs a token, and "
            f"{count(facts['router_flops_per_token'][modality])} in routers, "
            f"{count(facts['auxiliary_flops_per_token'][modality])} in auxiliary routers"
        )
    held = facts["memory_per_rank"]
    console.print(
        f"memory a rank, ZeRO stage {held['zero_stage']} on {held['ranks']} rank(s), activations apart: weights "
        f"{size(held['weights'])}, gradients {size(held['gradients'])}, optimizer {size(held['optimizer'])}"
        + (" (offloaded to the host)" if held["optimizer_offloaded"] else "")
    )
    console.print(
        "left out of FLOPs: norms, activations, rotary embedding, softmax, top-k, gathers; active: weights a token meets on "
        "average, MoD layers by their capacity, embedding and head whole"
    )


def _grow(tree: Tree, module: nn.Module, length: float, modalities: Sequence[str], top: bool = True) -> None:
    """A branch for every child that has a cost or routes tokens; layers that are alike share one."""
    for name, child in module.named_children():
        if isinstance(child, nn.ModuleList):
            alike: dict[str, list[int]] = {}
            for index, entry in enumerate(child):
                alike.setdefault(_label(entry, length, modalities) + repr(entry), []).append(index)
            for indices in alike.values():
                _branch(tree, f"{name}.{ranges(indices)}", child[indices[0]], length, modalities)
        elif isinstance(child, nn.ModuleDict):
            for key, entry in child.items():
                _branch(tree, f"{name}.{key}", entry, length, modalities)
        elif top or _shown(child):
            _branch(tree, name, child, length, modalities)


def _shown(module: nn.Module) -> bool:
    """Blocks and routers; the projections inside a mixer are part of it."""
    if isinstance(module, ModalityLinear):
        return False
    return hasattr(module, "cost") or isinstance(module, Scorer | AuxiliaryRouter | StackedSwiGLU)


def _branch(tree: Tree, name: str, module: nn.Module, length: float, modalities: Sequence[str]) -> None:
    inner = length * float(module.capacity) if hasattr(module, "capacity") else length
    _grow(tree.add(f"{name}  {_label(module, length, modalities)}"), module, inner, modalities, top=False)


def ranges(numbers: Sequence[int]) -> str:
    """[0, 1, 2, 5] → "0–2,5"; evenly spaced ones → "1,3…7"."""
    steps = {b - a for a, b in zip(numbers, numbers[1:], strict=False)}
    if len(numbers) > 2 and len(steps) == 1:
        step = steps.pop()
        return f"{numbers[0]}–{numbers[-1]}" if step == 1 else f"{numbers[0]},{numbers[1]}…{numbers[-1]}"
    return ",".join(map(str, numbers))


def _label(module: nn.Module, length: float, modalities: Sequence[str]) -> str:
    parameters = sum(p.numel() for p in module.parameters())
    text = f"[cyan]{type(module).__name__}[/cyan]  {count(parameters)}"
    if hasattr(module, "cost"):
        cost: Cost = module.cost(length)
        flops = sorted(set(cost.flops))
        text += "  " + " / ".join(count(value) for value in flops) + " FLOPs a token"
    if isinstance(module, StackedSwiGLU):
        text += f"  {module.w_in.shape[0]} experts"
    if hasattr(module, "capacity"):
        text += f"  capacity {float(module.capacity):g} of each {module.scope}"
    return text


def _auxiliary(model: nn.Module) -> int:
    return sum(p.numel() for name, p in model.named_parameters() if "auxiliary" in name)


def count(value: float) -> str:
    """1,234,567 → 1.23M."""
    for unit, limit in UNITS.items():
        if abs(value) >= limit:
            return f"{value / limit:.3g}{unit}"
    return f"{value:.3g}"


def size(value: float) -> str:
    """Bytes as MiB or GiB."""
    return f"{value / 2**30:.2f} GiB" if value >= 2**30 else f"{value / 2**20:.1f} MiB"


if __name__ == "__main__":
    sys.exit(main())
