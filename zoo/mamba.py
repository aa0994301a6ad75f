"""Mamba-1 (arXiv 2312.00752) and, with untied projections, Mixture-of-Mamba (arXiv 2501.16295 §3)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from zoo import kernels
from zoo.config import ConfigError
from zoo.context import TokenContext
from zoo.flops import Cost
from zoo.kernels.layout import Layout
from zoo.registry import BlockConfig, Place, register
from zoo.roles import Role
from zoo.slots import Mixer
from zoo.states import MambaState
from zoo.untied import Grouping, ModalityLinear, Towers, check_towers


class RecurrentConfig(BlockConfig):
    """What Mamba-1 and Mamba-2 have in common."""

    d_conv: int = Field(4, gt=1)
    """Taps of the causal convolution."""
    expand: int = Field(2, gt=0)
    """Inner width over d_model."""
    dt_min: float = Field(1e-3, gt=0)
    """The first step sizes Δ are drawn log-uniformly from [dt_min, dt_max]."""
    dt_max: float = Field(0.1, gt=0)
    """The largest first step size."""
    dt_floor: float = Field(1e-4, gt=0)
    """No first step size is smaller than this."""
    towers: Towers | None = None
    """Which modalities share their untied weights; default: each has its own."""
    if TYPE_CHECKING:  # each kind says which of its parts can be untied
        untied: Sequence[str]

    def check(self, place: Place, path: str) -> None:
        if self.dt_min > self.dt_max:
            raise ConfigError(f"{path}.dt_min: {self.dt_min} is above dt_max {self.dt_max}; swap them")
        check_towers(self.towers, place.modalities, f"{path}.towers", None if self.untied else f"{path}.untied")
        for name in self.untied:
            if self.untied.count(name) > 1:
                raise ConfigError(f"{path}.untied: {name!r} stands there twice; remove one")


class Recurrent(Mixer):
    """The parts of a Mamba mixer that are not projections: convolution, step sizes, decay, and the order of the tokens.

    A recurrence is causal everywhere, also inside an item in which attention goes in both directions.

    They are shared by all modalities but for the bias of the step sizes: convolution and state mix tokens, so a
    modality is not defined there. Decay and skip are computed in fp32 from whatever the engine holds the parameter in.
    """

    roles = {
        "dt_bias": Role.MODALITY_BIAS,
        "conv_weight": Role.CONVOLUTION,
        "conv_bias": Role.BIAS,
        "A_log": Role.RECURRENCE,
        "D": Role.RECURRENCE,
    }
    conv_weight: nn.Parameter
    conv_bias: nn.Parameter
    A_log: nn.Parameter
    D: nn.Parameter

    def __init__(self, config: RecurrentConfig, place: Place, operation: str, steps: int, bias_untied: bool) -> None:
        """`steps` is the number of step sizes a token has, `operation` the recurrence's kernel."""
        super().__init__()
        self.inner, self.d_conv = config.expand * place.d_model, config.d_conv
        self.grouping = Grouping.of(place.modalities, config.towers, untied=bool(config.untied))
        self.steps, self.dt_range = steps, (config.dt_min, config.dt_max, config.dt_floor)
        self.bias_groups = self.groups(bias_untied)
        self.dt_bias = nn.Parameter(torch.empty(self.bias_groups * steps))
        self.operation = operation
        self.backends = {name: place.kernels.get(name, "auto") for name in (operation, "conv")}
        for name, backend in self.backends.items():
            kernels.choose(name, backend)

    def groups(self, untied: bool) -> int:
        """Number of weights of a part."""
        return self.grouping.count if untied else 1

    def initialise(self, name: str, parameter: Tensor, generator: torch.Generator) -> None:
        if name == "dt_bias":  # softplus⁻¹ of Δ, drawn for each group by itself
            low, high, floor = self.dt_range
            draw = torch.rand(parameter.shape, generator=generator, dtype=parameter.dtype)
            delta = torch.exp(math.log(low) + draw * (math.log(high) - math.log(low))).clamp(min=floor)
            parameter.copy_(delta + torch.log(-torch.expm1(-delta)))
        elif name.startswith("conv_"):
            parameter.uniform_(-(self.d_conv**-0.5), self.d_conv**-0.5, generator=generator)
        elif name == "D":
            parameter.fill_(1.0)
        else:
            self.initialise_decay(parameter, generator)

    def initialise_decay(self, parameter: Tensor, generator: torch.Generator) -> None:
        """First value of A_log."""
        raise NotImplementedError

    def project(self, rows: Tensor, sizes: tuple[int, ...], layout: Layout, state: MambaState | None) -> Tensor:
        """What is between the order of the tokens and its undoing: rows (R, D) → (R, D)."""
        raise NotImplementedError

    def forward(self, x: Tensor, context: TokenContext, state: MambaState | None = None) -> Tensor:
        """x (B, T, D) → branch output (B, T, D), 0 at padding."""
        layout = Layout.of(context, self.grouping, None if state is None else state.document)
        rows = self.grouping.split(x, context).flatten(0, -2)
        y = self.project(rows, self.grouping.sizes(context), layout, state)
        return self.grouping.unsort(y, context).view_as(x)

    def convolve(self, values: Tensor, layout: Layout, state: MambaState | None) -> tuple[Tensor, Tensor | None]:
        """values (R, W) → (R, W) after convolution and SiLU; and the state's next window."""
        kernel = kernels.choose("conv", self.backends["conv"], values.device.type).module
        window = None if state is None else state.window
        return kernel.causal_conv1d(values, self.conv_weight.squeeze(1), self.conv_bias, layout, window)

    def own_cost(self) -> Cost:
        """The parts that are not products with a weight matrix: convolution, and A_log, D, dt_bias without one."""
        convolution = 2.0 * self.conv_weight.numel()
        vectors = self.A_log.numel() + self.D.numel() + self.steps + self.conv_weight.numel() + self.conv_bias.numel()
        return Cost.of(flops=convolution, active=vectors)


