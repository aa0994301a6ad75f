"""The tokenizers a recipe asks for: read from its files, from the cache, or trained on the training
shards."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Collection, Iterable
from pathlib import Path
from typing import Any

import numpy as np

from pretrain.data.config import DataConfig, vocabulary
from pretrain.data.index import Listing
from pretrain.data.reading import BrokenDocument, read_parts
from zoo.files import atomic_path
from zoo.modalities import BytesConfig
from zoo.noise import hash32

FIT_CHARACTERS = 1 << 26
FIT_IMAGES = 1 << 12
"""What a tokenizer is trained on at most; documents are drawn from all shards alike."""

SUFFIX = {"text": ".json", "image": ".safetensors"}


def load_tokenizers(
    config: DataConfig, listings: list[Listing], cache: Path, log: Callable[[str], None]
) -> dict[str, Any]:
    """Modality → tokenizer; those without a `path` are trained once on the shards of `listings` and kept in
    `cache`.

    Raises:
        UserError: a tokenizer's file is missing or does not fit its config; no image to learn a codebook
            from.
    """
    shards = [listing.checksum for listing in listings]
    files: dict[str, Path | None] = {}
    for modality, tokenizer in config.tokenizers.items():
        if isinstance(tokenizer, BytesConfig):
            files[modality] = None
        elif tokenizer.path is not None:
            files[modality] = Path(tokenizer.path)
        else:
            recipe = json.dumps([tokenizer.model_dump(), shards], sort_keys=True)
            files[modality] = cache / f"{modality}-{hashlib.sha256(recipe.encode()).hexdigest()[:32]}{SUFFIX[modality]}"
    missing = [m for m, file in files.items() if file and config.tokenizers[m].path is None and not file.exists()]
    if missing:
        for modality, tokenizer in fit_tokenizers(config, listings, missing, log).items():
            with atomic_path(files[modality]) as temporary:
                tokenizer.save(temporary)
    return {modality: tokenizer.load(files[modality]) for modality, tokenizer in config.tokenizers.items()}


def fit_tokenizers(
    config: DataConfig, listings: list[Listing], modalities: Collection[str], log: Callable[[str], None]
) -> dict[str, Any]:
    """Train the tokenizers of `modalities` on the shards of `listings`; a function of their content alone."""
    log(f"training the {' and the '.join(modalities)} tokenizer on {sum(map(len, listings)):,} documents")
    samples = _sample(config, listings, modalities)
    return {modality: config.tokenizers[modality].fit(samples[modality]) for modality in modalities}


def fingerprint(config: DataConfig, tokenizers: dict[str, Any]) -> str:
    """Hash of everything that decides the tokens of a document."""
    parts = [[modality, tokenizer.fingerprint] for modality, tokenizer in tokenizers.items()]
    return hashlib.sha256(json.dumps([parts, list(vocabulary(config).sizes.items())]).encode()).hexdigest()


def _sample(config: DataConfig, listings: Iterable[Listing], modalities: Collection[str]) -> dict[str, list[Any]]:
    """Contents of each modality from documents in a scattered order, up to the limits above."""
    places = [(listing.shard, entry) for listing in listings for entry in listing.entries()]
    samples: dict[str, list[Any]] = {modality: [] for modality in modalities}
    room = {"text": FIT_CHARACTERS, "image": FIT_IMAGES}
    for place in np.argsort(hash32(np.arange(len(places)))).tolist():
        shard, entry = places[place]
        wanted = [modality for modality in modalities if room[modality] > 0]
        if not wanted:
            break
        with open(shard, "rb") as file:
            try:
                parts = list(read_parts(file, entry, wanted))
            except BrokenDocument:
                continue  # indexing counts and names it
        for modality, content in parts:
            if modality in wanted:
                # Pictures as the tokenizer sees them: the originals might not fit into the memory.
                samples[modality].append(config.image.square(content) if modality == "image" else content)
                room[modality] -= len(content) if modality == "text" else 1
    return samples
