"""The causal stand-in for expert choice: a router that learns, token by token, what the top-k of a scope decides.

Sources: MoMa (arXiv 2407.21770 §2.4), Mixture-of-Depths (arXiv 2404.02258 §3).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.config import ConfigError, UserError
from zoo.context import CAUSAL, TokenContext
from zoo.layers import wide_linear
from zoo.registry import Place
from zoo.roles import ParameterOwner, Role
from zoo.routing.candidates import RoutedBatch
from zoo.routing.statistics import RouterHits


class RoutedBlock:
    """What every block that chooses among tokens says of itself: a group of experts, a Mixture-of-Depths layer."""

    name: str
    """Dotted; what the trace calls it."""
    looks_ahead: bool
    """Whether what happens to a token depends on later ones, unless an auxiliary router decides."""
    auxiliary: AuxiliaryRouter | None

    def decided_by_auxiliary(self, context: TokenContext) -> bool:
        """Whether the auxiliary router decides in this forward.

        Raises:
            ConfigError: it has to, but there is none.
        """
        if context.routing != CAUSAL or not self.looks_ahead:
            return False
        if self.auxiliary is None:
            raise ConfigError(
                f"{self.name}.auxiliary: false; causal routing needs the auxiliary router, set it to true"
            )
        return True


class AuxiliaryRouter(ParameterOwner):
    """SiLU(x W₁) W₂ with W₁ (D, D/2): predicts, from one token alone, what the top-k of the scope decides (MoMa §2.4).

    Its input is detached: training it never moves the main model. Its logits are relative to a threshold, 0 at first,
    which no gradient moves and `zoo.calibrate` sets: it decides how many tokens the router lets pass, not which.

    Args:
        place: `<block>.auxiliary`.
        names: of the groups of tokens with a threshold of their own, as the block calls them in the trace; default:
            `<block>` alone.
    """

    roles = {"w_in": Role.AUXILIARY, "w_out": Role.AUXILIARY}

    def __init__(self, place: Place, outputs: int, names: Sequence[str] | None = None) -> None:
        super().__init__()
        self.names = (place.name.rpartition(".")[0],) if names is None else tuple(names)
        # bits of fp32 numbers: an engine's cast to bf16 leaves integers alone
        self.register_buffer("threshold_bits", torch.zeros(len(self.names), outputs, dtype=torch.int32))
        self.w_in = nn.Parameter(torch.empty(max(1, place.d_model // 2), place.d_model))
        self.w_out = nn.Parameter(torch.empty(outputs, max(1, place.d_model // 2)))

    def initialise(self, name: str, parameter: Tensor, generator: torch.Generator) -> None:
        parameter.normal_(0.0, parameter.shape[1] ** -0.5, generator=generator)

    def forward(self, x: Tensor, sizes: Sequence[int] | None = None) -> Tensor:
        """x (…, D) → logits (…, outputs), fp32 (float64 for a float64 model), above the threshold; above 0 means yes.

        Args:
            sizes: rows of each group of `names`, one group after the other, x being (n, D); default: there is one.
        """
        logits = self.logits(x)
        if sizes is None:
            return logits - self.threshold[0]
        parts = zip(logits.split(list(sizes)), self.threshold.unbind(0), strict=True)
        return torch.cat([part - threshold for part, threshold in parts])

    def logits(self, x: Tensor) -> Tensor:
        """x (…, D) → (…, outputs): what the threshold is compared with.

        Wide, so that a decision near it does not hang on how many tokens share a product.
        """
        hidden = F.silu(wide_linear(x.detach(), self.w_in))
        return F.linear(hidden, self.w_out.to(hidden.dtype))

    @property
    def threshold(self) -> Tensor:
        """(groups, outputs) fp32: the logit above which the answer is yes. Assign to change it."""
        return self.threshold_bits.view(torch.float32)

    @threshold.setter
    def threshold(self, value: Tensor) -> None:
        self.threshold_bits.copy_(value.to(torch.float32).view(torch.int32))

    @property
    def weights(self) -> int:
        return self.w_in.numel() + self.w_out.numel()


def train_auxiliary(context: RoutedBatch, name: str, logits: Tensor, chosen: Tensor) -> None:
    """Give the trace the auxiliary router's loss and hit statistics.

    Args:
        logits: (n, E) of the auxiliary router.
        chosen: (n, E) bool, the realised top-k membership (the target).
    """
    if context.trace is None:
        return
    loss = F.binary_cross_entropy_with_logits(logits, chosen.to(logits.dtype), reduction="sum")
    context.trace.add_loss(name, loss, logits.shape[0])
    predicted = logits.detach() > 0
    hits = RouterHits(chosen.numel(), chosen.sum(), predicted.sum(), (predicted & chosen).sum())
    context.trace.add_hits(name, hits)


def check_causal(model: nn.Module, folder: object) -> None:
    """Raise UserError where a block looks ahead and has no auxiliary router, so that nothing goes token by token.

    Args:
        folder: of the run, which begins the message.
    """
    blind = [
        name
        for name, block in model.named_modules()
        if isinstance(block, RoutedBlock) and block.looks_ahead and block.auxiliary is None
    ]
    if blind:
        raise UserError(
            f"{folder}: {blind[0]} and {len(blind) - 1} other blocks choose among tokens that are still to come, "
            f"and have no auxiliary router; train them: python -m tools.train_routers {folder}"
        )
