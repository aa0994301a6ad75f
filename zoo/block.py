"""The block: mixer and feed-forward, each with norm and residual."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Literal

from pydantic import Field
from torch import Tensor

from zoo import noise
from zoo.config import Config
from zoo.context import TokenContext
from zoo.flops import Cost
from zoo.layers import RMSNorm
from zoo.registry import DepthSlot, FeedForwardSlot, MixerSlot, Place
from zoo.slots import Branch, Component
from zoo.states import State
from zoo.untied import Grouping, Towers, check_towers


class LayerConfig(Config):
    """One layer: a mixer and a feed-forward, each with its norm and residual."""

    mixer: MixerSlot
    """What moves information between tokens."""
    feedforward: FeedForwardSlot | None = None
    """What is computed in each token by itself; null: the layer has a mixer alone, as Mamba's."""
    depth: DepthSlot | None = None
    """What decides which tokens pass through the layer; null: all do."""
    norm: Literal["pre", "post"] = "pre"
    """"pre": x + F(N(x)). "post": x + N(F(x)), Swin's order (Chameleon-34B, MoMa, Mixture-of-Transformers)."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """On both branches, before they join the residual stream."""
    untied_norms: bool = False
    """A gain of its own for each modality in both norms (Mixture-of-Transformers)."""
    towers: Towers | None = None
    """Modalities that share their untied norms; default: none do."""
    repeat: int = Field(1, gt=0)
    """How many layers like this follow each other."""

    def check(self, place: Place, path: str) -> None:
        norms = None if self.untied_norms else f"{path}.untied_norms"
        check_towers(self.towers, place.modalities, f"{path}.towers", norms)
        for slot in ("mixer", "feedforward", "depth"):
            part = getattr(self, slot)
            if part is not None:
                part.check(place.child(slot, norm=self.norm), f"{path}.{slot}")

    def build(self, place: Place) -> Component:
        """The layer at `place`, wrapped by its depth router if it has one."""
        if self.depth is None:
            return Block(self, place)
        return self.depth.block(self.depth, place, Block(self, place.child("block")))


@dataclasses.dataclass
class BlockState:
    """Decoding state of a block whose feed-forward has one too."""

    mixer: State
    feedforward: State

    def clone(self) -> BlockState:
        return BlockState(self.mixer.clone(), self.feedforward.clone())

    def reorder(self, index: Tensor) -> None:
        self.mixer.reorder(index)
        self.feedforward.reorder(index)


class Block(Component, counter_noise=True):
    """x + mixer, then + feed-forward, each under its norm."""

    def __init__(self, config: LayerConfig, place: Place) -> None:
        super().__init__()
        self.name, self.post, self.dropout = place.name, config.norm == "post", config.dropout
        self.mixer = config.mixer.block(config.mixer, place.child("mixer", norm=config.norm))
        self.norm_grouping = Grouping.of(place.modalities, config.towers, untied=config.untied_norms)
        self.mixer_norm = self._norm_for(self.mixer, place)
        self.feedforward = self.feedforward_norm = None
        if config.feedforward is not None:
            self.feedforward = config.feedforward.block(
                config.feedforward, place.child("feedforward", norm=config.norm, norm_grouping=self.norm_grouping)
            )
            self.feedforward_norm = self._norm_for(self.feedforward, place)

    def forward(self, x: Tensor, context: TokenContext, state: State | None = None) -> Tensor:
        """(B, T, D) → (B, T, D), residual included."""
        mixer, feedforward = (state.mixer, state.feedforward) if isinstance(state, BlockState) else (state, None)
        x = x + self._branch(x, self.mixer, self.mixer_norm, "mixer", context, mixer)
        if self.feedforward is not None:
            x = x + self._branch(x, self.feedforward, self.feedforward_norm, "feedforward", context, feedforward)
        return x

    def _branch(
        self, x: Tensor, part: Branch, norm: RMSNorm | None, slot: str, context: TokenContext, state: State | None
    ) -> Tensor:
        group = self.norm_grouping.group_of_token(context)
        y = part(x if self.post or norm is None else norm(x, group), context, state)
        if self.post and norm is not None:
            y = norm(y, group)
        if self.training and self.dropout:
            y = noise.dropout(y, self.dropout, context.key, context.salt(f"{self.name}.{slot}"))
        return y

    def _norm_for(self, part: Branch, place: Place) -> RMSNorm | None:
        """Parts that normalise inside themselves (experts gated outside a post-norm) need none here."""
        return None if part.owns_norm else RMSNorm(place.d_model, self.norm_grouping.count)

    def init_state(self, rows: int, length: int, like: Tensor) -> State | None:
        """The mixer's, and the feed-forward's where that has one."""
        mixer = self.mixer.init_state(rows, length, like)
        feedforward = None if self.feedforward is None else self.feedforward.init_state(rows, length, like)
        return mixer if feedforward is None else BlockState(mixer, feedforward)

    def cost(self, length: float, load: Mapping[str, float] | None = None) -> Cost:
        """Sum of the branches."""
        parts = [self.mixer] if self.feedforward is None else [self.mixer, self.feedforward]
        gains = sum(norm.width for norm in (self.mixer_norm, self.feedforward_norm) if norm is not None)
        return Cost.total(part.cost(length, load) for part in parts) + Cost.of(active=gains)
