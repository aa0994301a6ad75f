"""Codecs of Transformers from tiny folders with random weights."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.zoo.modalities.speech.waves import RATE, tone, voice
from zoo.config import UserError
from zoo.modalities import Channels, Codec, Ids

SMALL = {
    "MimiModel": {
        "sampling_rate": RATE,
        "num_filters": 4,
        "upsampling_ratios": [5, 4],
        "hidden_size": 16,
        "codebook_size": 32,
        "codebook_dim": 8,
        "vector_quantization_hidden_dimension": 8,
        "num_quantizers": 4,
        "num_hidden_layers": 1,
        "intermediate_size": 16,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "upsample_groups": 16,
        "frame_rate": 200.0,
    },
    "EncodecModel": {
        "sampling_rate": RATE,
        "hidden_size": 8,
        "num_filters": 4,
        "upsampling_ratios": [5, 4],
        "codebook_size": 32,
        "num_lstm_layers": 1,
        "target_bandwidths": [2.0, 8.0],
    },
    "DacModel": {
        "sampling_rate": RATE,
        "encoder_hidden_size": 4,
        "decoder_hidden_size": 16,
        "downsampling_ratios": [4, 5],
        "n_codebooks": 4,
        "codebook_size": 32,
        "codebook_dim": 4,
    },
}
HOPS = {"MimiModel": 40, "EncodecModel": 20, "DacModel": 20}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    import transformers

    result = {}
    for name, keys in SMALL.items():
        torch.manual_seed(0)
        model = getattr(transformers, name)
        model = model(model.config_class(**keys))
        for key, buffer in model.named_buffers():
            if "embed" in key and buffer.dim() == 2:  # codebooks begin at zero
                buffer.normal_(0, 0.05)
        result[name] = tmp_path_factory.mktemp(name)
        model.save_pretrained(result[name])
    return result


def config(name: str, folder: Path, **changes: Any) -> Codec.Config:
    keys = {
        "path": str(folder),
        "rate": RATE,
        "codebooks": 3,
        "codes": 32,
        "hop_samples": HOPS[name],
        "max_seconds": 2.0,
    }
    return Codec.Config(**(keys | changes))


@pytest.mark.parametrize("name", SMALL)
def test_codes_are_the_models_own(folders: dict[str, Path], name: str) -> None:
    """The first codebooks of what the class itself makes of the sound; and the sound is what its decoder makes."""
    kind = Codec(config(name, folders[name]))
    assert kind.config.carries == Channels(3, 32)
    sound = voice(0.3)[:2390]
    codes = kind.encode(sound)
    frames = -(-2390 // HOPS[name])
    assert codes.dtype == np.int32 and codes.shape == (frames, 3) and len(np.unique(codes)) > 3
    whole = torch.from_numpy(np.pad(sound, (0, frames * HOPS[name] - 2390)))[None, None]
    with torch.no_grad():
        if name == "EncodecModel":
            theirs = kind.model.encode(whole, bandwidth=8.0).audio_codes[0]
        else:
            theirs = kind.model.encode(whole).audio_codes
    assert np.array_equal(codes, theirs[0, :3].T.numpy())
    again = kind.decode(codes)
    assert again.dtype == np.float32 and len(again) == frames * HOPS[name] and np.isfinite(again).all()
    assert np.array_equal(kind.decode(codes), again)
    assert len(kind.config.read(kind.write(again))) == len(again)


@pytest.mark.parametrize("name", SMALL)
def test_one_codebook_is_ids(folders: dict[str, Path], name: str) -> None:
    one, three = (Codec(config(name, folders[name], codebooks=count)) for count in (1, 3))
    assert one.config.carries == Ids(32)
    ids = one.encode(tone(0.2))
    assert ids.ndim == 1 and np.array_equal(ids, three.encode(tone(0.2))[:, 0])
    assert len(one.decode(ids)) == len(ids) * HOPS[name]


def test_silence_and_shortness(folders: dict[str, Path]) -> None:
    for name, folder in folders.items():
        kind = Codec(config(name, folder))
        assert len(kind.encode(np.zeros(1, np.float32))) == 1
        assert kind.decode(kind.encode(np.zeros(400, np.float32))).shape == (400,)


def test_the_fingerprint_is_of_the_content(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "elsewhere"
    shutil.copytree(folders["DacModel"], folder)
    prints = [Codec(config("DacModel", each)).fingerprint for each in (folders["DacModel"], folder)]
    assert prints[0] == prints[1]
    weights = load_file(folder / "model.safetensors")
    weights["encoder.conv1.bias"] += 1
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    assert Codec(config("DacModel", folder)).fingerprint != prints[0]


def spoiled(folder: Path, tmp_path: Path, change: str) -> Path:
    """A copy of a folder, spoiled."""
    copy = tmp_path / "spoiled"
    shutil.copytree(folder, copy)
    content = json.loads((copy / "config.json").read_text())
    match change:
        case "class":
            content["architectures"] = ["DacMode"]
        case "no class":
            del content["architectures"]
        case "sizes":
            content["codebook_size"] = 64
        case "weights":
            (copy / "model.safetensors").unlink()
        case "bytes":
            (copy / "model.safetensors").write_bytes(b"123")
        case "one weight":
            weights = load_file(copy / "model.safetensors")
            del weights["encoder.conv1.bias"]
            save_file(weights, copy / "model.safetensors", {"format": "pt"})
    (copy / "config.json").write_text(json.dumps(content))
    return copy


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("class", r"is of class DacMode; known: MimiModel, EncodecModel, DacModel \(did you mean 'DacModel'\?\)"),
        ("no class", "config.json names no class in `architectures`"),
        ("sizes", "does not load as DacModel|its weights do not fit config.json"),
        ("weights", "does not load as DacModel"),
        ("bytes", "does not load as DacModel"),
        ("one weight", "its weights do not fit config.json: encoder.conv1.bias"),
    ],
)
def test_folders_that_are_spoiled(folders: dict[str, Path], tmp_path: Path, change: str, message: str) -> None:
    folder = spoiled(folders["DacModel"], tmp_path, change)
    with pytest.raises(UserError, match=f"^codec folder .*{message}"):
        Codec(config("DacModel", folder))


def test_folders_that_do_not_fit(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = folders["DacModel"]
    with pytest.raises(UserError, match="config.json cannot be read"):
        Codec(config("DacModel", tmp_path))
    wrong = config("DacModel", folder, rate=16_000, codes=64)
    with pytest.raises(UserError, match=r"has rate 8000 \(the recipe says 16000\), codes 32 \(the recipe says 64\)"):
        Codec(wrong)
    with pytest.raises(UserError, match="has 4 codebooks, the recipe asks for 5"):
        Codec(config("DacModel", folder, codebooks=5))


def test_a_codec_with_scales_is_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    import transformers

    model = transformers.EncodecModel(transformers.EncodecConfig(**SMALL["EncodecModel"], normalize=True))
    model.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="normalised: True; only a codec of one channel without chunks"):
        Codec(config("EncodecModel", tmp_path))


def test_a_copy_is_the_codec(folders: dict[str, Path], tmp_path: Path) -> None:
    """What a run keeps of it."""
    config = Codec.Config(
        path=str(folders["DacModel"]), rate=RATE, codebooks=2, codes=32, hop_samples=HOPS["DacModel"], max_seconds=1.0
    )
    codec = config.open()
    codec.save(tmp_path / "speech")
    copy = config.beside(tmp_path / "speech").open()
    assert copy.fingerprint == codec.fingerprint and copy.config.path == str(tmp_path / "speech")
