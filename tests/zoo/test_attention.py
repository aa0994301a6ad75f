"""Attention: rotary positions, grouped queries, QK-norm, documents, and its decoding state."""

from __future__ import annotations

import pytest
import torch

from tests.zoo.helpers import (
    DENSE,
    assert_equal,
    build_block,
    build_model,
    gradients,
    ids,
    layer,
    mod,
    random_rows,
    stream,
    values,
)
from zoo import Trace
from zoo.context import TokenContext
from zoo.kernels import available
from zoo.layers import rotary_tables, rotate


def attention(**options) -> torch.nn.Module:
    return build_block("mixer", {"type": "attention", "heads": 4} | options)


def test_rotation_turns_pairs_by_position_times_frequency():
    context, theta = stream("ttt|t", "tiii"), 100.0
    x = torch.randn(2, 4, 3, 6, dtype=torch.float64)
    y = rotate(x, rotary_tables(context, 6, theta, x.dtype))
    for pair in range(3):
        turn = torch.exp(1j * context.position.double() * theta ** (-2 * pair / 6))[..., None]
        expected = torch.complex(x[..., pair], x[..., pair + 3]) * turn
        torch.testing.assert_close(torch.complex(y[..., pair], y[..., pair + 3]), expected)


@pytest.mark.parametrize("options", [{}, {"kv_heads": 2, "qk_norm": True}, {"kv_heads": 1, "head_dim": 6}])
def test_only_the_distance_of_positions_matters(options):
    block, context = attention(**options), stream("ttiit")
    moved = TokenContext.from_modality(context.modality, position=context.position + 17)
    x = values(context)
    torch.testing.assert_close(block(x, context), block(x, moved), rtol=0, atol=1e-12)
    stretched = TokenContext.from_modality(context.modality, position=context.position * 3)
    assert (block(x, context) - block(x, stretched)).abs().max() > 1e-3


def test_grouped_queries_are_full_heads_with_repeated_keys_and_values():
    grouped, full, context = attention(kv_heads=2), attention(), stream("ttiit|ti")
    full.load_state_dict(
        grouped.state_dict()
        | {
            name: grouped.state_dict()[name].view(2, 2, -1).repeat_interleave(2, dim=0).reshape(8, 8)
            for name in ("k_proj.weight", "v_proj.weight")
        }
    )
    x = values(context)
    torch.testing.assert_close(grouped(x, context), full(x, context), rtol=0, atol=1e-13)


def test_qk_norm_forgets_the_scale_of_queries_and_keys():
    block, context = attention(qk_norm=True), stream("ttiit|ti")
    x = values(context)
    before = block(x, context)
    with torch.no_grad():
        block.q_proj.weight.mul_(1000)
        block.k_proj.weight.mul_(1000)
    torch.testing.assert_close(block(x, context), before, rtol=0, atol=1e-3)  # the norm's epsilon


@pytest.mark.parametrize("kernel", available("attention"))
def test_documents_do_not_see_each_other_and_padding_is_zero(kernel):
    block = build_block("mixer", {"type": "attention", "heads": 2}, kernels={"attention": kernel})
    context = stream("..tti|it.", "tii|t....")
    x = values(context)
    y = block(x, context)
    assert not y[~context.valid].any()
    other = x.detach().clone()
    other[0, 2:5] += 1  # the first document of the first row
    changed = (block(other, context) - y).abs().amax(-1) > 1e-12
    assert changed.nonzero().tolist() == [[0, 2], [0, 3], [0, 4]]


@pytest.mark.parametrize("kernel", available("attention"))
def test_a_token_is_seen_from_the_beginning_of_its_item_on(kernel):
    block = build_block("mixer", {"type": "attention", "heads": 2}, kernels={"attention": kernel})
    context = stream("t[ii][iii]tt|[ii]t", "[iiii]|ttt[tt]..")
    x = values(context)
    y = block(x, context)
    # changed token → first and last token that see it
    for row, changed, first, last in (
        (0, 2, 1, 7),
        (0, 4, 3, 7),
        (0, 6, 6, 7),
        (0, 8, 8, 10),
        (1, 3, 0, 3),
        (1, 8, 7, 8),
    ):
        other = x.detach().clone()
        other[row, changed] += 1
        seen = ((block(other, context) - y).abs().amax(-1) > 1e-12).nonzero().tolist()
        assert seen == [[row, t] for t in range(first, last + 1)], (row, changed)


@pytest.mark.parametrize("kernel", available("attention"))
def test_padding_after_a_single_document_is_zero(kernel):
    block = build_block("mixer", {"type": "attention", "heads": 2}, kernels={"attention": kernel})
    context = stream("ttiit", "tt...", ".")
    assert context.single_document  # the causal path without a mask: padding does see the document
    assert not block(values(context), context)[~context.valid].any()


@pytest.mark.parametrize("capacity", ["1/2", {"text": "3/4", "image": "1/2"}])
@pytest.mark.parametrize("items", [False, True])
def test_a_depth_router_over_long_packed_rows_is_that_of_the_reference(items, capacity):
    row = "|".join(random_rows(1, 700)[0].split("|")[:60])
    drawn = [row + "|t[" + "i" * 60 + "]t[ii]", "[" + "i" * 200 + "]tt|" + row]
    context = stream(*(text if items else text.replace("[", "").replace("]", "") for text in drawn))
    results = []
    for kernel in ("reference", "per_document"):
        layers = layer(feedforward=DENSE), mod(feedforward=DENSE, depth={"type": "mod", "capacity": capacity})
        model = build_model(*layers, kernels={"attention": kernel})
        logits = model(ids(context), context.replace(trace=Trace()))
        results.append({"logits": logits.detach()} | gradients(logits.square().sum(), model))
    assert_equal(*results, 1e-11)


def test_a_state_that_is_too_small_says_so():
    block, context = attention(), stream("ttiit")
    x = values(context)
    with pytest.raises(ValueError, match="state: 5 tokens do not fit into 4 slots; make it with a larger length"):
        block(x, context, block.init_state(1, 4, x))
