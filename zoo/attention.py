"""Multi-head attention: rotary positions, grouped queries, optional QK-norm, packed documents, a decoding state."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from pydantic import Field
from torch import Tensor, nn

from zoo import kernels
from zoo.config import ConfigError
from zoo.context import TokenContext
from zoo.flops import Cost
from zoo.layers import Linear, RMSNorm, rotary_tables, rotate
from zoo.registry import BlockConfig, Place, register
from zoo.states import AttentionState


@register("mixer", "attention")
class Attention(nn.Module):
    """Causal attention inside each document. QK-norm is per head, before the rotation (Chameleon, arXiv 2405.09818 §2.3)."""

    class Config(BlockConfig):
        heads: int = Field(gt=0)
        """Query heads H."""
        kv_heads: int | None = Field(None, gt=0)
        """Key/value heads Hkv; default H. H must be a multiple (grouped-query attention, arXiv 2305.13245)."""
        head_dim: int | None = Field(None, gt=0)
        """K; default d_model / H."""
        rope_theta: float = Field(10_000.0, gt=0)
        qk_norm: bool = False

        def check(self, place: Place, path: str) -> None:
            if self.head_dim is None and place.d_model % self.heads:
                raise ConfigError(
                    f"{path}.heads: {self.heads} does not divide d_model {place.d_model}; change one of them or set head_dim"
                )
            if self.width(place) % 2:
                raise ConfigError(f"{path}.head_dim: {self.width(place)} is odd; rotary embedding turns pairs, make it even")
            if self.heads % (self.kv_heads or self.heads):
                raise ConfigError(
                    f"{path}.kv_heads: {self.kv_heads} does not divide heads {self.heads}; every group has equally many"
                )

        def width(self, place: Place) -> int:
            """K."""
            return self.head_dim or place.d_model // self.heads

    def __init__(self, config: Config, place: Place) -> None:
        super().__init__()
        self.heads, self.kv_heads = config.heads, config.kv_heads or config.heads
        self.head_dim, self.theta = config.width(place), config.rope_theta
        self.modalities = len(place.modalities)
        inner, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        self.q_proj = Linear(place.d_model, inner)
        self.k_proj = Linear(place.d_model, kv)
        self.v_proj = Linear(place.d_model, kv)
        self.o_proj = Linear(inner, place.d_model, scale=(2 * place.layers) ** -0.5)
        self.q_norm = RMSNorm(self.head_dim) if config.qk_norm else None
        self.k_norm = RMSNorm(self.head_dim) if config.qk_norm else None
        self.kernel = kernels.choose("attention", place.kernels.get("attention", "auto")).module

    def forward(self, x: Tensor, context: TokenContext, state: AttentionState | None = None) -> Tensor:
        """x (B, T, D) → branch output (B, T, D), 0 at padding."""
        rows, columns, _ = x.shape
        query = self.q_proj(x).view(rows, columns, self.heads, self.head_dim)
        key = self.k_proj(x).view(rows, columns, self.kv_heads, self.head_dim)
        value = self.v_proj(x).view(rows, columns, self.kv_heads, self.head_dim)
        if self.q_norm is not None and self.k_norm is not None:
            query, key = self.q_norm(query), self.k_norm(key)
        tables = rotary_tables(context, self.head_dim, self.theta, x.dtype)
        query, key = rotate(query, tables), rotate(key, tables)
        if state is None:
            mixed = self.kernel.packed_attention(query, key, value, context)
        else:
            before = state.used
            key, value, document = state.append(key, value, context.document)
            slot = torch.arange(state.used, device=x.device)
            seen = slot[None, :] <= before + torch.arange(columns, device=x.device)[:, None]
            mask = seen & (context.document[:, None, :, None] == document[:, None, None, :])
            mixed = self.kernel.masked_attention(query, key, value, mask)
        y = self.o_proj(mixed.reshape(rows, columns, -1))
        return y.masked_fill(~context.valid.unsqueeze(-1), 0.0) if context.padded else y

    def init_state(self, rows: int, length: int, like: Tensor) -> AttentionState:
        """State for `rows` rows of at most `length` tokens, with the dtype and device of `like`."""
        return AttentionState.empty(rows, length, self.kv_heads, self.head_dim, like)

    def cost(self, length: float, load: Mapping[str, float] | None = None) -> Cost:
        """Projections, and scores and mixing at (T + 1) / 2 keys a query."""
        weights = sum(p.weight.numel() for p in (self.q_proj, self.k_proj, self.v_proj, self.o_proj))
        pairs = 4.0 * self.heads * self.head_dim * (length + 1) / 2
        norms = sum(norm.weight.numel() for norm in (self.q_norm, self.k_norm) if norm is not None)
        return Cost.matmul(self.modalities, weights) + Cost.of(self.modalities, flops=pairs, active=norms)
