"""Folders that are damaged, or that somebody else made to do harm: one clear error each, and nothing of them runs."""

from __future__ import annotations

import builtins
import json
import pickle
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from tests.zoo.adapt.families import FAMILIES
from tests.zoo.adapt.test_conformance import METHODS, ROWS
from zoo import UserError
from zoo.adapt import adapt, load_adapted, routers, save_adapted

LLAVA = FAMILIES["llava"]
CONFIG = {"layers": [1, 2], "capacity": {"type": "constant", "value": 0.4}, **METHODS["p_mod"]}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, a model tuned in full (`whole`) and one by adapters (`adapters`)."""
    import peft

    folder = tmp_path_factory.mktemp("folders")
    torch.manual_seed(0)
    LLAVA.build().save_pretrained(folder / "base")
    model = adapt(transformers.LlavaForConditionalGeneration.from_pretrained(folder / "base"), CONFIG)
    save_adapted(model, folder / "whole")
    lora = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    save_adapted(peft.get_peft_model(model, lora), folder / "adapters")
    return folder


def write(path: Path, **changes: Any) -> None:
    """Change keys of a JSON file; None takes one away."""
    values = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in values.items() if value is not None}))


def change(path: Path, edit: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    """Change a file of weights."""
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path, {"format": "pt"})


def first(tensors: dict[str, torch.Tensor], value: float) -> None:
    next(iter(tensors.values())).view(-1)[0] = value


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


MOD, ROUTERS, WEIGHTS = "mod_config.json", "mod_routers.safetensors", "model.safetensors"
PEFT, LORA = "adapter_config.json", "adapter_model.safetensors"
DAMAGES: dict[str, tuple[str, Callable[[Path], Any], str]] = {
    "not there": ("whole", lambda f: (f / MOD).unlink(), "no mod_config.json in it; save_adapted writes one"),
    "no JSON": ("whole", lambda f: (f / MOD).write_text("{"), "mod_config.json: cannot be read as JSON"),
    "no text": ("whole", lambda f: (f / MOD).write_bytes(b"\xff\xfe"), "cannot be read as JSON ('utf-8' codec"),
    "a list": ("whole", lambda f: (f / MOD).write_text("[]"), "mod_config.json: holds a list, not an object"),
    "deep": ("whole", lambda f: (f / MOD).write_text("[" * 100_000), "cannot be read as JSON"),
    "empty": ("whole", lambda f: (f / MOD).write_text("{}"), "mod_config.json: version None; this library reads 1 and"),
    "no adapt": ("whole", lambda f: write(f / MOD, adapt=None), "mod_config.json: adapt: this key is required"),
    "adapt": ("whole", lambda f: write(f / MOD, adapt=3), "mod_config.json: adapt: 3: must be a mapping"),
    "no capacity": ("whole", lambda f: write(f / MOD, version=1, adapt={"layers": [1]}), "adapt.capacity: this key is"),
    "layers": ("whole", lambda f: write(f / MOD, adapt=CONFIG | {"layers": [1, 9]}), "9 is out of range"),
    "no class": ("whole", lambda f: write(f / MOD, **{"class": None}), "mod_config.json: class: this key is required"),
    "class": ("whole", lambda f: write(f / MOD, **{"class": "LlavaModle"}), "class: 'LlavaModle' is no model of Tran"),
    "function": ("whole", lambda f: write(f / MOD, **{"class": "pipeline"}), "class: 'pipeline' is no model of Trans"),
    "other class": ("whole", lambda f: write(f / MOD, **{"class": "LlamaForCausalLM"}), "has no weights"),
    "half a base": ("whole", lambda f: write(f / MOD, base="x"), "base, base_dtype and base_sha256 belong together"),
    "dtype": (
        "adapters",
        lambda f: write(f / MOD, base_dtype="load"),
        "base_dtype: 'load': must be 'float16', 'bfloat",
    ),
    "no routers": ("whole", lambda f: (f / ROUTERS).unlink(), "no mod_routers.safetensors in it"),
    "bad routers": ("whole", lambda f: (f / ROUTERS).write_bytes(b"garbage"), "mod_routers.safetensors: is damaged"),
    "cut routers": ("whole", lambda f: cut(f / ROUTERS), "mod_routers.safetensors: is damaged"),
    "NaN": ("whole", lambda f: change(f / ROUTERS, lambda t: first(t, float("nan"))), "holds NaN or infinite numbers"),
    "inf": ("whole", lambda f: change(f / ROUTERS, lambda t: first(t, -torch.inf)), "holds NaN or infinite numbers"),
    "integers": (
        "whole",
        lambda f: change(f / ROUTERS, lambda t: t.update({name: value.long() for name, value in t.items()})),
        "is of torch.int64, no numbers of floating point",
    ),
    "other routers": ("whole", lambda f: change(f / ROUTERS, lambda t: t.popitem()), "shapes must agree too"),
    "no weights": ("whole", lambda f: (f / WEIGHTS).unlink(), "cannot be opened"),
    "bad weights": ("whole", lambda f: (f / WEIGHTS).write_bytes(b"garbage"), "cannot be opened (Error while deserial"),
    "cut weights": ("whole", lambda f: cut(f / WEIGHTS), "cannot be opened (Error while deserializing header"),
    "a weight less": ("whole", lambda f: change(f / WEIGHTS, lambda t: t.pop(min(t))), "has no weights"),
    "a config less": ("whole", lambda f: (f / "config.json").unlink(), "holds no config.json; give a folder that"),
    "bad config": ("whole", lambda f: (f / "config.json").write_text("{"), "cannot be opened"),
    "adapters too": ("whole", lambda f: (f / PEFT).write_text("{}"), "holds adapters beside a model"),
    "no LoRA": ("adapters", lambda f: (f / LORA).unlink(), "no adapter_model.safetensors in it"),
    "cut LoRA": ("adapters", lambda f: cut(f / LORA), "adapter_model.safetensors: is damaged"),
    "LoRA less": (
        "adapters",
        lambda f: change(f / LORA, lambda t: t.pop(min(t))),
        "adapter_model.safetensors has no we",
    ),
    "LoRA NaN": ("adapters", lambda f: change(f / LORA, lambda t: first(t, float("nan"))), "holds NaN or infinite"),
    "no adapter_config": ("adapters", lambda f: (f / PEFT).unlink(), "no adapter_config.json in it"),
    "adapter_config": (
        "adapters",
        lambda f: (f / PEFT).write_text("3"),
        "adapter_config.json: holds a int, not an obj",
    ),
    "LoRA's targets": (
        "adapters",
        lambda f: write(f / PEFT, target_modules=["nothing"]),
        "cannot be opened (Target mod",
    ),
    "LoRA's rank": ("adapters", lambda f: write(f / PEFT, r=3), "cannot be opened (Error(s) in loading state_dict"),
    "other adapters": ("adapters", lambda f: write(f / PEFT, peft_type="XLORA"), "peft_type: 'XLORA'; adapted models"),
    "PiSSA": ("adapters", lambda f: write(f / PEFT, init_lora_weights="pissa"), "pissa changes the base, which would"),
    "imports": ("adapters", lambda f: write(f / PEFT, megatron_config={"a": 1}), "megatron_config: has a module impor"),
    "a hub's base": ("adapters", lambda f: write(f / MOD, base="some/model"), "base 'some/model' is no folder on this"),
    "base not there": ("adapters", lambda f: write(f / MOD, base="/nowhere/at/all"), "is no folder on this machine"),
    "another base": ("adapters", lambda f: write(f / MOD, base_sha256="0" * 64), "weights 000000000000…, but"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_folder(made: Path, tmp_path: Path, name: str) -> None:
    """It is one `UserError`, in few lines."""
    which, damage, message = DAMAGES[name]
    folder = tmp_path / which
    shutil.copytree(made / which, folder)
    damage(folder)
    with pytest.raises(UserError) as caught:
        load_adapted(folder)
    assert message in str(caught.value) and str(caught.value).count("\n") < 3


def test_routers_in_other_types_of_numbers(made: Path, tmp_path: Path) -> None:
    """Those of float64 are computed in fp32, as they would be anyway; narrower ones stay what they are."""
    for dtype, expected in ((torch.float64, torch.float32), (torch.bfloat16, torch.bfloat16)):
        folder = tmp_path / str(dtype)
        shutil.copytree(made / "whole", folder)
        change(folder / ROUTERS, lambda t, dtype=dtype: t.update({n: v.to(dtype) for n, v in t.items()}))
        model = load_adapted(folder)
        assert {p.dtype for _, router in routers(model) for p in router.parameters()} == {expected}
        inputs = LLAVA.inputs(model, ROWS)
        if dtype == torch.float64:
            assert torch.equal(model(**inputs).logits, load_adapted(made / "whole")(**inputs).logits)
    double = load_adapted(made / "whole").double()
    save_adapted(double, tmp_path / "double")
    assert {p.dtype for _, router in routers(load_adapted(tmp_path / "double")) for p in router.parameters()} == {
        torch.float64
    }


class Payload:
    """Unpickling it leaves a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.write_text, (self.path, "it ran")


