"""Every backend of every operation against the reference, and the reference against a loop.

The tables `CASES` and `zoo.kernels.OPERATIONS` make the tests: a new backend is tested by being registered, a new
operation by giving each of its functions its cases.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.zoo.helpers import assert_equal, random_rows, stream
from zoo import ConfigError, TokenContext, kernels
from zoo.kernels import OPERATIONS, flex, per_document, reference, sdpa, xformers

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


def selected_attention(*rows: str) -> Callable:
    """Rows of nine tokens, of which some are kept."""

    def case() -> tuple[Inputs, tuple, Tensor]:
        context = stream(*rows)
        index, valid = (
            torch.tensor([[1, 3, 6, 8], [0, 4, 1, 2]]),
            torch.tensor([[True] * 4, [True, True, False, False]]),
        )
        kept = context.select(index, valid)
        return {name: random(2, 4, 2, 4) for name in ("query", "key", "value")}, (kept,), valid[:, :, None, None]

    return case


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
        "a sub-sequence that a router kept": selected_attention("ttiit|itti", "tti|tit..."),
        "items": packed_attention("t[ii]t|[iii]|tt", "[ti]|t[ii][i]ti", "t[iii]....", "..t[ii]|[t]."),
        "items in single documents": packed_attention("t[iii]t[ii]", "[iiiiiii]", "ttitit.", "[ii][iiii]."),
        "items and documents without": packed_attention("tti|t[i]i|it", "ttt|t[ii]|ti", "t|t[ii][iii]t"),
        "items, one key head": packed_attention("t[ii]|t[iii]", heads=4, kv_heads=1, head_dim=2),
        "long items": packed_attention(
            "t" * 50 + "[" + "i" * 37 + "]|ttt|[" + "i" * 61 + "]t...", heads=2, head_dim=16
        ),
        "items that a router kept a part of": selected_attention("t[tii]t|[itti]", "[ttit]|tit..."),
    },
    ("attention", "masked_attention"): {"decoding": masked_attention},
    ("experts", "grouped_swiglu"): {
        "equal counts": grouped_swiglu(3, 3, 3),
        "unequal counts": grouped_swiglu(4, 0, 1),
        "one expert": grouped_swiglu(5),
        "no rows": grouped_swiglu(0, 0),
    },
}
CUDA = ("xformers", "flex")
"""Backends that work on CUDA alone."""
BACKENDS = [
    pytest.param(operation, backend, function, name, id=f"{function}-{backend}-{name}")
    for (operation, function), cases in CASES.items()
    for backend in OPERATIONS[operation]
    for name in cases
    if backend not in ("reference", *CUDA)
]


def run(
    module, function: str, inputs: Inputs, rest: tuple, real: Tensor, dtype: torch.dtype, device: str = "cpu"
) -> dict[str, Tensor]:
    """Output where it is specified, and the gradient of every input, in float64."""
    leaves = {name: x.to(device, dtype).requires_grad_() for name, x in inputs.items()}
    rest = tuple(x.to(device) if isinstance(x, Tensor | TokenContext) else x for x in rest)
    output = call(module, function, leaves, rest)
    probe = torch.linspace(-1, 1, output.numel(), dtype=torch.float64).view(output.shape)
    output = output.to("cpu", torch.float64) * real
    grads = torch.autograd.grad((output * probe).sum(), list(leaves.values()))
    grads = {name: g.to("cpu", torch.float64) for name, g in zip(leaves, grads, strict=True)}
    return {"output": output.detach()} | grads


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.bfloat16, BFLOAT16_TOLERANCE)])
@pytest.mark.parametrize(("operation", "backend", "function", "case"), BACKENDS)
def test_backend_is_the_reference(operation, backend, function, case, dtype, tolerance):
    inputs, rest, real = CASES[operation, function][case]()
    inputs = {name: x.to(dtype).to(torch.float64) for name, x in inputs.items()}  # the same numbers for both
    ours = run(OPERATIONS[operation][backend], function, inputs, rest, real, dtype)
    assert_equal(ours, run(reference, function, inputs, rest, real, torch.float64), tolerance)


WIDE: dict[str, Callable] = CASES["attention", "packed_attention"] | {  # heads as wide as the kernels on CUDA want them
    f"wide: {name}": packed_attention(*rows, heads=heads, kv_heads=kv_heads, head_dim=head_dim)
    for name, rows, heads, kv_heads, head_dim in (
        ("documents", ("tti|t|itt", "t|tiit|ti", "ttiitti"), 4, 4, 32),
        ("padding and grouped heads", ("tti|tt..", "...tt|ti", "........", "ttiit..."), 4, 2, 64),
        ("several blocks of odd length", tuple(random_rows(3, 389)), 4, 1, 64),
        ("documents longer than a block", ("t" * 200 + "|" + "i" * 130, "i" * 129 + "|" + "t" * 77), 2, 2, 128),
        ("a width that is not a power of two", ("tti|t|itt", "t" * 9), 2, 1, 24),
        ("items longer than a block", ("t" * 99 + "[" + "i" * 150 + "]|t[ii]", "[" + "i" * 140 + "]tt|[i]t"), 4, 2, 64),
        ("one document and an item", ("t" * 60 + "[" + "i" * 77 + "]", "[" + "i" * 137 + "]"), 2, 2, 32),
    )
}


@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 2 * BFLOAT16_TOLERANCE)])
@pytest.mark.parametrize("name", WIDE)
@pytest.mark.parametrize("backend", CUDA)
def test_backend_on_cuda_is_the_reference(backend, name, dtype, tolerance):
    if kernels.missing("attention", backend):
        pytest.skip(kernels.missing("attention", backend))
    torch.use_deterministic_algorithms(backend == "flex")  # the other's backward is refused under it
    inputs, rest, real = WIDE[name]()
    inputs = {key: x.to(dtype).to(torch.float64) for key, x in inputs.items()}
    ours = run(OPERATIONS["attention"][backend], "packed_attention", inputs, rest, real, dtype, "cuda")
    assert_equal(ours, run(reference, "packed_attention", inputs, rest, real, torch.float64), tolerance)


@pytest.mark.gpu
def test_flex_on_cuda_serves_a_sub_sequence_that_a_router_kept():
    context = stream(*random_rows(2, 300))
    index, valid = torch.arange(1, 300, 2).expand(2, -1), torch.arange(150) < torch.tensor([[150], [140]])
    kept = context.select(index, valid & context.valid.gather(1, index))
    assert kept.known.spans is None
    real = kept.valid[:, :, None, None]
    inputs = {name: random(2, 150, heads, 32).float().double() for name, heads in (("q", 4), ("k", 2), ("v", 2))}
    ours = run(flex, "packed_attention", inputs, (kept,), real, torch.float32, "cuda")
    assert_equal(ours, run(reference, "packed_attention", inputs, (kept,), real, torch.float64), 1e-4)


def narrowed(*rows: str) -> TokenContext:
    """The context of every second token."""
    context = stream(*rows)
    keep = (torch.arange(context.shape[1]) % 2 == 1) & context.valid
    kept = context.kept(keep)
    width = max(kept.row_counts)
    index = keep.logical_not().sort(dim=1, stable=True).indices[:, :width]
    return context.select(index, torch.arange(width) < torch.tensor(kept.row_counts)[:, None], kept)


LONG = ("t" * 300 + "|[" + "i" * 90 + "]t|" + "i" * 250 + "....", "..tt|t[iii]t" + "t" * 400 + "[ii][" + "i" * 70 + "]")


@pytest.mark.parametrize("items", [False, True])
def test_a_long_sub_sequence_is_computed_document_by_document(items, monkeypatch):
    context = narrowed(*(row if items else row.replace("[", "").replace("]", "") for row in LONG))
    inputs = {name: random(*context.shape, heads, 4) for name, heads in (("query", 4), ("key", 2), ("value", 2))}
    real = context.valid[:, :, None, None]
    expected = run(reference, "packed_attention", inputs, (context,), real, torch.float64)
    monkeypatch.setattr(TokenContext, "mask", property(lambda self: pytest.fail("a mask of all pairs is made")))
    ours = run(per_document, "packed_attention", inputs, (context,), real, torch.float64)
    assert_equal(ours, expected, 1e-12)
    assert context.shape[1] > per_document.SHORT
    calls = [(documents.index.shape[1], documents.mask is not None) for documents in per_document.calls(context)]
    assert {length for length, masked in calls if masked} == (set() if not items else {45, 238})


def test_only_documents_with_items_are_computed_under_a_mask(monkeypatch):
    calls, attention = [], torch.nn.functional.scaled_dot_product_attention

    def record(query, *rest, attn_mask, is_causal):
        assert is_causal == (attn_mask is None)
        calls.append((*query.shape[:3:2], None if attn_mask is None else tuple(attn_mask.shape)))
        return attention(query, *rest, attn_mask=attn_mask, is_causal=is_causal)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", record)
    query = random(2, 9, 2, 4)
    per_document.packed_attention(query, query, query, stream("ttit|it|iti", "iit|iiti|tt"))
    assert calls == [(2, 2, None), (2, 3, None), (2, 4, None)]
    calls.clear()
    per_document.packed_attention(query, query, query, stream("ttit|it|iti", "i[it]|[ii][t]i|tt"))
    assert calls == [(2, 2, None), (1, 3, None), (1, 3, (1, 1, 3, 3)), (1, 4, None), (1, 4, (1, 1, 4, 4))]
    calls.clear()
    per_document.packed_attention(query, query, query, stream("ttitititi", "[i]titi...."))
    assert calls == [(1, 5, None), (1, 9, None)]  # an item of one position sees no more than causal attention does
    calls.clear()
    per_document.packed_attention(query, query, query, stream("ttitititi", "ititi...."))
    assert calls == [(2, 9, None)]


def test_items_go_from_xformers_to_a_backend_that_knows_them(monkeypatch):
    taken = []
    monkeypatch.setattr(xformers, "takes", lambda query: True)
    monkeypatch.setattr(per_document, "packed_attention", lambda query, *rest: taken.append(1) or query)
    query = random(1, 5, 2, 8)
    for row in ("t[ii]tt", "t[ii]|tt"):
        xformers.packed_attention(query, query, query, stream(row))
    assert len(taken) == 2


def uneven() -> TokenContext:
    """Rows of more than one block of flex_attention, with documents, and padding at either end."""
    return stream("t" * 70 + "|" + "i" * 61 + "....", "..tt|iii" + "t" * 120, "." * 9)


def uneven_items() -> TokenContext:
    """As `uneven`, with items."""
    return stream("t" * 70 + "|[" + "i" * 60 + "]i....", "..[tt]|iii[" + "t" * 60 + "][" + "t" * 60 + "]", "." * 9)


@pytest.mark.parametrize("make", [uneven, uneven_items])
def test_what_flex_sees_is_the_mask(make):
    context = make()
    rows, columns = context.shape
    row, query, key = torch.meshgrid(torch.arange(rows), torch.arange(columns), torch.arange(columns), indexing="ij")
    seen = flex.sees(context)(row, torch.zeros_like(row), query, key)
    assert torch.equal(seen.unsqueeze(1), context.mask)


@torch.no_grad()
@pytest.mark.parametrize("make", [uneven, uneven_items, lambda: stream("t[" + "i" * 130 + "]t")])
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_uncompiled_is_the_reference(make, monkeypatch):
    from torch.nn.attention.flex_attention import flex_attention

    context = make()
    query, key, value = (random(*context.shape, heads, 16) for heads in (4, 2, 2))
    monkeypatch.setattr(flex, "takes", lambda query: True)
    monkeypatch.setattr(flex, "compiled", lambda: flex_attention)
    ours = flex.packed_attention(query, key, value, context)
    torch.testing.assert_close(ours, reference.packed_attention(query, key, value, context), rtol=0, atol=1e-12)
    assert flex.block_mask(context) is flex.block_mask(context)


@pytest.mark.gpu
def test_flex_on_cuda_is_not_compiled_anew_for_other_items():
    from torch._dynamo.utils import counters

    graphs = []
    for length in (40, 41, 99, 7, 70):
        context = stream("t" * (150 - length) + "[" + "i" * length + "]tt|[ii]", "t" * 154).to("cuda")
        query = torch.randn(*context.shape, 2, 32, device="cuda", requires_grad=True)
        flex.packed_attention(query, query, query, context).sum().backward()
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs[1:] == graphs[:1] * 4


def test_the_pieces_of_xformers_are_the_documents_and_the_padding():
    context = stream("tti|tt..", "...tt|ti", ".......", "ttiit..")
    assert xformers.runs(context) == [3, 2, 2 + 3, 2, 2, 7, 5, 2]
    assert xformers.runs(stream("tt|i", "itt")) == [2, 1, 3]


def test_the_mask_of_xformers_is_the_mask():
    pytest.importorskip("xformers.ops", reason="the package xformers is not installed", exc_type=ImportError)
    context = uneven()
    tokens = context.modality.numel()
    seen = xformers.bias(context).materialize((1, tokens, tokens))[0] == 0
    expected = torch.block_diag(*context.mask[:, 0].float()).bool()
    real = context.valid.flatten()
    assert torch.equal(seen[real], expected[real])


def test_what_a_kernel_on_cuda_does_not_take_goes_by_sdpa(monkeypatch):
    calls = []
    monkeypatch.setattr(sdpa, "packed_attention", lambda query, *rest: calls.append(query.dtype) or query)
    query = torch.zeros(1, 5, 2, 16)
    for module in (flex, xformers):
        module.packed_attention(query, query, query, stream("ttiit"))  # one document
        module.packed_attention(query, query, query, stream("ttiit|i"))  # not on a CUDA device
    assert len(calls) == 4


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is here")
@pytest.mark.parametrize("backend", CUDA)
def test_what_works_on_cuda_alone_is_refused_elsewhere(backend, monkeypatch):
    monkeypatch.setitem(sys.modules, "xformers", None)  # an import of it fails
    importlib.reload(OPERATIONS["attention"][backend])
    with pytest.raises(ConfigError) as error:
        kernels.check({"attention": backend})
    assert str(error.value) == (
        f"kernels.attention: {backend!r} does not load here: it needs a CUDA device; choose auto"
    )
    assert backend not in kernels.available("attention")


def test_auto_on_cuda_takes_what_loads_and_says_why(monkeypatch):
    monkeypatch.setattr(xformers, "missing", lambda: "no package")
    monkeypatch.setattr(flex, "missing", lambda: "no triton")
    choice = kernels.choose("attention", device="cuda")
    assert choice.backend == "per_document" and choice.reason.endswith("no flex: no triton; no xformers: no package")
    monkeypatch.setattr(xformers, "missing", lambda: None)
    assert kernels.choose("attention", device="cuda").backend == "xformers"
    monkeypatch.setattr(flex, "missing", lambda: None)
    choice = kernels.choose("attention", device="cuda")
    assert choice.backend == "flex" and choice.reason.startswith("one kernel for all documents")
    assert kernels.choose("attention", device="cpu").backend == "per_document"


def test_every_backend_has_the_functions_of_its_operation():
    for operation, function in CASES:
        for backend, module in OPERATIONS[operation].items():
            assert callable(getattr(module, function)), (backend, function)


@pytest.mark.parametrize("rows", [("tti|tt..", "..t|titi"), ("t[ii]|[ii]..", "..[t]|[i][iti]")])
def test_reference_attention_is_a_loop_over_documents_and_tokens(rows):
    inputs, (context,), _ = packed_attention(*rows)()
    item = torch.full_like(context.document, -1) if context.item is None else context.item
    query, key, value = (x.numpy() for x in inputs.values())
    out = reference.packed_attention(*inputs.values(), context).numpy()
    for b, t in np.argwhere(context.valid.numpy()):
        seen = [
            s
            for s in range(context.shape[1])
            if context.document[b, s] == context.document[b, t] and (s <= t or item[b, s] == item[b, t] >= 0)
        ]
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
