"""Folders of exported models: what they hold is checked before anything is built of it, and nothing in them is run."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from zoo.config import UserError, shown
from zoo.files import atomic_path, atomic_write

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
HUB = ("revision", "token", "cache_dir", "force_download", "local_files_only")
"""Options of `from_pretrained` that say how a folder is fetched."""
ADAPTERS = "adapter_config.json"

Shape = tuple[int, ...]


def local_folder(source: Any, options: Mapping[str, Any]) -> Path:
    """The folder that `source` names; one on the hub is fetched, without any code or pickle in it.

    Raises:
        UserError: there is none.
    """
    folder = Path(source)
    if folder.is_dir():
        return folder
    if folder.is_absolute() or str(source).count("/") != 1:  # no name on the hub
        raise UserError(f"{str(source)!r} is no folder; give one that tools.export wrote")
    import huggingface_hub

    wanted = {key: value for key, value in options.items() if key in HUB and value is not None}
    try:
        patterns = ["*.json", "*.safetensors", "modalities/*"]
        return Path(huggingface_hub.snapshot_download(str(source), allow_patterns=patterns, **wanted))
    except Exception as error:  # whatever a hub answers
        raise UserError(f"{str(source)!r} is no folder, and cannot be fetched ({str(error).splitlines()[0]})") from None


def check_folder(folder: Path, model: Callable[[Any], nn.Module], config: Any) -> None:
    """Raise UserError where the weights in a folder are not exactly those of the model that its config describes.

    Args:
        model: builds it from `config`; here on the meta device, without memory.
    """
    if (folder / ADAPTERS).is_file():
        raise UserError(
            f"{folder}: holds adapters, which would name a base to load; open the base, then peft's from_pretrained"
        )
    with torch.device("meta"):
        expected = {name: tuple(value.shape) for name, value in model(config).state_dict().items()}
    found = {name: shape for path in weight_files(folder) for name, shape in _shapes(path)}
    missing, unknown = sorted(expected.keys() - found.keys()), sorted(found.keys() - expected.keys())
    if missing or unknown:
        what = f"lacks {missing[0]}" if missing else f"has {unknown[0]}, which the config's model has not"
        more = len(missing) + len(unknown) - 1
        raise UserError(f"{folder}: {what}{f', and {more} others differ' if more else ''}; export the run anew")
    for name, shape in expected.items():
        if found[name] != shape:
            raise UserError(
                f"{folder}: {name} has shape {found[name]}, but the config's model {shape}; export the run anew"
            )


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a folder's weights: one, or those that its index names.

    Raises:
        UserError: there are none, or the index is damaged or names files elsewhere.
    """
    index = folder / INDEX
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    if not index.is_file():
        pickles = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth", "*.ckpt") for path in folder.glob(pattern))
        also = f"; {pickles[0]} is a pickle, which may run code and is never opened" if pickles else ""
        raise UserError(f"{folder}: has no {WEIGHTS}{also}; give a folder that tools.export wrote")
    try:
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        wrong = [name for name in names if Path(name).name != name or not name.endswith(".safetensors")]
        if wrong:
            raise ValueError(f"it names {shown(wrong[0])}")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{index}: cannot be read ({error}); export the run anew") from None
    lost = sorted(name for name in names if not (folder / name).is_file())
    if lost:
        raise UserError(f"{folder}: lacks {lost[0]}, which its index names; export the run anew")
    return [folder / name for name in sorted(names)]


def _shapes(path: Path) -> Iterator[tuple[str, Shape]]:
    """Name and shape of every tensor of a file, from its header alone."""
    try:
        with safe_open(path, "pt") as file:
            for name in file.keys():
                yield name, tuple(file.get_slice(name).get_shape())
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: is damaged ({error}); export the run anew") from None


def write_weights(
    folder: Path, names: Mapping[str, tuple[Shape, torch.dtype]], read: Callable[[str], Tensor], largest: int
) -> list[Path]:
    """Write weights as safetensors files of at most `largest` bytes each, unless one weight alone is larger.

    At any time no more than the weights of one file are in memory.

    Args:
        names: shape and type of each weight, in order.
        read: makes one.
    """
    shards = list(_shards({name: shape.numel() * dtype.itemsize for name, (shape, dtype) in _sized(names)}, largest))
    files = [folder / (WEIGHTS if len(shards) == 1 else _numbered(i, len(shards))) for i in range(len(shards))]
    for path, shard in zip(files, shards, strict=True):
        with atomic_path(path) as temporary:
            save_file({name: read(name).to(names[name][1]) for name in shard}, temporary, {"format": "pt"})
            temporary.chmod(0o644)  # safetensors makes files that others cannot read
    if len(shards) > 1:
        place = {name: path.name for path, shard in zip(files, shards, strict=True) for name in shard}
        total = sum(shape.numel() * dtype.itemsize for _, (shape, dtype) in _sized(names))
        index = {"metadata": {"total_size": total}, "weight_map": place}
        atomic_write(folder / INDEX, json.dumps(index, indent=1) + "\n")
    return files


def _sized(names: Mapping[str, tuple[Shape, torch.dtype]]) -> Iterable[tuple[str, tuple[torch.Size, torch.dtype]]]:
    return [(name, (torch.Size(shape), dtype)) for name, (shape, dtype) in names.items()]


def _shards(sizes: Mapping[str, int], largest: int) -> Iterator[list[str]]:
    """Names in order, cut where the next would not fit."""
    shard, filled = [], 0
    for name, size in sizes.items():
        if shard and filled + size > largest:
            yield shard
            shard, filled = [], 0
        shard.append(name)
        filled += size
    yield shard


def _numbered(number: int, count: int) -> str:
    return f"model-{number + 1:05}-of-{count:05}.safetensors"
