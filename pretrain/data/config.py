"""The `data` section of a recipe, and the vocabulary that follows from it alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

import pydantic
from pydantic_core import PydanticCustomError

from zoo.config import Config, suggestion
from zoo.modalities import BPEConfig, BytesConfig, PatchesConfig, Vocabulary

TEXT_TOKENIZERS = {"bytes": BytesConfig, "bpe": BPEConfig}
IMAGE_TOKENIZERS = {"patches": PatchesConfig}


def _one_of(known: Mapping[str, type[Config]]) -> pydantic.BeforeValidator:
    """A field that holds the config which `type` names in `known`, or null where the field allows it."""

    def resolve(value: Any) -> Any:
        if value is None or isinstance(value, Config):
            return value
        if not isinstance(value, Mapping):
            raise PydanticCustomError("zoo", "{text}", {"text": f"{value!r} is no tokenizer; write {{type: …}}"})
        name = value.get("type")
        if name not in known:
            text = f"{name!r} is not known; known: {', '.join(known)}{suggestion(str(name), known)}"
            raise PydanticCustomError("zoo_type", "{text}", {"text": text})
        try:
            return known[name].model_validate(dict(value))
        except pydantic.ValidationError as error:
            raise PydanticCustomError("zoo_nested", "nested", {"error": error, "root": known[name]}) from None

    return pydantic.BeforeValidator(resolve)


class DataConfig(Config):
    """Where the shards are and how they become rows of tokens.

    path: folder of WebDataset tar shards, relative to the current working directory.
    train, validation: patterns of shard names inside `path`; `validation: null` for none.
    text, image: the tokenizer of each modality; `image: null` for text alone.
    sequence_length: T, tokens of a row; a whole image with its begin and end must fit.
    max_broken_documents: how many unusable documents may be skipped, over all shards. Each is named.
    cache: folder for indexes and trained tokenizers; default: a hidden folder inside `path`, or, where that
        cannot be written, one under the user's cache folder.
    """

    path: str
    train: str = "*train*.tar"
    validation: str | None = "*val*.tar"
    text: Annotated[BytesConfig | BPEConfig, _one_of(TEXT_TOKENIZERS)] = BytesConfig()
    image: Annotated[PatchesConfig | None, _one_of(IMAGE_TOKENIZERS)] = None
    sequence_length: pydantic.PositiveInt
    max_broken_documents: pydantic.NonNegativeInt = 0
    cache: str | None = None

    @pydantic.field_validator("sequence_length")
    @classmethod
    def _holds_an_image(cls, length: int, info: pydantic.ValidationInfo) -> int:
        image = info.data.get("image")
        need, what, way_out = 2, "<bos> and <eos>", ""
        if image is not None:
            need = image.tokens_per_image + 4
            what = f"one image: {image.tokens_per_image} codes, <begin_image>, <end_image>, <bos> and <eos>"
            way_out = ", or make data.image.patch larger or data.image.image_size smaller"
        if length < need:
            raise ValueError(
                f"is too short for {what} need {need} tokens; set data.sequence_length to at least {need}{way_out}"
            )
        return length

    @property
    def tokenizers(self) -> dict[str, BytesConfig | BPEConfig | PatchesConfig]:
        """Config of the tokenizer of each modality, in the order of the modalities."""
        return {"text": self.text} | ({} if self.image is None else {"image": self.image})


def vocabulary(config: DataConfig) -> Vocabulary:
    """The id space of `config`; no data is touched."""
    return Vocabulary({modality: tokenizer.size for modality, tokenizer in config.tokenizers.items()})
