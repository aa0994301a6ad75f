"""Accelerators, by their makers' data sheets."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Accelerator:
    """One device and what joins it to others. Rates are peaks, a second; links are in one direction."""

    name: str
    flops: dict[str, float]
    """Dense matrix products, by `train.precision`; fp32 without TensorFloat-32, which recipes do not turn on."""
    memory: float
    """Bytes that it holds."""
    bandwidth: float
    """Bytes to and from the memory."""
    node: int
    """Devices that share the fast link."""
    link: float
    """Bytes from one device to others of its node."""
    network: float
    """Bytes from a whole node to others."""


KNOWN = {
    each.name: each
    for each in (
        # NVIDIA A100 80GB SXM, in nodes with 4 × 100 Gb/s as AWS's p4de
        Accelerator("a100", {"bf16": 312e12, "fp32": 19.5e12}, 80e9, 2.04e12, 8, 300e9, 50e9),
        # NVIDIA H100 and H200 SXM, B200: nodes of eight with 8 × 400 Gb/s
        Accelerator("h100", {"bf16": 989e12, "fp32": 67e12}, 80e9, 3.35e12, 8, 450e9, 400e9),
        Accelerator("h200", {"bf16": 989e12, "fp32": 67e12}, 141e9, 4.8e12, 8, 450e9, 400e9),
        Accelerator("b200", {"bf16": 2250e12, "fp32": 75e12}, 180e9, 8e12, 8, 900e9, 400e9),
    )
}
"""The accelerators that are known, by name."""
