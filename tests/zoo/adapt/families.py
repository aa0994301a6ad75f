"""Tiny random models of each family: a family is one row of FAMILIES."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from tests.zoo.adapt.pictures import END, IMAGE, PAD, START, VIDEO, Inputs, Picture, drawn


@dataclasses.dataclass(frozen=True)
class Family:
    """How tests get a model and inputs of a family."""

    build: Callable[..., nn.Module]
    """build(**text_config changes) → a random fp32 model in evaluation, its weights from torch's seed."""
    inputs: Callable[..., dict[str, Tensor]]
    """As `Inputs`, which it is in FAMILIES."""
    rows: tuple[list[int], ...] = ([2, 3], [5, 4, 3], [6])
    """A batch for tests: a row with a picture, one with two, one with none where the family can."""
    layers: tuple[int, ...] = (1, 2)
    """The layers that tests route."""
    chunks: bool = True
    """Whether the dense model can be given a prompt in parts."""
    splits: bool = True
    """Whether `generate` can do so too."""
    attention: tuple[str, ...] = ("sdpa", "eager")


def set_decoder_attention(model: nn.Module, implementation: str) -> None:
    """Set the attention of the decoder; the vision tower keeps its own. Phi-4's attends backwards only under sdpa, both
    ways under eager, so that its features are others."""
    part = "text_config" if "text_config" in model.config.sub_configs else ""
    model.set_attn_implementation({part: implementation})


def small_text(**changes: Any) -> dict[str, Any]:
    """Options of a small text config."""
    options = {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "initializer_range": 0.3,
        "pad_token_id": PAD,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    return options | changes


def small_vision(**changes: Any) -> dict[str, Any]:
    """Options of a small vision config: 4 × 4 patches."""
    options = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 8,
        "patch_size": 2,
    }
    return options | changes


def llava(**text: Any) -> nn.Module:
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**small_vision()),
        text_config=transformers.LlamaConfig(**small_text(**text)),
        image_token_index=IMAGE,
        image_seq_length=16,
    )
    return transformers.LlavaForConditionalGeneration(config).eval()


def llava_next(**text: Any) -> nn.Module:
    """An image of two tiles: 4 tokens of all of it, and 2 rows of 4 with a newline each."""
    config = transformers.LlavaNextConfig(
        vision_config=transformers.CLIPVisionConfig(**small_vision(patch_size=4)),
        text_config=transformers.LlamaConfig(**small_text(**text)),
        image_token_index=IMAGE,
        image_grid_pinpoints=[[8, 16], [16, 8]],
    )
    return transformers.LlavaNextForConditionalGeneration(config).eval()


def llava_onevision(**text: Any) -> nn.Module:
    """Images as LLaVA-NeXT's, of 16 tokens and 4 rows of 9; a video frame is pooled to 4 tokens, one newline ends
    it."""
    vision = transformers.SiglipVisionConfig(**small_vision(), vision_use_head=False)
    config = transformers.LlavaOnevisionConfig(
        vision_config=vision,
        text_config=transformers.Qwen2Config(**small_text(**text)),
        image_token_index=IMAGE,
        video_token_index=VIDEO,
        image_grid_pinpoints=[[8, 16], [16, 8]],
    )
    return transformers.LlavaOnevisionForConditionalGeneration(config).eval()


def video_llava(**text: Any) -> nn.Module:
    """An image is 16 tokens, a frame 17."""
    config = transformers.VideoLlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**small_vision()),
        text_config=transformers.LlamaConfig(**small_text(**text)),
        image_token_index=IMAGE,
        video_token_index=VIDEO,
    )
    return transformers.VideoLlavaForConditionalGeneration(config).eval()


def qwen_vl(kind: str, vision: dict[str, Any], **changes: Any) -> Callable[..., nn.Module]:
    """A model as Qwen2-VL and later ones, 4 × 4 tokens an image."""
    common = {"depth": 2, "num_heads": 2, "patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 2}
    rotary = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}

    def build(**text: Any) -> nn.Module:
        ids = {"image_token_id": IMAGE, "video_token_id": VIDEO, "vision_start_token_id": START}
        config = getattr(transformers, f"{kind}Config")(
            text_config=small_text(rope_parameters=rotary, **changes, **text),
            vision_config=common | {"in_channels": 3} | vision,
            vision_end_token_id=END,
            **ids,
        )
        return getattr(transformers, f"{kind}ForConditionalGeneration")(config).eval()

    return build


def internvl(**text: Any) -> nn.Module:
    """8 × 8 patches, shuffled to 4 × 4 tokens."""
    config = transformers.InternVLConfig(
        vision_config=small_vision(image_size=16),
        text_config=transformers.Qwen2Config(**small_text(**text)),
        image_token_id=IMAGE,
    )
    return transformers.InternVLForConditionalGeneration(config).eval()


