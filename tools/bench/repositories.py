"""Methods whose authors published a repository and no package: measured from a checkout, `--peer KIND=FOLDER`.

Their files are loaded as they are. What they import and what is not here is replaced while they load: a GPU's scan by
this project's C kernel, so that both sides run the same one.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import sys
import types
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tools.bench.benchmark import (
    HIGHER,
    Comparison,
    Goal,
    Group,
    Settings,
    TableRow,
    Unavailable,
    benchmark,
    goals,
    leaf,
)
from tools.bench.blocks import MODALITIES, alternating, build, build_layer, variant
from tools.bench.depth import layer
from tools.bench.kernels import compiled
from tools.bench.measure import FORWARD, Variant, both_modes
from tools.bench.recurrent import UNTIED
from zoo import TokenContext
from zoo.kernels.layout import Layout

KINDS = {
    "mixture_of_mamba": "github.com/Weixin-Liang/Mixture-of-Mamba",
    "mixture_of_transformers": "github.com/facebookresearch/Mixture-of-Transformers",
    "mixture_of_depths": "github.com/astramind-ai/Mixture-of-depths",
}


@contextlib.contextmanager
def importing(folder: Path, stubs: Mapping[str, types.ModuleType | None]) -> Iterator[None]:
    """Imports come from `folder` first, those of the names in `stubs` are these modules, or fail where None; afterwards
    nothing of it is left."""
    modules, path = dict(sys.modules), list(sys.path)
    sys.path.insert(0, str(folder))
    sys.modules.update(stubs)  # pyrefly: ignore[no-matching-overload]  # None makes the import of a name fail
    try:
        yield
    finally:
        sys.path[:] = path
        for name, module in list(sys.modules.items()):
            if name in stubs or str(folder) in (getattr(module, "__file__", None) or ""):
                del sys.modules[name]
        sys.modules.update({name: module for name, module in modules.items() if name not in sys.modules})


def load(settings: Settings, kind: str, module: str, **stubs: types.ModuleType | None) -> types.ModuleType:
    """A module of the repository of this kind. The package it is in, whose own __init__ may import anything, is left
    empty; `stubs` are by dotted name.

    Raises:
        Unavailable: no folder was given, it is not the repository's, or a package it needs is missing.
    """
    folder, package = settings.peer(kind), module.rpartition(".")[0]
    empty = {} if not package else {package: stub(__path__=[str(folder / package)])}
    with importing(folder, {**empty, **stubs}):
        try:
            return importlib.import_module(module)
        except ImportError as error:
            reason = f"{error}; give the folder of a checkout of {KINDS[kind]}"
            raise Unavailable(f"--peer {kind}={folder}: {reason}") from error


def stub(**values: Any) -> types.ModuleType:
    module = types.ModuleType("stub")
    module.__dict__.update(values)
    return module


def masks(context: TokenContext) -> list[Tensor]:
    """For each modality (B·T,) bool."""
    return [context.modality.reshape(-1) == m for m in range(len(MODALITIES))]


def agreement(ours: Variant, theirs: Variant) -> TableRow:
    """How far the two outputs are apart with the same weights: they do the same work."""
    with torch.no_grad():
        results = [result[0] if isinstance(result, tuple) else result for result in (ours.run(), theirs.run())]
    a, b = (result.reshape(-1) for result in results)
    error = float((a - b).norm() / b.norm())
    return TableRow("difference of outputs (L2), same weights", FORWARD, None, None, error, "lower", 1e-5, None)


def scan_interface(rows: int, length: int, width: int) -> Callable[..., Tensor]:
    """This project's compiled scan in the place of mamba-ssm's `selective_scan_fn`, for B = `rows`, T = `length` and
    W = 2 · `width`."""
    kernel = compiled()
    layout = Layout.of(TokenContext.from_modality(torch.zeros(rows, length, dtype=torch.int64)))
    no_bias = torch.zeros(1, 2 * width)

    def scan(
        u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, *, z: Tensor, **options: Any
    ) -> Tensor:
        """Values (B, W, T) by the C kernel, which has its own order."""
        by_token = [value.transpose(1, 2).reshape(rows * length, -1) for value in (u, delta, B, C, z)]
        u, delta, B, C, z = by_token
        y, _ = kernel.selective_scan(u, delta, no_bias, A, B, C, D, z, layout)
        return y.view(rows, length, -1).transpose(1, 2)

    return scan


def copy_mamba(ours: Any, theirs: Any) -> None:
    """Give the authors' module the weights of ours."""
    with torch.no_grad():
        for name in UNTIED["mamba"]:
            experts = getattr(theirs, f"local_experts_{name}")
            for expert, weight in zip(experts, getattr(ours, name).weight, strict=True):
                expert.weight.copy_(weight)
        for expert, bias in zip(theirs.local_experts_dt_proj, ours.dt_bias.view(len(MODALITIES), -1), strict=True):
            expert.bias.copy_(bias)
        theirs.conv1d.weight.copy_(ours.conv_weight)
        theirs.conv1d.bias.copy_(ours.conv_bias)


