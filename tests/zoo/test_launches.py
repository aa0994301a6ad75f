"""What a layer asks of a GPU besides its matrix products: launches, and bytes read and written, forward and backward.

Counted on the meta device, at 4 rows of 4,096 tokens, width 2,048, bf16, half text and half image in runs of 1,024:
every operation that is no view is a launch and moves its operands and results once, a sort takes 7 launches and the
gradient of an embedding 16, and what CUDA has as one kernel (RMSNorm, attention, scan, convolution) is one.
`python -m tools.gpu_check.launches` measures them.
"""

from __future__ import annotations

import collections
import sys
import types
from collections.abc import Mapping
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import zoo
from zoo.context import TokenContext
from zoo.kernels import mamba_ssm
from zoo.kernels.layout import Layout
from zoo.trace import Trace

ROWS, LENGTH, WIDTH, HIDDEN = 4, 4096, 2048, 5632
FREE = set(
    "view _unsafe_view reshape expand transpose t permute unsqueeze squeeze slice select split split_with_sizes chunk "
    "unbind alias detach as_strided lift_fresh empty empty_like new_empty new_empty_strided empty_strided "
    "promote_types _reshape_alias unflatten".split()
)
MANY = {"sort": 7, "embedding_dense_backward": 16}
PRODUCTS = ("mm", "addmm", "bmm")
ATTENTION = {"type": "attention", "heads": 16, "qk_norm": True}
UNTIED = {"untied": ["q_proj", "k_proj", "v_proj", "o_proj", "qk_norm"]}
MAMBA = {"type": "mamba", "untied": ["in_proj", "x_proj", "dt_proj", "out_proj"]}
MOMA = {"type": "moma", "experts": {"text": 4, "image": 4}, "d_ff": HIDDEN}
LAYERS: dict[str, dict[str, Any]] = {
    "moma": {"mixer": ATTENTION, "feedforward": MOMA | {"auxiliary": False}, "norm": "post"},
    "moma with auxiliary routers": {"mixer": ATTENTION, "feedforward": MOMA, "norm": "post"},
    "mixture of transformers": {
        "mixer": ATTENTION | UNTIED,
        "feedforward": {"type": "dense", "d_ff": HIDDEN, "untied": True},
        "untied_norms": True,
        "norm": "post",
    },
    "mixture of mamba": {"mixer": MAMBA},
}
LIMITS = {
    ("moma", False): (150, 11.3),
    ("moma with auxiliary routers", False): (198, 11.7),
    ("mixture of transformers", False): (128, 12.7),
    ("mixture of mamba", False): (91, 8.0),
    ("mixture of mamba", True): (110, 12.8),
}
"""(layer, packed): launches and GB. At first it was 202 and 11.9, 256 and 12.5, 272 and 16.1, 256 and 22.3, 275 and
29.8."""


class Counter(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.launches: collections.Counter[str] = collections.Counter()
        self.bytes = 0

    def add(self, name: str, moved: int) -> None:
        self.launches[name] += MANY.get(name, 1)
        self.bytes += moved

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None):
        result = function(*args, **kwargs or {})
        name = function._schema.name.split("::")[1]
        if name not in FREE:
            self.add(name, 0 if name in PRODUCTS else moved(name, tensors(args), tensors(result)))
        return result


def tensors(values: Any) -> list[Tensor]:
    return [value for value in tree_leaves(values) if isinstance(value, Tensor)]


def size(*values: Tensor) -> int:
    return sum(value.numel() * value.element_size() for value in values)


def moved(name: str, inputs: list[Tensor], outputs: list[Tensor]) -> int:
    """Bytes that an operation reads and writes."""
    if name in ("embedding", "index_select", "gather"):
        return 2 * size(*outputs)
    if name in ("index_add", "index_add_"):  # reads what it adds to; the form that is not in place copies it first
        return 3 * size(inputs[-1]) + (2 * size(*outputs) if name == "index_add" else 0)
    if name in ("index_copy", "index_copy_"):
        return 2 * size(inputs[-1]) + (2 * size(*outputs) if name == "index_copy" else 0)
    if name.startswith(("zeros", "ones", "full", "new_")):
        return size(*outputs)
    return (8 if name == "sort" else 1) * (size(*inputs) + size(*outputs))


