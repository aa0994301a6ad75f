"""Every test of the library starts from the same seed, and memory that nobody wrote is NaN."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def _seed_and_poison() -> Iterator[None]:
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True)  # fills `torch.empty` with NaN, see torch.utils.deterministic
    yield
    torch.use_deterministic_algorithms(False)
