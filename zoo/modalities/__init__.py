"""Modalities: one file a kind, and the vocabulary that joins them."""

from zoo.carries import Carries, Channels, Ids, Vectors
from zoo.modalities.continuous_patches import ContinuousPatches
from zoo.modalities.grammar import Choice, Grammar, Piece, grammars
from zoo.modalities.latents import Latents
from zoo.modalities.patches import Patches
from zoo.modalities.section import (
    Modalities,
    ModalitiesSection,
    default_modalities,
    in_order,
    parse_modalities,
    vocabulary,
)
from zoo.modalities.speech import Codec, DMel, Units
from zoo.modalities.text import BPE, Bytes, HuggingFace
from zoo.modalities.vocabulary import Vocabulary
from zoo.modalities.vq import VQ
from zoo.modalities.vqvae import VQVAE
from zoo.modality import (
    PARTS,
    LearnedConfig,
    LearnedModality,
    Modality,
    ModalityConfig,
    Positions,
)

__all__ = [
    "BPE",
    "PARTS",
    "VQ",
    "VQVAE",
    "Bytes",
    "Carries",
    "Channels",
    "Choice",
    "Codec",
    "ContinuousPatches",
    "DMel",
    "Grammar",
    "HuggingFace",
    "Ids",
    "Latents",
    "LearnedConfig",
    "LearnedModality",
    "Modalities",
    "ModalitiesSection",
    "Modality",
    "ModalityConfig",
    "Patches",
    "Piece",
    "Positions",
    "Units",
    "Vectors",
    "Vocabulary",
    "default_modalities",
    "grammars",
    "in_order",
    "parse_modalities",
    "vocabulary",
]
