"""A tokenizer of Transformers whose ids are those of the stream: text in its range, special tokens by their names."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import tokenizers
from transformers import PreTrainedTokenizerFast

from zoo.modalities.text import PROBES, Bytes, Tokenized
from zoo.modalities.vocabulary import Vocabulary
from zoo.modality import Modality

ALPHABET = tokenizers.pre_tokenizers.ByteLevel.alphabet


def stream_tokenizer(modalities: Mapping[str, Modality]) -> PreTrainedTokenizerFast | None:
    """The tokenizer, or None where that of text is no byte-level BPE, whose ids alone can be moved as they stand.

    It begins a document with `<bos>`. Names of special tokens that stand in a text are plain text to it.
    """
    from zoo.modalities.section import vocabulary

    words = vocabulary({name: modality.config for name, modality in modalities.items()})
    text = modalities[words.text]
    inner = (
        _bytes() if isinstance(text, Bytes) else json.loads(text.inner.to_str()) if isinstance(text, Tokenized) else {}
    )
    if (
        inner.get("model", {}).get("type") != "BPE"
        or inner["model"].get("unk_token")
        or inner["model"].get("byte_fallback")
    ):
        return None
    moved = tokenizers.Tokenizer.from_str(json.dumps(_moved(inner, words)))
    moved.encode_special_tokens = True
    start = words.range(words.text)[0]
    for probe in PROBES:
        if moved.encode(probe, add_special_tokens=False).ids != [start + int(i) for i in text.encode(probe)]:
            return None
    moved.post_processor = tokenizers.processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A $B", special_tokens=[("<bos>", words.bos)]
    )
    special = [name for name in words.specials if name not in ("<bos>", "<eos>")]
    return PreTrainedTokenizerFast(
        tokenizer_object=moved,
        bos_token="<bos>",
        eos_token="<eos>",
        pad_token="<eos>",
        padding_side="left",
        split_special_tokens=True,
        additional_special_tokens=special,
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
    )


def _bytes() -> dict[str, Any]:
    """A tokenizer whose ids are bytes, as `tokenizers` writes one."""
    order = {ord(c): c for c in ALPHABET() if ord(c) < 256}
    others = sorted(c for c in ALPHABET() if ord(c) >= 256)  # bytes that print nothing, in order
    free = iter(others)
    vocab = {order[byte] if byte in order else next(free): byte for byte in range(256)}
    inner = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocab, merges=[]))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = tokenizers.decoders.ByteLevel()
    return json.loads(inner.to_str())


def _moved(inner: dict[str, Any], words: Vocabulary) -> dict[str, Any]:
    """The tokenizer with its ids in the range of text, the special tokens before them."""
    start = words.range(words.text)[0]
    vocab = {token: number + start for token, number in inner["model"]["vocab"].items()}
    added = [entry | {"id": entry["id"] + start, "special": False} for entry in inner["added_tokens"]]
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    special = [{"id": number, "content": name, **plain} for name, number in words.specials.items()]
    model = inner["model"] | {"vocab": {**words.specials, **vocab}}
    return inner | {"model": model, "added_tokens": [*special, *added], "post_processor": None}
