"""Make a small untrained LLaVA folder of Transformers, with tokenizer and processor, for a set of questions.

    python -m tools.make_llava CONFIG.yaml DATA OUT [key.sub=value ...]

OUT holds a LlavaForConditionalGeneration (CLIP tower, two-layer projector, Llama decoder) and a LlavaProcessor, both
opened by plain `from_pretrained`; `pretrain.adapt` trains it. The tokenizer's words are those of DATA's training
questions and answers, in lower case and without punctuation; a word of `units` and the number after it are one.
"""

from __future__ import annotations

import argparse
import math
import re
import sys
from pathlib import Path
from typing import Any

import torch
from pydantic import Field
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import Tensor, nn

from pretrain import recipe
from pretrain.data.questions import read_questions
from zoo.config import Config, ConfigError, UserError

SPECIAL = {
    "pad_token": "<pad>",
    "bos_token": "<s>",
    "eos_token": "</s>",
    "unk_token": "<unk>",
    "image_token": "<image>",
}
"""Roles → tokens; their ids are 0, 1, …"""
TEMPLATE = (
    "{% for message in messages %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}{% endif %}{% endfor %}"
    "{% if message['role'] == 'assistant' %}</s>{% else %} {% endif %}{% endfor %}"
)
"""`<image>question answer</s>question answer</s>…`"""
LOCAL_PEAK, LOCAL_MARK = 10.0, 4.0
"""Of heads that begin local: their logit at the token they look at, and the coordinate that all tokens share."""


class TowerConfig(Config):
    """CLIP's vision tower."""

    d_model: int = Field(gt=0, multiple_of=4)
    layers: int = Field(gt=0)
    heads: int = Field(gt=0)
    d_ff: int = Field(gt=0)
    local: float = Field(2.0, ge=0)
    """How much its heads prefer near patches at the start; 0: not at all."""


class DecoderConfig(Config):
    """Llama's decoder."""

    d_model: int = Field(gt=0)
    layers: int = Field(gt=0)
    heads: int = Field(gt=0)
    d_ff: int = Field(gt=0)
    positions: int = Field(1024, gt=0)
    """Tokens of the longest sequence."""
    rope_theta: float = Field(1e6, gt=1)
    local_heads: int = Field(2, ge=0)
    """Heads of the first layer that begin by looking 1, 2, … tokens back."""


class LlavaFolderConfig(Config):
    """A whole folder. Sizes are in pixels, features and layers."""

    image_size: int = Field(gt=0)
    patch: int = Field(gt=0)
    vision: TowerConfig
    decoder: DecoderConfig
    units: list[str] = ["row", "column", "frame"]
    """Words that are one with the number after them."""
    seed: int = Field(0, ge=0)

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
        if self.decoder.local_heads > self.decoder.heads:
            raise ConfigError(
                f"decoder.local_heads: {self.decoder.local_heads} must be at most decoder.heads ({self.decoder.heads})"
            )


def word_pattern(units: list[str]) -> str:
    """Regular expression of one word."""
    units_of = "".join(rf"(?:{'|'.join(map(re.escape, units))}) \d+|" if units else "")
    return units_of + r"\w+"


def words_of(data: Path, units: list[str]) -> list[str]:
    """All words of the training questions and answers in the folder `data`, sorted.

    Raises:
        UserError: they cannot be read.
    """
    pattern = re.compile(word_pattern(units))
    texts = (text for question in read_questions(data, "train") for turn in question.turns for text in turn)
    return sorted({word for text in texts for word in pattern.findall(text.lower())})


