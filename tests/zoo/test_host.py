"""What goes from the host to a device."""

from __future__ import annotations

import pytest
import torch

from zoo.host import send


def test_numbers_and_tensors_arrive() -> None:
    assert torch.equal(send([3, 1, 2], "cpu"), torch.tensor([3, 1, 2]))
    assert send((1, 2), "cpu", torch.float64).dtype == torch.float64
    there = torch.arange(3)
    assert send(there, "cpu") is there


@pytest.mark.gpu
def test_the_host_does_not_wait() -> None:
    torch.cuda.set_sync_debug_mode("error")
    try:
        sent = send([3, 1, 2], "cuda")
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(sent.cpu(), torch.tensor([3, 1, 2]))
