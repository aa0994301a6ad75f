"""Mamba-2 (arXiv 2405.21060 §7): one decay a head, states of K × N, a gated norm; parts tied or untied by modality."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from zoo import kernels
from zoo.config import ConfigError
from zoo.flops import Cost
from zoo.kernels.layout import Layout
from zoo.mamba import Recurrent, RecurrentConfig
from zoo.registry import Place, register
from zoo.states import MambaState
from zoo.untied import ModalityLinear, ModalityNorm


@register("mixer", "mamba2")
class Mamba2(Recurrent, counter_noise=True):
    """y = W_out · RMSNorm(SSD(conv(x), Δ, B, C) ⊙ SiLU(z)); the norm is over the whole inner width."""

    class Config(RecurrentConfig):
        d_state: int = Field(128, gt=0)
        """N, state numbers for each number of a head."""
        head_dim: int = Field(64, gt=0)
        """K; heads H = expand · d_model / K."""
        groups: int = Field(1, gt=0)
        """Sets of B and C; H / groups heads share one."""
        untied: list[Literal["in_proj", "dt_bias", "norm", "out_proj"]] = []
        """Parts with weights for each modality."""

        def check(self, place: Place, path: str) -> None:
            super().check(place, path)
            inner = self.expand * place.d_model
            if inner % self.head_dim:
                raise ConfigError(
                    f"{path}.head_dim: {self.head_dim} does not divide the inner width {inner} (expand · d_model)"
                )
            if inner // self.head_dim % self.groups:
                raise ConfigError(
                    f"{path}.groups: {self.groups} does not divide the {inner // self.head_dim} heads; every group has "
                    "equally many"
                )

    def __init__(self, config: Config, place: Place) -> None:
        heads = config.expand * place.d_model // config.head_dim
        super().__init__(config, place, "ssd", heads, "dt_bias" in config.untied)
        self.heads, self.head_dim, self.sets, self.d_state = heads, config.head_dim, config.groups, config.d_state
        self.mixed = self.inner + 2 * self.sets * self.d_state  # what goes through the convolution: x, B, C
        groups = {name: self.groups(name in config.untied) for name in ("in_proj", "norm", "out_proj")}
        self.in_proj = ModalityLinear(place.d_model, self.inner + self.mixed + self.heads, groups["in_proj"])
        self.conv_weight = nn.Parameter(torch.empty(self.mixed, 1, self.d_conv))
        self.conv_bias = nn.Parameter(torch.empty(self.mixed))
        self.A_log = nn.Parameter(torch.empty(self.heads))
        self.D = nn.Parameter(torch.empty(self.heads))
        self.norm = ModalityNorm(self.inner, groups["norm"])
        self.out_proj = ModalityLinear(self.inner, place.d_model, groups["out_proj"], scale=(2 * place.layers) ** -0.5)

    def initialise_decay(self, parameter: Tensor, generator: torch.Generator) -> None:
        """A uniform in [−16, −1]."""
        parameter.uniform_(1.0, 16.0, generator=generator).log_()

    def project(self, rows: Tensor, sizes: tuple[int, ...], layout: Layout, state: MambaState | None) -> Tensor:
        z, mixed, dt = self.in_proj(rows, sizes).split((self.inner, self.mixed, self.heads), dim=-1)
        mixed, window = self.convolve(mixed, layout, state)
        width = self.sets * self.d_state
        x, B, C = mixed.split((self.inner, width, width), dim=-1)
        A = -torch.exp(self.A_log.to(torch.promote_types(x.dtype, torch.float32)))
        kernel = kernels.choose("ssd", self.backends["ssd"], x.device.type).module
        y, hidden = kernel.ssd(
            x.unflatten(-1, (self.heads, self.head_dim)),
            dt,
            self.dt_bias.view(self.bias_groups, -1),
            A,
            B.unflatten(-1, (self.sets, self.d_state)),
            C.unflatten(-1, (self.sets, self.d_state)),
            self.D.to(A.dtype),
            layout,
            None if state is None else state.hidden,
        )
        if state is not None:
            assert window is not None
            state.update(window, hidden, layout.ids)
        return self.out_proj(self.norm(y.flatten(1) * F.silu(z), sizes), sizes)

    def init_state(self, rows: int, length: int, like: Tensor) -> MambaState:
        """State for `rows` rows of any length, with the device of `like`, and its dtype for the convolution's
        window."""
        return MambaState.empty(rows, (self.d_conv - 1, self.mixed), (self.heads, self.head_dim, self.d_state), like)

    def cost(self, length: float, load: Mapping[str, float] | None = None) -> Cost:
        """Projections, convolution, and the recurrence step by step whatever form the kernel gives it: a state number
        costs 3 for h and 2 for C · h, an inner number 1 for Δx and 2 for D x. Exponentials, gate and norm are left
        out."""
        parts = Cost.total(part.cost() for part in (self.in_proj, self.out_proj))
        recurrence = Cost.of(flops=self.inner * (5.0 * self.d_state + 3.0), active=self.inner)
        return parts + self.own_cost() + recurrence  # the norm's gain is active too
