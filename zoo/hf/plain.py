"""Dense models that are Llama's architecture, or Qwen3's where queries and keys are normalised: their weights under the
names of Transformers' own classes, so that nothing of the zoo is needed to run them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import transformers
from torch import Tensor

from zoo.attention import Attention
from zoo.config import UserError
from zoo.feedforward import Dense
from zoo.hf.config import ZooConfig
from zoo.layers import RMSNorm

Piece = tuple[str, Callable[[Tensor], Tensor]]
"""Name of one of the zoo's weights, and what a class of Transformers wants of it."""


def plain_config(config: ZooConfig) -> transformers.PreTrainedConfig:
    """The config of the same model as one of Transformers.

    Raises:
        UserError: it is no such architecture; says which part prevents it.
    """
    network = config.model_config()
    first = network.layers[0]
    for index, layer in enumerate(network.layers):
        for what in _prevents(layer, first):
            raise UserError(f"model.layers[{index}].{what}; leave out --plain")
    if network.own_heads:
        raise UserError(
            f"modalities.{next(iter(network.own_heads))}: carries no ids, which neither Llama nor Qwen3 takes; leave "
            "out --plain"
        )
    mixer, feedforward = first.mixer, first.feedforward
    assert isinstance(mixer, Attention.Config) and isinstance(feedforward, Dense.Config)
    kind = transformers.Qwen3Config if mixer.qk_norm else transformers.LlamaConfig
    return kind(
        vocab_size=network.vocab_size or 0,
        hidden_size=network.d_model,
        intermediate_size=feedforward.d_ff,
        num_hidden_layers=len(network.pattern()),
        num_attention_heads=mixer.heads,
        num_key_value_heads=mixer.kv_heads or mixer.heads,
        head_dim=mixer.head_dim or network.d_model // mixer.heads,
        max_position_embeddings=config.max_position_embeddings,
        rms_norm_eps=RMSNorm(1).eps,
        rope_parameters={"rope_type": "default", "rope_theta": mixer.rope_theta},
        attention_bias=False,
        tie_word_embeddings=False,
        bos_token_id=config.bos_token_id,
        eos_token_id=config.eos_token_id,
        pad_token_id=config.pad_token_id,
        architectures=["Qwen3ForCausalLM" if mixer.qk_norm else "LlamaForCausalLM"],
        dtype=config.dtype,
    )


def _prevents(layer: Any, first: Any) -> Iterator[str]:
    """What of a layer neither Llama nor Qwen3 has: key, value, and why."""
    if not isinstance(layer.mixer, Attention.Config):
        yield f"mixer.type: {layer.mixer.type_name}: Llama has attention alone"
    elif layer.mixer.untied:
        yield f"mixer.untied: {layer.mixer.untied}: Llama's weights are for all modalities"
    if not isinstance(layer.feedforward, Dense.Config):
        name = layer.feedforward.type_name if layer.feedforward is not None else None
        yield f"feedforward: {name}: Llama has one SwiGLU, type: dense"
    elif layer.feedforward.untied:
        yield "feedforward.untied: true: Llama's weights are for all modalities"
    if layer.depth is not None:
        yield f"depth: {layer.depth.type_name}: every token passes through Llama's layers"
    if layer.norm != "pre":
        yield f"norm: {layer.norm}: Llama normalises before"
    if layer.untied_norms:
        yield "untied_norms: true: Llama's gains are for all modalities"
    if (layer.mixer, layer.feedforward) != (first.mixer, first.feedforward):
        yield "mixer: differs from the first layer's; Llama's layers are alike"


def plain_weights(config: ZooConfig) -> dict[str, Piece]:
    """Where each weight of `plain_config`'s model comes from, by its name."""
    network = config.model_config()

    def whole(weight: Tensor) -> Tensor:
        return weight

    def gate(weight: Tensor) -> Tensor:
        return weight.chunk(2)[0].contiguous()

    def up(weight: Tensor) -> Tensor:
        return weight.chunk(2)[1].contiguous()

    named: dict[str, Piece] = {"model.embed_tokens.weight": ("embedding.weight", whole)}
    for number, (_, layer) in enumerate(network.pattern()):
        ours, theirs = f"layers.{number}", f"model.layers.{number}"
        norms = ("q_norm", "k_norm") if layer.mixer.qk_norm else ()
        for part in ("q_proj", "k_proj", "v_proj", "o_proj", *norms):
            named[f"{theirs}.self_attn.{part}.weight"] = (f"{ours}.mixer.{part}.weight", whole)
        named[f"{theirs}.mlp.gate_proj.weight"] = (f"{ours}.feedforward.w_in.weight", gate)
        named[f"{theirs}.mlp.up_proj.weight"] = (f"{ours}.feedforward.w_in.weight", up)
        named[f"{theirs}.mlp.down_proj.weight"] = (f"{ours}.feedforward.w_out.weight", whole)
        named[f"{theirs}.input_layernorm.weight"] = (f"{ours}.mixer_norm.weight", whole)
        named[f"{theirs}.post_attention_layernorm.weight"] = (f"{ours}.feedforward_norm.weight", whole)
    return named | {"model.norm.weight": ("norm.weight", whole), "lm_head.weight": ("head.weight", whole)}
