"""Folders of multimodal models of Transformers: their config and processor, and what to say of those that do not open."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import transformers

from zoo.adapt.family import picture_ids
from zoo.config import UserError


def open_folder(name: str) -> tuple[Any, Any]:
    """Config and processor of a multimodal model, Transformers' own.

    Args:
        name: of a folder, or of a model on the hub.
    Raises:
        UserError: no such folder, only adapters in it, no multimodal model, or no processor of images and text.
    """
    folder = Path(name)
    local = folder.is_dir()
    if not local and (folder.is_absolute() or name.count("/") != 1):  # no name on the hub
        raise UserError(f"{name!r} is no folder; give one with a model of Transformers and its processor")
    if local and not (folder / "config.json").is_file():
        adapters = (folder / "adapter_config.json").is_file()
        what = "only adapters, not the model they belong to" if adapters else "no config.json"
        raise UserError(f"{name!r} holds {what}; give a folder that `save_pretrained` wrote for a whole model")
    try:
        config = transformers.AutoConfig.from_pretrained(name)
        picture_ids(config, f"{name!r} ({type(config).__name__})")
        processor = transformers.AutoProcessor.from_pretrained(name)
    except UserError:
        raise
    except Exception as error:  # whatever a folder holds, or a hub answers
        raise cannot_open(name, error) from None
    if not hasattr(processor, "tokenizer") or not hasattr(processor, "image_processor"):
        raise UserError(
            f"{name!r} holds a {type(processor).__name__}, no processor of images and text; save the model's own beside "
            "it: processor.save_pretrained(folder)"
        )
    return config, processor


def cannot_open(name: str, error: Exception) -> UserError:
    """What to say where Transformers fails at a model, with anything it likes to raise."""
    said = str(error).strip().partition("\n")[0] or type(error).__name__
    return UserError(f"{name!r} cannot be opened ({said})")
