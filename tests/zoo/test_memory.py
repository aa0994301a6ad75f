"""What a step made is gone when the step's references are: no cycle keeps it until Python's collector comes."""

from __future__ import annotations

import gc
import os
import resource
import subprocess
import sys
import weakref
from collections.abc import Iterator

import pytest
import torch

from tests.zoo.helpers import DENSE, MOMA, build_model, ids, layer, mod, stream, untied
from zoo import Trace

MAMBA = {"mixer": {"type": "mamba", "d_state": 3, "d_conv": 3, "dt_rank": 3}}
TOKEN_CHOICE = {"feedforward": {"type": "experts", "experts": 3, "d_ff": 6, "router": {"type": "token_choice"}}}
LAYERS = {
    "dense": [layer(feedforward=DENSE)],
    "moma": [layer()],
    "mod": [layer(), mod(feedforward=DENSE)],
    "mod by modality": [layer(), mod(depth={"type": "mod", "capacity": {"text": 1.0, "image": "1/2"}})],
    "staged mode": [mod(), mod()],
    "token choice": [layer(**TOKEN_CHOICE), mod(**TOKEN_CHOICE)],
    "untied": [untied(), mod(**untied())],
    "mamba": [layer(**MAMBA), mod(**MAMBA)],
}


@pytest.fixture
def no_collector() -> Iterator[None]:
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def step(model: torch.nn.Module) -> list[weakref.ref]:
    """One step that leaves the trace's terms alone; weak references to its context, trace, tokens and logits."""
    context = stream("ttiittiit|tti", "tti[ii]t|tiit", trace=Trace())
    tokens, trace = ids(context), context.trace
    logits = model(tokens, context)
    logits.square().mean().backward()
    return [weakref.ref(value) for value in (context, trace, tokens, logits)]


@pytest.mark.parametrize("activation_checkpointing", [False, True, "selective"])
@pytest.mark.parametrize("layers", LAYERS)
def test_a_step_is_gone_with_its_references(layers, activation_checkpointing, no_collector):
    model = build_model(*LAYERS[layers], activation_checkpointing=activation_checkpointing)
    step(model)  # the first one imports what PyTorch needs for it
    assert [reference() for reference in step(model)] == [None] * 4


@pytest.mark.parametrize("activation_checkpointing", [False, True])
def test_resident_memory_of_a_sparse_model_stays_flat(activation_checkpointing):
    assert_flat(activation_checkpointing, 70)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_resident_memory_stays_flat_over_two_thousand_steps():
    assert_flat(False, 2000)


def assert_flat(activation_checkpointing: bool, steps: int) -> None:
    """In a process of its own, without the collector."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1"}
    command = [sys.executable, "-m", "tests.zoo.test_memory", str(int(activation_checkpointing)), str(steps)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    early, late = map(int, done.stdout.split())
    assert late <= 1.01 * early, f"{early} KiB at first, {late} KiB at the end"


def main(activation_checkpointing: bool, steps: int, warm: int = 20) -> None:
    """Print the largest resident size, in KiB, after `warm` steps and after all."""
    gc.disable()
    torch.set_num_threads(1)
    staged = mod(feedforward=MOMA | {"scope": "row"})
    model = build_model(layer(), staged, layer(), staged, activation_checkpointing=activation_checkpointing).float()
    optimizer = torch.optim.AdamW(model.parameters())
    for number in range(steps):
        if number == warm:
            print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
        context = stream("ttiittiit|tti" * 24, "ttiiit|tiit" * 24, trace=Trace())
        loss = model(ids(context), context).square().mean()
        (loss + sum(loss for loss, _ in context.trace.losses.values())).backward()
        optimizer.step()
        optimizer.zero_grad()
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)


if __name__ == "__main__":
    main(sys.argv[1] == "1", int(sys.argv[2]))