def idefics(kind: str) -> Callable[..., nn.Module]:
    def build(**text: Any) -> nn.Module:
        config = getattr(transformers, f"{kind}Config")(
            text_config=small_text(model_type="llama", **text),
            vision_config=small_vision(image_size=16),
            image_token_id=IMAGE,
            scale_factor=2,
            pad_token_id=PAD,
        )
        return getattr(transformers, f"{kind}ForConditionalGeneration")(config).eval()

    return build


def paligemma(**text: Any) -> nn.Module:
    vision = small_vision(model_type="siglip_vision_model", projection_dim=32, vision_use_head=False)
    config = transformers.PaliGemmaConfig(
        text_config=small_text(model_type="gemma", head_dim=8, **text),
        vision_config=vision,
        image_token_index=IMAGE,
        projection_dim=32,
        hidden_size=32,
    )
    return transformers.PaliGemmaForConditionalGeneration(config).eval()


def gemma3(**text: Any) -> nn.Module:
    """Every image sees itself both ways; layers 0 and 3 have a window."""
    kinds = ["sliding_attention", "full_attention", "full_attention", "sliding_attention"]
    config = transformers.Gemma3Config(
        text_config=small_text(head_dim=8, sliding_window=16, layer_types=kinds, **text),
        vision_config=small_vision(image_size=16),
        mm_tokens_per_image=16,
        image_token_index=IMAGE,
        boi_token_index=START,
        eoi_token_index=END,
    )
    return transformers.Gemma3ForConditionalGeneration(config).eval()


def chameleon(**text: Any) -> nn.Module:
    """Images are quantised to codes, 4 × 4 of them."""
    quantiser = {
        "embed_dim": 8,
        "num_embeddings": 8,
        "latent_channels": 8,
        "resolution": 8,
        "base_channels": 32,
        "channel_multiplier": [1, 1],
        "num_res_blocks": 1,
        "double_latent": False,
    }
    codes = {f"IMGIMG{letter}Z": number + 40 for number, letter in enumerate("ABCDEFGH")}
    config = transformers.ChameleonConfig(
        **small_text(**text), vocabulary_map={"<image>": IMAGE, **codes}, vq_config=quantiser
    )
    return transformers.ChameleonForConditionalGeneration(config).eval()


def gemma4(**text: Any) -> nn.Module:
    """Layers get an input of their own besides the stream; 0 has a window."""
    kinds = ["sliding_attention", "full_attention", "full_attention", "full_attention"]
    options = {
        "head_dim": 8,
        "global_head_dim": 8,
        "sliding_window": 16,
        "layer_types": kinds,
        "hidden_size_per_layer_input": 4,
        "vocab_size_per_layer_input": 64,
    }
    vision = small_vision(head_dim=8, num_key_value_heads=2, pooling_kernel_size=2, position_embedding_size=64)
    config = transformers.Gemma4Config(
        text_config=small_text(**(options | text)),
        vision_config={name: value for name, value in vision.items() if name != "image_size"},
        audio_config=None,
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        audio_token_id=59,
        boi_token_id=START,
        eoi_token_id=END,
    )
    return transformers.Gemma4ForConditionalGeneration(config).eval()


def phi4(**text: Any) -> nn.Module:
    """An image is a tile and a view of it, 2 × 2 tokens each with a mark after every row and one between them."""
    audio = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_blocks": 1,
        "num_attention_heads": 2,
        "ext_pw_out_channel": 16,
        "depthwise_separable_out_channel": 16,
        "nemo_conv_channels": 16,
        "audio_token_id": 59,
    }
    config = transformers.Phi4MultimodalConfig(
        **small_text(**text),
        vision_config=small_vision(crop_size=8, image_token_id=IMAGE),
        audio_config=audio,
        sliding_window=None,
    )
    return transformers.Phi4MultimodalForCausalLM(config).eval()


def qwen_types(ids: Tensor) -> dict[str, Tensor]:
    return {"mm_token_type_ids": (ids == IMAGE).long() + 2 * (ids == VIDEO).long()}


def qwen_frame(features: dict[str, Tensor], i: int) -> dict[str, Tensor]:
    return {
        "pixel_values_videos": features["pixel_values_videos"].view(3, -1, 96)[i],
        "video_grid_thw": torch.tensor([[1, 4, 4]]),
    }


def gemma4_types(ids: Tensor) -> dict[str, Tensor]:
    return {"mm_token_type_ids": (ids == IMAGE).long()}


