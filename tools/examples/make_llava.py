"""Make a small untrained LLaVA folder of Transformers, with tokenizer and processor, for a set of questions.

    python -m tools.examples.make_llava CONFIG.yaml DATA OUT [key.sub=value ...]

OUT holds a LlavaForConditionalGeneration (CLIP tower, two-layer projector, Llama decoder) and a LlavaProcessor, both
opened by plain `from_pretrained`; `pretrain.finetune` trains it. The tokenizer knows DATA's training questions and
answers:

* without `vocabulary` by their words, in lower case and without punctuation; a place named by `units`, such as "row 2,
  column 3", is one word, as location tokens are in other models: an address in two words takes many times as long to
  learn;
* with `vocabulary: N` by byte-level byte-pair encoding, N tokens in all: any text, as it is written.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from pydantic import Field
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from pretrain import recipe
from pretrain.finetune.questions import read_questions
from tools.examples.llava_weights import DecoderConfig, TowerConfig, initialise
from zoo.config import Config, ConfigError, UserError

SPECIAL = {
    "pad_token": "<pad>",
    "bos_token": "<s>",
    "eos_token": "</s>",
    "unk_token": "<unk>",
    "image_token": "<image>",
}
"""Roles → tokens; their ids are 0, 1, …"""
BYTES = 256
TEMPLATE = (
    "{% for message in messages %}"
    "{% set frames = message['content'] | selectattr('type', 'equalto', 'image') | list | length %}"
    "{% set seen = namespace(frames=0) %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{% set seen.frames = seen.frames + 1 %}"
    "{% if frames > 1 %}frame {{ seen.frames }} {% endif %}<image>{% else %}{{ part['text'] }}{% endif %}{% endfor %}"
    "{% if message['role'] == 'assistant' %}</s>{% else %}{{ '\\n' }}{% endif %}{% endfor %}"
)
"""`<image>question⏎answer</s>question⏎answer</s>…`, ⏎ a line break; of several images each is announced: `frame 1
<image>frame 2 <image>…`"""


class LlavaFolderConfig(Config):
    """A LLaVA of random weights with its processor, as `tools.examples.make_llava` writes it."""

    image_size: int = Field(gt=0)
    """Side of the square, in pixels, that every picture is brought to."""
    patch: int = Field(gt=0)
    """Side of a patch in pixels."""
    vision: TowerConfig
    decoder: DecoderConfig
    units: list[str] = ["row", "column", "frame"]
    """Words that, with the number after each, name a place together; without meaning beside `vocabulary`."""
    vocabulary: int | None = Field(None, ge=len(SPECIAL) + BYTES)
    """null: a word is a token. A number: tokens of a byte-level byte-pair encoding, `SPECIAL` and the single bytes
    included; fewer where the texts are too short to learn as many."""
    seed: int = Field(0, ge=0)
    """Seed of the first weights."""

    @property
    def image_tokens(self) -> int:
        """Tokens of an image in the decoder."""
        return (self.image_size // self.patch) ** 2

    def check(self) -> None:
        """Raises:
        ConfigError: sizes that do not fit each other.
        """
        if self.image_size % self.patch:
            raise ConfigError(f"patch: {self.patch} must divide image_size ({self.image_size}); change one of them")
        for name, part, step in (("vision", self.vision, 1), ("decoder", self.decoder, 2)):
            if part.d_model % (part.heads * step):
                rule = "a multiple of 2 * heads, for rotary positions" if step == 2 else "a multiple of heads"
                raise ConfigError(f"{name}.d_model: {part.d_model} must be {rule} ({part.heads}); change one of them")
        if self.decoder.positions <= self.image_tokens:
            raise ConfigError(
                f"decoder.positions: {self.decoder.positions} must exceed the {self.image_tokens} tokens of an image"
            )


def word_pattern(units: list[str]) -> str:
    """Regular expression of one word."""
    unit = rf"(?:{'|'.join(map(re.escape, units))}) \d+"
    return (rf"{unit}(?:, {unit})*|" if units else "") + r"\w+"


def texts_of(data: Path) -> list[str]:
    """All training questions and answers in the folder `data`.

    Raises:
        UserError: they cannot be read.
    """
    return [text for question in read_questions(data, "train") for turn in question.turns for text in turn]


def make_tokenizer(config: LlavaFolderConfig, texts: Iterable[str]) -> Tokenizer:
    """The tokenizer of `texts`; `<s>` begins what it encodes."""
    if config.vocabulary is None:
        tokenizer = _words(texts, word_pattern(config.units))
    else:
        tokenizer = _bytes(texts, config.vocabulary)
    begin = SPECIAL["bos_token"]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{begin} $A", special_tokens=[(begin, tokenizer.token_to_id(begin))]
    )
    return tokenizer


def _words(texts: Iterable[str], pattern: str) -> Tokenizer:
    words = sorted({word for text in texts for word in re.findall(pattern, text.lower())})
    vocabulary = {token: index for index, token in enumerate([*SPECIAL.values(), *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=SPECIAL["unk_token"]))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(pattern), "removed", invert=True)
    return tokenizer


def _bytes(texts: Iterable[str], size: int) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            # no token spans a line break: a prompt, which ends in one, has the tokens that the same text has before an
            # answer
            pre_tokenizers.Split("\n", "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=list(SPECIAL.values()),
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def make_processor(config: LlavaFolderConfig, texts: Iterable[str]) -> Any:
    """The LlavaProcessor: an image becomes `config.image_tokens` tokens and is seen with intensities from 0 to 1.

    Args:
        texts: what the tokenizer is made for.
    """
    from transformers import LlavaProcessor, PreTrainedTokenizerFast
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    side = {"height": config.image_size, "width": config.image_size}
    image_processor = CLIPImageProcessorPil(size=side, crop_size=side, image_mean=[0.0] * 3, image_std=[1.0] * 3)
    special = {role: token for role, token in SPECIAL.items() if role != "image_token"}
    return LlavaProcessor(
        image_processor=image_processor,
        tokenizer=PreTrainedTokenizerFast(
            tokenizer_object=make_tokenizer(config, texts),
            **special,
            extra_special_tokens={"image_token": SPECIAL["image_token"]},
            clean_up_tokenization_spaces=False,
            model_max_length=config.decoder.positions,
        ),
        patch_size=config.patch,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,  # CLIP's class token, which the strategy leaves out
        chat_template=TEMPLATE,
    )


def make_model(config: LlavaFolderConfig, vocabulary: int) -> Any:
    """The LlavaForConditionalGeneration with its first weights, a function of the seed. See
    `tools.examples.llava_weights`.

    Args:
        vocabulary: number of tokens.
    """
    from transformers import LlavaForConditionalGeneration

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        model = LlavaForConditionalGeneration(_transformers_config(config, vocabulary))
        initialise(model, config.vision, config.decoder, config.image_size // config.patch)
    return model.eval()


def _transformers_config(config: LlavaFolderConfig, vocabulary: int) -> Any:
    """The sizes, as Transformers has them."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig

    ids = {role: index for index, role in enumerate(SPECIAL)}
    ends: dict[str, Any] = {f"{role}_id": ids[role] for role in ("pad_token", "bos_token", "eos_token")}
    vision, decoder = config.vision, config.decoder
    return LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=vision.d_model,
            intermediate_size=vision.d_ff,
            num_hidden_layers=vision.layers,
            num_attention_heads=vision.heads,
            image_size=config.image_size,
            patch_size=config.patch,
        ),
        text_config=LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=decoder.d_model,
            intermediate_size=decoder.d_ff,
            num_hidden_layers=decoder.layers,
            num_attention_heads=decoder.heads,
            num_key_value_heads=decoder.heads,
            max_position_embeddings=decoder.positions,
            tie_word_embeddings=False,
            rope_parameters={"rope_type": "default", "rope_theta": decoder.rope_theta},
            **ends,
        ),
        image_token_index=ids["image_token"],
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        tie_word_embeddings=False,
        **ends,
    )


