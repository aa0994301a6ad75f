"""The small parts: linear, RMSNorm, rotary embedding; and how a parameter gets its first value."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from zoo.context import TokenContext
from zoo.gather import spread
from zoo.roles import ParameterOwner, Role


class Linear(ParameterOwner, nn.Linear):
    """y = x Wᵀ, no bias. It is a linear layer of torch to those who look for such, as PEFT does.

    Args:
        d_in, d_out: widths.
        scale: standard deviation of the first weights in units of 1/√d_in.
        role: of the weight.
    """

    def __init__(self, d_in: int, d_out: int, scale: float = 1.0, role: Role = Role.MATRIX) -> None:
        nn.Module.__init__(self)  # torch's own would draw first values
        self.in_features, self.out_features, self.bias = d_in, d_out, None
        self.scale, self.roles = scale, {"weight": role}
        self.weight = nn.Parameter(torch.empty(d_out, d_in))

    def initialise(self, name: str, parameter: Tensor, generator: torch.Generator) -> None:
        parameter.normal_(0.0, self.scale * parameter.shape[-1] ** -0.5, generator=generator)

    def forward(self, x: Tensor) -> Tensor:  # pyrefly: ignore[bad-override-param-name]  # shape letters
        """(..., d_in) → (..., d_out)."""
        return F.linear(x, self.weight)


class _ExactLinear(torch.autograd.Function):
    """bf16 operands on a GPU, fp32 result: each product is exact, sums are fp32."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return torch.mm(x, weight.T, out_dtype=torch.float32)

    @staticmethod
    @once_differentiable
    def backward(  # pyrefly: ignore[bad-override]
        ctx: Any, dy: Tensor
    ) -> tuple[Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        dy = dy.to(x.dtype)
        return (
            torch.mm(dy, weight) if ctx.needs_input_grad[0] else None,
            torch.mm(dy.T, x) if ctx.needs_input_grad[1] else None,
        )


def wide_linear(x: Tensor, weight: Tensor) -> Tensor:
    """x (…, d_in) times weight (d_out, d_in) in fp32, in float64 for a float64 x: (…, d_out).

    bf16 values on a GPU are multiplied as they are and summed in fp32, which is the product of their fp32 copies at a
    tenth of its time; their gradients are rounded to bf16 before the products of the backward pass.
    """
    if x.device.type != "cpu" and x.dtype == weight.dtype == torch.bfloat16:
        return _ExactLinear.apply(x.reshape(-1, x.shape[-1]), weight).view(*x.shape[:-1], weight.shape[0])
    wide = torch.promote_types(x.dtype, torch.float32)
    return F.linear(x.to(wide), weight.to(wide))


class RMSNorm(ParameterOwner):
    """x / √(mean x² + eps) · gain over the last dimension; 0 stays 0.

    Args:
        width: of the last dimension.
        groups: number of gains; with one they are tied.
    """

    roles = {"weight": Role.GAIN}

    def __init__(self, width: int, groups: int = 1, eps: float = 1e-5) -> None:
        super().__init__()
        self.width, self.groups, self.eps = width, groups, eps
        self.weight = nn.Parameter(torch.empty(width if groups == 1 else (groups, width)))

    def initialise(self, name: str, parameter: Tensor, generator: torch.Generator) -> None:
        parameter.fill_(1.0)

    def forward(self, x: Tensor, group: Tensor | None = None) -> Tensor:
        """x (…, width) → (…, width).

        Args:
            group: (…) which gain each vector has; None: there is one (`Grouping.group_of_token`).
        """
        if group is None:
            return F.rms_norm(x, (self.width,), self.weight, self.eps)
        return F.rms_norm(x, (self.width,), None, self.eps) * spread(self.weight, group)


def rotary_tables(context: TokenContext, head_dim: int, theta: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosine and sine (B, T, 1, K/2) at the tokens' original positions; shared by all layers of one context.

    RoFormer (arXiv 2104.09864). Angles are fp32 (float64 for a float64 model).
    """

    def compute() -> tuple[Tensor, Tensor]:
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        exponent = torch.arange(0, head_dim, 2, device=context.position.device, dtype=wide) / head_dim
        angle = context.position.to(wide)[:, :, None, None] * theta**-exponent
        return angle.cos().to(dtype), angle.sin().to(dtype)

    return context.shared(("rotary", head_dim, theta, dtype), compute)


def rotate(x: Tensor, tables: tuple[Tensor, Tensor]) -> Tensor:
    """Turn the halves of each head of x (B, T, H, K) by the angles of `rotary_tables`."""
    cosine, sine = tables
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cosine - b * sine, b * cosine + a * sine), dim=-1)
