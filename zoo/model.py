"""The model: embedding, layers, final norm, head; its config; and how weights get their first values."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import cast, overload

import torch
import torch.nn.functional as F
from pydantic import Field, field_validator, model_validator
from torch import Tensor, nn

from zoo.block import LayerConfig
from zoo.carries import nothing
from zoo.config import Config, ConfigError
from zoo.context import TokenContext
from zoo.cross_entropy import TokenLosses
from zoo.flops import Cost
from zoo.heads import HeadConfig, IdHead
from zoo.layers import RMSNorm
from zoo.recompute import Recompute, recomputed
from zoo.registry import HeadSlot, Place, StemSlot
from zoo.roles import ParameterOwner
from zoo.slots import Component, Head, Stem, TimedStem
from zoo.states import State
from zoo.stems import IdStem, StemConfig
from zoo.trace import Trace

_IDS = (IdStem.Config, IdHead.Config, type(None))

MAX_WIDTH, MAX_IDS, MAX_LAYERS = 2**18, 2**24, 1024
"""Bounds of a model's sizes, far above what can be meant."""


class ModelConfig(Config):
    """The network: embedding, layers, final norm, output."""

    modalities: list[str] = Field(min_length=1)
    """In the order of the vocabulary's ranges; the first is the one begin/end markers belong to. In a recipe they
    follow from its section `modalities`."""
    d_model: int = Field(gt=0, le=MAX_WIDTH)
    """Width D of the residual stream."""
    vocab_size: int | None = Field(None, gt=0, le=MAX_IDS)
    """Default: what the modalities need."""
    stem: dict[str, StemSlot] = Field(default_factory=dict)
    """How the positions of a modality enter, by modality. Those that carry ids share the embedding; in a recipe the
    others have the stem that fits what they carry, unless another is given."""
    head: dict[str, HeadSlot] = Field(default_factory=dict)
    """What predicts the positions of a modality, by modality; as `stem`."""
    layers: list[LayerConfig] = Field(min_length=1)
    """From the first to the last."""
    repeat: int = Field(1, gt=0)
    """How often the whole pattern of `layers` is repeated."""

    @field_validator("modalities")
    @classmethod
    def _distinct(cls, modalities: list[str]) -> list[str]:
        if len(set(modalities)) != len(modalities):
            raise ValueError("names one modality twice; each stands once")
        return modalities

    @model_validator(mode="after")
    def _few_layers(self) -> ModelConfig:
        layers = self.repeat * sum(layer.repeat for layer in self.layers)
        if layers > MAX_LAYERS:
            raise ValueError(f"has {layers:,} layers, repeats written out; at most {MAX_LAYERS:,}")
        return self

    def pattern(self) -> list[tuple[int, LayerConfig]]:
        """(index in `layers`, config) of every layer of the model, repeats written out."""
        once = [(i, layer) for i, layer in enumerate(self.layers) for _ in range(layer.repeat)]
        return once * self.repeat

    def place(self, kernels: Mapping[str, str]) -> Place:
        return Place(
            self.d_model,
            tuple(self.modalities),
            layers=len(self.pattern()),
            kernels=dict(kernels),
            vocab_size=self.vocab_size or 0,
            heads=self.own_heads,
            stems=self.own_stems,
        )

    @property
    def own_stems(self) -> dict[str, StemConfig]:
        """Stems of the modalities whose positions carry no ids, in the order of the modalities."""
        return {name: self.stem[name] for name in self.modalities if not isinstance(self.stem.get(name), _IDS)}

    @property
    def own_heads(self) -> dict[str, HeadConfig]:
        """Heads of the modalities whose positions carry no ids, in the order of the modalities."""
        return {name: self.head[name] for name in self.modalities if not isinstance(self.head.get(name), _IDS)}

    def check(self, path: str = "model") -> None:
        """Raise `ConfigError` for what no single block sees: widths that do not divide, modalities without experts."""
        for slot, blocks in (("stem", self.stem), ("head", self.head)):
            for name, block in blocks.items():
                self.place({}).check_modality(name, f"{path}.{slot}.{name}")
                block.check(self.place({}), f"{path}.{slot}.{name}")
        for name in self.modalities:
            enters, leaves = (slot[name].carries if name in slot else None for slot in (self.stem, self.head))
            if enters != leaves:
                raise ConfigError(
                    f"{path}.head.{name}: predicts {leaves or 'ids'}, but {path}.stem.{name} takes {enters or 'ids'}; "
                    "make them agree"
                )
        for index, layer in enumerate(self.layers):
            layer.check(self.place({}), f"{path}.layers[{index}]")