@benchmark("mamba.official", rows=2, length=1024, width=512)
@benchmark("mamba.official.256", rows=4, length=2048, width=256)
def mixture_of_mamba(settings: Settings, rows: int, length: int, width: int) -> Group:
    """The authors' Mixture-of-Mamba module with this project's scan in it, against ours; alternating runs of 128
    tokens."""
    length, width = settings.size(length), settings.size(width)
    scan = scan_interface(rows, length, width)
    module = load(
        settings,
        "mixture_of_mamba",
        "MixtureOfMamba",
        **{
            "mamba_ssm": stub(),
            "mamba_ssm.ops": stub(),
            "mamba_ssm.ops.selective_scan_interface": stub(selective_scan_fn=scan, mamba_inner_fn=None),
            "mamba_ssm.ops.triton.selective_state_update": None,
            "mamba_ssm.ops.triton.layer_norm": None,
            "causal_conv1d": None,
            "src": stub(),
            "src.args": stub(ModelArgs=types.SimpleNamespace),
        },
    )
    theirs = module.MixtureOfMamba(types.SimpleNamespace(n_modalities=len(MODALITIES)), width)
    ours = build("mixer", {"type": "mamba", "untied": UNTIED["mamba"]}, width)
    copy_mamba(ours, theirs)
    x, context = leaf(rows, length, width), alternating(rows, length)
    chosen = masks(context)
    both = {
        "ours": variant(ours, x, context),
        "official": Variant(lambda: theirs(x, chosen), [x, *theirs.parameters()]),
    }
    note = "their scan replaced by ours; the transposes to its order count as theirs"
    pair = Comparison("ours", "official", HIGHER, goals(Goal(1.4), Goal(2.5)), note=note)
    return Group(both_modes(both), [pair], [agreement(*both.values())])


@benchmark("mot.official")
def mixture_of_transformers(settings: Settings) -> Group:
    """The authors' untied feed-forward with its norms against ours, 4,096 tokens, D=512 F=1536."""
    rows, length, width, hidden = 4, settings.size(1024), settings.size(512), settings.size(1536)
    module = load(settings, "mixture_of_transformers", "src.simple_ModalityUntiedFeedForward")
    vars(module)["merge_modalities"] = merge  # theirs has room for the tokens of one modality only
    theirs = module.SimpleModalityUntiedFeedForward(
        width, hidden * 3 // 2, multiple_of=hidden, n_modalities=len(MODALITIES)
    )
    x, context = leaf(rows, length, width), alternating(rows, length)
    chosen = masks(context)
    config = {
        "mixer": {"type": "mamba"},
        "feedforward": {"type": "dense", "d_ff": hidden, "untied": True},
        "norm": "post",
        "untied_norms": True,
    }
    block = build_layer(config, width)
    with torch.no_grad():
        for m, expert in enumerate(theirs.local_experts):
            gate, up = block.feedforward.w_in.weight[m].chunk(2)
            for linear, weight in ((expert.w1, gate), (expert.w3, up), (expert.w2, block.feedforward.w_out.weight[m])):
                linear.weight.copy_(weight)
    parts = nn.ModuleList([block.feedforward, block.feedforward_norm])
    both = {
        "ours": Variant(
            lambda: parts[1](parts[0](x, context), context),
            [x, *parts.parameters()],
        ),
        "official": Variant(lambda: theirs(x.view(-1, width), chosen), [x, *theirs.parameters()]),
    }
    pair = Comparison("ours", "official", HIGHER, note="their merging of modalities repaired")
    return Group(both_modes(both), [pair], [agreement(*both.values())])


def merge(outputs: list[Tensor], chosen: list[Tensor]) -> Tensor:
    """Rows of each modality back into time order."""
    merged = outputs[0].new_empty(chosen[0].numel(), outputs[0].shape[1])
    for rows, where in zip(outputs, chosen, strict=True):
        merged[where] = rows
    return merged


class OneRow(nn.Module):
    """One of our layers as their wrapper calls it: with the kept tokens of one row."""

    def __init__(self, block: nn.Module, width: int) -> None:
        super().__init__()
        self.block, self.hidden_size = block, width

    def forward(self, x: Tensor, position_ids: Tensor, **options: Any) -> tuple[Tensor]:
        context = TokenContext.from_modality(torch.zeros_like(position_ids), position=position_ids)
        return (self.block(x, context),)


@benchmark("mod.astramind")
def mixture_of_depths(settings: Settings) -> Group:
    """astramind's Mixture-of-Depths round our layer against ours round the same, B=4 T=1024 D=512 F=1344."""
    rows, length, width, hidden = 4, settings.size(1024), settings.size(512), settings.size(1344)
    module = load(settings, "mixture_of_depths", "MoD.MoD")
    x, context = leaf(rows, length, width), alternating(rows, length)
    position = torch.arange(length).expand(rows, length)
    plain, both, pairs = layer(hidden), {}, []
    for capacity in (0.125, 0.25, 0.5):
        ours = build_layer(plain | {"depth": {"type": "mod", "capacity": capacity, "auxiliary": False}}, width)
        theirs = module.MoD(capacity, OneRow(build_layer(plain, width), width))
        theirs.router.eval()  # in training it anneals its capacity from 100 %
        names = f"ours {capacity:.1%}", f"astramind {capacity:.1%}"
        both[names[0]] = variant(ours, x, context)
        both[names[1]] = Variant(functools.partial(_first, theirs, x, position), [x, *theirs.parameters()])
        pairs.append(Comparison(*names, HIGHER, note="theirs keeps one token less"))
    return Group(both_modes(both), pairs)


def _first(module: nn.Module, x: Tensor, position: Tensor) -> Tensor:
    """Their wrapper without mask and cache."""
    return module(x, None, position, None, False, False)[0]
