"""Image ↔ ids: a convolutional autoencoder with a quantizer between, trained by `tools.train_image_tokenizer`.

Quantizers are those of `vector-quantize-pytorch`: VQ, a codebook by moving averages whose dead codes are revived
(van den Oord et al., arXiv 1711.00937; Yu et al., arXiv 2110.04627, for small codes compared by their cosine), and FSQ,
rounding to a grid (Mentzer et al., arXiv 2309.15505), which has no codebook and so no dead code.
"""

from __future__ import annotations

import hashlib
import math
import shutil
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import pydantic
import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from zoo.config import Config, ConfigError, UserError
from zoo.extras import extra
from zoo.modalities.coded_pictures import CodedConfig, CodedPictures
from zoo.modalities.folder import check_folder
from zoo.registry import register

KEY = "autoencoder"
"""What the file's metadata call the config."""


class VQConfig(Config):
    """A learned codebook."""

    type: Literal["vq"] = "vq"
    codes: int = pydantic.Field(default=256, ge=2, le=2**18)
    """Codes of the codebook."""
    dimension: pydantic.PositiveInt = 8
    """Numbers of a code, compared by their cosine."""
    decay: float = pydantic.Field(default=0.9, ge=0, lt=1)
    """How slowly the moving averages change that the codes are."""
    dead_below: float = pydantic.Field(default=1.0, ge=0)
    """A code that stands for fewer squares of a step, on a moving average, is replaced with a square of the step."""
    commitment: float = pydantic.Field(default=0.25, ge=0)
    """Weight of the loss that keeps squares near their codes."""

    @property
    def size(self) -> int:
        """How many codes there are."""
        return self.codes


class FSQConfig(Config):
    """Finite scalar quantization: each number of a code is rounded to one of some levels."""

    type: Literal["fsq"] = "fsq"
    levels: list[int] = pydantic.Field(min_length=1, max_length=16)
    """Levels of each number of a code, 2 or more; there are as many codes as their product."""

    @property
    def size(self) -> int:
        """How many codes there are."""
        return math.prod(self.levels)


class AutoencoderConfig(Config):
    """The network of an image tokenizer."""

    patch: pydantic.PositiveInt = 4
    """Side in pixels of the square that a code stands for; a power of two."""
    width: int = pydantic.Field(default=64, ge=8, le=4096)
    """Channels of the convolutions, a multiple of 8."""
    blocks: int = pydantic.Field(default=1, ge=1, le=16)
    """Residual blocks at each resolution."""
    quantizer: Annotated[VQConfig | FSQConfig, pydantic.Field(discriminator="type")]
    """What makes codes of the squares: `vq` or `fsq`."""

    @pydantic.model_validator(mode="after")
    def _fits(self) -> AutoencoderConfig:
        if self.patch & (self.patch - 1):
            raise ValueError(f"patch {self.patch}: must be a power of two")
        if self.width % 8:
            raise ValueError(f"width {self.width}: must be a multiple of 8")
        return self


class Residual(nn.Module):
    """x + conv(SiLU(norm(conv(SiLU(norm(x))))))."""

    def __init__(self, width: int) -> None:
        super().__init__()
        layers = [
            layer
            for _ in range(2)
            for layer in (nn.GroupNorm(8, width), nn.SiLU(), nn.Conv2d(width, width, 3, padding=1))
        ]
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x)


