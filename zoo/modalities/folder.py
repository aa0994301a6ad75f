"""A trained tokenizer of Transformers, by class, from a local folder: weights, geometry, and what it is known by."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from zoo.config import UserError, suggestion
from zoo.extras import extra

CONFIG = "config.json"


def folder_class(path: str, known: Collection[str], what: str) -> str:
    """The class that a folder's `config.json` says it is of.

    Args:
        known: classes that can be used.
        what: "codec", for messages.
    Raises:
        UserError: there is no such folder, or it is of no known class.
    """
    try:
        content = json.loads((Path(path) / CONFIG).read_text(encoding="utf-8"))
        name = content["architectures"][0]
    except OSError as error:
        raise UserError(
            f"{what} folder {path}: {CONFIG} cannot be read ({error.strerror}); give the folder of a model as "
            "Transformers saves it"
        ) from None
    except (ValueError, KeyError, IndexError, TypeError):
        raise UserError(f"{what} folder {path}: {CONFIG} names no class in `architectures`") from None
    if name not in known:
        raise UserError(
            f"{what} folder {path}: is of class {name}; known: {', '.join(known)}{suggestion(str(name), known)}"
        )
    return name


def load_folder(path: str, known: Collection[str], what: str, key: str) -> Any:
    """The model of a folder, in evaluation mode on the CPU, without gradients; every weight is there.

    Args:
        known, what: as for `folder_class`.
        key: the extra of setup.cfg that is needed.
    Raises:
        UserError: as `folder_class`; the weights are missing, no safetensors, or do not fit `config.json`.
    """
    name = folder_class(path, known, what)
    with extra(key, what):
        import transformers
    try:
        model, report = getattr(transformers, name).from_pretrained(
            path, local_files_only=True, use_safetensors=True, output_loading_info=True
        )
    except Exception as error:  # whatever Transformers raises for files that do not fit
        raise UserError(f"{what} folder {path}: does not load as {name} ({_first_line(error)})") from None
    missing = sorted(report["missing_keys"]) + sorted(str(each) for each in report["mismatched_keys"])
    if missing:
        raise UserError(
            f"{what} folder {path}: its weights do not fit {CONFIG}: {missing[0]} and {len(missing) - 1} others are "
            "missing or of another shape"
        )
    return model.eval().requires_grad_(False)


def check_folder(path: str, what: str, said: Mapping[str, Any], found: Mapping[str, Any]) -> None:
    """Raise `UserError` where a recipe's keys say something else than the folder; names all that differ."""
    wrong = [f"{key} {found[key]} (the recipe says {said[key]})" for key in said if said[key] != found[key]]
    if wrong:
        raise UserError(f"{what} folder {path}: has {', '.join(wrong)}; correct the recipe, or name another folder")


def folder_hash(path: str) -> str:
    """Hash of the configuration and weights in a folder, whatever it is called."""
    digest = hashlib.sha256()
    for file in _files(path):
        digest.update(file.name.encode())
        with open(file, "rb") as content:
            digest.update(hashlib.file_digest(content, "sha256").digest())
    return digest.hexdigest()


def copy_folder(path: str | Path, target: str | Path) -> None:
    """Copy the configuration and weights of a folder into a new one."""
    Path(target).mkdir()
    for file in (*_files(path), *Path(path).glob("*.safetensors.index.json")):
        shutil.copyfile(file, Path(target) / file.name)


def _files(path: str | Path) -> list[Path]:
    """Configuration and weights in a folder, by name."""
    return [file for file in sorted(Path(path).glob("*")) if file.name == CONFIG or file.suffix == ".safetensors"]


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else 'no reason given'}"