def make_processor(config: LlavaFolderConfig, words: list[str]) -> Any:
    """The LlavaProcessor: a word is a token, `<s>` begins every text, an image becomes `config.image_tokens` tokens and is
    seen with intensities from 0 to 1."""
    from transformers import LlavaProcessor, PreTrainedTokenizerFast
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    vocabulary = {token: index for index, token in enumerate([*SPECIAL.values(), *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=SPECIAL["unk_token"]))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(word_pattern(config.units)), "removed", invert=True)
    begin = SPECIAL["bos_token"]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{begin} $A", special_tokens=[(begin, vocabulary[begin])]
    )
    side = {"height": config.image_size, "width": config.image_size}
    image_processor = CLIPImageProcessorPil(
        size=side, crop_size=side, image_mean=[0.0] * 3, image_std=[1.0] * 3, resample=0
    )
    special = {role: token for role, token in SPECIAL.items() if role != "image_token"}
    return LlavaProcessor(
        image_processor=image_processor,
        tokenizer=PreTrainedTokenizerFast(
            tokenizer_object=tokenizer, **special, extra_special_tokens={"image_token": SPECIAL["image_token"]},
            clean_up_tokenization_spaces=False, model_max_length=config.decoder.positions,
        ),
        patch_size=config.patch,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,  # CLIP's class token, which the strategy leaves out
        chat_template=TEMPLATE,
    )  # fmt: skip


def make_model(config: LlavaFolderConfig, vocabulary: int) -> Any:
    """The LlavaForConditionalGeneration with its first weights, a function of the seed. See `initialise`.

    Args:
        vocabulary: number of tokens.
    """
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    ids = {role: index for index, role in enumerate(SPECIAL)}
    ends = {f"{role}_id": ids[role] for role in ("pad_token", "bos_token", "eos_token")}
    vision, decoder = config.vision, config.decoder
    llava = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=vision.d_model, intermediate_size=vision.d_ff, num_hidden_layers=vision.layers,
            num_attention_heads=vision.heads, image_size=config.image_size, patch_size=config.patch,
        ),
        text_config=LlamaConfig(
            vocab_size=vocabulary, hidden_size=decoder.d_model, intermediate_size=decoder.d_ff,
            num_hidden_layers=decoder.layers, num_attention_heads=decoder.heads, num_key_value_heads=decoder.heads,
            max_position_embeddings=decoder.positions, tie_word_embeddings=False,
            rope_parameters={"rope_type": "default", "rope_theta": decoder.rope_theta}, **ends,
        ),
        image_token_index=ids["image_token"], vision_feature_layer=-1, vision_feature_select_strategy="default",
        tie_word_embeddings=False, **ends,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        model = LlavaForConditionalGeneration(llava)
        initialise(model, config)
    return model.eval()


