"""Checkpoints: bit-for-bit resuming, another number of ranks, and every way a save can die."""

from __future__ import annotations

import errno
import json
import math
import os
import shutil
import signal
import time
import zlib
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from pretrain import checkpoint
from pretrain.checkpoint import CheckpointError, CheckpointStore
from pretrain.consolidate import stored_in_checkpoint
from pretrain.engine import TAG, Writing, Written
from pretrain.manifest import MANIFEST
from pretrain.process_group import Ranks
from tests.pretrain import tiny
from tests.pretrain.ranks import run_ranks
from zoo.config import UserError

CASES = [
    (0, "fp32"),
    (1, "fp32"),
    (2, "fp32"),
    (3, "fp32"),
    (1, "bf16"),
    (2, "bf16"),
    (3, "bf16"),
    (0, "muon"),
    (1, "muon"),
]
CLIPPED = [(2, "fp32"), (1, "bf16")]
"""Resumed with another `train.clip` than they were written with, too."""
IN_BACKGROUND = CASES[1::2]
"""Saved while training goes on; the others are waited for."""
RESIZED = [(0, "fp32"), (1, "fp32"), (3, "fp32")]
RESIZED_SLOWLY = [(2, "fp32"), (1, "bf16"), (2, "bf16"), (3, "bf16")]  # the same code paths, or looser


def engine_of(case: tuple[int, str], world: int = 2, **rest: Any) -> Any:
    stage, kind = case
    if kind == "muon":
        rest["optimizer"] = {"type": "muon", "muon_lr": 0.02}
        kind = "fp32" if stage == 0 else "bf16"
    return tiny.make_engine(stage, kind, world=world, **rest)


def store_of(folder: Path, name: object, **rest: Any) -> CheckpointStore:
    return CheckpointStore(folder / str(name).replace(" ", ""), keep=rest.pop("keep", 3), **rest)


def advance(engine: Any, start: int, stop: int) -> list[tuple[float, float]]:
    """(loss, gradient norm) of steps start … stop-1."""
    results = [tiny.train_step(engine, step) for step in range(start, stop)]
    return [(loss, result.grad_norm) for result, loss in results]


# ---- what the processes run
# -----------------------------------------------------------------------------------


def write_all(folder: Path) -> dict[Any, Any]:
    """World 2: train 3 steps, save, train 4 more; then saves that fail."""
    results: dict[Any, Any] = {}
    for case in CASES:
        engine, store = engine_of(case), store_of(folder, case)
        store.clean(engine)
        assert store.load_newest(engine) is None
        advance(engine, 0, 3)
        state = {"step": 3, "best": math.inf, "data": {"position": 12}}
        save, whole = store.begin if case in IN_BACKGROUND else store.save, engine.full_state_dict()
        save(engine, 3, state, validation_loss=2.5)
        if engine.ranks.first:
            results["whole", case] = whole
        results[case] = (advance(engine, 3, 7), tiny.weights(engine))
        store.finish(engine)
        if case == (2, "fp32"):
            results["full"] = full_disks(engine, store_of(folder, "full"))
        engine.destroy()
    return results


def full_disks(engine: Any, store: CheckpointStore) -> dict[str, Any]:
    """Errors of saves that ran out of space on rank 1, on rank 0, and in the manifest."""
    import pretrain.checkpoint
    import pretrain.engine

    store.clean(engine)
    store.save(engine, 1, {"step": 1})
    before = {p.name: p.read_bytes() for p in (store.folder / "step-1").rglob("*") if p.is_file()}
    errors = []
    torch_save, write = torch.save, pretrain.checkpoint.atomic_write

    def failing(rank: int, error: Exception) -> Any:
        def save(state: Any, file: Any, **rest: Any) -> None:
            if engine.ranks.rank == rank:
                file.write(b"half")
                raise error
            torch_save(state, file, **rest)

        return save

    def failing_write(path: Path, text: str) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    full = OSError(errno.ENOSPC, "No space left on device")
    for patch in (
        failing(1, full),
        failing(0, RuntimeError("PytorchStreamWriter failed writing file")),
        None,
    ):
        pretrain.engine.torch.save = patch or torch_save
        pretrain.checkpoint.atomic_write = write if patch else failing_write
        try:
            store.save(engine, 2, {"step": 2})
        except CheckpointError as error:
            errors.append(str(error))
        finally:
            pretrain.engine.torch.save, pretrain.checkpoint.atomic_write = torch_save, write
    after = {p.name: p.read_bytes() for p in (store.folder / "step-1").rglob("*") if p.is_file()}
    left = sorted(p.name for p in store.folder.iterdir())
    engine.ranks.barrier()
    store.save(engine, 2, {"step": 2})
    return {"errors": errors, "intact": before == after, "left": left, "steps": store.steps()}


