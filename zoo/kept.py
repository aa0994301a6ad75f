"""What a run folder keeps of its modalities: tokenizers and codebooks as they save themselves, what each was, and the
vocabulary. With it a run says what its ids mean when its data are gone.

    RUN/modalities/text.json          what the modality `text` saves; nothing where a modality needs no file
    RUN/modalities/about.json         kind, file and fingerprint of each modality, and the vocabulary's ranges
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from zoo.config import UserError
from zoo.files import atomic_path, atomic_write
from zoo.modalities.section import Modalities, vocabulary
from zoo.modality import Modality

FOLDER, ABOUT = "modalities", "about.json"


def keep_modalities(run: Path, modalities: Mapping[str, Modality]) -> None:
    """Write the modalities of a run into its folder; nothing happens where they are kept already."""
    folder, about = run / FOLDER, _about(modalities)
    with contextlib.suppress(UserError):
        if _read(run) == about:
            return
    folder.mkdir(exist_ok=True)
    for name, modality in modalities.items():
        if modality.config.file is not None:
            with atomic_path(folder / f"{name}{modality.config.file}") as temporary:
                modality.save(temporary)
    atomic_write(folder / ABOUT, json.dumps(about, indent=1) + "\n")


def open_modalities(run: Path, configs: Modalities) -> dict[str, Modality]:
    """The modalities of a run, ready for use, from its folder alone.

    Args:
        configs: of the run's recipe.
    Raises:
        UserError: a file is missing, cannot be read, or is not the one that the run was trained with.
    """
    modalities = {name: config.beside(run / FOLDER / name).open() for name, config in configs.items()}
    changed = different(run, modalities)
    if changed or _read(run)["vocabulary"] != _about(modalities)["vocabulary"]:
        raise UserError(
            f"{run / FOLDER}: {', '.join(changed or modalities)}: ids mean something else than when the run was "
            "trained; restore the folder's files"
        )
    return modalities


def different(run: Path, modalities: Mapping[str, Modality]) -> list[str]:
    """Names of those of `modalities` whose ids or vectors mean something else than in `run`, or which it lacks.

    Raises:
        UserError: the run does not say what its own mean.
    """
    kept = _read(run)["modalities"]
    return [name for name, each in modalities.items() if each.fingerprint != kept.get(name, {}).get("fingerprint")]


def kept_files(run: Path) -> dict[str, Path]:
    """The file or folder of each modality of a run that needs one."""
    entries = _read(run)["modalities"]
    return {name: run / FOLDER / entry["file"] for name, entry in entries.items() if entry["file"] is not None}


def _about(modalities: Mapping[str, Modality]) -> dict[str, Any]:
    words = vocabulary({name: modality.config for name, modality in modalities.items()})
    entries = {}
    for name, modality in modalities.items():
        config = modality.config
        file = None if config.file is None else f"{name}{config.file}"
        entries[name] = {"type": config.type_name, "file": file, "fingerprint": modality.fingerprint}
    ranges = {name: list(words.range(name)) for name in words.modalities}
    return {"modalities": entries, "vocabulary": {"specials": words.specials, "ranges": ranges}}


def _read(run: Path) -> dict[str, Any]:
    path = run / FOLDER / ABOUT
    try:
        about = json.loads(path.read_text(encoding="utf-8"))
        files = [entry["file"] for entry in about["modalities"].values()]
        if not all(file is None or Path(file).name == file for file in files):
            raise ValueError("it names files of other folders")
        if "vocabulary" not in about:
            raise ValueError("it has no vocabulary")
        return about
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise UserError(
            f"{path}: cannot be read ({reason}); without it nobody knows what the run's ids mean: restore it, or let "
            "the run be resumed once, with its data, which writes it"
        ) from None
