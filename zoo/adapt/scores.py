"""Scores without weights: the attention that tokens receive (FastV, arXiv 2403.06764, §4) and random draws.

FastV drops image tokens from layer K on by the attention that the prompt's last token pays them in the layer before,
mean over heads. Its query is one row, so that row alone is computed beside the layer's own attention, whatever
implementation that has. In a forward that holds generated tokens too (without a cache) the last one is another.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from zoo.adapt.context import AdaptContext
from zoo.adapt.family import PADDING
from zoo.config import UserError
from zoo.noise import uniform
from zoo.routing.candidates import Candidates
from zoo.routing.scorer import Scorer

NAME = "zoo_received"
"""Name of the attention function that also says what the last token attends to."""


class Unlearned(Scorer):
    """Base of scorers without weights: they do not read the tokens' values, and give ranks rather than log-odds."""


class RandomScorer(Unlearned, counter_noise=True):
    """Uniform draws, of each layer its own."""

    def forward(self, x: Tensor, candidates: Candidates | None = None) -> Tensor:
        assert candidates is not None
        return uniform(candidates.key, candidates.salt, 1)


class AttentionScorer(Unlearned, counter_noise=True):
    """The attention that `attend` saw tokens receive."""

    def forward(self, x: Tensor, candidates: Candidates | None = None) -> Tensor:
        assert candidates is not None
        return candidates.context.shared("received", _missing)[candidates.index, None]


UNLEARNED: dict[str, type[Unlearned]] = {"attention": AttentionScorer, "random": RandomScorer}
"""By `router.type` of the config."""


class Watched:
    """An attention module's config, under which it calls `attend`. What is set on the model's own config still
    counts."""

    def __init__(self, config: Any) -> None:
        self.dense = config

    _attn_implementation = NAME

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "dense":  # a copy in the making has none yet
            raise AttributeError(name)
        return getattr(self.dense, name)


def watch(layer: nn.Module) -> None:
    """Have a decoder layer's attention tell the context what the last token attends to.

    Raises:
        UserError: its attention is not called by the name that its config gives.
    """
    attention: Any = getattr(layer, "self_attn", None)
    module = sys.modules[type(attention).__module__]
    if not hasattr(attention, "config") or not hasattr(module, "eager_attention_forward"):
        raise UserError(
            f"router.type: attention: the attention weights of {type(layer).__name__} are not available; choose a "
            "linear or random router"
        )
    attention.config = Watched(attention.config)


def unwatch(layer: nn.Module) -> None:
    """Undo what `watch` did to a layer."""
    attention: Any = getattr(layer, "self_attn", None)
    if isinstance(getattr(attention, "config", None), Watched):
        attention.config = attention.config.dense


def attend(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    """The module's own attention; if the forward routes, `received` goes into its context."""
    eager = sys.modules[type(module).__module__].eager_attention_forward
    own = ALL_ATTENTION_FUNCTIONS.get_interface(module.config.dense._attn_implementation, eager)
    context: AdaptContext | None = kwargs.get("mod_context")
    if context is not None and context.routes:
        scale = kwargs.get("scaling") or query.shape[-1] ** -0.5
        with torch.autocast(query.device.type, enabled=False):
            context.shared("received", lambda: received(context, query.detach(), key.detach(), attention_mask, scale))
    return own(module, query, key, value, attention_mask, **kwargs)


def received(context: AdaptContext, query: Tensor, key: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """(B·T,) fp32: the attention weight of each token under the last one of its row, padding apart; mean over heads.

    Args:
        query: (B, H, T, K).
        key: (B, G, S, K), G heads of keys; its last T columns are the forward's.
        mask: as attention functions get it: (B or 1, 1, T, S) bool or additive, (B, S) of valid keys, or None.
    """
    rows, heads, tokens, width = query.shape
    columns = torch.arange(tokens)
    assert context.kind is not None
    last = torch.where(context.kind != PADDING, columns, 0).amax(1).to(query.device)  # (B,)
    wide = torch.promote_types(query.dtype, torch.float32)
    last_query = query.gather(2, last[:, None, None, None].expand(rows, heads, 1, width)).to(wide)
    grouped = last_query.view(rows, key.shape[1], -1, width)  # heads that share keys stand side by side
    scores = (grouped @ key.to(wide).transpose(2, 3)).view(rows, heads, -1) * scale
    if isinstance(mask, Tensor) and mask.dim() == 4:
        row = mask.expand(rows, -1, -1, -1)[:, 0].gather(1, last[:, None, None].expand(rows, 1, mask.shape[-1]))
        row = row[..., : key.shape[2]]
        scores = scores.masked_fill(~row, -torch.inf) if row.dtype == torch.bool else scores + row
    else:
        seen = torch.arange(key.shape[2], device=key.device) <= (last + key.shape[2] - tokens)[:, None]
        seen = seen if mask is None else seen & mask[:, : key.shape[2]].bool()
        scores = scores.masked_fill(~seen[:, None], -torch.inf)
    return scores.softmax(-1).mean(1)[:, key.shape[2] - tokens :].reshape(-1)


def _missing() -> Tensor:
    raise UserError("router.type: attention: the layer before the first routed one gave no attention weights")


ALL_ATTENTION_FUNCTIONS.register(NAME, attend)
