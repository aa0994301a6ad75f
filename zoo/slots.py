"""What the blocks in the slots of a model promise each other: the base classes of ours and of a user's own.

A slot holds a subclass of its base: `mixer` a `Mixer`, `feedforward` a `FeedForward`, `depth` a `Depth`, `stem` a
`Stem`, `head` a `Head`, `objective` an `Objective`, `router` a `Scorer` (`zoo.routing.scorer`), `modality` a
`Modality` (`zoo.modality`). A base declares everything that is asked of the block, with a default where there is one;
what has none raises `NotImplementedError`.
"""

from __future__ import annotations

from collections.abc import Mapping
from fractions import Fraction
from typing import Any, ClassVar

from torch import Tensor, nn

from zoo.batch import Batch
from zoo.context import TokenContext
from zoo.flops import Cost
from zoo.place import Configured
from zoo.roles import ParameterOwner
from zoo.states import State


class Part(Configured, ParameterOwner):
    """Base of what stands in a slot of a model."""

    counter_noise: ClassVar[bool] = False
    """All noise of `forward` is a function of the tokens' keys (`zoo.noise`), so that a recomputation draws the same
    without help. Otherwise activation checkpointing saves torch's random state and restores it before the
    recomputation. Every class says so for itself, `class Mine(Mixer, counter_noise=True)`; a subclass does not inherit
    it."""

    name: str = ""
    """Dotted name in the model. A part that tells the trace something, or has an `update`, sets it to its place's."""

    def __init_subclass__(cls, counter_noise: bool = False, **rest: Any) -> None:
        super().__init_subclass__(**rest)
        cls.counter_noise = counter_noise

    def update(self, statistics: Mapping[str, Tensor], step: int) -> None:
        """Renew state that no gradient trains (buffers), once an optimizer step; as default there is none.

        Args:
            statistics: sums over all micro-batches and ranks of what `forward` put into `Trace.updates` under `name`.
            step: number of the step, from 0.
        """


class Component(Part):
    """Maps a stream of tokens to a stream of tokens, and knows what that costs."""

    def forward(self, x: Tensor, context: TokenContext, state: Any = None) -> Tensor:
        """x (B, T, D) in time order → (B, T, D), 0 at padding.

        Args:
            state: from `init_state`, updated in place: the tokens continue those that it has seen. None: they begin.
        """
        raise NotImplementedError(f"{type(self).__name__} has no forward(x, context, state=None)")

    def init_state(self, rows: int, length: int, like: Tensor) -> State | None:
        """Decoding state for `rows` rows of at most `length` tokens, with the dtype and device of `like`; None for a
        block that needs none, because it treats every token by itself."""
        return None

    def cost(self, length: float, load: Mapping[str, float] | None = None) -> Cost:
        """What a token costs in rows of `length` tokens.

        Args:
            load: share of its tokens that each routed block, by name, took; None: the nominal share.
        """
        raise NotImplementedError(f"{type(self).__name__} has no cost(length, load=None)")


class Branch(Component):
    """A mixer or a feed-forward: its output is what is added to the residual stream, without the stream itself.

    Built as `cls(config, place)`.
    """

    owns_norm: bool = False
    """It normalises inside itself, as experts do that are gated outside a post-norm: the block adds no norm."""


class Mixer(Branch):
    """Base of the slot `mixer`: lets the tokens of a document see each other."""

    bidirectional: ClassVar[bool] = False
    """Inside an item of the context (`TokenContext.item`) it lets a token see those that follow, too."""

    def init_state(self, rows: int, length: int, like: Tensor) -> State | None:
        raise NotImplementedError(f"{type(self).__name__} has no init_state(rows, length, like), so it cannot decode")


class FeedForward(Branch):
    """Base of the slot `feedforward`: treats tokens one by one."""


class Depth(Component):
    """Base of the slot `depth`: stands round a block and decides which tokens enter it. Its output holds the residual.

    Built as `cls(config, place, block)`.
    """

    scope: str = "row"
    """The tokens that compete: those of a "row", or those of the whole "microbatch"."""

    @property
    def capacity(self) -> Fraction:
        """Nominal share of all tokens that enter the block."""
        return Fraction(1)


