"""Sound ↔ codes of a neural codec, trained elsewhere, from a local folder of Transformers: Mimi, EnCodec, DAC."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pydantic
import torch
from torch import Tensor

from zoo.carries import Channels, Ids
from zoo.config import UserError
from zoo.modalities.folder import check_folder, copy_folder, folder_hash, load_folder
from zoo.modalities.speech.sounds import Sound, SoundConfig
from zoo.registry import register


@register("modality", "codec")
class Codec(Sound):
    """Frames of a codec: the code of each codebook.

    Raises:
        UserError: the folder is missing, is no codec of a known class, or does not fit the config; an extra is missing.
    """

    class Config(SoundConfig):
        """Sounds as frames of a codec's codes, of one codebook an id, of several as channels.

        `path` is a folder as Transformers saves `MimiModel`, `EncodecModel` or `DacModel`, with weights as safetensors.
        What the folder says of `rate`, `hop_samples` and `codes` stands in the recipe as well, so that the model is
        known without it.
        """

        file: ClassVar[str] = ""
        path: str
        """The folder of the codec."""
        codebooks: int = pydantic.Field(ge=1, le=256)
        """The first so many codebooks are used; more tell the sound more finely."""
        codes: int = pydantic.Field(ge=2)
        """Codes of a codebook."""
        hop_samples: int = pydantic.Field(ge=1)
        """Samples from one frame to the next."""

        @property
        def carries(self) -> Channels | Ids:
            return Ids(self.codes) if self.codebooks == 1 else Channels(self.codebooks, self.codes)

        @property
        def hop(self) -> int:
            return self.hop_samples

    config: Config

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.model = load_folder(config.path, tuple(_CODECS), "codec", "speech")
        self.codec = _CODECS[type(self.model).__name__](self.model)
        said = {key: getattr(config, key) for key in ("rate", "hop_samples", "codes")}
        check_folder(config.path, "codec", said, self.codec.geometry())
        if config.codebooks > self.codec.codebooks:
            raise UserError(
                f"codec folder {config.path}: has {self.codec.codebooks} codebooks, the recipe asks for "
                f"{config.codebooks}; ask for at most so many"
            )
        content = [config.model_dump(mode="json", exclude={"path"}), folder_hash(config.path)]
        self._fingerprint = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    @property
    def fingerprint(self) -> str:
        return self._fingerprint

    def save(self, path: str | Path) -> None:
        """Copy the codec's configuration and weights into a new folder."""
        copy_folder(self.config.path, path)

    @torch.no_grad()
    def encode(self, item: np.ndarray) -> np.ndarray:
        """(f, codebooks) int32 codes of a sound (n,) float32, or (f,) of a single codebook; silence fills the last."""
        frames, config = self.config.frames(len(item)), self.config
        sound = np.pad(item, (0, frames * config.hop - len(item)))
        codes = self.codec.encode(torch.from_numpy(sound)[None, None], config.codebooks)
        if codes.shape != (1, config.codebooks, frames):
            raise ValueError(f"the codec made codes of shape {tuple(codes.shape)} of {frames} frames")
        content = codes[0].T.numpy().astype(np.int32)
        return content[:, 0] if config.codebooks == 1 else content

    @torch.no_grad()
    def decode(self, content: np.ndarray) -> np.ndarray:
        """(f · hop,) float32: what the codec's decoder makes of codes (f, codebooks), or (f,) of a single codebook.

        Raises:
            ValueError: an array of another shape, or a code that is none.
        """
        codes, config = np.asarray(content), self.config
        shape = () if config.codebooks == 1 else (config.codebooks,)
        if codes.shape[1:] != shape or not len(codes) or codes.min() < 0 or codes.max() >= config.codes:
            raise ValueError(
                f"a frame has {config.codebooks} codes in [0, {config.codes - 1}]; got an array of shape {codes.shape}"
            )
        rows = torch.from_numpy(codes.astype(np.int64)).reshape(len(codes), config.codebooks)
        sound = self.codec.decode(rows.T[None]).reshape(-1).numpy()
        return np.pad(sound, (0, max(0, len(codes) * config.hop - len(sound))))[: len(codes) * config.hop]


class _Mimi:
    """`MimiModel`: sound (1, 1, n) ↔ codes (1, codebooks, f)."""

    def __init__(self, model: Any) -> None:
        self.model, self.codebooks = model, model.config.num_quantizers

    def geometry(self) -> dict[str, int]:
        config = self.model.config
        hop = round(config.sampling_rate / config.frame_rate)
        return {"rate": config.sampling_rate, "hop_samples": hop, "codes": config.codebook_size}

    def encode(self, sound: Tensor, codebooks: int) -> Tensor:
        return self.model.encode(sound, num_quantizers=codebooks).audio_codes

    def decode(self, codes: Tensor) -> Tensor:
        return self.model.decode(codes).audio_values


class _Encodec:
    """`EncodecModel`, of one channel and without chunks and scales, which no position carries; as `_Mimi`."""

    def __init__(self, model: Any) -> None:
        config = model.config
        if config.audio_channels != 1 or config.normalize or config.chunk_length_s is not None:
            raise UserError(
                f"codec folder {config.name_or_path}: codes {config.audio_channels} channels in chunks of "
                f"{config.chunk_length_s} s, normalised: {config.normalize}; only a codec of one channel without "
                "chunks and normalisation is read, such as encodec_24khz"
            )
        self.model, self.codebooks = model, config.num_quantizers

    def geometry(self) -> dict[str, int]:
        config = self.model.config
        return {"rate": config.sampling_rate, "hop_samples": config.hop_length, "codes": config.codebook_size}

    def encode(self, sound: Tensor, codebooks: int) -> Tensor:
        finest = self.model.config.target_bandwidths[-1]
        return self.model.encode(sound, bandwidth=finest).audio_codes[0][:, :codebooks]

    def decode(self, codes: Tensor) -> Tensor:
        return self.model.decode(codes[None], [None]).audio_values


class _Dac:
    """`DacModel`; as `_Mimi`."""

    def __init__(self, model: Any) -> None:
        self.model, self.codebooks = model, model.config.n_codebooks

    def geometry(self) -> dict[str, int]:
        config = self.model.config
        return {"rate": config.sampling_rate, "hop_samples": config.hop_length, "codes": config.codebook_size}

    def encode(self, sound: Tensor, codebooks: int) -> Tensor:
        return self.model.encode(sound, n_quantizers=codebooks).audio_codes

    def decode(self, codes: Tensor) -> Tensor:
        return self.model.decode(audio_codes=codes).audio_values


_CODECS = {"MimiModel": _Mimi, "EncodecModel": _Encodec, "DacModel": _Dac}