PLAIN = Picture((IMAGE,) * 16, drawn(pixel_values=(1, 3, 8, 8)))
LARGE = Picture((START, *(IMAGE,) * 16, END), drawn(pixel_values=(1, 3, 16, 16)))
GRID = Picture((START, *(IMAGE,) * 16, END), drawn(pixel_values=(64, 96), image_grid_thw=[[1, 8, 8]]))
QWEN_CLIP = Picture(
    (START, *(VIDEO,) * 12, END),
    drawn(pixel_values_videos=(48, 96), video_grid_thw=[[3, 4, 4]]),
    frames=(4, 4, 4),
    frame=qwen_frame,
)
VIDEO_LLAVA_CLIP = Picture(
    (VIDEO,) * 51,
    drawn(pixel_values_videos=(1, 3, 3, 8, 8)),
    frames=(17, 17, 17),
    frame=lambda features, i: {"pixel_values_videos": features["pixel_values_videos"][:, i : i + 1]},
)
TILES = Picture((IMAGE,) * 14, drawn(pixel_values=(1, 3, 3, 8, 8), image_sizes=[[8, 16]]))
ONEVISION = Picture((IMAGE,) * 52, drawn(pixel_values=(1, 3, 3, 8, 8), image_sizes=[[8, 16]]))
ONEVISION_CLIP = Picture((VIDEO,) * 13, drawn(pixel_values_videos=(1, 3, 3, 8, 8)), frames=(4, 4, 5))

GEMMA4 = Picture(
    (START, *(IMAGE,) * 4, END),
    drawn(pixel_values=(1, 16, 12), image_position_ids=[[[x, y] for y in range(4) for x in range(4)]]),
)
PHI4 = Picture(
    (IMAGE,) * 13,
    drawn(image_pixel_values=(1, 2, 3, 8, 8), image_sizes=[[8, 8]], image_attention_mask=[[[[1.0] * 4] * 4] * 2]),
)

QWEN3_VISION = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "out_hidden_size": 32,
    "num_position_embeddings": 64,
    "deepstack_visual_indexes": [0, 1],
}

FAMILIES = {
    "llava": Family(llava, Inputs((PLAIN,))),
    "llava_next": Family(llava_next, Inputs((TILES,))),
    "llava_onevision": Family(llava_onevision, Inputs((ONEVISION,))),
    "llava_onevision_video": Family(llava_onevision, Inputs((ONEVISION_CLIP, ONEVISION))),
    "qwen2_vl": Family(
        qwen_vl("Qwen2VL", {"embed_dim": 16, "hidden_size": 32, "mlp_ratio": 2}), Inputs((GRID,), qwen_types)
    ),
    "qwen2_5_vl_video": Family(
        qwen_vl(
            "Qwen2_5_VL",
            {
                "hidden_size": 16,
                "intermediate_size": 32,
                "out_hidden_size": 32,
                "window_size": 16,
                "fullatt_block_indexes": [1],
            },
        ),
        Inputs((QWEN_CLIP, GRID), qwen_types),
    ),
    "qwen3_vl": Family(
        qwen_vl(
            "Qwen3VL",
            QWEN3_VISION,
            head_dim=8,
        ),
        Inputs((GRID,), qwen_types),
    ),
    "qwen3_vl_moe": Family(
        qwen_vl(
            "Qwen3VLMoe",
            QWEN3_VISION,
            head_dim=8,
            num_experts=4,
            num_experts_per_tok=2,
            moe_intermediate_size=16,
        ),
        Inputs((GRID,), qwen_types),
        attention=("eager",),  # its experts know no float64
    ),
    "internvl": Family(internvl, Inputs((LARGE,))),
    "idefics3": Family(idefics("Idefics3"), Inputs((LARGE,), by_row=True)),
    "smolvlm": Family(idefics("SmolVLM"), Inputs((LARGE,), by_row=True)),
    "paligemma": Family(
        paligemma,
        Inputs((PLAIN,), lambda ids: {"token_type_ids": torch.zeros_like(ids)}),
        rows=([0, 3], [0, 0, 5], [0, 4]),
        chunks=False,  # its prompt is seen both ways, as a whole
    ),
    "gemma3": Family(gemma3, Inputs((LARGE,), lambda ids: {"token_type_ids": (ids == IMAGE).long()})),
    "gemma4": Family(gemma4, Inputs((GEMMA4,), gemma4_types)),
    # under beams it gives a row's second picture to another row, and so does the dense model
    "phi4_multimodal": Family(phi4, Inputs((PHI4,)), rows=([2, 3], [5, 4], [6]), splits=False),
    "chameleon": Family(chameleon, Inputs((Picture((START, *(IMAGE,) * 16, END), drawn(pixel_values=(1, 3, 8, 8))),))),
    "video_llava": Family(video_llava, Inputs((VIDEO_LLAVA_CLIP, PLAIN))),
}
