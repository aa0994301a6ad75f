"""Latents of an autoencoder: a random one of a few weights, as diffusers writes it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from zoo.config import ConfigError, UserError
from zoo.modalities import Latents, Positions, Vectors, parse_modalities

KEYS = {"image_size": 16, "patch": 4, "factor": 2, "latents": 3}


def config(path: Path | None = None, **changes) -> Latents.Config:
    section = {"type": "latents", "path": None if path is None else str(path)} | KEYS | changes
    return parse_modalities({"text": {"type": "bytes"}, "image": section})["image"]  # type: ignore[return-value]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    autoencoder = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D", "DownEncoderBlock2D"),
        up_block_types=("UpDecoderBlock2D", "UpDecoderBlock2D"),
        block_out_channels=(4, 8),
        latent_channels=3,
        norm_num_groups=2,
        sample_size=16,
        scaling_factor=0.5,
        shift_factor=0.1,
    )
    path = tmp_path_factory.mktemp("autoencoder")
    autoencoder.save_pretrained(path)
    return path


def picture(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (16, 16, 3), dtype=np.uint8)


def test_what_is_known_without_the_autoencoder():
    known = config()
    assert (known.carries, known.positions, known.bidirectional) == (Vectors(12), Positions(16, 16), True)
    assert not config(mask="causal").bidirectional


def test_vectors_are_patches_of_the_scaled_mean(folder):
    modality = config(folder).load(folder)
    pixels = torch.from_numpy(picture()).permute(2, 0, 1)[None] / 127.5 - 1
    with torch.no_grad():
        latent = (modality.autoencoder.encode(pixels).latent_dist.mean[0] - 0.1) * 0.5
    vectors = modality.encode(picture())
    assert vectors.shape == (16, 12) and vectors.dtype == np.float32
    # position 6: row 1, column 2 of the patches; the second latent of its lower row is its last
    np.testing.assert_allclose(vectors[6, 9:], latent[:, 3, 5], atol=1e-6)
    np.testing.assert_allclose(vectors[6, :3], latent[:, 2, 4], atol=1e-6)


def test_decoding_is_the_decoder_of_those_latents(folder):
    modality = config(folder).load(folder)
    pixels = torch.from_numpy(picture()).permute(2, 0, 1)[None] / 127.5 - 1
    with torch.no_grad():
        mean = modality.autoencoder.encode(pixels).latent_dist.mean
        expected = (modality.autoencoder.decode(mean).sample[0].permute(1, 2, 0) + 1) * 127.5
    decoded = modality.decode(modality.encode(picture()))
    assert decoded.shape == (16, 16, 3) and decoded.dtype == np.uint8
    np.testing.assert_allclose(decoded, expected.clamp(0, 255).round(), atol=1)
    with pytest.raises(ValueError, match=r"^an image has vectors of shape \(16, 12\); got \(4, 12\)"):
        modality.decode(np.zeros((4, 12)))


def test_a_run_keeps_it_in_one_file(folder, tmp_path):
    modality = config(folder).load(folder)
    modality.save(tmp_path / "image.safetensors")
    again = config(folder).load(tmp_path / "image.safetensors")
    assert again.fingerprint == modality.fingerprint
    assert np.array_equal(again.encode(picture(1)), modality.encode(picture(1)))
    with torch.no_grad():
        next(again.autoencoder.parameters()).add_(1)
    assert config(folder).load(folder).fingerprint == modality.fingerprint
    assert Latents(config(folder), again.autoencoder).fingerprint != modality.fingerprint


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"latents": 4}, "has latents 3, the config says 4; make them equal"),
        ({"factor": 4}, "has factor 2, the config says 4; make them equal"),
    ],
)
def test_an_autoencoder_that_does_not_fit(folder, changes, message):
    with pytest.raises(UserError, match=message):
        config(folder, **changes).load(folder)


def test_what_is_no_autoencoder(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match=r"is no AutoencoderKL of diffusers \(\w+: "):
        config().load(tmp_path)
    with pytest.raises(UserError, match="does not exist; correct `path`"):
        config().load(tmp_path / "nothing")
    (tmp_path / "file").write_bytes(b"nothing")
    with pytest.raises(UserError, match="is no autoencoder that a run kept"):
        config().load(tmp_path / "file")
    with pytest.raises(UserError, match="an autoencoder is not trained here"):
        config().fit([])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("one weight", "weights are missing, encoder.conv_in.bias among 1; save it again"),
        ("more layers", r"weights are missing, decoder.up_blocks.0.resnets.2.\S+ among \d+;"),
        ("another shape", r"is no AutoencoderKL of diffusers \(ValueError: "),
        ("another class", "it is of class VQModel;"),
        ("no weights", r"is no AutoencoderKL of diffusers \(OSError: "),
    ],
)
def test_folders_that_are_spoiled(folder, tmp_path, change, message):
    """diffusers itself would take the first two, and leave weights without a value."""
    copy = tmp_path / "spoiled"
    shutil.copytree(folder, copy)
    file = copy / "diffusion_pytorch_model.safetensors"
    said, weights = json.loads((copy / "config.json").read_text()), load_file(file)
    match change:
        case "one weight":
            del weights["encoder.conv_in.bias"]
        case "more layers":
            said["layers_per_block"] = 2
        case "another shape":
            weights["encoder.conv_in.bias"] = torch.zeros(3)
        case "another class":
            said["_class_name"] = "VQModel"
    (copy / "config.json").write_text(json.dumps(said))
    save_file(weights, file, {"format": "pt"})
    if change == "no weights":
        file.unlink()
    with pytest.raises(UserError, match=message):
        config(copy).load(copy)


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"patch": 4, "factor": 8}, "patch 4 is no multiple of factor 8"), ({"channels": 1}, "channels must be 3")],
)
def test_errors(changes, message):
    with pytest.raises(ConfigError, match=message):
        config(**changes)
