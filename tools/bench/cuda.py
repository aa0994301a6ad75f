"""On a GPU, in bf16: untied Mamba against mamba-ssm's block, MoMa and MoD against dense, MFU of the recipes near
1.4B."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

import zoo
from pretrain import recipe as recipes
from tools.bench.benchmark import HIGHER, Comparison, Group, Settings, Unavailable, benchmark, leaf
from tools.bench.blocks import alternating, build, build_layer, variant, variants
from tools.bench.depth import layer
from tools.bench.experts import moma
from tools.bench.measure import BOTH, Variant, both_modes
from tools.bench.models import flops, loss_of
from tools.bench.recurrent import UNTIED
from zoo.flops import TRAINING_FACTOR

DEVICE, DTYPE = "cuda", torch.bfloat16
RECIPES = Path(__file__).parents[2] / "recipes" / "models"
PEAKS = {"A100": 312e12, "H100": 989e12, "H200": 989e12, "B200": 2250e12}
"""Nominal dense bf16 FLOPs a second, by a part of the device's name."""
RESERVED = 0.4
"""Share of the memory left to activations, logits and the allocator; the rest is for weights and gradients."""


@benchmark("cuda.mamba", "cuda", kind="mamba", peer="Mamba")
@benchmark("cuda.mamba2", "cuda", kind="mamba2", peer="Mamba2")
def untied_against_dense(settings: Settings, kind: str, peer: str) -> Group:
    """Mixture-of-Mamba and our tied mixer over mamba-ssm's dense block, B=4 T=4096 D=2048."""
    try:
        import mamba_ssm
    except Exception as error:  # built for another torch it fails with whatever the loader says
        raise Unavailable(f"import mamba_ssm: {error}; pip install -e .[gpu] --no-build-isolation") from error
    rows, length, width = 4, settings.size(4096), settings.size(2048)
    x = leaf(rows, length, width, device=DEVICE, dtype=DTYPE)
    context = alternating(rows, length, DEVICE)
    theirs = getattr(mamba_ssm, peer)(width).to(DEVICE, DTYPE)
    both = {"mamba-ssm": Variant(lambda: theirs(x), [x, *theirs.parameters()])}
    for name, untied in (("dense", []), ("untied", UNTIED[kind])):
        block = build("mixer", {"type": kind, "untied": untied}, width).to(DEVICE, DTYPE)
        both[name] = variant(block, x, context)
    pairs = [Comparison("untied", "mamba-ssm"), Comparison("dense", "mamba-ssm"), Comparison("untied", "dense")]
    return Group(both_modes(both), pairs)


@benchmark("cuda.moma", "cuda")
def moma_over_dense(settings: Settings) -> Group:
    """MoMa 4t4i over the dense SwiGLU of equal FLOPs, 16,384 tokens, D=2048 F=5632."""
    hidden = settings.size(5632)
    configs = {"dense": {"type": "dense", "d_ff": hidden}, "MoMa 4t4i": moma(hidden)}
    shape = (4, settings.size(4096), settings.size(2048))
    return Group(both_modes(variants(configs, "feedforward", shape, DEVICE, DTYPE)), [Comparison("MoMa 4t4i", "dense")])


@benchmark("cuda.mod", "cuda")
def depth(settings: Settings) -> Group:
    """A transformer layer under Mixture-of-Depths, B=4 T=4096 D=2048 H=16 F=5632: share of the theoretical speed-up."""
    rows, length, width = 4, settings.size(4096), settings.size(2048)
    plain = layer(settings.size(5632), heads=16)
    x = leaf(rows, length, width, device=DEVICE, dtype=DTYPE)
    context = alternating(rows, length, DEVICE)
    dense = build_layer(plain, width).to(DEVICE, DTYPE)
    both, pairs = {"dense": variant(dense, x, context)}, []
    for capacity in (0.125, 0.25, 0.5):
        block = build_layer(plain | {"depth": {"type": "mod", "capacity": capacity, "auxiliary": False}}, width)
        name = f"MoD {capacity:.1%}"
        both[name] = variant(block.to(DEVICE, DTYPE), x, context)
        predicted = block.cost(length).flops[0] / dense.cost(length).flops[0]
        pairs.append(Comparison(name, "dense", HIGHER, expected=predicted))
    return Group(both_modes(both), pairs)


@benchmark("cuda.mfu.dense", "cuda", file="dense_1.4b")
@benchmark("cuda.mfu.moma", "cuda", file="moma_4t4i_1.4b")
@benchmark("cuda.mfu.mod_moma", "cuda", file="mod_moma_4t4i_1.4b")
@benchmark("cuda.mfu.mot", "cuda", file="mot_1.5b")
@benchmark("cuda.mfu.mixture_of_mamba", "cuda", file="mixture_of_mamba_1.5b")
def utilisation(settings: Settings, file: str) -> Group:
    """Model FLOPs utilisation of a recipe's loss and gradients on one GPU, at its row length, one row, recomputing
    layers."""
    path = RECIPES / f"{file}.yaml"
    if not path.is_file():
        raise Unavailable(f"there is no {path}")
    peak = next((value for part, value in PEAKS.items() if part in torch.cuda.get_device_name()), None)
    if peak is None:
        raise Unavailable(f"the nominal bf16 speed of {torch.cuda.get_device_name()} is not known; add it to PEAKS")
    shrunk = ["model.repeat=1", "data.sequence_length=256"] if settings.quick else []
    recipe = recipes.load(path, shrunk)
    model, note = fitting(recipe)
    length = recipe.data.sequence_length
    modality = alternating(1, length).modality
    tokens = torch.randint(model.head.weight.shape[0], modality.shape, device=DEVICE)
    objective = zoo.build("objective", recipe.objective, modalities=tuple(recipe.model.modalities))
    training = Variant(lambda: loss_of(model, objective, tokens, modality), list(model.parameters()))
    least = TRAINING_FACTOR * flops(model, length) * length / peak
    pair = Comparison(
        file,
        None,
        HIGHER,
        floor_ms={BOTH: 1e3 * least},
        label=f"MFU of {file}",
        note=f"3 × forward FLOPs, recomputation and routers not counted; {peak / 1e12:.0f} TFLOP/s{note}",
    )
    return Group({BOTH: {file: training.forward_backward()}}, [pair])


def fitting(recipe: recipes.Recipe) -> tuple[zoo.Model, str]:
    """The recipe's model on the GPU, with fewer layers where its weights and gradients would not fit; and a note of
    that."""
    with torch.device("meta"):
        whole = zoo.build("model", recipe.model, kernels=recipe.kernels, seed=None)
    needed = 2 * DTYPE.itemsize * sum(parameter.numel() for parameter in whole.parameters())
    room = (1 - RESERVED) * torch.cuda.get_device_properties(0).total_memory
    repeat = recipe.model.repeat if needed <= room else max(1, int(recipe.model.repeat * room / needed))
    note = "" if repeat == recipe.model.repeat else f"; {repeat} of {recipe.model.repeat} repeats of its layers"
    torch.set_default_dtype(DTYPE)
    try:
        with torch.device(DEVICE):
            config = recipe.model.model_copy(update={"repeat": repeat})
            model = zoo.build("model", config, kernels=recipe.kernels, activation_checkpointing=True, seed=None)
    finally:
        torch.set_default_dtype(torch.float32)
    for parameter in model.parameters():  # drawn here: the seeded draw is made on the host, too slow for billions
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
        else:
            nn.init.ones_(parameter)
    return model, note
