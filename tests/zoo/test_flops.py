"""`cost` against PyTorch's own counter, and against formulas where that counter sees something else."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from tests.zoo.helpers import D_FF, D_MODEL, DENSE, build_block, build_model, ids, layer, mod, stream, values
from zoo import Trace
from zoo.flops import Cost

HEADS, HEAD_DIM = 4, D_MODEL // 4
MIXER = {"type": "attention", "heads": HEADS, "kv_heads": 2}
REFERENCE = {"attention": "reference"}
EXPERTS = {"text": 4, "image": 4}


def measured(module: torch.nn.Module, *inputs) -> int:
    """FLOPs that PyTorch counts in one forward."""
    inputs = [x.detach() if isinstance(x, torch.Tensor) else x for x in inputs]  # it refuses leaves under no_grad
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        module(*inputs)
    return counter.get_total_flops()


def scores(length: float) -> float:
    """FLOPs of one token's attention scores and mixing where it sees `length` keys."""
    return 4 * HEADS * HEAD_DIM * length


@pytest.mark.parametrize("rows", [["t" * 15 + "i" * 17] * 2, ["t" * 5]])
def test_a_dense_model_on_the_meta_device(rows):
    with torch.device("meta"):
        model = build_model({"mixer": MIXER, "feedforward": DENSE, "repeat": 3}, kernels=REFERENCE)
    context = stream(*rows)
    length = context.shape[1]
    per_token = model.cost(length).flops
    # the reference computes the full square of scores; a query has (T + 1) / 2 keys on average
    expected = per_token[0] + 3 * (scores(length) - scores((length + 1) / 2))
    count = measured(model, ids(context).to("meta"), context.to("meta"))
    assert count == expected * context.modality.numel()
    assert per_token[0] == per_token[1] and model.cost(length).router == (0, 0)


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("kernel", ["grouped", "reference"])
def test_moma_costs_exactly_the_dense_feed_forward(device, kernel):
    config = {"type": "moma", "experts": EXPERTS, "d_ff": D_FF}
    context = stream("tttttiiitiii", "iiiiiiittiii")
    assert context.totals == (8, 16)  # four experts take a quarter each
    with torch.device(device):
        dense = build_block("feedforward", DENSE)
        moma = build_block("feedforward", config, kernels={"experts": kernel})
    x, here = values(context).to(device), context.to(device)
    tokens, cost = context.modality.numel(), moma.cost(12)
    assert cost.flops == dense.cost(12).expand(2).flops == (6 * D_MODEL * D_FF,) * 2
    assert measured(dense, x, here) == tokens * cost.flops[0]
    assert measured(moma, x, here) == tokens * (cost.flops[0] + cost.router[0] + cost.auxiliary[0])
    assert cost.router == (2 * D_MODEL * 4,) * 2
    assert cost.auxiliary == (2 * (D_MODEL * D_MODEL // 2 + D_MODEL // 2 * 4),) * 2


@pytest.mark.parametrize("experts", [{"text": 1, "image": 1}, {"text": 4, "image": 4}, {"text": 7, "image": 1}])
def test_any_number_of_experts_costs_what_dense_does(experts):
    assert build_block("feedforward", {"type": "moma", "experts": experts, "d_ff": D_FF}).cost(8).flops == (
        pytest.approx(6 * D_MODEL * D_FF),
        pytest.approx(6 * D_MODEL * D_FF),
    )


@pytest.mark.parametrize("capacity", [0.25, 0.5, 1.0])
def test_mod_costs_its_block_at_capacity_on_the_kept_length(capacity):
    context = stream("ttiittiittiiitti", "iiiittttiiiitttt")
    plain = build_model(layer(mixer=MIXER, feedforward=DENSE), kernels=REFERENCE).layers[0]
    depth = {"type": "mod", "capacity": capacity}
    routed = build_model(layer(mixer=MIXER, feedforward=DENSE, depth=depth), kernels=REFERENCE).layers[0]
    kept, cost = 16 * capacity, routed.cost(16)
    assert cost.flops == plain.cost(kept).scaled(capacity).expand(2).flops
    assert cost.router == (2 * D_MODEL,) * 2
    assert cost.auxiliary == (2 * (D_MODEL * D_MODEL // 2 + D_MODEL // 2),) * 2
    expected = cost.flops[0] + cost.router[0] + cost.auxiliary[0] + capacity * (scores(kept) - scores((kept + 1) / 2))
    assert measured(routed, values(context), context) == 32 * expected


@pytest.mark.parametrize("config", [layer(mixer=MIXER), mod(mixer=MIXER, feedforward=DENSE)], ids=["moma", "mod"])
def test_the_load_of_a_causal_forward_gives_the_flops_really_used(config):
    model = build_model(config, kernels=REFERENCE).eval()
    context = stream("ttiittiittiiitt", trace=Trace(), routing="causal")
    count = measured(model, ids(context), context)
    load = context.trace.statistics.shares()
    cost, kept = model.cost(15, load), 15 * load.get("layers.0", 1.0)
    per_modality = zip(context.totals, cost.flops, cost.router, cost.auxiliary, strict=True)
    expected = sum(n * (flops + router + auxiliary) for n, flops, router, auxiliary in per_modality)
    assert count == pytest.approx(expected + kept * (scores(kept) - scores((kept + 1) / 2)))
    assert cost.flops != model.cost(15).flops


def test_active_and_total_parameters():
    dense = build_model({"mixer": MIXER, "feedforward": DENSE, "repeat": 2})
    assert dense.cost(8).active == (sum(p.numel() for p in dense.parameters()),) * 2

    def of(feedforward: dict) -> Cost:
        return build_block("feedforward", {"d_ff": D_FF, "auxiliary": False, **feedforward}).cost(8)

    one, router = 3 * D_MODEL * D_FF, 4 * D_MODEL
    assert of({"type": "moma", "experts": EXPERTS}).active == (one + router,) * 2
    assert of({"type": "moma", "experts": EXPERTS, "capacity": "1/2"}).active == (2 * one + router,) * 2
    assert of({"type": "experts", "experts": 4}).active == (one + router,) * 2
    whole = build_block("feedforward", {"type": "moma", "experts": EXPERTS, "d_ff": D_FF, "auxiliary": False})
    assert sum(p.numel() for p in whole.parameters()) == 2 * (4 * one + router)


def test_costs_add_and_scale():
    cost = Cost.of(flops=3, active=1, router=2) + Cost((1.0, 2.0), (0.0, 0.0), (0.0, 0.0), (5.0, 6.0)).scaled(2)
    assert cost == Cost((5.0, 7.0), (1.0, 1.0), (2.0, 2.0), (10.0, 12.0))
    assert cost.scaled(0.5, 2.0).flops == (2.5, 14.0)
    assert Cost.total([]) == Cost.of() and Cost.total([cost, cost]) == cost.scaled(2)


def test_costs_of_unequally_many_modalities_do_not_add():
    with pytest.raises(ValueError, match="zip"):
        Cost.matmul(5).expand(2) + Cost.matmul(5).expand(4)


@pytest.mark.parametrize("modalities", [1, 2, 3])
def test_a_cost_that_is_one_for_all_modalities_goes_with_any_number_of_them(modalities):
    uneven = Cost(*(tuple(float(m) for m in range(modalities)) for _ in range(4)))
    total = uneven + Cost.matmul(5)
    assert total.flops == tuple(10.0 + m for m in range(modalities)) and total == Cost.matmul(5) + uneven
    assert Cost.matmul(5).expand(modalities).active == (5.0,) * modalities