class Fused(torch.autograd.Function):
    """One kernel forward and one backward, of which `counter` knows if it is given."""

    @staticmethod
    def forward(ctx: Any, counter: Counter | None, *inputs: Tensor) -> Tensor:
        ctx.save_for_backward(*inputs)
        ctx.counter = counter
        if counter:
            counter.add("fused", 2 * size(inputs[0]))
        return torch.empty_like(inputs[0])

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # pyrefly: ignore[bad-override]
        if ctx.counter:
            ctx.counter.add("fused", 3 * size(dy))
        return None, *map(torch.empty_like, ctx.saved_tensors)


@pytest.fixture
def counter(monkeypatch: pytest.MonkeyPatch) -> Counter:
    """Counts, with what CUDA has as one kernel in one piece."""
    counter = Counter()

    def norm(x: Tensor, shape: Any, weight: Tensor | None = None, eps: float | None = None) -> Tensor:
        return Fused.apply(counter, x, *([] if weight is None else [weight]))

    def scan(*inputs: Tensor, delta_softplus: bool, return_last_state: bool) -> tuple[Tensor, Tensor]:
        return Fused.apply(None, *inputs), inputs[0].new_empty(1)

    monkeypatch.setattr(F, "rms_norm", norm)
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda q, k, v, **rest: Fused.apply(None, q, k, v))
    names = ("causal_conv1d", "mamba_ssm", "mamba_ssm.ops", "mamba_ssm.ops.selective_scan_interface")
    modules: dict[str, Any] = {name: types.ModuleType(name) for name in names}
    modules[names[0]].causal_conv1d_fn = lambda x, weight, bias, **rest: Fused.apply(None, x, weight, bias)
    modules[names[3]].selective_scan_fn = scan
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(mamba_ssm, "missing", lambda: None)
    place = property(lambda layout: (torch.zeros_like(layout.row), LENGTH + 3))
    monkeypatch.setattr(Layout, "apart", place, raising=False)
    return counter


def count(counter: Counter, layer: Mapping[str, Any], repeat: int, packed: bool) -> tuple[int, int]:
    """Launches and bytes of a step with the layer `repeat` times."""
    config = {"modalities": ["text", "image"], "d_model": WIDTH, "vocab_size": 8, "layers": [layer], "repeat": repeat}
    kernels = {"attention": "sdpa", "scan": "mamba_ssm", "conv": "mamba_ssm"}
    with torch.device("meta"):
        model = zoo.build("model", config, kernels=kernels, seed=None).to(torch.bfloat16).train()
    column, trace = torch.arange(LENGTH), Trace()
    modality = (column // 1024 % 2).expand(ROWS, -1).contiguous()
    document = (column // 1500).expand(ROWS, -1).contiguous() if packed else None
    context = TokenContext.from_modality(modality, document, trace=trace).to("meta")
    tokens = torch.zeros(ROWS, LENGTH, dtype=torch.int64, device="meta")
    counter.launches.clear()
    counter.bytes = 0
    with counter:
        loss = model(tokens, context).float().sum()
        for total, _ in trace.losses.values():
            loss = loss + total
        loss.backward()
    return sum(counter.launches.values()), counter.bytes


@pytest.mark.parametrize(("layer", "packed"), LIMITS, ids=str)
def test_no_more_than_it_was(counter: Counter, layer: str, packed: bool) -> None:
    launches, moved = (
        two - one for two, one in zip(*(count(counter, LAYERS[layer], n, packed) for n in (2, 1)), strict=True)
    )
    most, gigabytes = LIMITS[layer, packed]
    assert launches <= most and moved <= gigabytes * 1e9, (launches, moved / 1e9, counter.launches)