class Stem(Part):
    """Base of the slot `stem`: from what the positions of a modality carry to the residual stream. Built as
    `cls(config, place)`."""

    def forward(self, x: Tensor) -> Tensor:
        """What n positions carry, (n, …) in row and time order → (n, D). Also called with n = 0, so that every rank
        runs every parameter."""
        raise NotImplementedError(f"{type(self).__name__} has no forward(x)")

    def cost(self) -> Cost:
        """What a position costs."""
        raise NotImplementedError(f"{type(self).__name__} has no cost()")


class TimedStem(Stem):
    """A stem of positions whose content may be mixed with noise: it is told how much."""

    def forward(self, x: Tensor, time: Tensor | None = None) -> Tensor:
        """What n positions carry, (n, …) in row and time order → (n, D).

        Args:
            time: (n,) at least fp32, how far each is from data (0) to pure noise (1); default: they are data.
        """
        raise NotImplementedError(f"{type(self).__name__} has no forward(x, time=None)")


class Head(Part):
    """Base of the slot `head`: from the last layer to a prediction of what a position carries. Built as
    `cls(config, place)`."""

    def forward(self, x: Tensor) -> Tensor:
        """x (…, D) → (…, what is predicted of each). Also called without rows."""
        raise NotImplementedError(f"{type(self).__name__} has no forward(x)")

    def cost(self) -> Cost:
        """What a prediction costs."""
        raise NotImplementedError(f"{type(self).__name__} has no cost()")


class Objective(Part):
    """Base of the slot `objective`: what the model is trained for. Built as `cls(config, place)`.

    A loss has *parts*, each a sum over terms: of a modality's tokens, of images, of a regulariser. How many terms a
    part has in a whole step, over all micro-batches and ranks, is known before the first forward pass, so the loss does
    not depend on how a step is cut.
    """

    parts: tuple[str, ...]
    """Their names, the same on every rank."""
    tells_terms: ClassVar[bool] = False
    """Whether `forward` puts the terms of every part that `combine` reads into `Trace.terms`, where they are wanted."""

    def prepare(self, batch: Batch) -> Batch:
        """What training makes of a batch on the host, before anything else is asked about it; as default nothing.
        Evaluation leaves it out. Its noise depends on the tokens' keys alone (`zoo.noise`)."""
        return batch

    def counts(self, batch: Batch) -> dict[str, int]:
        """How many terms each part has in a batch; asked on the host, before the forward pass."""
        raise NotImplementedError(f"{type(self).__name__} has no counts(batch)")

    def forward(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """The sum of each part's terms: scalars, at least fp32, joined to the graph where a part has no term.

        The model is called here, with whatever the objective makes of the batch: it may put noise on `batch.content`,
        and reads the heads where it likes.
        """
        raise NotImplementedError(f"{type(self).__name__} has no forward(model, batch)")

    def combine(self, sums: Mapping[str, Tensor], counts: Mapping[str, float]) -> Tensor:
        """One loss, linear in `sums`, so that micro-batches and ranks add up.

        Args:
            sums: of each part, over a micro-batch, a rank or everything.
            counts: terms of each part over the whole step on all ranks.
        """
        raise NotImplementedError(f"{type(self).__name__} has no combine(sums, counts)")

    def report(self, sums: Mapping[str, float], counts: Mapping[str, float], training: bool) -> dict[str, float]:
        """What is said of the loss beside the whole, by label; by default the mean of every part that has terms.

        Args:
            sums, counts: of each part, over everything.
            training: of a log step; False for an evaluation.
        """
        return {name: sums[name] / counts[name] for name in self.parts if counts[name]}

    def constant_loss(self, modality: str, error: float) -> float:
        """The least loss of a model that makes the same guess everywhere, for a modality whose positions carry vectors.

        Args:
            error: mean squared error of the best constant vector; it is the loss, unless vectors are not what is
                predicted.
        """
        return error
