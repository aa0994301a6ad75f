"""The engine on two real processes: one model at every stage, bad steps skipped by all, norms, clipping, Muon."""

from __future__ import annotations

import math
from typing import Any

import psutil
import pytest
import torch

from tests.pretrain import tiny
from tests.pretrain.ranks import run_ranks

CASES = [(0, "fp32"), (1, "fp32"), (2, "fp32"), (3, "fp32"), (1, "bf16"), (2, "bf16"), (3, "bf16")]
OFFLOAD = {1: ("offload_optimizer",), 2: ("offload_optimizer",), 3: ("offload_optimizer", "offload_param")}


def nan_loss_on_rank_one(loss: torch.Tensor, rank: int, index: int) -> torch.Tensor:
    return loss * math.nan if (rank, index) == (1, 0) else loss


def infinite_constant_on_rank_zero(loss: torch.Tensor, rank: int, index: int) -> torch.Tensor:
    return loss + math.inf if (rank, index) == (0, 1) else loss  # its gradient is finite


def infinite_gradient_on_rank_one(loss: torch.Tensor, rank: int, index: int) -> torch.Tensor:
    if (rank, index) != (1, 1):
        return loss
    return loss + (loss - loss.detach()).abs().sqrt()  # value finite, gradient not


POISONS = [nan_loss_on_rank_one, infinite_constant_on_rank_zero, infinite_gradient_on_rank_one]


def steps_of(engine: Any, bad: bool, micro: int = 1) -> dict[str, Any]:
    """Three good steps, with a bad one of each kind between them where `bad`."""
    good, skipped, first = [], [], tiny.weights(engine)
    for step in range(3):
        if bad:
            before = tiny.weights(engine)
            result, _ = tiny.train_step(engine, 50 + step, micro, POISONS[step])
            after = tiny.weights(engine)
            skipped.append((result.applied, result.grad_norm, all(torch.equal(before[k], after[k]) for k in before)))
        result, loss = tiny.train_step(engine, step, micro)
        good.append((result.applied, result.grad_norm, loss))
    return {"good": good, "skipped": skipped, "weights": tiny.weights(engine), "first": first}


def scenario() -> dict[Any, Any]:
    results: dict[Any, Any] = {}

    def record(key: Any, engine: Any, run: Any) -> None:
        results[key] = run(engine)
        engine.destroy()

    for stage, precision in CASES:
        for bad in (False, True):
            zero = {"stage3_param_persistence_threshold": 0} if stage == 3 and bad else {}
            engine = tiny.make_engine(stage, precision, zero=zero)
            record((stage, precision, bad), engine, lambda e, bad=bad: steps_of(e, bad))
    for stage, keys in OFFLOAD.items():
        zero = {key: {"device": "cpu", "pin_memory": False} for key in keys}
        for bad in (False, True):
            record(
                ("offload", stage, bad),
                tiny.make_engine(stage, zero=zero),
                lambda e, bad=bad: steps_of(e, bad),
            )
    for stage in (0, 1, 2, 3):
        record(("clip", stage), tiny.make_engine(stage, clip=0.05), lambda e: steps_of(e, False))
    for auxiliary in (tiny.AUXILIARY_SCALE, 0.0):

        def run(engine, auxiliary=auxiliary):
            for step in range(3):
                tiny.train_step(engine, step, 1, None, auxiliary)
            return tiny.weights(engine)

        record(("joint", auxiliary), tiny.make_engine(2, clip=0.05), run)
    record("whole batch", tiny.make_engine(2, micro=2), lambda e: steps_of(e, False, micro=2))
    muon = {"type": "muon", "muon_lr": 0.02}
    for stage, precision in ((0, "fp32"), (1, "bf16")):
        for bad in (False, True):
            engine = tiny.make_engine(stage, precision, clip=0.05, optimizer=muon)
            record(("muon", stage, bad), engine, lambda e, bad=bad: steps_of(e, bad))
    engine = tiny.make_engine(3, "bf16")
    engine.eval()
    with torch.no_grad():
        rows, _ = engine.module(tiny.batch(0))
    results["evaluation"] = rows
    results["objects"] = (engine.ranks.broadcast({"rank": engine.ranks.rank}), engine.ranks.gather(engine.ranks.rank))
    connections = psutil.Process().net_connections("inet")
    results["listens"] = {each.laddr.ip for each in connections if each.status == psutil.CONN_LISTEN}
    results["reduced"] = (
        float(engine.ranks.sum(torch.tensor(engine.ranks.rank + 1.0))),
        float(engine.ranks.max(torch.tensor(float(engine.ranks.rank)))),
    )
    return results


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[Any, Any]]:
    return run_ranks("tests.pretrain.test_engine:scenario", 2, tmp_path_factory.mktemp("engine"))


def reference(clip: float = 0.0) -> dict[str, Any]:
    """One process, plain PyTorch, the whole batch."""
    from pretrain.optim import OptimizerConfig, parameter_groups

    model = tiny.TinyModel()
    tiny.initialise(model, 3, lambda parameters: torch.no_grad())
    optimizer = torch.optim.AdamW(parameter_groups(model, OptimizerConfig(lr=0.01)))
    norms = []
    for step in range(3):
        rows, router = model(tiny.batch(step))
        ((rows.sum() + tiny.AUXILIARY_SCALE * router.sum()) / (tiny.ROWS * 6)).backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), clip or math.inf)))
        for group in optimizer.param_groups:
            group["lr"] = 0.01 / (1 + step)
        optimizer.step()
        optimizer.zero_grad()
    return {"norms": norms, "weights": {k: v.detach() for k, v in model.state_dict().items()}}


