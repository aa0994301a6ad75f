"""Image ↔ vectors: patches of the latent space of a variational autoencoder, in raster order.

The autoencoder is a diffusers folder on this machine (`AutoencoderKL`: `config.json` and safetensors); nothing is
downloaded. Encoding takes the mean of its distribution, shifted and scaled as the folder's config says, so that the
numbers of a latent have a variance of about 1.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import pydantic
import safetensors
import safetensors.torch
import torch
from PIL import Image

from zoo.carries import Vectors
from zoo.config import UserError
from zoo.modalities.pictures import Picture, PictureConfig
from zoo.modality import LearnedConfig, LearnedModality
from zoo.registry import register

KEY = "autoencoder"
"""Under which a file's metadata keep the autoencoder's config."""


@register("modality", "latents")
class Latents(Picture, LearnedModality):
    """Patches as vectors of latents.

    Args:
        autoencoder: an `AutoencoderKL` of diffusers, on the host, in fp32.
    """

    class Config(PictureConfig, LearnedConfig):
        """Patches of `patch`² pixels, each a vector of (`patch` / `factor`)² × `latents` numbers.

        `path` is required: a folder that diffusers wrote for an `AutoencoderKL`, or the file that a run kept of one.
        """

        file: ClassVar[str] = ".safetensors"
        image_size: pydantic.PositiveInt = 256
        """Side in pixels of the square that every image is brought to (short side resized, centre cropped)."""
        patch: pydantic.PositiveInt = 16
        """Side of a patch in pixels; divides image_size, and is a multiple of `factor`."""
        factor: pydantic.PositiveInt = 8
        """Pixels on a side of a latent; the autoencoder decides it."""
        latents: pydantic.PositiveInt = 4
        """Channels of the latent space; the autoencoder decides it."""
        mask: Literal["causal", "bidirectional"] = "bidirectional"
        """What a patch sees of its own image: the patches before it, or all of them."""

        @pydantic.model_validator(mode="after")
        def _fits(self) -> Latents.Config:
            if self.patch % self.factor:
                raise ValueError(f"patch {self.patch} is no multiple of factor {self.factor}; a patch is whole latents")
            if self.channels != 3:
                raise ValueError("channels must be 3; autoencoders of diffusers see colours")
            return self

        @property
        def carries(self) -> Vectors:
            return Vectors((self.patch // self.factor) ** 2 * self.latents)

        @property
        def bidirectional(self) -> bool:
            return self.mask == "bidirectional"

        def fit(self, items: Iterable[Any]) -> Latents:
            raise UserError(
                "modalities.image.path: null; an autoencoder is not trained here, give a folder that diffusers wrote"
            )

        def load(self, path: str | Path) -> Latents:
            """Read an autoencoder.

            Raises:
                UserError: diffusers is missing, `path` is no autoencoder, or it does not fit the config.
            """
            autoencoder = _from_folder(Path(path)) if Path(path).is_dir() else _from_file(Path(path))
            made = {"latents": autoencoder.config.latent_channels, "factor": _factor(autoencoder.config)}
            for key, value in made.items():
                if value != getattr(self, key):
                    raise UserError(f"{path} has {key} {value}, the config says {getattr(self, key)}; make them equal")
            return Latents(self, autoencoder)

    config: Config

    def __init__(self, config: Config, autoencoder: Any) -> None:
        super().__init__(config)
        self.autoencoder = autoencoder.eval().requires_grad_(False)
        self.scale = float(autoencoder.config.scaling_factor)
        self.shift = float(getattr(autoencoder.config, "shift_factor", None) or 0.0)

    @functools.cached_property
    def fingerprint(self) -> str:
        digest = hashlib.sha256(json.dumps([super().fingerprint, _plain(self.autoencoder.config)]).encode())
        for name, value in sorted(self.autoencoder.state_dict().items()):
            digest.update(name.encode() + value.numpy().tobytes())
        return digest.hexdigest()

    @torch.no_grad()
    def encode(self, item: Image.Image | np.ndarray) -> np.ndarray:
        """(positions, width) float32 of a Pillow image or an (H, W[, channels]) uint8 array."""
        pixels = torch.from_numpy(self.config.square(item).copy()).permute(2, 0, 1)[None] / 127.5 - 1
        latent = (self.autoencoder.encode(pixels).latent_dist.mean[0] - self.shift) * self.scale
        side, patch = self._sides()
        grid = latent.reshape(-1, side, patch, side, patch).permute(1, 3, 2, 4, 0)  # as pixels: channels last
        return grid.reshape(side * side, -1).numpy()

    @torch.no_grad()
    def decode(self, content: np.ndarray) -> np.ndarray:
        """(image_size, image_size, 3) uint8 of the vectors of all positions.

        Raises:
            ValueError: an array of another shape.
        """
        vectors, shape = np.asarray(content, np.float32), (self.config.positions.most, self.config.carries.width)
        if vectors.shape != shape:
            raise ValueError(f"an image has vectors of shape {shape}; got {vectors.shape}")
        side, patch = self._sides()
        grid = torch.from_numpy(vectors).reshape(side, side, patch, patch, -1).permute(4, 0, 2, 1, 3)
        latent = grid.reshape(1, -1, side * patch, side * patch) / self.scale + self.shift
        pixels = self.autoencoder.decode(latent).sample[0].permute(1, 2, 0)
        return ((pixels + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).numpy()

    def _sides(self) -> tuple[int, int]:
        """Positions on a side of an image, and latents on a side of a position."""
        return self.config.image_size // self.config.patch, self.config.patch // self.config.factor

    def save(self, path: str | Path) -> None:
        """Write the whole autoencoder as one safetensors file."""
        weights = {name: value.contiguous() for name, value in self.autoencoder.state_dict().items()}
        metadata = {KEY: json.dumps(_plain(self.autoencoder.config))}
        Path(path).write_bytes(safetensors.torch.save(weights, metadata))


def _autoencoder_class() -> Any:
    try:
        from diffusers import AutoencoderKL
    except ImportError as error:
        raise UserError(
            f"modalities.image.type: 'latents' needs diffusers ({error}); pip install 'early-fusion-zoo[image]'"
        ) from None
    return AutoencoderKL


def _from_folder(folder: Path) -> Any:
    cls = _autoencoder_class()
    try:
        said = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("_class_name")
        autoencoder, report = cls.from_pretrained(
            folder, local_files_only=True, use_safetensors=True, torch_dtype=torch.float32, output_loading_info=True
        )
    except Exception as error:  # diffusers raises anything for a folder that it cannot read
        raise UserError(
            f"{folder}: is no AutoencoderKL of diffusers ({type(error).__name__}: {error}); it needs config.json and "
            "diffusion_pytorch_model.safetensors"
        ) from None
    missing = sorted(report["missing_keys"])
    if said != cls.__name__ or missing:  # diffusers leaves what is missing without a value, and takes any class
        wrong = f"weights are missing, {missing[0]} among {len(missing)}" if missing else f"it is of class {said}"
        raise UserError(
            f"{folder}: is no whole AutoencoderKL of diffusers: {wrong}; save it again, or name another folder"
        )
    return autoencoder


def _from_file(file: Path) -> Any:
    if not file.is_file():
        raise UserError(f"autoencoder {file} does not exist; correct `path`, it is a folder that diffusers wrote")
    cls = _autoencoder_class()
    try:
        with safetensors.safe_open(str(file), framework="pt") as opened:
            config = json.loads((opened.metadata() or {})[KEY])
            weights = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118  no mapping
        autoencoder = cls.from_config(config)
        autoencoder.load_state_dict(weights)
    except (safetensors.SafetensorError, KeyError, ValueError, RuntimeError) as error:
        raise UserError(f"{file}: is no autoencoder that a run kept ({error})") from None
    return autoencoder


def _factor(config: Any) -> int:
    """Pixels on a side of a latent: every block but the last halves the side."""
    return 2 ** (len(config.block_out_channels) - 1)


def _plain(config: Any) -> dict[str, Any]:
    """The autoencoder's config without notes of where it came from."""
    return {key: value for key, value in dict(config).items() if not key.startswith("_")}