def plant(folder: Path, mark: Path) -> None:
    """Code in every place where a library of the trade might run it."""
    code = (
        f"from pathlib import Path\nPath({str(mark)!r}).write_text('it ran')\nclass C: pass\ndef generate(**_): pass\n"
    )
    (folder / "code.py").write_text(code)
    (folder / "custom_generate").mkdir(exist_ok=True)
    (folder / "custom_generate" / "generate.py").write_text(code)
    classes = ("AutoConfig", "AutoModelForImageTextToText", "AutoProcessor", "AutoTokenizer", "AutoImageProcessor")
    for name in ("config.json", "processor_config.json", "tokenizer_config.json", "preprocessor_config.json"):
        if (folder / name).is_file():
            write(folder / name, auto_map={kind: "code.C" for kind in classes})


@pytest.fixture
def nothing_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    """No question is asked, and no other machine called."""

    def never(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("asked, or called another machine")

    monkeypatch.setattr(builtins, "input", never)
    monkeypatch.setattr(socket.socket, "connect", never)
    monkeypatch.setattr(socket, "getaddrinfo", never)


@pytest.mark.usefixtures("nothing_outside")
def test_nothing_of_a_folder_runs(made: Path, tmp_path: Path) -> None:
    """Neither its code nor a pickle, nor is anything fetched that it names."""
    mark = tmp_path / "mark"
    for name in ("base", "whole", "adapters"):
        shutil.copytree(made / name, tmp_path / name)
        plant(tmp_path / name, mark)
    write(tmp_path / "adapters" / PEFT, base_model_name_or_path="some/model", auto_mapping={"parent_library": "code"})
    write(tmp_path / "adapters" / MOD, base="some/model")
    inputs = LLAVA.inputs(load_adapted(made / "whole"), ROWS)
    assert torch.equal(load_adapted(tmp_path / "whole")(**inputs).logits, load_adapted(made / "whole")(**inputs).logits)
    with pytest.raises(UserError, match="give the base, a folder or a name on the hub, with base="):
        load_adapted(tmp_path / "adapters")
    model = load_adapted(tmp_path / "adapters", tmp_path / "base")
    assert model.peft_config["default"].base_model_name_or_path == str(tmp_path / "base")
    save_adapted(model, tmp_path / "again")

    (tmp_path / "whole" / WEIGHTS).unlink()
    with open(tmp_path / "whole" / "pytorch_model.bin", "wb") as file:
        pickle.dump({"lm_head.weight": Payload(mark)}, file)
    torch.save({"lm_head.weight": Payload(mark)}, tmp_path / "adapters" / "adapter_model.bin")
    (tmp_path / "adapters" / LORA).unlink()
    for folder in ("whole", "adapters"):
        with pytest.raises(UserError):
            load_adapted(tmp_path / folder, tmp_path / "base")
    assert not mark.exists()
