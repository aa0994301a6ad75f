"""Every mistake a user can make ends with exit code 2, one clear message, and nothing written to the run folder."""

from __future__ import annotations

import fcntl
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import pretrain.train
from pretrain import recipe as recipes
from pretrain import run_folder
from tests.pretrain.data.samples import png, sample, write_shard
from tests.pretrain.runs import tiny_recipe
from zoo.config import UserError

LAYER = "model.layers.0"


class Refused:
    """Runs the command on a wrong recipe and returns its message."""

    def __init__(self, folder: Path, data: Path, capture: pytest.CaptureFixture[str]) -> None:
        self.folder, self.data, self.run, self.capture = folder, data, folder / "run", capture

    def __call__(self, *overrides: str, path: Path | None = None, **changes: Any) -> str:
        if path is None:
            path = self.folder / "recipe.yaml"
            path.write_text(yaml.safe_dump(tiny_recipe(self.data, self.run, **changes)))
        before = snapshot(self.run)
        assert pretrain.train.main([str(path), *overrides]) == 2
        error = self.capture.readouterr().err
        assert error.startswith("error: ") and "Traceback" not in error, error
        assert snapshot(self.run) == before, "the run folder was written to"
        return error.removeprefix("error: ").rstrip("\n")


def snapshot(folder: Path) -> dict[str, bytes] | None:
    if not folder.exists():
        return None
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture
def refused(
    tmp_path: Path, digit_shards: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Refused:
    def launched(*arguments: Any) -> None:
        raise AssertionError("the run was launched")

    monkeypatch.setattr(pretrain.train, "Pretraining", launched)
    monkeypatch.setattr(pretrain.train, "prepare_environment", lambda *given, **named: None)
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    monkeypatch.chdir(tmp_path)
    return Refused(tmp_path, digit_shards, capsys)


# ------------------------------------------------------------------------------------------------------- wrong entries

UNKNOWN = {
    "nmae=x": ("nmae: unknown key; known: name, run_dir,", "did you mean 'name'?"),
    "model.d_modl=3": ("model.d_modl: unknown key", "did you mean 'd_model'?"),
    f"{LAYER}.drop=1": ("model.layers[0].drop: unknown key", "did you mean 'dropout'?"),
    f"{LAYER}.mixer.head=2": ("model.layers[0].mixer.head: unknown key", "did you mean 'heads'?"),
    "model.layers.1.depth.router={type: linear, activaton: raw}": (
        "model.layers[1].depth.router.activaton: unknown key",
        "did you mean 'activation'?",
    ),
    "modalities.image.patchs=2": ("modalities.image.patchs: unknown key", "did you mean 'patch'?"),
    "optimizer.weight_deacy=1": ("optimizer.weight_deacy: unknown key", "did you mean 'weight_decay'?"),
    "schedule.warmup=3": ("schedule.warmup: unknown key", "did you mean 'warmup_steps'?"),
    "train.step=3": ("train.step: unknown key", "did you mean 'steps'?"),
    "evaluate.row=3": ("evaluate.row: unknown key; known: rows",),
    "kernels.atention=sdpa": ("kernels.atention: unknown key", "did you mean 'attention'?"),
    "objective.zloss=1": ("objective.zloss: unknown key", "did you mean 'z_loss'?"),
    "deepspeed.zero_optimisation={}": ("deepspeed.zero_optimisation: unknown key", "did you mean 'zero_optimization'?"),
    "deepspeed.zero_optimization.stge=1": ("deepspeed.zero_optimization.stge: unknown key", "did you mean 'stage'?"),
}

WRONG = {
    f"{LAYER}.feedforward.type=momma": (
        "model.layers[0].feedforward.type: 'momma' is not known; known: ",
        "did you mean 'moma'?",
    ),
    f"{LAYER}.mixer.type=atention": ("mixer.type: 'atention' is not known", "did you mean 'attention'?"),
    "model.layers.1.depth.type=mode": ("model.layers[1].depth.type: 'mode' is not known", "did you mean 'mod'?"),
    f"{LAYER}.mixer=attention": ("model.layers[0].mixer: 'attention' is not a block; write {type: …}",),
    f"{LAYER}.mixer.heads=5": ("mixer.heads: 5 does not divide d_model 32; change",),
    f"{LAYER}.mixer.kv_heads=3": ("mixer.kv_heads: 3 does not divide heads 2",),
    "model.layers.1.depth.capacity=1.5": ("depth.capacity: 1.5: must be above 0 and at most 1",),
    "model.layers.1.depth.capacity=half": ("depth.capacity: 'half': must be a number or a fraction such as '1/4'",),
    f"{LAYER}.feedforward.capacity=2": ("feedforward.capacity: 2: must be above 0 and at most 1",),
    f"{LAYER}.feedforward.experts.text=0": ("experts: text has 0 experts; every modality needs at least 1",),
    f"{LAYER}.feedforward.experts={{text: 2}}": ("experts: no entry for 'image'; give every modality",),
    f"{LAYER}.feedforward.experts.audio=2": ("experts.audio: unknown modality; model.modalities are text, image",),
    f"{LAYER}.feedforward.experts=4": ("experts: 4: must be a mapping, written as `key: value` lines",),
    "model.d_model='32'": ("model.d_model: '32': must be a valid integer",),
    "model.d_model=-1": ("model.d_model: -1: must be greater than 0",),
    "model.layers=3": ("model.layers: 3: must be a list",),
    "model.modalities=[text]": ("model.modalities: ['text'], but the section modalities has ['text', 'image']",),
    "data.image={type: patches}": (
        "data.image: is modalities.image now, a section of its own beside data; move it there",
    ),
    "data.text.type=bpe": ("data.text: is modalities.text now",),
    "modalities.image.type=patch": ("modalities.image.type: 'patch' is not known; known: ", "did you mean 'patches'?"),
    "modalities={image: {type: patches}}": (
        "modalities: has image, but no kind of text, which the markers between parts are of",
    ),
    "modalities.image={type: continuous_patches, image_size: 8, mask: bidirectional}": (
        (
            "objective.type: 'autoregressive' predicts every position from those before it, but a position of "
            "modalities.image"
        ),
        "make its mask causal, or choose an objective that",
    ),
    "model.stem={image: {type: vectors, width: 3}}": ("model.stem.image: is for Vectors(width=3), but a position of",),
    "modalities={}": ("modalities: has none, but no kind of text",),
    "modalities={1: {type: bytes}}": ("must be a text; quote it",),
    "modalities=bpe": ("modalities: 'bpe': must be a mapping",),
    "model.vocab_size=10": ("model.vocab_size: 10 is less than the 276 ids of the modalities; remove the key",),
    "train.steps=1.5": ("train.steps: 1.5: must be a valid integer",),
    "train.steps=0": ("train.steps: 0: must be greater than 0",),
    "train.precision=fp16": ("train.precision: 'fp16': must be 'fp32' or 'bf16'",),
    "optimizer.lr=.inf": ("optimizer.lr: inf: must be a finite number",),
    "optimizer.lr=fast": ("optimizer.lr: 'fast': must be a valid number",),
    "optimizer.betas=[1,2]": ("optimizer.betas: [1, 2]: both betas must lie in [0, 1), for example [0.9, 0.95]",),
    "schedule.type=cos": ("schedule.type: 'cos': must be 'cosine', 'linear' or 'wsd'",),
    "name='a b'": ("name: 'a b': must be letters, digits,",),
    "imports=my_blocks": ("imports: 'my_blocks': must be a list of module names, such as [my_blocks]",),
    "imports=[not_there]": ("imports: 'not_there' cannot be imported (ModuleNotFoundError",),
    "kernels.attention=fast": ("kernels.attention: 'fast' is not known; known: auto, ",),
    "data.sequence_length=10": (
        "data.sequence_length: 10: is too short for one image: 16 positions,",
        "set data.sequence_length to at least 20",
    ),
    "train.micro_batch=3": ("train.micro_batch: 3 does not divide train.global_batch 4; choose",),
    "deepspeed.train_batch_size=7": (
        "deepspeed.train_batch_size: 7 contradicts train.global_batch: 4",
        "or write deepspeed.train_batch_size: auto",
    ),
    "deepspeed.gradient_clipping=0.3": ("deepspeed.gradient_clipping: 0.3 contradicts train.clip: 1.0",),
    "deepspeed.bf16={enabled: true}": ("deepspeed.bf16.enabled: True contradicts train.precision: 'fp32'",),
    "deepspeed.optimizer={type: Adam}": ("deepspeed.optimizer: not allowed here: the recipe's own `optimizer`",),
    "deepspeed.scheduler={type: W}": ("deepspeed.scheduler: not allowed here: the recipe's own `schedule`",),
    "deepspeed=not_there.json": ("deepspeed: cannot read 'not_there.json'", "give the path of a JSON file"),
    "deepspeed=3": ("deepspeed: 3: must be a mapping of DeepSpeed's keys, or the path of a JSON file",),
    "deepspeed.zero_optimization.stage=5": ("stage: 5 must be 0, 1, 2 or 3",),
    "deepspeed.zero_optimization.overlap_comm=maybe": ("overlap_comm: 'maybe': must be a valid boolean",),
    "train.step": ("'train.step': an override is key.sub=value, for example",),
    "=3": ("'=3': an override is key.sub=value",),
    "name=[1": ("name: '[1' is not valid YAML; quote it",),
    "model.layers.7.dropout=0": ("'7' is not an entry of model.layers, which has 2, from 0",),
    "model.d_model.size=3": ("model.d_model.size: model.d_model is 32, a single value without keys",),
    "data.path=nowhere": ("data.path: 'nowhere' is not a folder (looked for from ", "correct data.path"),
    "data.train=z*": ("data.train: no shard in ", "it holds digits-train-000.tar, digits-val-000.tar"),
}


@pytest.mark.parametrize("override", [*UNKNOWN, *WRONG])
def test_wrong_entries(refused: Refused, override: str) -> None:
    message = refused(override)
    for part in (UNKNOWN | WRONG)[override]:
        assert part in message
    assert "\n" not in message, "one thing is wrong, one line says so"


def test_two_mistakes_two_lines(refused: Refused) -> None:
    lines = refused("train.steps=0", "model.d_modl=3").splitlines()
    assert [line.split(":")[0] for line in lines] == ["model.d_modl", "train.steps"]


def test_batch_that_does_not_divide_over_the_ranks(refused: Refused, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")
    message = refused()
    assert "train.global_batch: 4 is not a multiple of train.micro_batch × ranks = 2 × 3 = 6; choose" in message


def test_only_rank_zero_speaks(
    refused: Refused, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "1")
    path = refused.folder / "absent.yaml"
    assert pretrain.train.main([str(path)]) == 2
    assert capsys.readouterr().err == ""


def test_bf16_without_zero(refused: Refused) -> None:
    message = refused("train.precision=bf16", "deepspeed.zero_optimization.stage=0")
    assert "zero_optimization.stage: 0 does not go with train.precision: 'bf16'" in message
    assert "use stage 1, or fp32" in message


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
def test_cuda_where_there_is_none(refused: Refused) -> None:
    assert refused("train.device=cuda") == "train.device: 'cuda' is not available on this machine; use auto or cpu"


def test_port_that_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two runs under one port on one machine."""
    from pretrain import process_group

    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        address = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        for name, value in ({"DS_ACCELERATOR": "cpu"} | address).items():
            monkeypatch.setenv(name, value)
        with pytest.raises(UserError, match=rf"^port {port} is in use, .*; choose another: deepspeed --master_port"):
            process_group.join_processes("cpu", 1.0)


# --------------------------------------------------------------------------------------------------------------- files

FILES = {
    "empty": (b"", "is empty; a recipe needs at least model, data, optimizer and train"),
    "text": (b"hello", "holds a str, not a mapping of keys"),
    "list": (b"- a\n- b\n", "holds a list, not a mapping of keys"),
    "binary": (b"\x00\xff\xfe\x01", "is not a text file; a recipe is YAML"),
    "broken": (b"a: [1\nb: 2", "line 2 expected ',' or ']', but got ':'; correct the file"),
    "tab": (b"a:\n\tb: 1", "line 2 found character '\\t' that cannot start any token"),
    "twice": (b"name: a\nname: b\n", "line 2 the key 'name' stands twice"),
    "twice inside": (b"train: {steps: 1, steps: 2}\n", "line 1 the key 'steps' stands twice"),
    "template": (b"name: {{ name }}\n", "line 1 a key must be a word; text with braces or brackets needs quotes"),
    "deep": (b"a: " + b"[" * 3000, "nested too deeply to be a recipe"),
    "no such alias": (b"a: *b", "line 1 found undefined alias 'b'"),
    "extends a number": (b"extends: [3]", "extends: [3] is not the path of a recipe file"),
    "extends nothing": (b"extends: no.yaml", "no.yaml' does not exist; the path is relative to the file it stands in"),
}


@pytest.mark.parametrize("name", FILES)
def test_files_that_are_no_recipe(refused: Refused, name: str) -> None:
    content, part = FILES[name]
    path = refused.folder / "wrong.yaml"
    path.write_bytes(content)
    message = refused(path=path)
    assert str(path) in message and part in message


def test_missing_recipe(refused: Refused) -> None:
    message = refused(path=refused.folder / "absent.yaml")
    assert "absent.yaml: cannot be read (No such file or directory); give the path of a recipe" in message
    assert "Is a directory" in refused(path=refused.folder)


def test_recipes_run_no_code(refused: Refused) -> None:
    tag = f"!!python/object/apply:os.system ['touch {refused.folder}/ran']"
    path = refused.folder / "wrong.yaml"
    path.write_text(f"name: {tag}\n")
    assert "recipes are plain data, tags that run code are refused" in refused(path=path)
    assert "is not valid YAML" in refused(f"name={tag}")
    assert not (refused.folder / "ran").exists()


def test_extends_in_a_circle(refused: Refused) -> None:
    (refused.folder / "inner").mkdir()
    (refused.folder / "a.yaml").write_text("extends: inner/b.yaml")
    (refused.folder / "inner" / "b.yaml").write_text("extends: ../inner/../a.yaml")
    message = refused(path=refused.folder / "a.yaml")
    assert "extends itself" in message and "remove one `extends`" in message and len(message) < 600


def test_imports_that_fail(refused: Refused) -> None:
    (refused.folder / "divides_by_zero.py").write_text("x = 1\nx / 0\n")
    message = refused(imports=["divides_by_zero"])
    assert "imports: 'divides_by_zero' cannot be imported (ZeroDivisionError: division by zero" in message
    assert "divides_by_zero.py line 2)" in message


def test_deepspeed_file_that_is_no_json(refused: Refused) -> None:
    (refused.folder / "zero.json").write_text("{")
    message = refused("deepspeed=zero.json")
    assert "'zero.json' is not a valid DeepSpeed JSON file: Expecting property name" in message
    (refused.folder / "zero.json").write_text('{"zero_optimisation": {}}')
    assert "did you mean 'zero_optimization'?" in refused("deepspeed=zero.json")


# ---------------------------------------------------------------------------------------------------------------- data


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """Ten training documents and two for validation, in a folder of their own."""
    folder = tmp_path / "shards"
    folder.mkdir()
    write_shard(folder / "a-train-0.tar", [sample(f"{n:03d}", f"text {n}", png(n)) for n in range(10)])
    write_shard(folder / "a-val-0.tar", [sample(f"{n:03d}", png(n), f"text {n}") for n in range(10, 12)])
    return folder


def test_damaged_shards(refused: Refused, shards: Path) -> None:
    shard = shards / "a-train-0.tar"
    whole = shard.read_bytes()
    data = f"data.path={shards}"
    shard.write_bytes(b"")
    assert f"{shard}: the shard is empty (0 bytes); write it again or remove it" in refused(data)
    shard.write_bytes(whole[: len(whole) // 2])
    assert f"{shard}: the shard is truncated, it ends at byte {len(whole) // 2}" in refused(data)
    header = whole.index(b"005.json")
    shard.write_bytes(whole[:header] + b"\xff" * 300 + whole[header + 300 :])
    assert f"{shard}: damaged header at byte {header}, the rest of the shard cannot be read" in refused(data)
    shard.write_bytes(b"not a tar file" * 1000)
    assert f"{shard}: not a plain tar file" in refused(data)


def test_broken_documents(
    refused: Refused, shards: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = [sample("100", b"no picture"), sample("101", "text", json=b"{"), sample("102", "text", png(3))]
    write_shard(shards / "b-train-0.tar", broken)
    message = refused(f"data.path={shards}", "data.max_broken_documents=1")
    assert "data.max_broken_documents: 1: 2 documents cannot be used; repair them or set it to at least 2" in message
    assert "b-train-0.tar: 100: 0.png does not decode (UnidentifiedImageError" in message
    assert "b-train-0.tar: 101: its JSON is not" in message

    opened: list[Any] = []
    monkeypatch.setattr(pretrain.train, "Pretraining", lambda recipe, data, *rest: opened.append(data))
    monkeypatch.setattr(pretrain.train, "train", lambda task, config: None)
    path = refused.folder / "recipe.yaml"
    assert pretrain.train.main([str(path), f"data.path={shards}", "data.max_broken_documents=2"]) == 0
    assert [(b.shard, b.key) for b in opened[0].skipped] == [("b-train-0.tar", "100"), ("b-train-0.tar", "101")]
    printed = capsys.readouterr().out
    assert "skipping 2 broken documents" in printed and "b-train-0.tar: 100: " in printed


# ---------------------------------------------------------------------------------------------------------- run folder


def test_folder_in_use(refused: Refused) -> None:
    refused.run.mkdir()
    hold = "import fcntl, sys; f = open(sys.argv[1], 'w'); fcntl.flock(f, fcntl.LOCK_EX); "
    hold += "print(flush=True); sys.stdin.read()"
    holder = subprocess.Popen(
        [sys.executable, "-c", hold, str(refused.run / ".lock")], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    try:
        assert holder.stdout is not None
        holder.stdout.readline()
        message = refused()
        assert "run_dir: " in message and "is in use by a live run; wait for it, stop it, or give" in message
    finally:
        holder.kill()
        holder.communicate()
    with open(refused.run / ".lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_folder_that_cannot_be_written(refused: Refused) -> None:
    (refused.folder / "file").write_text("")
    message = refused(f"run_dir={refused.folder / 'file' / 'run'}")
    assert "run_dir: " in message and "cannot be written (Not a directory); choose another" in message
    if os.geteuid():  # root may write anywhere
        (refused.folder / "locked").mkdir(mode=0o500)
        assert "(Permission denied); choose another" in refused(f"run_dir={refused.folder / 'locked' / 'run'}")


def test_folder_of_another_recipe(refused: Refused) -> None:
    refused.run.mkdir()
    other = recipes.resolve(tiny_recipe(refused.data, refused.run, optimizer={"eps": 1e-6}, train={"steps": 99}))
    run_folder.write_recipe(refused.run, other, {})
    message = refused()
    assert "belongs to another recipe; choose another run_dir or name, or remove the folder" in message
    assert message.splitlines()[1:] == ["  optimizer.eps: 1e-06 there, 1e-08 here"], "train.steps may change"
    for content in (b"\xff\xfe", b"- 1", b"a: [", b""):
        (refused.run / "recipe.yaml").write_bytes(content)
        message = refused()
        assert message.startswith(f"{refused.run / 'recipe.yaml'}: ")
        assert message.rstrip().endswith("Restore it, or choose another run_dir")
