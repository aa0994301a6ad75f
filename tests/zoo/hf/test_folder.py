"""Folders of exports: written one file at a time, and refused where they are damaged or hostile."""

from __future__ import annotations

import gc
import json
import pickle
import shutil
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.zoo.hf.exports import exported, opened
from zoo import UserError
from zoo.hf import ZooForCausalLM
from zoo.hf.folder import local_folder, weight_files, write_weights


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An export whose weights lie in several files."""
    folder = tmp_path_factory.mktemp("exported")
    exported(folder, "ids", "dense", shard=4000)
    return folder / "out"


def change(name: str, edit: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def damage(out: Path) -> None:
        values = json.loads((out / name).read_text())
        edit(values)
        (out / name).write_text(json.dumps(values))

    return damage


def with_weights(edit: Callable[[dict[str, Tensor]], Any]) -> Callable[[Path], None]:
    def damage(out: Path) -> None:
        path = sorted(out.glob("*.safetensors"))[0]
        weights = load_file(path)
        edit(weights)
        save_file(weights, path)

    return damage


def flip(out: Path) -> None:
    """One bit of a number in the config."""
    text = (out / "config.json").read_text()
    assert '"rope_theta": 10000.0' in text or '"heads": 2' in text
    (out / "config.json").write_text(text.replace('"heads": 2', '"heads": 4'))


def pickles(out: Path) -> None:
    for path in [*out.glob("*.safetensors"), *out.glob("*.index.json")]:
        path.unlink()
    (out / "pytorch_model.bin").write_bytes(pickle.dumps({"harm": 1}))


def cut(out: Path) -> None:
    path = sorted(out.glob("*.safetensors"))[0]
    path.write_bytes(path.read_bytes()[:40])


EMBEDDING = "model.embedding.weight"
HOSTILE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "a bit of the config": (flip, "config.json: was altered since it was written"),
    "another network": (change("config.json", lambda c: c["network"].update(d_model=8)), "config.json: was altered"),
    "code in the config": (
        change("config.json", lambda c: c.update(auto_map={"AutoModelForCausalLM": "evil.Evil"})),
        "config.json: auto_map: names code",
    ),
    "no network": (change("config.json", lambda c: c.pop("network")), "config.json: has no network"),
    "an unknown block": (
        change("config.json", lambda c: (c["network"]["layers"][0]["mixer"].update(type="mine"), c.pop("checksum"))),
        "config.json: network.layers[0].mixer.type: 'mine' is not known",
    ),
    "a weight is gone": (with_weights(lambda w: w.pop(EMBEDDING)), f"lacks {EMBEDDING}"),
    "a weight too many": (with_weights(lambda w: w.update(more=torch.ones(1))), "has more, which the config's model"),
    "another shape": (
        with_weights(lambda w: w.update({EMBEDDING: torch.ones(2, 2)})),
        f"{EMBEDDING} has shape (2, 2), but the config's model (265, 16)",
    ),
    "a file is cut": (cut, "is damaged"),
    "a file is gone": (lambda out: sorted(out.glob("*.safetensors"))[0].unlink(), "which its index names"),
    "files elsewhere": (
        change("model.safetensors.index.json", lambda i: i["weight_map"].update({EMBEDDING: "../../x.safetensors"})),
        "model.safetensors.index.json: cannot be read (it names '../../x.safetensors')",
    ),
    "pickles alone": (pickles, "pytorch_model.bin is a pickle, which may run code and is never opened"),
    "adapters": (lambda out: (out / "adapter_config.json").write_text("{}"), "holds adapters"),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_what_is_no_export_is_refused(export: Path, tmp_path: Path, what: str) -> None:
    damage, reason = HOSTILE[what]
    out = tmp_path / "out"
    shutil.copytree(export, out)
    damage(out)
    for opener in (ZooForCausalLM, transformers.AutoModelForCausalLM):
        with pytest.raises(UserError) as caught:
            opener.from_pretrained(out)
        assert reason in str(caught.value) and "\n" not in str(caught.value)


def test_weights_that_nobody_needs_are_not_opened(export: Path, tmp_path: Path) -> None:
    """A pickle beside the safetensors lies there."""
    shutil.copytree(export, tmp_path / "out")
    (tmp_path / "out" / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    assert opened(tmp_path)[0].config.hidden_size == 16


PROCESSOR: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no processor": (lambda out: (out / "processor_config.json").unlink(), "processor_config.json: cannot be read"),
    "code": (
        change("processor_config.json", lambda c: c.update(auto_map={"AutoProcessor": "evil.Evil"})),
        "processor_config.json: cannot be read (auto_map",
    ),
    "no modalities": (change("processor_config.json", lambda c: c.update(modalities=3)), "cannot be read"),
    "no codebook": (lambda out: (out / "modalities/x.safetensors").unlink(), "codebook"),
    "other modalities": (
        change("modalities/about.json", lambda a: a["modalities"]["x"].update(fingerprint="0")),
        "modalities: x: ids mean something else",
    ),
}


@pytest.mark.parametrize("what", PROCESSOR)
def test_processors_that_are_damaged_are_refused(export: Path, tmp_path: Path, what: str) -> None:
    from zoo.hf import ZooProcessor

    damage, reason = PROCESSOR[what]
    out = tmp_path / "out"
    shutil.copytree(export, out)
    damage(out)
    with pytest.raises(UserError) as caught:
        ZooProcessor.from_pretrained(out)
    assert reason in str(caught.value)


def test_no_more_than_one_file_is_in_memory(tmp_path: Path) -> None:
    alive: set[int] = set()
    most = []

    def read(name: str) -> Tensor:
        gc.collect()
        weight = torch.full((100,), float(name))
        alive.add(int(name))
        weakref.finalize(weight, alive.discard, int(name))
        most.append(len(alive))
        return weight

    names = {str(i): ((100,), torch.float32) for i in range(10)}
    files = write_weights(tmp_path, names, read, largest=3 * 400)
    assert len(files) == 4 and max(most) <= 3 and weight_files(tmp_path) == files
    found = {name: value for path in files for name, value in load_file(path).items()}
    assert {name: float(value[0]) for name, value in found.items()} == {name: float(name) for name in names}
    assert all(path.stat().st_mode & 0o044 == 0o044 for path in files)


def test_one_weight_may_be_larger_than_a_file(tmp_path: Path) -> None:
    names = {"a": ((100,), torch.float32), "b": ((1,), torch.bfloat16)}
    files = write_weights(tmp_path, names, lambda name: torch.ones(names[name][0]), largest=8)
    assert [path.name for path in files] == ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    assert load_file(files[1])["b"].dtype == torch.bfloat16


def test_names_on_the_hub_are_fetched_without_code(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import huggingface_hub

    asked = {}

    def download(name: str, **options: Any) -> str:
        asked[name] = options
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert local_folder("somebody/model", {"revision": "main", "dtype": "auto"}) == tmp_path
    assert asked == {
        "somebody/model": {"allow_patterns": ["*.json", "*.safetensors", "modalities/*"], "revision": "main"}
    }
    for name in ("nowhere", "/not/there", "a/b/c"):
        with pytest.raises(UserError, match="is no folder; give one that tools.export wrote"):
            local_folder(name, {})
