"""What differs between families of multimodal models: where the decoder is, which ids stand for pictures, how a run of
picture tokens falls into images and frames. Everything else is the same for all of them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from torch import nn
from transformers import GenerationMixin

from zoo.config import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TEXT, IMAGE, VIDEO, ANSWER, PADDING = 0, 1, 2, 3, -1
"""What a token is. ANSWER: a text token with a label, in training."""

IGNORED = -100
"""Label of a token that is not predicted, Transformers' own."""

FEATURES = (
    "pixel_values",
    "pixel_values_images",
    "pixel_values_videos",
    "image_pixel_values",
    "image_hidden_states",
)
"""Arguments by which a forward carries pictures, beside `mm_encoder_outputs`, a mapping."""

FIXED = ("llava", "vipllava", "video_llava", "paligemma")
"""Model types whose images all have equally many tokens and may follow each other without a separator."""

FRAMES: dict[str, Callable[[Any], int]] = {
    "video_llava": lambda config: (config.vision_config.image_size // config.vision_config.patch_size) ** 2 + 1,
    "llava_onevision": lambda config: (
        (-(-(config.vision_config.image_size // config.vision_config.patch_size) // 2)) ** 2
    ),
}
"""Tokens of a video frame, of families in which it is always the same number and frames stand side by side."""

SIDE_BY_SIDE = ("qwen2_vl", "qwen2_5_vl")
"""Families whose videos have frames of any size side by side; later ones put a time stamp between."""

CROSSING = ("cross_attention_layers", "cross_layer_interval")
"""Keys of text configs whose decoder attends to pictures that are not in its stream (Mllama, IDEFICS)."""

GATED = ("post_feedforward_layernorm", "post_mlp_layernorm", "mlp", "feed_forward")
"""Where the MLP branch ends, first of those that a layer has."""


def has_pictures(inputs: Mapping[str, Any]) -> bool:
    """Whether a forward carries pictures. A placeholder id in one that does not was sampled: it is text."""
    encoded = inputs.get("mm_encoder_outputs") or {}
    return any(value is not None for value in (*(inputs.get(name) for name in FEATURES), *encoded.values()))


@dataclasses.dataclass(frozen=True)
class Parts:
    """The parts of a multimodal model that adapting it touches."""

    top: PreTrainedModel
    """What a caller calls: with the language head, if there is one."""
    base: PreTrainedModel
    """Where token ids and pictures become one stream."""
    decoder: PreTrainedModel
    """Where the layers are."""

    @property
    def layers(self) -> nn.ModuleList:
        return cast(nn.ModuleList, self.decoder.layers)

    @property
    def text_config(self) -> Any:
        return self.top.config.get_text_config(decoder=True)


def unwrapped(model: Any) -> Any:
    """The model of Transformers, out of PEFT's wrapper of it if there is one."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def parts(model: nn.Module) -> Parts:
    """Find the parts of a model.

    Args:
        model: of Transformers, or PEFT's wrapper of one.
    Raises:
        UserError: it is not a multimodal decoder, or its `generate` hides which tokens are those of pictures.
    """
    top = unwrapped(model)
    name = type(top).__name__
    if not hasattr(top, "config") or not hasattr(top, "get_decoder"):
        raise UserError(f"{name} is not a model of Transformers; give one loaded by AutoModelForImageTextToText")
    picture_ids(top.config, name)
    writes = [type(child).__name__ for child in top.children() if isinstance(child, GenerationMixin)]
    if writes and getattr(type(top), "generate", None) is not GenerationMixin.generate:
        raise UserError(
            f"{name}.generate calls its {writes[0]} with embeddings, which do not say which tokens are those of "
            "pictures; give a model whose generate calls the model itself, such as LLaVA"
        )
    decoder = top.get_decoder()
    if decoder is None or not isinstance(getattr(decoder, "layers", None), nn.ModuleList):
        decoder = getattr(decoder, "model", None)  # a decoder with a head of its own
    if decoder is None or not isinstance(getattr(decoder, "layers", None), nn.ModuleList):
        raise UserError(f"{name} has no decoder with a list of layers; it cannot be adapted")
    return Parts(top, top.base_model, decoder)


def picture_ids(config: Any, name: str) -> dict[int, int]:
    """Placeholder id → IMAGE or VIDEO.

    Raises:
        UserError: there is none, or pictures are no tokens of the decoder's stream.
    """
    text = config.get_text_config(decoder=True)
    if getattr(config, "is_encoder_decoder", False) or getattr(text, "is_encoder_decoder", False):
        crosses = "it has an encoder, to which pictures are given"
    else:
        crosses = next((f"config.{key}" for key in CROSSING if getattr(text, key, None)), "")
    if crosses:
        raise UserError(
            f"the decoder of {name} meets pictures by cross-attention ({crosses}), so that no token of its stream is a"
            " picture's and there is nothing to skip; give a model that puts pictures among its tokens, such as LLaVA"
        )
    vision = getattr(config, "vision_config", None)
    image = getattr(config, "image_token_id", None)
    if image is None and isinstance(getattr(config, "vocabulary_map", None), Mapping):  # Chameleon
        image = config.vocabulary_map.get("<image>")
    if image is None:  # Phi-4-multimodal
        image = getattr(vision, "image_token_id", None)
    video = getattr(config, "video_token_id", None)
    ids = {token: kind for token, kind in ((image, IMAGE), (video, VIDEO)) if token is not None}
    if not ids and vision is None:
        raise UserError(
            f"{name} has no image token (config.image_token_id): a text-only model, or one of sound, has nothing to "
            "skip; give a multimodal one, such as LLaVA"
        )
    if not ids:
        raise UserError(
            f"{name} sees pictures, but no id stands for their tokens (config.image_token_id), so that nothing says "
            "which ones may be skipped; set the id if the model has one, or give a model that has, such as LLaVA"
        )
    return ids


def gated(layer: nn.Module) -> str:
    """Name of the child of a decoder layer whose output is its MLP branch, as added to the residual stream."""
    if "Swin" in type(layer).__name__:  # Chameleon's: the norm follows the branch
        return "post_attention_layernorm"
    for name in GATED:
        if isinstance(getattr(layer, name, None), nn.Module):
            return name
    raise UserError(f"{type(layer).__name__} has no child {' or '.join(GATED)}; set gate.branch: block")


def may_follow(kind: int, frames: bool, inputs: Mapping[str, Any], config: Any) -> bool:
    """Whether a group of tokens of this kind may begin right after a forward that ended in one: where nothing stands
    between groups, and the forward brings whole pictures (`generate`'s prefill_chunk_size cuts anywhere)."""
    if inputs.get("mm_encoder_outputs"):
        return False
    if kind == IMAGE:
        return config.model_type in FIXED
    return frames and (config.model_type in FRAMES or config.model_type in SIDE_BY_SIDE)


def lengths(
    kind: int, index: np.ndarray, columns: int, frames: bool, inputs: Mapping[str, Any], config: Any
) -> list[int]:
    """Tokens of each image (or video), or of each frame, in the order of the tokens.

    Both are runs of tokens that nothing interrupts, except where a family puts images or frames side by side. What is
    asked of `inputs` is there in a plain forward and in `generate`, which encodes pictures beforehand.

    Args:
        kind: IMAGE or VIDEO.
        index: (n,) flat indices, into B·T, of the tokens of that kind; n > 0.
        columns: T.
        frames: whether videos are cut into frames.
        inputs: the forward's arguments.
        config: the model's.
    Raises:
        UserError: frames are asked for but nothing says where one ends; likewise images side by side.
    """
    starts = np.diff(index, prepend=index[0]) != 1
    starts |= np.diff(index // columns, prepend=-1) != 0
    starts[0] = True
    if kind == IMAGE and config.model_type in FIXED:
        count = _images(inputs)
        size = index.size // count
        if size * count == index.size and all(run % size == 0 for run in _sizes(starts)):
            return [size] * count
    if kind == VIDEO and frames:
        if config.model_type in FRAMES:
            return [part for run in _sizes(starts) for part in _cut(run, FRAMES[config.model_type](config))]
        if config.model_type in SIDE_BY_SIDE:
            return _frames_on_grid(index, starts, inputs, config)
    return _sizes(starts)


def _sizes(starts: np.ndarray) -> list[int]:
    """Lengths of the parts that begin where `starts`, (n,) bool, is true; starts[0] is."""
    return np.diff([*np.flatnonzero(starts), starts.size]).tolist()


def _images(inputs: Mapping[str, Any]) -> int:
    encoded = (inputs.get("mm_encoder_outputs") or {}).get("image")
    if encoded is not None:
        if encoded.get("last_hidden_state") is None:  # of parts of a prompt the features of its tokens alone are left
            raise UserError(
                "prefill_chunk_size cuts the prompt anywhere, and this family has nothing between images to tell "
                "them apart by; leave it out, or call the model on parts of the prompt with whole images"
            )
        return len(encoded.pooler_output)
    return len(next(inputs[n] for n in ("pixel_values", "pixel_values_images") if inputs.get(n) is not None))


def _cut(run: int, size: int) -> list[int]:
    """A video of `run` tokens in frames of `size`; what is left over (a newline token) goes with the last."""
    count = max(1, run // size)
    return [size] * (count - 1) + [run - size * (count - 1)]


def _frames_on_grid(index: np.ndarray, starts: np.ndarray, inputs: Mapping[str, Any], config: Any) -> list[int]:
    """Frames of videos that stand side by side: from their grids, or from the tokens' places (row, column), which go
    up within a frame."""
    positions, grid = inputs.get("position_ids"), inputs.get("video_grid_thw")
    if positions is not None and positions.dim() == 3 and positions.shape[0] >= 3:
        height, width = positions[-2:].reshape(2, -1)[:, index].cpu().numpy()
        up = (np.diff(height) > 0) | ((np.diff(height) == 0) & (np.diff(width) > 0))
        return _sizes(starts | np.append(True, ~up))
    if grid is None:
        raise UserError("group: frame needs video_grid_thw, as the processor gives it, to tell the frames of a video")
    merge = config.vision_config.spatial_merge_size**2
    return [height * width // merge for time, height, width in grid.tolist() for _ in range(time)]
