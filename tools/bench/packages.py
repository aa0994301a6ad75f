"""What is measured of the Transformers package: its blocks without a GPU's kernels, and its chunk scan."""

from __future__ import annotations

import importlib
import logging
import types
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from tools.bench.benchmark import Unavailable


def _model(name: str) -> types.ModuleType:
    """The module of one of its models.

    Raises:
        Unavailable: the package is not here.
    """
    try:
        module = importlib.import_module(f"transformers.models.{name}.modeling_{name}")
    except ImportError:
        raise Unavailable("needs Transformers; pip install -e .[dev]") from None
    logging.getLogger("transformers").setLevel(logging.ERROR)  # it warns that its form without kernels is slow
    return module


def chunk_scan() -> Callable[..., Tensor]:
    """Mamba-2's state-space dual."""
    return _model("mamba2").mamba2_chunk_scan


def mixer(kind: str, width: int, length: int, head_dim: int) -> nn.Module:
    """The mixer of a `mamba` or `mamba2` model with expansion 2; values (B, T, D) → (B, T, D)."""
    module = _model(kind)
    if kind == "mamba":
        return module.MambaMixer(module.MambaConfig(hidden_size=width, use_bias=False), 0)
    config = module.Mamba2Config(
        hidden_size=width,
        head_dim=head_dim,
        num_heads=2 * width // head_dim,
        n_groups=1,
        use_bias=False,
        chunk_size=min(256, length),
    )
    return module.Mamba2Mixer(config, 0)


def mixtral_block(width: int, hidden: int, experts: int) -> nn.Module:
    """Router and experts of Mixtral, each token to its best, in the form that runs without a GPU ("eager")."""
    module = _model("mixtral")
    config = module.MixtralConfig(
        hidden_size=width, intermediate_size=hidden, num_local_experts=experts, num_experts_per_tok=1
    )
    config._experts_implementation = "eager"
    block = module.MixtralSparseMoeBlock(config)
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.02)
    return block


def llama(width: int, hidden: int, layers: int, ids: int, heads: int) -> Any:
    """A Llama with first weights, in evaluation."""
    module = _model("llama")
    config = module.LlamaConfig(
        vocab_size=ids,
        hidden_size=width,
        intermediate_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        eos_token_id=None,
        bos_token_id=None,
    )
    return module.LlamaForCausalLM(config).eval()


@torch.no_grad()
def llama_prefill(model: Any, prompt: Tensor) -> Any:
    """Its cache after a prompt (B, T); logits of the last token are computed, too."""
    return model(prompt, use_cache=True, logits_to_keep=1).past_key_values


@torch.no_grad()
def llama_decode(model: Any, cache: Any, following: Tensor) -> None:
    """Go on token by token."""
    for n in range(following.shape[1]):
        model(following[:, n : n + 1], past_key_values=cache, use_cache=True)


def exported(config: Mapping[str, Any], length: int) -> Any:
    """A model of text alone as `zoo.hf` opens it, with first weights, in evaluation, without a grammar and an end.

    Args:
        config: section `model` of a recipe.
        length: longest context.
    """
    _model("llama")
    from zoo.hf import ZooConfig, ZooForCausalLM
    from zoo.modalities import Vocabulary

    described = ZooConfig(
        network=dict(config),
        modalities={
            "text": {"type": "bpe", "vocab_size": config["vocab_size"] - len(Vocabulary({"text": 1}).specials)}
        },
        max_position_embeddings=length,
        eos_token_id=None,
        pad_token_id=None,
        grammar=False,
    )
    return ZooForCausalLM(described).eval()