class Autoencoder(nn.Module):
    """Pictures (B, 3, height, width) from −1 to 1 → codes (B, rows, columns) → pictures."""

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        self.config, width = config, config.width
        down, up = [nn.Conv2d(3, width, 3, padding=1)], []
        for _ in range(config.patch.bit_length() - 1):
            down += [*(Residual(width) for _ in range(config.blocks)), nn.Conv2d(width, width, 4, 2, 1)]
            up += [*(Residual(width) for _ in range(config.blocks)), nn.ConvTranspose2d(width, width, 4, 2, 1)]
        middle = [Residual(width) for _ in range(config.blocks)]
        self.encoder = nn.Sequential(*down, *middle, nn.GroupNorm(8, width))
        self.quantizer = _quantizer(config)
        self.decoder = nn.Sequential(
            *(Residual(width) for _ in range(config.blocks)),
            *up,
            nn.GroupNorm(8, width),
            nn.SiLU(),
            nn.Conv2d(width, 3, 3, padding=1),
        )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The picture again, the codes that stood between, and the loss of the quantizer (a scalar)."""
        squares = self.encoder(x)
        # the library's own way with maps mixes up channels and columns when it goes back from codes
        quantized, codes, *loss = self.quantizer(squares.flatten(2).transpose(1, 2))
        again = self.decoder(quantized.transpose(1, 2).reshape(squares.shape))
        return again, codes.view(len(x), *squares.shape[2:]), loss[0].sum() if loss else x.new_zeros(())

    def encode(self, x: Tensor) -> Tensor:
        """(B, rows, columns) codes."""
        squares = self.encoder(x)
        return self.quantizer(squares.flatten(2).transpose(1, 2))[1].view(len(x), *squares.shape[2:])

    def decode(self, codes: Tensor) -> Tensor:
        """(B, 3, height, width) of codes (B, rows, columns)."""
        learned = isinstance(self.config.quantizer, VQConfig)
        of_codes = self.quantizer.get_output_from_indices if learned else self.quantizer.indices_to_codes
        squares = of_codes(codes.flatten(1))
        return self.decoder(squares.transpose(1, 2).reshape(len(codes), -1, *codes.shape[1:]))


def _quantizer(config: AutoencoderConfig) -> Any:
    """The library's quantizer.

    Raises:
        UserError: the extra `image` is not installed.
        ConfigError: levels of FSQ below 2.
    """
    with extra("image", "the image tokenizer"):
        from vector_quantize_pytorch import FSQ, VectorQuantize
    kind = config.quantizer
    if isinstance(kind, FSQConfig):
        if min(kind.levels) < 2:
            raise ConfigError(f"quantizer.levels: {kind.levels}: each must be 2 or more")
        return FSQ(levels=kind.levels, dim=config.width)
    return VectorQuantize(
        dim=config.width,
        codebook_size=kind.codes,
        codebook_dim=kind.dimension,
        use_cosine_sim=True,
        kmeans_init=True,
        decay=kind.decay,
        threshold_ema_dead_code=kind.dead_below,
        commitment_weight=kind.commitment,
    )


def save_autoencoder(path: Path, model: Autoencoder) -> None:
    """Write weights and config as safetensors."""
    weights = {name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()}
    path.write_bytes(safetensors.torch.save(weights, {KEY: model.config.model_dump_json()}))


def load_autoencoder(path: str) -> Autoencoder:
    """Read what `save_autoencoder` wrote, in evaluation mode and without gradients.

    Raises:
        UserError: the file is missing, or is no such thing.
    """
    if not Path(path).is_file():
        raise UserError(
            f"image tokenizer {path} does not exist; correct `path`, or train one: tools.train_image_tokenizer"
        )
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            config = AutoencoderConfig.model_validate_json((file.metadata() or {})[KEY])
            weights = {name: file.get_tensor(name) for name in file.keys()}
        model = Autoencoder(config)
        model.load_state_dict(weights)
    except (safetensors.SafetensorError, KeyError, RuntimeError, pydantic.ValidationError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"{path} is no image tokenizer of tools.train_image_tokenizer: {reason}") from None
    return model.eval().requires_grad_(False)


@register("modality", "vq")
class VQ(CodedPictures):
    """The codes of an autoencoder that `tools.train_image_tokenizer` has trained.

    Raises:
        UserError: the file is missing, or does not fit the config; the extra `image` is missing.
    """

    class Config(CodedConfig):
        """Pictures as the codes of an autoencoder trained by `tools.train_image_tokenizer`, by VQ or FSQ.

        `path` is the file that it wrote. What the file says of `patch` and `codes` stands in the recipe as well.
        """

        file: ClassVar[str] = ".safetensors"

    config: Config

    def __init__(self, config: Config) -> None:
        self.model = load_autoencoder(config.path)
        content = hashlib.sha256(Path(config.path).read_bytes()).hexdigest()
        super().__init__(config, content)
        found = {"patch": self.model.config.patch, "codes": self.model.config.quantizer.size}
        check_folder(config.path, "image tokenizer", {key: getattr(config, key) for key in found}, found)

    def save(self, path: str | Path) -> None:
        """Copy the tokenizer's file."""
        shutil.copyfile(self.config.path, path)

    @torch.no_grad()
    def codes(self, picture: np.ndarray) -> np.ndarray:
        return self.model.encode(torch.from_numpy(picture).permute(2, 0, 1)[None])[0].numpy()

    @torch.no_grad()
    def picture(self, codes: np.ndarray) -> np.ndarray:
        return self.model.decode(torch.from_numpy(codes.astype(np.int64))[None])[0].permute(1, 2, 0).numpy()
