"""A LLaVA processor made on the spot, and JSON lines of questions."""

from __future__ import annotations

import json
import string
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

CHARACTERS = string.ascii_lowercase + "ABEINRSTU" + string.digits + " :?.,\n"
PAD, BEGIN, END, UNKNOWN, IMAGE = 0, 60, 61, 62, 63
"""Ids outside the characters, which begin at 1; IMAGE is that of the tiny models of `tests.zoo.adapt.families`."""

LLAVA_TEMPLATE = (
    "{% for message in messages %}{{ message['role'].upper() + ': ' }}"
    "{% for part in message['content'] if part['type'] == 'image' %}{{ '<image>\n' }}{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] + ' ' }}{% endfor %}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
"""The form of LLaVA's: no end after an answer."""
TURN_TEMPLATE = (
    "{% for message in messages %}{{ '<s>' + message['role'] + '\n' }}"
    "{% for part in message['content'] %}"
    "{{ '<image>' if part['type'] == 'image' else part['text'] }}{% endfor %}{{ '</s>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<s>assistant\nthink. ' }}{% endif %}"
)
"""The form of Qwen's: each turn ends itself; it invites more than it later writes."""


def tokenizer(**names: str) -> Any:
    """A token a character; 64 ids, from which on those of `names` follow: tokens by attribute, such as boi_token."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = {"<pad>": PAD, "<s>": BEGIN, "</s>": END, "<unk>": UNKNOWN, "<image>": IMAGE}
    vocabulary = {character: number for number, character in enumerate(CHARACTERS, 1)} | special
    vocabulary |= {
        f"<{number}>": number for number in range(len(CHARACTERS) + 1, BEGIN)
    }  # saved tokenizers have no holes
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    inner.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        extra_special_tokens=names or ["<image>"],
    )


def llava_processor(chat_template: str | None = None) -> Any:
    """Images of 8 × 8 pixels, 16 tokens each."""
    from transformers import CLIPImageProcessor, LlavaProcessor

    images = CLIPImageProcessor(size={"shortest_edge": 8}, crop_size={"height": 8, "width": 8})
    return LlavaProcessor(
        images,
        tokenizer(),
        patch_size=2,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=chat_template,
    )


def other_processors(tokens: int = 4) -> dict[str, Any]:
    """One of each family that has its own way with text or images; `tokens` an image where the number is free, and 4 a
    tile."""
    import transformers as hf

    sides = {"height": 8, "width": 8}
    paligemma = hf.SiglipImageProcessor(size=sides)
    paligemma.image_seq_length = tokens
    chameleon = tokenizer()
    chameleon.sep_token = "</s>"
    gemma = tokenizer(image_token="<image>", boi_token="<boi>", eoi_token="<eoi>")
    cropped = {"size": {"shortest_edge": 8}, "crop_size": sides}
    tiled = hf.LlavaNextImageProcessor(**cropped, image_grid_pinpoints=[[8, 16], [16, 8]])
    idefics = hf.Idefics3ImageProcessor(size={"longest_edge": 16}, max_image_size={"longest_edge": 8})
    found = [
        hf.PaliGemmaProcessor(paligemma, tokenizer()),
        hf.Gemma3Processor(hf.Gemma3ImageProcessor(size={"height": 16, "width": 16}), gemma, image_seq_length=tokens),
        hf.Idefics3Processor(idefics, tokenizer(), image_seq_len=4),
        hf.ChameleonProcessor(hf.ChameleonImageProcessor(**cropped), chameleon, image_seq_length=tokens),
        hf.LlavaNextProcessor(
            tiled, tokenizer(), patch_size=2, vision_feature_select_strategy="default", num_additional_image_tokens=1
        ),
    ]
    return {type(processor).__name__: processor for processor in found}


def picture(seed: int, height: int = 8, width: int = 8) -> Image.Image:
    return Image.fromarray(np.random.RandomState(seed).randint(0, 256, (height, width)).astype(np.uint8))


def write_questions(folder: Path, lines: Sequence[Mapping[str, Any] | str], split: str = "train") -> Path:
    """JSON lines as given, and a picture for every image they name; returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, line in enumerate(lines):
        if isinstance(line, str):
            continue
        for name in [line["image"]] if "image" in line else line.get("images", []):
            picture(number).save(folder / name)
    texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    (folder / f"{split}.jsonl").write_text("\n".join(texts) + "\n")
    return folder
