"""What turns items into features for FID and KID: a model of Transformers on disk, or a function of the user's own."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from zoo.config import UserError
from zoo.extras import extra

Features = Callable[[Sequence[np.ndarray]], np.ndarray]
"""Items → (n, d) numbers."""
BATCH = 32


def features(what: str, rate: int | None) -> Features:
    """What `--features` names.

    Args:
        what: the folder of a model of Transformers that encodes pictures or sounds, with its processor; or
            `MODULE:FUNCTION`, which takes a list of items as the modality decodes them and returns (n, d) numbers.
        rate: samples a second of sounds; None of pictures.
    Raises:
        UserError: there is no such model or function.
    """
    if Path(what).is_dir():
        return _model(what, rate)
    module, colon, name = what.partition(":")
    if not colon:
        raise UserError(f"--features {what}: is neither a folder with a model of Transformers nor MODULE:FUNCTION")
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise UserError(f"--features {what}: cannot be imported ({error})") from None
    return lambda items: _checked(np.asarray(found(list(items))), len(items), what)


def _model(folder: str, rate: int | None) -> Features:
    with extra("transformers", "adapt"):
        import transformers
    kind: Any = transformers.AutoImageProcessor if rate is None else transformers.AutoFeatureExtractor
    try:
        processor = kind.from_pretrained(folder, local_files_only=True)
        model = transformers.AutoModel.from_pretrained(folder, local_files_only=True, use_safetensors=True).eval()
    except (OSError, ValueError, ImportError) as error:
        raise UserError(f"--features {folder}: cannot be opened ({' '.join(str(error).split())})") from None

    @torch.no_grad()
    def encode(items: Sequence[np.ndarray]) -> np.ndarray:
        found = []
        for start in range(0, len(items), BATCH):
            part = list(items[start : start + BATCH])
            if rate is None:
                given = processor(images=[_colour(each) for each in part], return_tensors="pt")
            else:
                given = processor(part, sampling_rate=rate, return_tensors="pt", padding=True)
            said = model(**given)
            pooled = getattr(said, "pooler_output", None)
            found.append((said.last_hidden_state.mean(1) if pooled is None else pooled).flatten(1).numpy())
        return _checked(np.concatenate(found), len(items), folder)

    return encode


def _colour(picture: np.ndarray) -> np.ndarray:
    return np.repeat(picture, 3, axis=2) if picture.shape[2] == 1 else picture


def _checked(found: np.ndarray, items: int, what: str) -> np.ndarray:
    if found.ndim != 2 or len(found) != items or not np.isfinite(found).all():
        raise UserError(
            f"--features {what}: gives an array of shape {found.shape} for {items} items; it must be ({items}, d) "
            "finite numbers"
        )
    return found