@torch.no_grad()
def initialise(model: Any, config: LlavaFolderConfig) -> None:
    """First weights with which a model of this size learns in minutes what pretrained ones know already: where a patch is,
    that near patches belong together, and what the word before says. Draws from torch's generator.

    * Decoder and projector: N(0, 1/fan-in), what is added to the residual stream by 1/√(2·layers) less, embeddings
      N(0, 1), the head N(0, 0.02²).
    * The tower's position embedding: sines and cosines of row and column (as arXiv 2111.06377); its queries and keys read
      them alike, so that near patches see each other (the mimetic initialisation of arXiv 2305.09828).
    * `decoder.local_heads` of the first layer look 1, 2, … tokens back by rotary position alone, for which all tokens
      share one coordinate: among hundreds of image tokens a random head would hardly see the word before.
    """
    language, projector = model.model.language_model, model.model.multi_modal_projector
    for name, weight in [*language.named_parameters(), *projector.named_parameters()]:
        if name.startswith("embed_tokens"):
            weight.normal_(std=1.0)
        elif weight.dim() == 2:
            residual = name.endswith(("o_proj.weight", "down_proj.weight"))
            depth = 2 * config.decoder.layers if residual else 1
            weight.normal_(std=(weight.shape[1] * depth) ** -0.5)
    model.lm_head.weight.normal_(std=0.02)
    tower = model.model.vision_tower
    tower = getattr(tower, "vision_model", tower)
    tower.embeddings.position_embedding.weight[0] = 0  # the class token's
    tower.embeddings.position_embedding.weight[1:] = sines(config.image_size // config.patch, config.vision.d_model)
    if config.vision.local:
        for layer in tower.encoder.layers:
            _near_patches(layer.self_attn, config.vision)
    if config.decoder.local_heads:
        language.embed_tokens.weight[:, 0] = LOCAL_MARK
        projector.linear_2.weight[0] = 0
        projector.linear_2.bias[0] = LOCAL_MARK
        _near_tokens(language.layers[0].self_attn, config.decoder)


def sines(side: int, width: int, fastest: float = 2.0, span: float = 20.0) -> Tensor:
    """Position code (side·side, width) of patches in raster order: sin and cos of the row at width/4 frequencies, then of
    the column.

    Args:
        fastest: highest frequency, radians a patch.
        span: the highest frequency over the lowest.
    """
    quarter = width // 4
    angle = torch.arange(side)[:, None] * fastest / span ** (torch.arange(quarter) / quarter)
    line = torch.cat([angle.sin(), angle.cos()], 1)  # (side, width / 2)
    rows, columns = line[:, None].expand(side, side, -1), line[None].expand(side, side, -1)
    return torch.cat([rows, columns], -1).reshape(side * side, width)


def _near_patches(attention: nn.Module, config: TowerConfig) -> None:
    """Queries and keys of each head read the same share of the position code, besides a little at random."""
    quarter, size = config.d_model // 4, config.d_model // config.heads
    code = torch.zeros(config.d_model, config.d_model)
    taken = [0] * config.heads
    for pair in range(quarter):
        head = pair % config.heads
        for feature in (pair, pair + quarter, pair + 2 * quarter, pair + 3 * quarter):  # sin, cos of row, of column
            if taken[head] < size:
                code[head * size + taken[head], feature] = config.local
                taken[head] += 1
    for projection in (attention.q_proj, attention.k_proj):
        projection.weight.mul_(0.3).add_(code)


def _near_tokens(attention: nn.Module, config: DecoderConfig) -> None:
    """Head j looks j + 1 tokens back and copies a share of the features found there."""
    size = config.d_model // config.heads
    half = size // 2
    frequency = config.rope_theta ** (-torch.arange(half) / half)
    fast = int((frequency > 0.1).sum())  # slower ones tell near from far too late
    frequency = frequency[:fast]
    mark = LOCAL_MARK / math.sqrt((config.d_model - 1 + LOCAL_MARK**2) / config.d_model)  # after the norm
    scale = math.sqrt(LOCAL_PEAK * math.sqrt(size) / fast) / mark
    turn = torch.linalg.qr(torch.randn(config.d_model, config.d_model))[0]
    for head in range(config.local_heads):
        rows = slice(head * size, (head + 1) * size)
        query, key = torch.zeros(size, config.d_model), torch.zeros(size, config.d_model)
        key[:fast, 0] = scale
        query[:fast, 0] = scale * torch.cos(frequency * (head + 1))
        query[half : half + fast, 0] = -scale * torch.sin(frequency * (head + 1))
        attention.q_proj.weight[rows], attention.k_proj.weight[rows] = query, key
        attention.v_proj.weight[rows], attention.o_proj.weight[:, rows] = turn[rows], turn[rows].T


def write(config: LlavaFolderConfig, data: Path, out: Path) -> Any:
    """Write the folder `out`; returns the model.

    Raises:
        UserError: sizes do not fit each other, the questions cannot be read, or `out` holds a model already.
    """
    config.check()
    if (out / "config.json").exists():
        raise UserError(f"{out} holds a model already; give another folder")
    processor = make_processor(config, words_of(data, config.units))
    model = make_model(config, len(processor.tokenizer))
    processor.save_pretrained(out)
    model.save_pretrained(out)
    return model


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path, help="YAML file with the sizes")
    parser.add_argument("data", type=Path, help="folder with train.jsonl and its images")
    parser.add_argument("out", type=Path, help="folder to write")
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value")
    options = parser.parse_args(arguments)
    try:
        config = LlavaFolderConfig.parse(recipe.read(options.config, options.overrides))
        model = write(config, options.data, options.out)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    parts = {"tower": model.model.vision_tower, "decoder": model.model.language_model, "in all": model}
    counts = ", ".join(f"{name} {sum(p.numel() for p in part.parameters()):,}" for name, part in parts.items())
    print(f"{options.out}: {config.image_tokens} tokens an image; parameters: {counts}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
