"""From the host to a device without waiting: for what is made from Python numbers, and for batches."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


def send(
    values: Tensor | np.ndarray | Sequence[int], device: torch.device | str, dtype: torch.dtype | None = None
) -> Tensor:
    """A tensor or an array on the host, or numbers, on `device`.

    A copy to a GPU from memory that may be paged out makes the host wait for all that the GPU has been given; one from
    pinned memory is only put into its queue.
    """
    host, device = torch.as_tensor(values, dtype=dtype), torch.device(device)
    if device.type != "cuda" or host.is_cuda:
        return host.to(device)
    return host.pin_memory().to(device, non_blocking=True)