def die_while_saving(folder: Path, stage: int) -> None:
    """World 2: a good save, then rank 1 is killed in the middle of writing the next."""
    engine, store = tiny.make_engine(stage), store_of(folder, f"killed {stage}")
    advance(engine, 0, 1)
    store.save(engine, 1, {"step": 1})
    advance(engine, 1, 2)
    import pretrain.engine

    torch_save = torch.save

    def killed(state: Any, file: Any, **rest: Any) -> None:
        if engine.ranks.rank == 1:
            file.write(b"half")
            file.flush()
            os.kill(os.getpid(), signal.SIGKILL)
        torch_save(state, file, **rest)

    pretrain.engine.torch.save = killed
    store.save(engine, 2, {"step": 2})


def shrink(folder: Path, cases: list[tuple[int, str]]) -> dict[Any, Any]:
    """World 1: resume what two ranks wrote, train 2 steps, save."""
    results: dict[Any, Any] = {}
    for case in cases:
        engine, store = engine_of(case, world=1), store_of(folder, case)
        store.clean(engine)
        state = store.load_newest(engine)
        groups = [
            {k: v for k, v in g.items() if k in ("name", "weight_decay", "eps")}
            for g in engine.module.optimizer.param_groups
        ]
        results[case] = (state, groups, advance(engine, 3, 5))
        if case == RESIZED[1]:
            engine.destroy()
            results["converted again"] = [converted_again(folder, case, fault) for fault in CONVERTED_FAULTS]
            engine = engine_of(case, world=1)
            store.load_newest(engine)
            advance(engine, 3, 5)
        grown = store_of(folder, ("grown", *case))
        grown.clean(engine)
        grown.save(engine, 5, {"step": 5})
        engine.destroy()
    return results


def converted_again(folder: Path, case: tuple[int, str], fault: Any) -> tuple[list[str], list[tuple[float, float]]]:
    """What is said, and the losses, when a conversion that is there has been damaged."""
    said: list[str] = []
    engine, store = engine_of(case, world=1), store_of(folder, case, log=said.append)
    target = store.folder / "step-3.universal"
    fault(max((p for p in target.rglob("*.pt") if p.name == "fp32.pt"), key=lambda p: p.stat().st_size))
    store.load_newest(engine)
    losses = advance(engine, 3, 5)
    engine.destroy()
    return said, losses


def read_all(folder: Path) -> dict[Any, Any]:
    """World 2 again, new processes: resume bit for bit, after faults, after growing from one rank."""
    results: dict[Any, Any] = {}
    for case in CASES:
        engine, store = engine_of(case), store_of(folder, case)
        store.clean(engine)
        state = store.load_newest(engine)
        results[case] = (state, advance(engine, 3, 7), tiny.weights(engine))
        engine.destroy()
    results |= grow(folder, RESIZED)
    for case in CLIPPED:
        engine = engine_of(case, clip=0.25)
        store_of(folder, case).load_newest(engine)
        results["clip", *case] = engine.module.optimizer.clip_grad
        engine.destroy()
    for name in sorted(p.name for p in folder.iterdir() if p.name.startswith(("fault-", "killed"))):
        said: list[str] = []
        engine, store = (
            tiny.make_engine(3 if name.endswith("3") else 2),
            store_of(folder, name, log=said.append),
        )
        store.clean(engine)
        try:
            outcome = store.load_newest(engine)["step"]
            advance(engine, outcome, outcome + 1)
        except UserError as error:
            outcome = f"{type(error).__name__}: {error}"
        results[name] = (outcome, said, sorted(p.name for p in store.folder.iterdir()))
        engine.destroy()
    for name, case, build in (("wider", (2, "fp32"), WiderModel), ("stage", (1, "fp32"), tiny.TinyModel)):
        engine = engine_of(case, build=build)
        try:
            store_of(folder, (2, "fp32")).load_newest(engine)
        except UserError as error:
            results[name] = str(error)
        engine.destroy()
    return results


