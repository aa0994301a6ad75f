"""Tokenizers of each modality, and the vocabulary that puts them into one id space."""

from zoo.modalities.patches import ImageTokenizer, PatchesConfig, PatchTokenizer
from zoo.modalities.text import BPEConfig, BPETokenizer, BytesConfig, BytesTokenizer, TextTokenizer
from zoo.modalities.vocabulary import Vocabulary

__all__ = [
    "BPEConfig",
    "BPETokenizer",
    "BytesConfig",
    "BytesTokenizer",
    "ImageTokenizer",
    "PatchTokenizer",
    "PatchesConfig",
    "TextTokenizer",
    "Vocabulary",
]