def write(config: LlavaFolderConfig, data: Path, out: Path) -> Any:
    """Write the folder `out`; returns the model.

    Raises:
        UserError: sizes do not fit each other, the questions cannot be read, or `out` holds a model already.
    """
    config.check()
    if (out / "config.json").exists():
        raise UserError(f"{out} holds a model already; give another folder")
    processor = make_processor(config, texts_of(data))
    model = make_model(config, len(processor.tokenizer))
    processor.save_pretrained(out)
    model.save_pretrained(out)
    return model


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path, help="YAML file with the sizes")
    parser.add_argument("data", type=Path, help="folder with train.jsonl and its images")
    parser.add_argument("out", type=Path, help="folder to write")
    parser.add_argument("overrides", nargs="*", default=[], metavar="key.sub=value")
    options = parser.parse_args(arguments)
    try:
        config = LlavaFolderConfig.parse(recipe.read(options.config, options.overrides))
        model = write(config, options.data, options.out)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    parts = {"tower": model.model.vision_tower, "decoder": model.model.language_model, "in all": model}
    counts = ", ".join(f"{name} {sum(p.numel() for p in part.parameters()):,}" for name, part in parts.items())
    vocabulary = model.config.text_config.vocab_size
    print(
        f"{options.out}: {config.image_tokens} tokens an image, {vocabulary:,} in the vocabulary; parameters: {counts}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
