"""Folders of multimodal models of Transformers, dense or adapted: their config, processor and weights, and what to say
of those that do not open."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers

import zoo.adapt as za
from zoo.adapt.family import parts, picture_ids
from zoo.adapt.folder import CONFIG, cannot_open, check_whole, open_whole
from zoo.config import UserError


def open_folder(name: str) -> tuple[Any, Any]:
    """Config and processor of a multimodal model, Transformers' own.

    Args:
        name: of a folder, or of a model on the hub.
    Raises:
        UserError: no such folder, only adapters in it, no multimodal model, or no processor of images and text.
    """
    check_whole(name)
    try:
        config = transformers.AutoConfig.from_pretrained(name, trust_remote_code=False)
        picture_ids(config, f"{name!r} ({type(config).__name__})")
        processor = transformers.AutoProcessor.from_pretrained(name, trust_remote_code=False)
    except UserError:
        raise
    except Exception as error:  # whatever a folder holds, or a hub answers
        raise cannot_open(name, error) from None
    if not hasattr(processor, "tokenizer") or not hasattr(processor, "image_processor"):
        raise UserError(
            f"{name!r} holds a {type(processor).__name__}, no processor of images and text; save the model's own beside"
            " it: processor.save_pretrained(folder)"
        )
    return config, processor


def open_model(name: str, device: str = "auto", dtype: str = "auto") -> tuple[Any, Any]:
    """A model in evaluation, dense or adapted, as it was saved, and its processor.

    Args:
        name: of a folder, or of a dense model on the hub.
        device: see `on_device`.
        dtype: of a dense model's weights, such as "float32"; "auto": the checkpoint's.
    Raises:
        UserError: it cannot be opened, or knows no images.
    """
    folder = Path(name)
    return open_adapted(folder, None, device) if (folder / CONFIG).is_file() else open_dense(name, device, dtype)


def open_dense(name: str, device: str = "auto", dtype: str = "auto") -> tuple[Any, Any]:
    """A dense model in evaluation, and its processor; arguments as for `open_model`.

    Raises:
        UserError: it cannot be opened, lacks weights, or knows no images.
    """
    _, processor = open_folder(name)
    model = open_whole(transformers.AutoModelForImageTextToText, name, dtype=dtype)
    return on_device(model, device).eval(), processor


def open_adapted(folder: Path, base: str | None = None, device: str = "auto") -> tuple[Any, Any]:
    """An adapted model in evaluation, and its processor.

    Args:
        base: of adapters: where their base is, if not where it was.
        device: see `on_device`.
    Raises:
        UserError: it is none, or cannot be opened.
    """
    try:
        model = za.load_adapted(folder, base)
        kept_beside = (folder / "preprocessor_config.json", folder / "processor_config.json")
        source = folder if any(map(Path.is_file, kept_beside)) else base or parts(model).top.config._name_or_path
        processor = transformers.AutoProcessor.from_pretrained(source, trust_remote_code=False)
    except UserError:
        raise
    except Exception as error:  # Transformers, and what reads weights, raise anything for a wrong folder
        raise UserError(f"{folder}: cannot be opened as an adapted model with a processor: {error}") from None
    return on_device(model, device), processor


def on_device(model: Any, device: str) -> Any:
    """The model, moved to `device`: "cpu", "cuda", "cuda:1", or "auto", which is CUDA where there is any.

    Raises:
        UserError: it is not there.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        return model.to(device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {device}: is not to be had ({error})") from None
