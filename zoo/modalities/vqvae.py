"""Image ↔ ids: the VQ-VAE of a unified model, from a local folder of Transformers: Emu3's, Janus's, Chameleon's."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from zoo.config import UserError
from zoo.modalities.coded_pictures import CodedConfig, CodedPictures
from zoo.modalities.folder import check_folder, copy_folder, folder_hash, load_folder
from zoo.registry import register

CLASSES = ("Emu3VQVAE", "JanusVQVAE", "ChameleonVQVAE")


@register("modality", "vqvae")
class VQVAE(CodedPictures):
    """The codes of a trained VQ-VAE.

    Raises:
        UserError: the folder is missing, is of no known class, or does not fit the config; an extra is missing.
    """

    class Config(CodedConfig):
        """Pictures as the codes of a trained VQ-VAE.

        `path` is a folder as Transformers saves `Emu3VQVAE`, `JanusVQVAE` or `ChameleonVQVAE`, with weights as
        safetensors. Transformers has no decoder of Chameleon's: with it pictures are read, but none can be written.
        Janus's has one size, a square. What the folder says of `patch` and `codes` stands in the recipe as well.
        """

        file: ClassVar[str] = ""

    config: Config

    def __init__(self, config: Config) -> None:
        super().__init__(config, folder_hash(config.path))
        self.model = load_folder(config.path, CLASSES, "VQ-VAE", "image")
        self.kind = type(self.model).__name__
        found = self.model.config
        emu = self.kind == "Emu3VQVAE"
        geometry = {
            "patch": 2 ** (len(found.channel_multiplier) - 1),
            "codes": found.codebook_size if emu else found.num_embeddings,
        }
        check_folder(config.path, "VQ-VAE", {key: getattr(config, key) for key in geometry}, geometry)
        if self.kind == "JanusVQVAE":
            side = found.num_patches * geometry["patch"]
            check_folder(config.path, "VQ-VAE", {"sizes": [list(s) for s in config.sizes]}, {"sizes": [[side, side]]})

    def save(self, path: str | Path) -> None:
        """Copy the tokenizer's configuration and weights into a new folder."""
        copy_folder(self.config.path, path)

    @torch.no_grad()
    def codes(self, picture: np.ndarray) -> np.ndarray:
        pixels = torch.from_numpy(picture).permute(2, 0, 1)[None].contiguous()
        grid = self.config.grid((pixels.shape[2], pixels.shape[3]))
        more = {"image_sizes": torch.tensor([pixels.shape[2:]])} if self.kind == "Emu3VQVAE" else {}
        tokens: Any = self.model.encode(pixels, **more).image_tokens
        return (tokens[0] if isinstance(tokens, list) else tokens).reshape(grid).numpy()

    @torch.no_grad()
    def picture(self, codes: np.ndarray) -> np.ndarray:
        if self.kind == "ChameleonVQVAE":
            raise UserError(
                f"VQ-VAE folder {self.config.path}: ChameleonVQVAE only encodes, so no picture can be written; use an "
                "Emu3VQVAE or a JanusVQVAE, or a tokenizer of your own (tools.train_image_tokenizer)"
            )
        ids = torch.from_numpy(codes.astype(np.int64))[None]
        pixels: Tensor = self.model.decode(ids if self.kind == "Emu3VQVAE" else ids.flatten(1))
        return pixels[0].permute(1, 2, 0).numpy()