class Model(nn.Module):
    """A decoder over one stream of tokens of all modalities.

    Args:
        config: validated and checked.
        kernels: backend of each operation, see `zoo.kernels`.
        activation_checkpointing: what of a layer is computed again in the backward pass, see `zoo.recompute`.
    """

    def __init__(
        self, config: ModelConfig, kernels: Mapping[str, str], activation_checkpointing: Recompute = False
    ) -> None:
        super().__init__()
        if config.vocab_size is None:
            raise ConfigError("model.vocab_size: not set; give it, or a section `modalities` that decides it")
        place = config.place(kernels)
        self.modalities = place.modalities
        self.carries = {name: stem.carries for name, stem in config.own_stems.items() if stem.carries is not None}
        self.activation_checkpointing = activation_checkpointing
        self.embedding = IdStem(IdStem.Config(), place)
        self.stems = nn.ModuleDict(
            {name: stem.block(stem, place.child(f"stems.{name}")) for name, stem in config.own_stems.items()}
        )
        self.layers = nn.ModuleList(
            [layer.build(place.child(f"layers.{i}", layer=i)) for i, (_, layer) in enumerate(config.pattern())]
        )
        self.norm = RMSNorm(config.d_model)
        self.head = IdHead(IdHead.Config(), place)
        self.heads = nn.ModuleDict(
            {name: head.block(head, place.child(f"heads.{name}")) for name, head in config.own_heads.items()}
        )

    @overload
    def forward(
        self,
        tokens: Tensor,
        context: TokenContext,
        states: Sequence[State] | None = None,
        content: Mapping[str, Tensor] | None = None,
        *,
        time: Mapping[str, Tensor] | None = None,
        logits_at: Tensor | None = None,
    ) -> Tensor: ...

    @overload
    def forward(
        self,
        tokens: Tensor,
        context: TokenContext,
        states: Sequence[State] | None = None,
        content: Mapping[str, Tensor] | None = None,
        *,
        time: Mapping[str, Tensor] | None = None,
        read: Mapping[str, Tensor],
        logits_at: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]: ...

    @overload
    def forward(
        self,
        tokens: Tensor,
        context: TokenContext,
        states: Sequence[State] | None = None,
        content: Mapping[str, Tensor] | None = None,
        *,
        time: Mapping[str, Tensor] | None = None,
        read: Mapping[str, Tensor],
        target: Tensor,
        log_z: bool = True,
    ) -> tuple[TokenLosses, dict[str, Tensor]]: ...

    def forward(
        self,
        tokens: Tensor,
        context: TokenContext,
        states: Sequence[State] | None = None,
        content: Mapping[str, Tensor] | None = None,
        *,
        time: Mapping[str, Tensor] | None = None,
        read: Mapping[str, Tensor] | None = None,
        logits_at: Tensor | None = None,
        target: Tensor | None = None,
        log_z: bool = True,
    ) -> Tensor | tuple[Tensor, dict[str, Tensor]] | tuple[TokenLosses, dict[str, Tensor]]:
        """tokens (B, T) int64 → logits (B, T, V); 0 at padding.

        Args:
            states: from `init_state`; the tokens continue what they have seen.
            content: what the positions of each modality carry that carries no ids, in row and time order
                (`Batch.content`); may be left out where there are no such positions.
            time: for modalities whose stem is a `TimedStem` how far what each position carries is from data (0) to
                noise (1), (n,); default: data.
            read: for each modality with a head of its own the flat positions (r,) at which that head is wanted.
            logits_at: the flat positions (n,) at which logits are wanted; default: all.
            target: (B, T) the id that each position is to predict, negative where there is none. What the logits lose
                against it is returned in their place; large logits then never exist whole (`zoo.cross_entropy`).
            log_z: whether log Z is wanted beside the cross-entropy.
        Returns:
            The logits, (n, V) at `logits_at`, or with `target` `TokenLosses` (B, T); with `read` also what each head
            predicts there, {modality: (r, …)}.
        Raises:
            ValueError: content that does not fit the context.
        """
        x = self._enter(tokens, context, content or {}, time or {})
        if self.activation_checkpointing and self.training and states is None:
            context = context if context.trace is not None else context.replace(trace=Trace())
            for layer in self._components:
                x = recomputed(layer, x, context, selective=self.activation_checkpointing == "selective")
        else:
            for i, layer in enumerate(self.layers):
                x = layer(x, context, None if states is None else states[i])
        x = self.norm(x)
        flat = x.reshape(-1, x.shape[-1])
        if target is None:
            said = self.head(x if logits_at is None else F.embedding(logits_at, flat))
        else:
            said = self.head(x, target, log_z)
        if read is None:
            return said
        return said, {name: head(F.embedding(read[name], flat)) for name, head in self.heads.items()}

    def _enter(
        self, tokens: Tensor, context: TokenContext, content: Mapping[str, Tensor], time: Mapping[str, Tensor]
    ) -> Tensor:
        """The residual stream before the first layer, (B, T, D)."""
        if context.modalities != self.modalities:
            raise ValueError(
                f"context: its modalities are {', '.join(context.modalities)}, the model's are "
                f"{', '.join(self.modalities)}; build it with "
                "TokenContext.from_modality(…, modalities=model.modalities)"
            )
        x = self.embedding(tokens)
        if context.padded:
            x = x.masked_fill(~context.valid.unsqueeze(-1), 0.0)
        for name, stem in self.stems.items():
            places = context.index(self.modalities.index(name))
            carried = self.carries[name]
            assert carried is not None
            rows = content[name] if name in content else nothing(carried, tokens.device)
            if len(rows) != len(places):
                raise ValueError(
                    f"content: {len(rows)} rows of {name}, but the context has {len(places)} of its positions"
                )
            entered = stem(rows, time.get(name)) if isinstance(stem, TimedStem) else stem(rows)
            x = x.reshape(-1, x.shape[-1]).index_add(0, places, entered).view(x.shape)
        return x

    @property
    def _components(self) -> Iterable[Component]:
        return cast(Iterable[Component], self.layers)

    def init_state(self, rows: int, length: int) -> list[State | None]:
        """Decoding states of all layers, for `rows` rows of at most `length` tokens."""
        return [layer.init_state(rows, length, self.norm.weight) for layer in self._components]

    def cost(self, length: float, load: Mapping[str, float] | None = None) -> Cost:
        """Cost a token at sequence length `length`. Embedding and head count whole as active.

        Args:
            load: share of its tokens that each routed block, by name, took (`RoutingStatistics.shares`); default:
                nominal.
        """
        norm = Cost.of(active=self.norm.weight.numel())
        whole = self.embedding.cost() + norm + Cost.total(layer.cost(length, load) for layer in self._components)
        whole = whole + self.head.cost()
        for name, end in (*self.stems.items(), *self.heads.items()):
            own = cast(Stem | Head, end).cost()
            whole = whole + own.scaled(*(float(name == other) for other in self.modalities))
        return whole.expand(len(self.modalities))


