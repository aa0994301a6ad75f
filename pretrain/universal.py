"""Universal checkpoints: a checkpoint converted so that any number of ranks can load it; kept beside its source."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from pretrain import deepspeed_patches
from pretrain.engine import TAG
from pretrain.manifest import DamageError, read_manifest, write_manifest
from zoo.files import atomic_path, checksum, sync

WORKERS = min(8, os.cpu_count() or 1)
"""Processes of a conversion, each holding some tensors in memory."""


def universal_folder(source: Path) -> Path:
    """Where the conversion of the checkpoint `source` is kept."""
    return source.with_name(source.name + ".universal")


def damage_of(source: Path, rank: int, world: int) -> str:
    """Why the conversion of `source` cannot be used, empty where it can; each rank reads its share of the files."""
    target = universal_folder(source)
    if not target.is_dir():
        return "it has not been made yet"
    try:
        manifest = read_manifest(target)
        if manifest.about != {"source": read_manifest(source).crc32}:
            raise DamageError(f"it was made of another {source.name}")
        manifest.check_sizes(target)
        manifest.check_contents(target, rank, world)
    except DamageError as error:
        return str(error)
    return ""


def convert(source: Path) -> None:
    """Make the conversion of `source`, in place of one that is there; no file of it runs code.

    Raises:
        OSError: DeepSpeed's converter failed, or the disk is full.
    """
    with atomic_path(universal_folder(source)) as temporary:
        environment = {
            **os.environ,
            "DS_ACCELERATOR": "cpu",
            "PYTHONPATH": os.pathsep.join(map(os.path.abspath, sys.path)),
        }
        # -P: nothing is imported from the folder in which the command runs
        command = [sys.executable, "-P", "-m", "pretrain.universal", str(source), str(temporary)]
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        if done.returncode:
            raise OSError((done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1])
        sync(temporary)
        files = sorted(path for path in temporary.rglob("*") if path.is_file())
        checksums = {str(path.relative_to(temporary)): checksum(path) for path in files}
        write_manifest(temporary, {"source": read_manifest(source).crc32}, checksums)


def main(source: str, target: str) -> None:
    """Convert the checkpoint in `source` into `target`, beside it, in a process of its own."""
    os.chdir(Path(source).parent)  # the converter reads paths as patterns: a "(" or "+" further up would break it
    deepspeed_patches.convert(f"{Path(source).name}/{TAG}", f"{Path(target).name}/{TAG}", WORKERS)


if __name__ == "__main__":
    main(*sys.argv[1:])
