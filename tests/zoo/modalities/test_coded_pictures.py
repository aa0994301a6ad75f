"""Sizes, shapes and ids of pictures that a tokenizer codes; the tokenizers of Transformers from tiny folders."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from zoo.config import ConfigError, UserError
from zoo.modalities import VQ, VQVAE, Ids, Positions
from zoo.modalities.vq import Autoencoder, AutoencoderConfig, save_autoencoder

SIZES = [(16, 16), (8, 24), (24, 8)]


def config(**keys: Any) -> VQ.Config:
    return VQ.Config(**({"path": "nowhere", "sizes": SIZES, "patch": 4, "codes": 20} | keys))


def png(height: int, width: int) -> bytes:
    """Red above, blue below."""
    picture = np.zeros((height, width, 3), np.uint8)
    picture[: height // 2, :, 0], picture[height // 2 :, :, 2] = 255, 255
    content = io.BytesIO()
    Image.fromarray(picture).save(content, "PNG")
    return content.getvalue()


# ---------------------------------------------------------------------------------------------------- sizes and shapes


@pytest.mark.parametrize(
    ("given", "taken"),
    [((100, 100), (16, 16)), ((90, 120), (16, 16)), ((50, 130), (8, 24)), ((1000, 3), (24, 8)), ((7, 20), (8, 24))],
)
@pytest.mark.parametrize("aspect", ["crop", "pad", "stretch"])
def test_a_picture_takes_the_size_of_the_nearest_shape(given: Any, taken: Any, aspect: str) -> None:
    picture = config(aspect=aspect).read(png(*given))
    assert picture.dtype == np.uint8 and picture.shape == (*taken, 3)
    assert picture[1, taken[1] // 2, 0] > 200 or aspect == "pad"


def test_what_becomes_of_another_shape() -> None:
    """Twice as wide as it is high: cut off on both sides, white above and below, or squeezed."""
    wide = np.zeros((20, 40, 3), np.uint8)
    wide[:, :10], wide[:, 30:] = 255, 255
    seen = {
        aspect: config(sizes=[(20, 20)], aspect=aspect).fitted(Image.fromarray(wide))[..., 0]
        for aspect in ("crop", "pad", "stretch")
    }
    assert not seen["crop"].any()
    assert (seen["pad"][:4] == 255).all() and (seen["pad"][16:] == 255).all() and not seen["pad"][7:13, 7:13].any()
    assert (seen["stretch"][:, :3] == 255).all() and not seen["stretch"][:, 8:12].any()


def test_ids_and_positions() -> None:
    assert config().carries == Ids(23) and config().positions == Positions(1 + 12, 1 + 16)
    one = config(sizes=[(16, 24)])
    assert one.carries == Ids(20) and one.positions == Positions(24, 24)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"sizes": [[16, 18]]}, r"sizes: \[16, 18\]: patch = 4 does not divide both sides"),
        ({"sizes": [[16, 16], [16, 16]]}, "sizes: name one twice"),
        ({"sizes": []}, "sizes"),
        ({"aspect": "squeeze"}, "aspect: 'squeeze': must be 'crop', 'pad' or 'stretch'"),
    ],
)
def test_keys_that_do_not_fit(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        VQ.Config.parse({"path": "x", "sizes": [[16, 16]], "patch": 4, "codes": 20} | keys, "modalities.image")


# ------------------------------------------------------------------------------------------------ one of the project's


@pytest.fixture(params=["vq", "fsq"])
def file(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    quantizer = {"vq": {"type": "vq", "codes": 20}, "fsq": {"type": "fsq", "levels": [5, 4]}}[request.param]
    torch.manual_seed(0)
    network = AutoencoderConfig.parse({"patch": 4, "width": 8, "quantizer": quantizer})
    model = Autoencoder(network)
    for _ in range(2):
        model(torch.rand(8, 3, 16, 16) * 2 - 1)
    save_autoencoder(tmp_path / "image.safetensors", model.eval())
    return tmp_path / "image.safetensors"


@pytest.mark.parametrize("size", SIZES)
def test_codes_are_the_networks_own(file: Path, size: tuple[int, int]) -> None:
    kind = VQ(config(path=str(file)))
    picture = np.random.RandomState(0).randint(0, 256, (*size, 3)).astype(np.uint8)
    ids = kind.encode(picture)
    assert ids.dtype == np.int32 and ids[0] == 20 + SIZES.index(size) and ids[1:].max() < 20
    x = torch.from_numpy(picture).permute(2, 0, 1)[None].float() / 127.5 - 1
    with torch.no_grad():
        again, codes, _ = kind.model(x)
    assert np.array_equal(ids[1:], codes.flatten().numpy())
    decoded = kind.decode(ids)
    assert decoded.shape == picture.shape
    expected = ((again[0].permute(1, 2, 0) + 1) * 127.5).round().clamp(0, 255).numpy()
    assert np.abs(decoded.astype(int) - expected).max() <= 1
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(kind.write(decoded)))), decoded)


def test_ids_that_no_picture_has(file: Path) -> None:
    kind = VQ(config(path=str(file)))
    for ids in ([], [20], [20] + [0] * 12, [21] + [0] * 16, [23] + [0] * 16, [20] + [20] * 16, [-1] + [0] * 16):
        with pytest.raises(ValueError, match="no ids of a picture in one of"):
            kind.decode(ids)
    with pytest.raises(ValueError, match="is no picture in one of"):
        kind.encode(np.zeros((16, 24, 3), np.uint8))


def test_the_fingerprint_is_of_the_content(file: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere.safetensors"
    elsewhere.write_bytes(file.read_bytes())
    prints = [VQ(config(path=str(path))).fingerprint for path in (file, elsewhere)]
    assert prints[0] == prints[1] != VQ(config(path=str(file), aspect="pad")).fingerprint


def test_files_that_do_not_fit(file: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"has patch 4 \(the recipe says 8\), codes 20 \(the recipe says 30\)"):
        VQ(config(path=str(file), patch=8, codes=30))
    with pytest.raises(UserError, match="nowhere does not exist; correct `path`, or train one"):
        VQ(config())
    (tmp_path / "broken").write_bytes(b"123")
    with pytest.raises(UserError, match="broken is no image tokenizer of tools.train_image_tokenizer"):
        VQ(config(path=str(tmp_path / "broken")))


# ----------------------------------------------------------------------------------------------------- of Transformers


SMALL = {
    "Emu3VQVAE": {
        "codebook_size": 20,
        "base_channels": 32,
        "channel_multiplier": [1, 1, 1],
        "num_res_blocks": 1,
        "attn_resolutions": [],
        "hidden_size": 32,
        "temporal_downsample_factor": 2,
    },
    "JanusVQVAE": {
        "num_embeddings": 20,
        "base_channels": 32,
        "channel_multiplier": [1, 1, 1],
        "num_res_blocks": 1,
        "latent_channels": 32,
        "num_patches": 4,
    },
    "ChameleonVQVAE": {
        "num_embeddings": 20,
        "base_channels": 32,
        "channel_multiplier": [1, 1, 1],
        "num_res_blocks": 1,
        "latent_channels": 32,
        "embed_dim": 8,
        "resolution": 16,
    },
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    import transformers
    from transformers.models.chameleon.modeling_chameleon import ChameleonVQVAE
    from transformers.models.emu3.modeling_emu3 import Emu3VQVAE
    from transformers.models.janus.modeling_janus import JanusVQVAE

    assert transformers.__version__
    result = {}
    for cls in (Emu3VQVAE, JanusVQVAE, ChameleonVQVAE):
        torch.manual_seed(0)
        model = cls(cls.config_class(**SMALL[cls.__name__]))
        result[cls.__name__] = tmp_path_factory.mktemp(cls.__name__)
        model.save_pretrained(result[cls.__name__])
    return result


def trained(name: str, folder: Path, **keys: Any) -> VQVAE:
    return VQVAE(VQVAE.Config(**({"path": str(folder), "sizes": [(16, 16)], "patch": 4, "codes": 20} | keys)))


@pytest.mark.parametrize("name", SMALL)
def test_folders_of_transformers(folders: dict[str, Path], name: str) -> None:
    kind = trained(name, folders[name])
    picture = np.random.RandomState(0).randint(0, 256, (16, 16, 3)).astype(np.uint8)
    ids = kind.encode(picture)
    assert ids.shape == (16,) and 0 <= ids.min() and ids.max() < 20 and len(set(ids.tolist())) > 1
    assert np.array_equal(kind.encode(picture), ids)
    if name == "ChameleonVQVAE":
        with pytest.raises(
            UserError, match="ChameleonVQVAE only encodes, so no picture can be written; use an Emu3VQVAE"
        ):
            kind.decode(ids)
    else:
        assert kind.decode(ids).shape == picture.shape and np.array_equal(kind.decode(ids), kind.decode(ids))


def test_a_picture_that_is_no_square(folders: dict[str, Path]) -> None:
    kind = trained("Emu3VQVAE", folders["Emu3VQVAE"], sizes=[(8, 24), (16, 16)])
    picture = np.random.RandomState(0).randint(0, 256, (8, 24, 3)).astype(np.uint8)
    ids = kind.encode(picture)
    assert ids.shape == (13,) and ids[0] == 20 and kind.decode(ids).shape == picture.shape


def test_folders_of_transformers_that_do_not_fit(folders: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"has patch 4 \(the recipe says 8\), codes 20 \(the recipe says 30\)"):
        trained("Emu3VQVAE", folders["Emu3VQVAE"], patch=8, codes=30)
    with pytest.raises(UserError, match=r"has sizes \[\[16, 16\]\] \(the recipe says \[\[8, 24\]\]\)"):
        trained("JanusVQVAE", folders["JanusVQVAE"], sizes=[(8, 24)])
    with pytest.raises(UserError, match=r"VQ-VAE folder .*: config.json cannot be read"):
        trained("Emu3VQVAE", tmp_path)