def grow(folder: Path, cases: list[tuple[int, str]]) -> dict[Any, Any]:
    """World 2: resume what one rank wrote, train 2 steps."""
    results: dict[Any, Any] = {}
    for case in cases:
        engine, store = engine_of(case), store_of(folder, ("grown", *case))
        results["grown", case] = (store.load_newest(engine), advance(engine, 5, 7))
        engine.destroy()
    return results


class WiderModel(tiny.TinyModel):
    def __init__(self) -> None:
        super().__init__()
        self.mixer = torch.nn.Linear(tiny.WIDTH, tiny.WIDTH, bias=False)
        self.experts = torch.nn.Parameter(torch.empty(4, tiny.WIDTH, tiny.WIDTH))


def _optimizer_file(step: Path, rank: int) -> Path:
    (found,) = (step / "engine").glob(f"*zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")
    return found


def lose_file(store: Path) -> None:
    _optimizer_file(store / "step-2", 1).unlink()


def cut_file(store: Path) -> None:
    path = _optimizer_file(store / "step-2", 1)
    path.write_bytes(path.read_bytes()[:-100])


def flip_byte(store: Path) -> None:
    path = _optimizer_file(store / "step-2", 1)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def lose_latest(store: Path) -> None:
    (store / "latest").unlink()


def empty_latest(store: Path) -> None:
    (store / "latest").write_text("")


def half_manifest(store: Path) -> None:
    path = store / "step-2" / MANIFEST
    path.write_text(path.read_text()[:40])


def lose_everything(store: Path) -> None:
    for step in ("step-1", "step-2"):
        (store / step / MANIFEST).unlink()


