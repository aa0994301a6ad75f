"""Multi-head attention: rotary positions, grouped queries, optional QK-norm, packed documents, a decoding state."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from pydantic import Field
from torch import Tensor

from zoo import kernels
from zoo.config import ConfigError
from zoo.context import TokenContext
from zoo.flops import Cost
from zoo.layers import rotary_tables, rotate
from zoo.registry import BlockConfig, Place, register
from zoo.slots import Mixer
from zoo.states import AttentionState
from zoo.untied import Grouping, ModalityLinear, ModalityNorm, Towers, check_towers


@register("mixer", "attention")
class Attention(Mixer, counter_noise=True):
    """Attention inside each document: causal, and in both directions inside an item of the context (Transfusion,
    arXiv 2408.11039 §3). QK-norm is per head, before rotation (Chameleon, arXiv 2405.09818)."""

    bidirectional = True

    class Config(BlockConfig):
        heads: int = Field(gt=0)
        """Query heads H."""
        kv_heads: int | None = Field(None, gt=0)
        """Key/value heads Hkv; default H. H must be a multiple (grouped-query attention, arXiv 2305.13245)."""
        head_dim: int | None = Field(None, gt=0)
        """K; default d_model / H."""
        rope_theta: float = Field(10_000.0, gt=0)
        """Base of the wavelengths of rotary position embedding."""
        qk_norm: bool = False
        """Normalise each head's queries and keys before they are rotated (Chameleon)."""
        untied: list[Literal["q_proj", "k_proj", "v_proj", "o_proj", "qk_norm"]] = Field(default_factory=list)
        """Projections with weights of their own for each modality; all of them make Mixture-of-Transformers
        (arXiv 2411.04996 §3). Attention itself stays global."""
        towers: Towers | None = None
        """Modalities that share their untied weights (leave-one-out ablation); default: none do."""

        def check(self, place: Place, path: str) -> None:
            if self.head_dim is None and place.d_model % self.heads:
                raise ConfigError(
                    f"{path}.heads: {self.heads} does not divide d_model {place.d_model}; change one or set head_dim"
                )
            if self.width(place) % 2:
                raise ConfigError(
                    f"{path}.head_dim: {self.width(place)} is odd; rotary embedding turns pairs, make it even"
                )
            if self.heads % (self.kv_heads or self.heads):
                raise ConfigError(
                    f"{path}.kv_heads: {self.kv_heads} does not divide heads {self.heads}; every group has equally many"
                )
            if "qk_norm" in self.untied and not self.qk_norm:
                raise ConfigError(f"{path}.untied: qk_norm is off; set {path}.qk_norm to true, or leave it out here")
            check_towers(self.towers, place.modalities, f"{path}.towers", None if self.untied else f"{path}.untied")

        def width(self, place: Place) -> int:
            """Width K of a head."""
            return self.head_dim or place.d_model // self.heads

    def __init__(self, config: Config, place: Place) -> None:
        super().__init__()
        self.heads, self.kv_heads = config.heads, config.kv_heads or config.heads
        self.head_dim, self.theta = config.width(place), config.rope_theta
        inner, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        self.grouping = Grouping.of(place.modalities, config.towers, untied=bool(config.untied))
        groups = dict.fromkeys(config.untied, self.grouping.count)
        self.q_proj = ModalityLinear(place.d_model, inner, groups.get("q_proj", 1))
        self.k_proj = ModalityLinear(place.d_model, kv, groups.get("k_proj", 1))
        self.v_proj = ModalityLinear(place.d_model, kv, groups.get("v_proj", 1))
        out_scale = (2 * place.layers) ** -0.5
        self.o_proj = ModalityLinear(inner, place.d_model, groups.get("o_proj", 1), scale=out_scale)
        self.q_norm = ModalityNorm(self.head_dim, groups.get("qk_norm", 1)) if config.qk_norm else None
        self.k_norm = ModalityNorm(self.head_dim, groups.get("qk_norm", 1)) if config.qk_norm else None
        self.backend = place.kernels.get("attention", "auto")
        kernels.choose("attention", self.backend)

    def forward(self, x: Tensor, context: TokenContext, state: AttentionState | None = None) -> Tensor:
        """x (B, T, D) → branch output (B, T, D), 0 at padding.

        With `state` the tokens continue what it has seen; an item is fed whole, see `AttentionState`.
        """
        sizes, tokens = self.grouping.sizes(context), self.grouping.split(x, context)
        query = self._heads(self.q_proj(tokens, sizes), self.heads)
        key = self._heads(self.k_proj(tokens, sizes), self.kv_heads)
        value = self._heads(self.v_proj(tokens, sizes), self.kv_heads)
        if self.q_norm is not None and self.k_norm is not None:
            query, key = self.q_norm(query, sizes), self.k_norm(key, sizes)
        query, key, value = (self.grouping.unsort(part, context) for part in (query, key, value))
        kernel = kernels.choose("attention", self.backend, x.device.type).module
        tables = rotary_tables(context, self.head_dim, self.theta, x.dtype)
        query, key = rotate(query, tables), rotate(key, tables)
        seen = None if state is None else state.append(key, value, context)
        if seen is None:
            mixed = kernel.packed_attention(query, key, value, context)
        else:
            mixed = kernel.masked_attention(query, *seen)
        mixed = self.grouping.split(mixed.flatten(2), context)
        return self.grouping.merge(self.o_proj(mixed, sizes), context)

    def _heads(self, x: Tensor, heads: int) -> Tensor:
        """(…, H·K) → (…, H, K)."""
        return x.view(*x.shape[:-1], heads, self.head_dim)

    def init_state(self, rows: int, length: int, like: Tensor) -> AttentionState:
        """State for `rows` rows of at most `length` tokens, with the dtype and device of `like`."""
        return AttentionState.empty(rows, length, self.kv_heads, self.head_dim, like)

    def cost(self, length: float, load: Mapping[str, float] | None = None) -> Cost:
        """Projections, and scores and mixing at (T + 1) / 2 keys a query: what items see ahead is not counted."""
        projections = [p.cost() for p in (self.q_proj, self.k_proj, self.v_proj, self.o_proj)]
        pairs = 4.0 * self.heads * self.head_dim * (length + 1) / 2
        norms = sum(norm.width for norm in (self.q_norm, self.k_norm) if norm is not None)
        return Cost.total(projections) + Cost.of(flops=pairs, active=norms)