@register("mixer", "mamba")
class Mamba(Recurrent, counter_noise=True):
    """Selective state space. Which projections are untied is the ablation grid of Mixture-of-Mamba; all four are its
    model."""

    class Config(RecurrentConfig):
        d_state: int = Field(16, gt=0)
        """N, numbers of state a channel."""
        dt_rank: int | None = Field(None, gt=0)
        """Width of the bottleneck before the step sizes; default ⌈d_model / 16⌉."""
        untied: list[Literal["in_proj", "x_proj", "dt_proj", "out_proj"]] = []
        """Projections with weights for each modality; dt_proj takes its bias along."""

    def __init__(self, config: Config, place: Place) -> None:
        super().__init__(config, place, "scan", config.expand * place.d_model, "dt_proj" in config.untied)
        self.d_state, self.dt_rank = config.d_state, config.dt_rank or math.ceil(place.d_model / 16)
        groups = {name: self.groups(name in config.untied) for name in ("in_proj", "x_proj", "dt_proj", "out_proj")}
        self.in_proj = ModalityLinear(place.d_model, 2 * self.inner, groups["in_proj"])
        self.conv_weight = nn.Parameter(torch.empty(self.inner, 1, self.d_conv))
        self.conv_bias = nn.Parameter(torch.empty(self.inner))
        self.x_proj = ModalityLinear(self.inner, self.dt_rank + 2 * self.d_state, groups["x_proj"])
        self.dt_proj = ModalityLinear(self.dt_rank, self.inner, groups["dt_proj"], scale=3**-0.5)  # as U(±1/√rank)
        self.A_log = nn.Parameter(torch.empty(self.inner, self.d_state))
        self.D = nn.Parameter(torch.empty(self.inner))
        self.out_proj = ModalityLinear(self.inner, place.d_model, groups["out_proj"], scale=(2 * place.layers) ** -0.5)

    def initialise_decay(self, parameter: Tensor, generator: torch.Generator) -> None:
        """A = −1, …, −N in every channel (S4D-real)."""
        parameter.copy_(torch.arange(1, self.d_state + 1, dtype=parameter.dtype).log().expand_as(parameter))

    def project(self, rows: Tensor, sizes: tuple[int, ...], layout: Layout, state: MambaState | None) -> Tensor:
        u, z = self.in_proj(rows, sizes).chunk(2, dim=-1)
        u, window = self.convolve(u, layout, state)
        dt, B, C = self.x_proj(u, sizes).split((self.dt_rank, self.d_state, self.d_state), dim=-1)
        dt = self.dt_proj(dt, sizes)
        A = -torch.exp(self.A_log.to(torch.promote_types(u.dtype, torch.float32)))
        kernel = kernels.choose("scan", self.backends["scan"], u.device.type).module
        y, hidden = kernel.selective_scan(
            u,
            dt,
            self.dt_bias.view(self.bias_groups, -1),
            A,
            B,
            C,
            self.D.to(A.dtype),
            z,
            layout,
            None if state is None else state.hidden,
        )
        if state is not None:
            assert window is not None
            state.update(window, hidden, layout.ids)
        return self.out_proj(y, sizes)

    def init_state(self, rows: int, length: int, like: Tensor) -> MambaState:
        """State for `rows` rows of any length, with the device of `like`, and its dtype for the convolution's
        window."""
        return MambaState.empty(rows, (self.d_conv - 1, self.inner), (self.inner, self.d_state), like)

    def cost(self, length: float, load: Mapping[str, float] | None = None) -> Cost:
        """Projections, convolution, and the recurrence step by step: a channel's state number costs 1 for ΔA, 3 for h
        and 2 for C · h; a channel 1 for Δu and 2 for D u. Exponentials and gates are left out, as activations are."""
        parts = (self.in_proj, self.x_proj, self.dt_proj, self.out_proj)
        recurrence = Cost.of(flops=self.inner * (6.0 * self.d_state + 3.0))
        return Cost.total(part.cost() for part in parts) + self.own_cost() + recurrence
