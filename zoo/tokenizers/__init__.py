"""Tokenizers of each modality, and the vocabulary that puts them into one id space."""

from zoo.tokenizers.image import ImageTokenizer, PatchesConfig, PatchTokenizer
from zoo.tokenizers.text import BPEConfig, BPETokenizer, BytesConfig, BytesTokenizer, TextTokenizer
from zoo.tokenizers.vocabulary import Vocabulary

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