def flip_converted(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


CONVERTED_FAULTS = [Path.unlink, flip_converted]


FAULTS = {
    lose_file: 1,
    cut_file: 1,
    flip_byte: 1,
    lose_latest: 2,
    empty_latest: 2,
    half_manifest: 1,
    lose_everything: "none that every rank can read",
}


# ---- the story: two ranks, a crash, one rank, two ranks
# -------------------------------------------------------


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    root = tmp_path_factory.mktemp("checkpoint")
    stores, module = root / "stores", "tests.pretrain.test_checkpoint"
    written = run_ranks(f"{module}:write_all", 2, root / "write", folder=stores)
    with pytest.raises(AssertionError, match="exit codes"):
        run_ranks(f"{module}:die_while_saving", 2, root / "die", folder=stores, stage=2)
    killed = sorted(p.name for p in (stores / "killed2").iterdir())
    for fault in FAULTS:
        shutil.copytree(stores / "full", stores / f"fault-{fault.__name__}")
        fault(stores / f"fault-{fault.__name__}")
    shrunk = run_ranks(f"{module}:shrink", 1, root / "shrink", folder=stores, cases=RESIZED)
    read = run_ranks(f"{module}:read_all", 2, root / "read", folder=stores)
    return {"written": written, "killed": killed, "shrunk": shrunk, "read": read, "stores": stores}


@pytest.mark.parametrize("case", CASES)
def test_resumes_bit_for_bit(story: dict[str, Any], case: Any) -> None:
    for rank in (0, 1):
        results, weights = story["written"][rank][case]
        state, resumed, resumed_weights = story["read"][rank][case]
        assert state == {"step": 3, "best": math.inf, "data": {"position": 12}}
        assert resumed == results
        assert weights.keys() == resumed_weights.keys()
        assert all(torch.equal(weights[k], resumed_weights[k]) for k in weights)


@pytest.mark.parametrize("case", CASES)
def test_whole_weights_come_from_the_files_one_by_one(story: dict[str, Any], case: Any) -> None:
    whole = story["written"][0]["whole", case]
    folder = story["stores"] / str(case).replace(" ", "") / "step-3" / TAG
    stored = stored_in_checkpoint(folder)
    assert stored.keys() == whole.keys()
    for name, value in whole.items():
        assert stored[name].shape == tuple(value.shape) and torch.equal(stored[name].read().to(value.dtype), value), (
            name
        )


@pytest.mark.parametrize("case", CLIPPED)
def test_gradients_are_clipped_as_the_run_says_and_not_the_checkpoint(story: dict[str, Any], case: Any) -> None:
    assert [results["clip", *case] for results in story["read"]] == [0.25, 0.25]


@pytest.mark.parametrize("case", RESIZED)
def test_another_number_of_ranks(story: dict[str, Any], case: Any) -> None:
    compare_resized(case, story["written"][0], story["shrunk"][0], story["read"][0])


def test_a_damaged_conversion_is_made_again(story: dict[str, Any]) -> None:
    _, _, losses = story["shrunk"][0][RESIZED[1]]
    lost, flipped = story["shrunk"][0]["converted again"]
    assert lost[1] == flipped[1] == losses
    for said, word in ((lost[0], "cannot be read (No such file"), (flipped[0], "does not have the checksum")):
        assert said[0].startswith("step-3.universal is made again: rank 0: ") and word in said[0]
        assert said[1:] == ["converting step-3 for another number of ranks"]


@pytest.mark.slow
def test_another_number_of_ranks_at_the_other_stages(story: dict[str, Any], tmp_path: Path) -> None:
    module, arguments = "tests.pretrain.test_checkpoint", {"folder": story["stores"], "cases": RESIZED_SLOWLY}
    shrunk = run_ranks(f"{module}:shrink", 1, tmp_path / "shrink", **arguments)
    grown = run_ranks(f"{module}:grow", 2, tmp_path / "grow", **arguments)
    for case in RESIZED_SLOWLY:
        compare_resized(case, story["written"][0], shrunk[0], grown[0])


def compare_resized(case: tuple[int, str], written: Any, shrunk: Any, grown: Any) -> None:
    """Losses of 2 → 1 → 2 ranks against those of two ranks throughout."""
    tolerance = 1e-6 if case[1] == "fp32" else 5e-3
    expected = [loss for loss, _ in written[case][0]]
    state, groups, losses = shrunk[case]
    assert state["step"] == 3
    assert {g["name"]: g["weight_decay"] for g in groups} == {"decay": 0.1, "no_decay": 0.0, "auxiliary": 0.0}
    assert {g["name"]: g["eps"] for g in groups}["auxiliary"] == 1e-8 * 2.0**-16
    assert [loss for loss, _ in losses] == pytest.approx(expected[:2], rel=tolerance)
    state, losses = grown["grown", case]
    assert state == {"step": 5}
    assert [loss for loss, _ in losses] == pytest.approx(expected[2:], rel=tolerance)


def test_full_disk(story: dict[str, Any]) -> None:
    for rank in (0, 1):
        full = story["written"][rank]["full"]
        assert len(full["errors"]) == 3, "every rank must raise"
        assert "rank 1" in full["errors"][0] and "No space left" in full["errors"][0]
        assert "rank 0" in full["errors"][1] and "PytorchStreamWriter" in full["errors"][1]
        assert "earlier checkpoints are intact" in full["errors"][2]
        assert full["intact"]
        assert full["left"] == ["latest", "step-1"]
        assert full["steps"] == [1, 2]


def test_killed_while_saving(story: dict[str, Any]) -> None:
    assert story["killed"] == ["latest", "step-1", "step-2.tmp"]
    for rank in (0, 1):
        outcome, _, left = story["read"][rank]["killed2"]
        assert outcome == 1
        assert left == ["latest", "step-1"]


@pytest.mark.parametrize("fault", FAULTS)
def test_damage_steps_all_ranks_back(story: dict[str, Any], fault: Any) -> None:
    for rank in (0, 1):
        outcome, said, _ = story["read"][rank][f"fault-{fault.__name__}"]
        if isinstance(FAULTS[fault], int):
            assert outcome == FAULTS[fault]
        else:
            assert FAULTS[fault] in outcome
    if fault is flip_byte:
        said = story["read"][0]["fault-flip_byte"][1]
        assert len(said) == 1 and "checksum" in said[0]


def test_another_model_or_stage_is_named(story: dict[str, Any]) -> None:
    for rank in (0, 1):
        message = story["read"][rank]["wider"]
        assert "only in the checkpoint: mixer.bias [8]" in message
        assert "experts: [2, 8, 8] in the checkpoint, [4, 8, 8] in this run" in message
        assert "has stage 2, this run 1" in story["read"][rank]["stage"]


def test_nothing_but_tensors_needs_unpickling(story: dict[str, Any]) -> None:
    folder = story["stores"] / "full" / "step-2"
    assert json.loads((folder / "trainer.json").read_text()) == {"step": 2}
    assert {p.suffix for p in folder.iterdir() if p.is_file()} == {".json"}


# ---- the store alone
# ------------------------------------------------------------------------------------------


class OneRank:
    """What the store asks of an engine, on one rank, with one byte of weights."""

    ranks, stage, precision, optimizer_type = Ranks(), 2, "fp32", "adamw"
    content = b"x"

    def save(self, folder: Path) -> Written:
        (folder / "engine").mkdir()
        (folder / "engine" / "states.pt").write_bytes(self.content)
        return Written({"engine/states.pt": zlib.crc32(self.content)}, [])

    def save_later(self, folder: Path) -> Writing:
        return Writing(lambda: self.save(folder))

    def load(self, folder: Path, universal: bool = False) -> None:
        self.loaded = (folder / "engine" / "states.pt").read_bytes()

    def parameter_shapes(self) -> dict[str, list[int]]:
        return {"w": [1]}


def test_keeps_the_newest_and_the_best(tmp_path: Path) -> None:
    engine: Any = OneRank()
    store = CheckpointStore(tmp_path, keep=2)
    for step, loss in ((1, 3.0), (2, 1.0), (3, 2.0), (4, None), (5, math.nan), (6, 1.0)):
        store.save(engine, step, {}, validation_loss=loss)
    assert store.steps() == [2, 5, 6]
    assert (tmp_path / "best").read_text() == "step-2\n"
    assert (tmp_path / "latest").read_text() == "step-6\n"


def test_other_versions_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, said = OneRank(), list[str]()
    store = two_checkpoints(tmp_path, engine, said)
    assert store.load_newest(engine) == {"n": 2} and not said
    monkeypatch.setattr(checkpoint, "versions", lambda: {"torch": "9.9"})
    store.load_newest(engine)
    assert len(said) == 1 and said[0].startswith("step-2 was written with ")
    assert f"torch {torch.__version__}, now 9.9" in said[0] and said[0].endswith("may not go on bit for bit")


def test_what_is_written_in_the_background_counts_when_it_is_finished(tmp_path: Path) -> None:
    engine: Any = OneRank()
    store, late = CheckpointStore(tmp_path, keep=2), {"n": 1}
    store.save(engine, 1, {"n": 0})
    store.begin(engine, 2, late, validation_loss=2.0)
    late["n"] = 5
    assert store.steps() == [1] and store.unfinished
    store.finish(engine)
    assert store.steps() == [1, 2] and not store.unfinished and not store.busy
    assert (tmp_path / "best").read_text() == (tmp_path / "latest").read_text() == "step-2\n"
    assert CheckpointStore(tmp_path, keep=2).load_newest(engine) == {"n": 1}
    store.finish(engine)  # nothing has begun


def test_a_run_that_dies_before_the_background_is_finished(tmp_path: Path) -> None:
    engine: Any = OneRank()
    store = CheckpointStore(tmp_path, keep=2)
    store.save(engine, 1, {"n": 1})
    store.begin(engine, 2, {"n": 2})
    while store.busy:
        time.sleep(0.01)
    again = CheckpointStore(tmp_path, keep=2)
    again.clean(engine)
    assert again.load_newest(engine) == {"n": 1} and not (tmp_path / "step-2.tmp").exists()


def test_a_disk_that_fills_up_in_the_background(tmp_path: Path) -> None:
    engine: Any = OneRank()
    store = CheckpointStore(tmp_path, keep=2)
    store.save(engine, 1, {"n": 1})
    engine.save = lambda folder: Written({}, ["states.pt: No space left on device"])
    store.begin(engine, 2, {"n": 2})
    with pytest.raises(CheckpointError, match="the checkpoint of step 2 could not be written: rank 0: states.pt: No"):
        store.finish(engine)
    assert store.steps() == [1] and not store.unfinished and not (tmp_path / "step-2.tmp").exists()


def test_saving_a_step_again_replaces_it_whole(tmp_path: Path) -> None:
    engine: Any = OneRank()
    store = CheckpointStore(tmp_path, keep=2)
    store.save(engine, 1, {"n": 1})
    engine.content = b"yy"
    store.save(engine, 1, {"n": 2})
    assert store.load_newest(engine) == {"n": 2}
    assert engine.loaded == b"yy"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["latest", "step-1"]


@pytest.mark.parametrize("moment", ["before", "after"])
def test_dying_inside_a_replacement_loses_nothing(tmp_path: Path, moment: str) -> None:
    engine: Any = OneRank()
    store = CheckpointStore(tmp_path, keep=2)
    store.save(engine, 1, {"n": 1})
    shutil.copytree(tmp_path / "step-1", tmp_path / "step-1.old")
    if moment == "before":
        os.replace(tmp_path / "step-1", tmp_path / "step-1.tmp")
    store.clean(engine)
    assert store.load_newest(engine) == {"n": 1}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["latest", "step-1"]


def test_a_future_gone_back_from_is_dropped(tmp_path: Path) -> None:
    engine: Any = OneRank()
    store = CheckpointStore(tmp_path, keep=3, log=lambda line: None)
    for step in (1, 2, 3):
        store.save(engine, step, {"n": step})
    (tmp_path / "step-3" / "engine" / "states.pt").write_bytes(b"z")
    assert store.load_newest(engine) == {"n": 2}
    store.save(engine, 3, {"n": 33})
    assert store.load_newest(engine) == {"n": 33}


@pytest.mark.parametrize("content", ["[]", "null", "{}", "", '{"crc32": 1', "é", None, 7 * "[1,", '{"files": {}}'])
def test_a_manifest_that_is_none_is_named(tmp_path: Path, content: str | None) -> None:
    """It is passed over, and removed later with a word."""
    engine, said = OneRank(), list[str]()
    store = two_checkpoints(tmp_path, engine, said)
    path = tmp_path / "step-2" / MANIFEST
    path.unlink() if content is None else path.write_text(content, encoding="latin-1")
    assert store.steps() == [1] and store.load_newest(engine) == {"n": 1}
    assert len(said) == 1 and said[0].startswith("checkpoint step-2 is passed over: rank 0: its manifest.json ")
    words = {None: "cannot be read (No such file or directory)", "": "is empty"}
    assert words.get(content, "is not one that this library writes") in said[0]
    store.keep = 1
    store.save(engine, 3, {"n": 3})
    assert len(said) == 2 and said[1].startswith("checkpoint step-2 is removed: its manifest.json ")
    assert store.steps() == [3]


@pytest.mark.parametrize("stride", [7, pytest.param(1, marks=pytest.mark.slow)])
def test_every_bit_of_a_manifest(tmp_path: Path, stride: int) -> None:
    """A flip (in the suite one in every byte, in the long test each) makes the run fall back to the checkpoint before,
    or changes nothing; never anything else."""
    engine, said = OneRank(), list[str]()
    store = two_checkpoints(tmp_path, engine, said)
    path = tmp_path / "step-2" / MANIFEST
    content = path.read_bytes()
    outcomes = Counter()
    for place in range(0, 8 * len(content), stride):
        flipped = bytearray(content)
        flipped[place // 8] ^= 1 << place % 8
        path.write_bytes(flipped)
        said.clear()
        state = store.load_newest(engine)
        outcomes[state["n"]] += 1
        assert (state, bool(said)) in (({"n": 1}, True), ({"n": 2}, False)), (place, flipped)
        assert engine.loaded == (b"x" if state["n"] == 1 else b"yy")
    assert outcomes[1] > 0.99 * outcomes.total() and 8 * len(content) > 2900


def test_every_bit_of_a_checkpoint(tmp_path: Path) -> None:
    engine, said = OneRank(), list[str]()
    store = two_checkpoints(tmp_path, engine, said)
    for path in [p for p in (tmp_path / "step-2").rglob("*") if p.is_file() and p.name != MANIFEST]:
        content = path.read_bytes()
        for place in range(8 * len(content)):
            flipped = bytearray(content)
            flipped[place // 8] ^= 1 << place % 8
            path.write_bytes(flipped)
            assert store.load_newest(engine) == {"n": 1}
            assert said[-1].endswith(
                f"{path.relative_to(tmp_path / 'step-2')} does not have the checksum of its manifest"
            )
        path.write_bytes(content)
    assert store.load_newest(engine) == {"n": 2}


def test_another_steps_checkpoint_under_a_wrong_name(tmp_path: Path) -> None:
    engine, said = OneRank(), list[str]()
    store = two_checkpoints(tmp_path, engine, said)
    shutil.copytree(tmp_path / "step-1", tmp_path / "step-5")
    assert store.load_newest(engine) == {"n": 2}
    assert said == ["checkpoint step-5 is passed over: rank 0: its manifest is that of step 1"]


def test_all_damaged_says_why(tmp_path: Path) -> None:
    engine = OneRank()
    store = two_checkpoints(tmp_path, engine, [])
    (tmp_path / "step-1" / "engine" / "states.pt").unlink()
    (tmp_path / "step-2" / MANIFEST).write_bytes(b"")
    with pytest.raises(CheckpointError, match="holds checkpoints, but none that every rank can read") as caught:
        store.load_newest(engine)
    assert str(caught.value).splitlines()[1:] == [
        "  step-2: rank 0: its manifest.json is empty",
        "  step-1: rank 0: engine/states.pt cannot be read (No such file or directory)",
    ]


def two_checkpoints(folder: Path, engine: OneRank, said: list[str]) -> CheckpointStore:
    """Steps 1 (`b"x"`) and 2 (`b"yy"`)."""
    store = CheckpointStore(folder, keep=2, log=said.append)
    for step, content in ((1, b"x"), (2, b"yy")):
        engine.content = content
        store.save(engine, step, {"n": step})
    return store


def test_only_what_is_ours_is_removed(tmp_path: Path) -> None:
    engine = OneRank()
    store = two_checkpoints(tmp_path, engine, [])
    theirs = [
        "step-1-keep",
        "step-1.bak",
        "step-01",
        "step-x.tmp",
        "notes.tmp",
        "latest.old",
        "my-step-1.old",
        "step-9.tmp2",
    ]
    ours = ["step-7.tmp", "step-7.universal.12.writing", "latest.12.writing", "step-1.universal"]
    for name in (*theirs, *ours):
        (tmp_path / name).mkdir()
        (tmp_path / name / "content").write_text(name)
    (tmp_path / "step-8.tmp").write_text("a file of somebody's")
    (tmp_path / "notes.12.writing").write_text("another")
    store.clean(engine)
    store.keep = 1
    store.save(engine, 3, {"n": 3})
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {*theirs, "step-8.tmp", "notes.12.writing", "step-3", "latest"}
    assert all((tmp_path / name / "content").read_text() == name for name in theirs)


def test_unwritable_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot be used"):
        CheckpointStore(tmp_path / "file" / "checkpoints", keep=1).clean(OneRank())  # type: ignore[arg-type]
