"""Every backend of every operation against the reference, and the reference against a loop.

The tables `CASES` and `zoo.kernels.OPERATIONS` make the tests: a new backend is tested by being registered, a new
operation by giving each of its functions its cases.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.zoo.helpers import assert_equal, stream
from zoo import ConfigError, kernels
from zoo.kernels import OPERATIONS, reference

Inputs = dict[str, Tensor]
BFLOAT16_TOLERANCE = 2e-2  # 2⁻⁸ a rounding, a few of them one after the other; relative to the largest entry


def random(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def packed_attention(*rows: str, heads: int = 4, kv_heads: int = 2, head_dim: int = 6) -> Callable:
    def case() -> tuple[Inputs, tuple, Tensor]:
        context = stream(*rows)
        b, t = context.shape
        shapes = {"query": heads, "key": kv_heads, "value": kv_heads}
        inputs = {name: random(b, t, h, head_dim) for name, h in shapes.items()}
        return inputs, (context,), context.valid[:, :, None, None]

    return case


def selected_attention() -> tuple[Inputs, tuple, Tensor]:
    context = stream("ttiit|itti", "tti|tit...")
    index, valid = (
        torch.tensor([[1, 3, 6, 8], [0, 4, 1, 2]]),
        torch.tensor([[True] * 4, [True, True, False, False]]),
    )
    kept = context.select(index, valid)
    return {name: random(2, 4, 2, 4) for name in ("query", "key", "value")}, (kept,), valid[:, :, None, None]


def masked_attention() -> tuple[Inputs, tuple, Tensor]:
    mask = torch.rand(2, 1, 3, 7) < 0.6
    mask[..., 0] = True
    inputs = {"query": random(2, 3, 4, 6), "key": random(2, 7, 2, 6), "value": random(2, 7, 2, 6)}
    return inputs, (mask,), torch.ones(())


def grouped_swiglu(*counts: int) -> Callable:
    def case() -> tuple[Inputs, tuple, Tensor]:
        w_in, w_out = random(len(counts), 5, 14), random(len(counts), 7, 5)
        return {"x": random(sum(counts), 5), "w_in": w_in, "w_out": w_out}, (counts,), torch.ones(())

    return case


def call(module, function: str, inputs: Inputs, rest: tuple) -> Tensor:
    if function == "grouped_swiglu":
        return module.grouped_swiglu(inputs["x"], *rest, inputs["w_in"], inputs["w_out"])
    return getattr(module, function)(*inputs.values(), *rest)


CASES: dict[tuple[str, str], dict[str, Callable]] = {
    ("attention", "packed_attention"): {
        "one document": packed_attention("ttiitti", "tttttti"),
        "one token": packed_attention("t"),
        "documents": packed_attention("tti|t|itt", "t|tiit|ti", "ttiitti"),
        "padding": packed_attention("tti|tt..", "...tt|ti", "........", "ttiit..."),
        "one document and padding": packed_attention("tti..", "ttiit", "....."),
        "as many key heads": packed_attention("tti|titi", heads=3, kv_heads=3, head_dim=5),
        "one key head": packed_attention("tti|titi", heads=4, kv_heads=1, head_dim=2),
        "long odd length": packed_attention("t" * 70 + "|" + "i" * 61 + "....", heads=2, kv_heads=1, head_dim=16),
        "a sub-sequence that a router kept": selected_attention,
    },
    ("attention", "masked_attention"): {"decoding": masked_attention},
    ("experts", "grouped_swiglu"): {
        "equal counts": grouped_swiglu(3, 3, 3),
        "unequal counts": grouped_swiglu(4, 0, 1),
        "one expert": grouped_swiglu(5),
        "no rows": grouped_swiglu(0, 0),
    },
}
BACKENDS = [
    pytest.param(operation, backend, function, name, id=f"{function}-{backend}-{name}")
    for (operation, function), cases in CASES.items()
    for backend in OPERATIONS[operation]
    for name in cases
    if backend != "reference"
]


def run(module, function: str, inputs: Inputs, rest: tuple, real: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
    """Output where it is specified, and the gradient of every input, in float64."""
    leaves = {name: x.to(dtype).requires_grad_() for name, x in inputs.items()}
    output = call(module, function, leaves, rest)
    probe = torch.linspace(-1, 1, output.numel(), dtype=torch.float64).view(output.shape)
    output = output.to(torch.float64) * real
    grads = torch.autograd.grad((output * probe).sum(), list(leaves.values()))
    return {"output": output.detach()} | {name: g.to(torch.float64) for name, g in zip(leaves, grads, strict=True)}


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.bfloat16, BFLOAT16_TOLERANCE)])
@pytest.mark.parametrize(("operation", "backend", "function", "case"), BACKENDS)
def test_backend_is_the_reference(operation, backend, function, case, dtype, tolerance):
    inputs, rest, real = CASES[operation, function][case]()
    inputs = {name: x.to(dtype).to(torch.float64) for name, x in inputs.items()}  # the same numbers for both
    ours = run(OPERATIONS[operation][backend], function, inputs, rest, real, dtype)
    assert_equal(ours, run(reference, function, inputs, rest, real, torch.float64), tolerance)


def test_every_backend_has_the_functions_of_its_operation():
    for operation, function in CASES:
        for backend, module in OPERATIONS[operation].items():
            assert callable(getattr(module, function)), (backend, function)


def test_reference_attention_is_a_loop_over_documents_and_tokens():
    inputs, (context,), _ = packed_attention("tti|tt..", "..t|titi")()
    query, key, value = (x.numpy() for x in inputs.values())
    out = reference.packed_attention(*inputs.values(), context).numpy()
    for b, t in np.argwhere(context.valid.numpy()):
        seen = [s for s in range(t + 1) if context.document[b, s] == context.document[b, t]]
        for h in range(4):
            scores = np.array([query[b, t, h] @ key[b, s, h // 2] for s in seen]) / np.sqrt(6)
            weights = np.exp(scores) / np.exp(scores).sum()
            np.testing.assert_allclose(out[b, t, h], weights @ value[b, seen, h // 2], atol=1e-13)


def names(operation: str) -> str:
    return ", ".join(["auto", *OPERATIONS[operation]])


def test_auto_takes_a_registered_backend_and_says_why():
    for choice in kernels.check({}):
        assert choice.backend in OPERATIONS[choice.operation] and choice.reason
    assert kernels.choose("attention", "sdpa").module is OPERATIONS["attention"]["sdpa"]


@pytest.mark.parametrize(
    ("section", "message"),
    [
        (
            {"attention": "spda"},
            f"kernels.attention: 'spda' is not known; known: {names('attention')} (did you mean 'sdpa'?)",
        ),
        ({"experts": "fast"}, f"kernels.experts: 'fast' is not known; known: {names('experts')}"),
        (
            {"atention": "sdpa"},
            f"kernels.atention: unknown key; known: {', '.join(OPERATIONS)} (did you mean 'attention'?)",
        ),
    ],
)
def test_a_wrong_choice_names_the_key_and_the_way_out(section, message):
    with pytest.raises(ConfigError) as error:
        kernels.check(section)
    assert str(error.value) == message