def largest_difference(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    assert a.keys() == b.keys()
    return max(float((a[k] - b[k]).abs().max()) for k in a)


@pytest.mark.parametrize("key", [(s, "fp32", False) for s in range(4)] + ["whole batch"])
def test_every_stage_trains_what_one_process_trains(ranks: list[dict[Any, Any]], key: Any) -> None:
    expected = reference()
    assert largest_difference(ranks[0][key]["weights"], expected["weights"]) < 1e-6
    assert [g[1] for g in ranks[0][key]["good"]] == pytest.approx(expected["norms"], rel=1e-6)


@pytest.mark.parametrize("case", [*CASES, ("offload", 2), ("offload", 3), ("muon", 1)])
def test_first_weights_are_not_rounded(ranks: list[dict[Any, Any]], case: Any) -> None:
    """Nor are they in bf16: the optimizer starts from what the seed gives."""
    model = tiny.TinyModel()
    tiny.initialise(model, 3, lambda parameters: torch.no_grad())
    first = ranks[0][(*case, False)]["first"]
    assert [name for name, value in model.state_dict().items() if not torch.equal(first[name], value)] == []


@pytest.mark.parametrize("stage", range(4))
def test_clipping_is_the_same_at_every_stage(ranks: list[dict[Any, Any]], stage: int) -> None:
    expected = reference(clip=0.05)
    assert largest_difference(ranks[0]["clip", stage]["weights"], expected["weights"]) < 1e-6
    assert [g[1] for g in ranks[0]["clip", stage]["good"]] == pytest.approx(expected["norms"], rel=1e-6)


@pytest.mark.parametrize("key", [*CASES, *(("offload", s) for s in OFFLOAD), ("muon", 0), ("muon", 1)])
def test_bad_steps_leave_no_trace(ranks: list[dict[Any, Any]], key: Any) -> None:
    for rank in (0, 1):
        spoilt, clean = ranks[rank][(*key, True)], ranks[rank][(*key, False)]
        assert [s[0] for s in spoilt["skipped"]] == [False] * 3
        assert not any(math.isfinite(s[1]) for s in spoilt["skipped"])
        assert all(s[2] for s in spoilt["skipped"]), "weights moved in a skipped step"
        assert spoilt["good"] == clean["good"], "Adam's state moved in a skipped step"
        assert all(g[0] for g in clean["good"])
        assert all(torch.equal(spoilt["weights"][k], clean["weights"][k]) for k in clean["weights"])


def test_norm_is_the_same_on_every_rank(ranks: list[dict[Any, Any]]) -> None:
    for key in ranks[0]:
        if isinstance(ranks[0][key], dict) and "good" in ranks[0][key]:
            assert ranks[0][key]["good"] == ranks[1][key]["good"], key


def test_auxiliary_router_does_not_move_the_main_model_under_joint_clipping(
    ranks: list[dict[Any, Any]],
) -> None:
    with_router, without = ranks[0]["joint", tiny.AUXILIARY_SCALE], ranks[0]["joint", 0.0]
    moved = [k for k in with_router if not torch.equal(with_router[k], without[k])]
    assert moved == ["auxiliary.weight", "auxiliary.bias"]


def test_muon_moves_hidden_matrices_by_its_rate(ranks: list[dict[Any, Any]]) -> None:
    for stage in (0, 1):
        result = ranks[0]["muon", stage, False]
        assert all(torch.isfinite(w).all() for w in result["weights"].values())
        start = tiny.TinyModel()
        tiny.initialise(start, 3, lambda parameters: torch.no_grad())
        moved = (result["weights"]["mixer.weight"] - start.state_dict()["mixer.weight"]).norm() / tiny.WIDTH**0.5
        # Orthogonal updates of root-mean-square 1/√D at 0.02 × (1 + 1/2 + 1/3), direction kept or not.
        assert 0.01 < float(moved) < 0.06
        assert [g[1] for g in result["good"]][0] == pytest.approx(reference()["norms"][0], rel=0.02)


def test_evaluation_and_collectives(ranks: list[dict[Any, Any]]) -> None:
    assert torch.equal(ranks[0]["evaluation"], ranks[1]["evaluation"])
    assert ranks[1]["objects"] == ({"rank": 0}, [0, 1])
    assert ranks[1]["reduced"] == (3.0, 1.0)


def test_ranks_of_one_machine_listen_to_no_other(ranks: list[dict[Any, Any]]) -> None:
    assert [rank["listens"] for rank in ranks] == [{"127.0.0.1"}] * 2


def test_choose_device() -> None:
    from pretrain.process_group import choose_device
    from zoo.config import UserError

    assert choose_device("cpu") == "cpu"
    assert choose_device("auto") == ("cuda" if torch.cuda.is_available() else "cpu")
    with pytest.raises(UserError, match="known: auto, cpu, cuda"):
        choose_device("tpu")
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="use auto or cpu"):
            choose_device("cuda")
