"""How long a checkpoint holds training up, waited for and written in the background: a model of 58 million weights."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.pretrain.ranks import run_ranks

LAYER = {"mixer": {"type": "attention", "heads": 8}, "feedforward": {"type": "dense", "d_ff": 1344}}
MODEL = {"modalities": ["text"], "d_model": 512, "vocab_size": 8192, "layers": [LAYER], "repeat": 16}
ROUNDS = 3


def measured(folder: Path) -> dict[str, float]:
    """Seconds of a step, of a checkpoint that is waited for, of beginning one in the background, of a step meanwhile,
    until it is written, and of its commit; the least of several rounds."""
    import zoo
    from pretrain.checkpoint import CheckpointStore
    from pretrain.deepspeed_config import effective
    from pretrain.engine import Engine
    from pretrain.optim import OptimizerConfig
    from pretrain.process_group import prepare_environment

    prepare_environment("cpu")
    optimizer = OptimizerConfig(lr=1e-4)
    section = {"zero_optimization": {"stage": 2}}
    batches = {"world": 1, "global_batch": 1, "micro_batch": 1}
    config = effective(section, **batches, precision="fp32", clip=0.0, optimizer=optimizer)

    def build() -> torch.nn.Module:
        return zoo.build("model", MODEL, seed=None)

    engine = Engine(build, zoo.initialise, config, optimizer, seed=0, device="cpu")
    store = CheckpointStore(folder / "checkpoints", keep=1)
    store.clean(engine)
    tokens = torch.arange(64).view(1, -1)
    context = zoo.TokenContext.from_modality(torch.zeros_like(tokens), modalities=("text",))

    def step() -> None:
        engine.train()
        engine.backward(engine.module(tokens, context).square().mean())
        engine.step(1.0)

    def seconds(work: Callable[[], object]) -> float:
        began = time.perf_counter()
        work()
        return time.perf_counter() - began

    step()
    found = {"step": min(seconds(step) for _ in range(3))}
    rounds: dict[str, list[float]] = {"save": [], "begin": [], "step meanwhile": [], "until written": [], "finish": []}
    for number in range(ROUNDS):
        rounds["save"].append(seconds(lambda: store.save(engine, 2 * number, {})))  # noqa: B023  called at once
        rounds["begin"].append(seconds(lambda: store.begin(engine, 2 * number + 1, {})))  # noqa: B023
        began = time.perf_counter()
        while store.busy:
            rounds["step meanwhile"].append(seconds(step))
        rounds["until written"].append(time.perf_counter() - began)
        rounds["finish"].append(seconds(lambda: store.finish(engine)))
    found |= {name: min(values) for name, values in rounds.items()}
    found["parameters"] = sum(parameter.numel() for parameter in engine.module.module.parameters())
    found["bytes"] = sum(
        file.stat().st_size for file in (store.folder / f"step-{2 * ROUNDS - 1}").rglob("*") if file.is_file()
    )
    return found


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_checkpoint_in_the_background_holds_a_step_up_for_its_copy_alone(tmp_path: Path) -> None:
    (found,) = run_ranks("tests.pretrain.test_stall:measured", 1, tmp_path / "scratch", 800, folder=tmp_path)
    print("\n" + "\n".join(f"{name}: {value:,.3f}" for name, value in found.items()))
    assert found["parameters"] > 50e6
    assert found["begin"] + found["finish"] < 0.5 * found["save"], found
