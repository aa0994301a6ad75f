"""What a layer's forward and backward pass ask of a GPU: time, launches, and the longest kernels.

    python -m tools.gpu_check.launches [--kernels 12]

4 rows of 4,096 tokens, width 2,048, hidden width 5,632, 16 heads, bf16; text and image alternate. Where the host needs
as long to issue a pass as the pass takes, launches decide, not FLOPs.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from tools.bench.blocks import alternating, build, build_layer
from tools.bench.depth import layer
from tools.bench.experts import moma

ROWS, LENGTH, WIDTH, HIDDEN, HEADS = 4, 4096, 2048, 5632, 16
WARM_UP, PASSES = 3, 5


def blocks() -> dict[str, Callable[[], nn.Module]]:
    """What is looked at, by name."""
    dense = layer(HIDDEN, heads=HEADS)
    projections = ["q_proj", "k_proj", "v_proj", "o_proj"]
    untied = {
        "mixer": {"type": "attention", "heads": HEADS, "untied": projections},
        "feedforward": {"type": "dense", "d_ff": HIDDEN, "untied": True},
        "norm": "post",
        "untied_norms": True,
    }
    mod = {"type": "mod", "capacity": 0.25}
    return {
        "dense feed-forward": lambda: build("feedforward", {"type": "dense", "d_ff": HIDDEN}, WIDTH),
        "MoMa 4t4i": lambda: build("feedforward", moma(HIDDEN), WIDTH),
        "dense layer": lambda: build_layer(dense, WIDTH),
        "MoD 25 %": lambda: build_layer(dense | {"depth": mod | {"auxiliary": False}}, WIDTH),
        "MoD 25 % with auxiliary router": lambda: build_layer(dense | {"depth": mod}, WIDTH),
        "Mixture-of-Transformers": lambda: build_layer(untied, WIDTH),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="tools.gpu_check.launches", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kernels", type=int, default=12, help="how many of each block's longest are named")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("error: there is no CUDA device here; python -m tools.doctor says why", file=sys.stderr)
        return 2
    x = torch.randn(ROWS, LENGTH, WIDTH, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    for name, made in blocks().items():
        look(name, made().to("cuda", torch.bfloat16).train(), x, options.kernels)
    return 0


def look(name: str, block: nn.Module, x: Tensor, shown: int) -> None:
    """Time `block` and say what it launches."""
    context = alternating(x.shape[0], x.shape[1], "cuda")
    leaves = [x, *block.parameters()]

    def step() -> None:
        torch.autograd.grad(block(x, context).float().square().mean(), leaves, allow_unused=True)

    for _ in range(WARM_UP):
        step()
    torch.cuda.synchronize()
    began = time.perf_counter()
    for _ in range(PASSES):
        step()
    issued = time.perf_counter() - began
    torch.cuda.synchronize()
    took = time.perf_counter() - began
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as found:
        step()
        torch.cuda.synchronize()
    kernels: list[Any] = [event for event in found.key_averages() if event.device_type.name == "CUDA"]
    busy = sum(event.self_device_time_total for event in kernels) / 1e3
    print(
        f"{name}: {1e3 * took / PASSES:.2f} ms, issued in {1e3 * issued / PASSES:.2f} ms; "
        f"device busy {busy:.2f} ms in {sum(event.count for event in kernels)} launches",
        flush=True,
    )
    for event in sorted(kernels, key=lambda event: -event.self_device_time_total)[:shown]:
        print(f"    {event.self_device_time_total / 1e3:8.3f} ms {event.count:4d} ×  {event.key[:100]}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
