"""FLOPs of the decoder against torch's counter, nominal against traced."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from tests.zoo.adapt.families import FAMILIES, IMAGE
from tests.zoo.adapt.test_conformance import METHODS
from zoo import UserError
from zoo.adapt import Trace, adapt, decoder_flops, restore, traced_flops

LLAVA = FAMILIES["llava"]


@pytest.mark.parametrize("method", METHODS)
def test_prefill_is_what_torch_counts(method: str) -> None:
    """Eager attention, whose score products torch sees, as full squares: the causal half is added for comparison."""
    torch.manual_seed(0)
    model = LLAVA.build()
    model.set_attn_implementation("eager")
    inputs = LLAVA.inputs(model, [[5, 4, 3]])
    tokens, images = inputs["input_ids"].shape[1], int((inputs["input_ids"] == IMAGE).sum())
    for keep in (None, 0.25):
        if keep is not None:
            adapt(model, {"layers": [1, 2], "capacity": {"type": "constant", "value": keep}, **METHODS[method]})
        groups = () if keep is None else (16, 16)
        counted = decoder_flops(model, tokens, groups)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(**inputs)
        layers = model.get_decoder().layers
        seen = sum(
            sum(flops.values())
            for name, flops in counter.get_flop_counts().items()
            if name.endswith(tuple(f"language_model.layers.{i}" for i in range(len(layers))))
        )
        kept = [tokens] * 4 if keep is None else [tokens, tokens - 24, tokens - 24, tokens]
        half = sum(4 * 32 * n * (n - 1) / 2 for n in kept)
        assert counted.prefill + half + counted.router == pytest.approx(seen, rel=1e-12)
        assert (counted.router > 0) == (keep is not None) and counted.decode == 0
    trace = Trace()
    model(**inputs, mod_trace=trace)
    assert traced_flops(model, trace, [tokens]) == decoder_flops(model, tokens, (16, 16))
    dense = decoder_flops(model, tokens)
    restore(model)
    assert decoder_flops(model, tokens).prefill == dense.prefill and images == 32


def test_generated_tokens_meet_a_shorter_cache() -> None:
    torch.manual_seed(0)
    model = LLAVA.build()
    adapt(model, {"layers": [1, 2], "capacity": {"type": "constant", "value": 0.25}, **METHODS["p_mod"]})
    one = decoder_flops(model, 40, (16,), generated=1).decode
    weights = sum(m.weight.numel() for m in model.get_decoder().layers[0].modules() if isinstance(m, torch.nn.Linear))
    assert one == 4 * 2 * weights + 4 * 32 * (2 * 41 + 2 * 29)
    three = decoder_flops(model, 40, (16,), generated=3).decode
    assert three == 3 * one + 4 * 4 * 32 * (1 + 2)
    with pytest.raises(UserError, match="64 candidates among 40 tokens"):
        decoder_flops(model, 40, (64,))