Gather = Callable[[list[nn.Parameter]], contextlib.AbstractContextManager]


def initialise(model: nn.Module, seed: int, gather: Gather | None = None) -> None:
    """Give every parameter its first value, which depends on (seed, its dotted name) alone.

    So every ZeRO stage, rank count and device starts from the same model, and adding a block moves no other.

    Args:
        gather: makes partitioned parameters whole for writing (ZeRO-3); default: they are whole.
    Raises:
        TypeError: a module has parameters of its own and no `initialise(name, parameter, generator)`.
    """
    for module_name, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            if not isinstance(module, ParameterOwner):
                raise TypeError(
                    f"{type(module).__name__} owns {name!r} but has no initialise(name, parameter, generator); derive "
                    "it from zoo.roles.ParameterOwner, or use what zoo.layers has"
                )
            digest = hashlib.sha256(f"{seed}:{module_name}.{name}".encode()).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))
            with gather([parameter]) if gather else contextlib.nullcontext(), torch.no_grad():
                if parameter.is_meta or parameter.numel() == 0:
                    continue
                value = torch.empty(parameter.shape, dtype=torch.promote_types(parameter.dtype, torch.float32))
                module.initialise(name, value, generator)
                parameter.copy_(value)


def load_weights(model: nn.Module, weights: Mapping[str, Tensor], gather: Gather | None = None) -> None:
    """Set every parameter, and every buffer that `weights` has, from whole weights by name.

    Args:
        gather: as for `initialise`.
    Raises:
        KeyError: a parameter is not among `weights`.
    """
    for name, parameter in model.named_parameters():
        with gather([parameter]) if gather else contextlib.nullcontext(), torch.no_grad():
            if parameter.numel():
                parameter.copy_(weights[name])
    for name, buffer in model.named_buffers():
        if name in weights:
            buffer.copy_(weights[name])
