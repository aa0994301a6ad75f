"""ARank: maps of known rank, and models against a dense computation from output_attentions."""

from __future__ import annotations

import math
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.zoo.adapt.families import FAMILIES, IMAGE, Family, set_decoder_attention
from zoo.adapt import arank
from zoo.config import UserError

ROWS = [[3, 5], [2, 4, 3], [6, 1]]
"""Words between images: 24, 41 and 23 tokens in LLaVA."""


FAST = ("llava", "gemma3", "qwen2_vl")
"""Masks and positions of all kinds."""


@pytest.fixture(params=[pytest.param(name, marks=[] if name in FAST else pytest.mark.slow) for name in FAMILIES])
def family(request: pytest.FixtureRequest) -> Family:
    return FAMILIES[request.param]


@pytest.fixture
def llava() -> nn.Module:
    return FAMILIES["llava"].build()


def inputs(model: nn.Module, rows: list[list[int]] = ROWS, family: Family = FAMILIES["llava"]) -> dict[str, Tensor]:
    """A batch padded on the right: in float64 eager attention gives a row of nothing but padding NaN."""
    batch = family.inputs(model, rows)
    mask = batch["attention_mask"]
    order = (1 - mask).sort(dim=1, stable=True).indices
    return {name: value.gather(1, order) if value.shape == mask.shape else value for name, value in batch.items()}


def of_rank(rank: int, size: int, count: int = 3) -> Tensor:
    """Random matrices (count, size, size) float64 with `rank` singular values of 1."""
    u, _ = torch.linalg.qr(torch.randn(count, size, rank, dtype=torch.float64))
    v, _ = torch.linalg.qr(torch.randn(count, size, rank, dtype=torch.float64))
    return u @ v.mT


@pytest.mark.parametrize("rank", [1, 5, 16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_known_ranks(rank: int, dtype: torch.dtype) -> None:
    found = arank.spectrum(of_rank(rank, 16).to(dtype), rtol=0.1)  # all three are `rank` where σ are equal
    torch.testing.assert_close(found, torch.full((3, 3), rank / 16, dtype=torch.float64), rtol=5e-2, atol=0)
    assert (found[:, 0] == rank / 16).all()


def test_statistics_are_their_formulas() -> None:
    values = torch.tensor([1.0, 0.5, 0.02, 0.005, 0.0])
    rank, stable, entropy = arank.spectrum(torch.diag(values)[None])[0].tolist()
    share = [v / 1.525 for v in (1.0, 0.5, 0.02, 0.005)]
    assert rank == 3 / 5
    assert stable == pytest.approx((1 + 0.25 + 0.0004 + 0.000025) / 5)
    assert entropy == pytest.approx(math.exp(-sum(p * math.log(p) for p in share)) / 5, rel=1e-6)
    assert not arank.spectrum(torch.zeros(2, 4, 4)).any()


def test_monotone_in_the_tolerance() -> None:
    logits = torch.randn(4, 12, 12, dtype=torch.float64)
    maps = torch.softmax(logits.masked_fill(torch.ones(12, 12, dtype=torch.bool).triu(1), -torch.inf), -1)
    ranks = [arank.spectrum(maps, rtol)[:, 0] for rtol in (0.5, 0.1, 1e-2, 1e-3, 1e-12)]
    assert all((low <= high).all() for low, high in zip(ranks, ranks[1:], strict=False))
    assert (ranks[0] < ranks[-1]).all() and (ranks[-1] == 1).all(), "a causal softmax map has full rank"
    columns = torch.arange(12)
    assert (arank.reduce(maps, columns, rtol=1e-12)[:, 0] == 11 / 12).all(), "its diagonal was not taken out"


def test_padding_and_other_rows_are_left_out() -> None:
    maps = torch.rand(2, 9, 9)
    tokens = torch.tensor([2, 3, 4, 6, 8])
    square = maps[:, tokens][:, :, tokens] * (1 - torch.eye(5))
    assert torch.equal(arank.reduce(maps, tokens), arank.spectrum(square))
    queries = torch.tensor([1, 3])
    assert torch.equal(arank.reduce(maps, tokens, queries), arank.spectrum(square[:, queries]))
    assert maps[0, 2, 2] != 0, "the caller's maps were changed"


@torch.no_grad()
def dense(model: nn.Module, batch: dict[str, Tensor], rtol: float) -> Tensor:
    """(B, L, H) rank over length, from all maps at once and with matrix_rank. It must be the first forward of a model:
    after one that asks for no attentions, Transformers hooks Phi-4's vision tower twice and then finds no features."""
    before = model.get_decoder().config._attn_implementation
    set_decoder_attention(model, "eager")
    attentions = model(**batch, output_attentions=True).attentions
    set_decoder_attention(model, before)
    samples = []
    for row, mask in enumerate(batch["attention_mask"].bool()):
        maps = torch.stack([each[row] for each in attentions])[:, :, mask][..., mask].float()
        maps = maps * (1 - torch.eye(int(mask.sum())))
        samples.append(torch.linalg.matrix_rank(maps, rtol=rtol) / mask.sum())
    return torch.stack(samples).double()


def test_every_family_against_the_dense_computation(family: Family) -> None:
    model = family.build()
    batch = family.inputs(model, [[3, 5]])
    expected = dense(model, batch, 1e-2)
    found = arank.measure(model, [batch])
    torch.testing.assert_close(found.values[..., 0], expected, rtol=0, atol=1e-6)
    assert found.image_tokens[0] > 0 and found.tokens[0] >= 8 + found.image_tokens[0]
    assert 0 < found.values.min() and found.values.max() < 1


def test_a_padded_batch_equals_one_by_one(family: Family) -> None:
    model = family.build()
    rows = [[3, 5], [6, 4, 3], [9, 1]]
    batch = inputs(model, rows, family)
    expected = dense(model, batch, 1e-2)
    together = arank.measure(model, [batch])
    alone = arank.measure(model, [inputs(model, [row], family) for row in rows])
    assert together.tokens == alone.tokens and together.image_tokens == alone.image_tokens
    torch.testing.assert_close(together.values, alone.values, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(together.values[..., 0], expected, rtol=0, atol=1e-6)


def test_padding_on_the_left_in_float32(llava: nn.Module) -> None:
    llava.float()
    left, right = (make(llava, ROWS) for make in (FAMILIES["llava"].inputs, inputs))
    assert not torch.equal(left["attention_mask"], right["attention_mask"])
    found, expected = (arank.measure(llava, [batch]).values for batch in (left, right))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_means_and_standard_errors(llava: nn.Module) -> None:
    found = arank.measure(llava, [inputs(llava)])
    assert found.values.shape == (3, 4, 4, 3) and found.tokens == (24, 41, 23) and found.image_tokens == (16, 32, 16)
    for index, layer in enumerate(found.layers()):
        by_sample = found.values[:, index, :, 0].mean(1)
        assert layer["index"] == index and layer["rank_over_length"] == pytest.approx(float(by_sample.mean()))
        assert layer["stderr"] == pytest.approx(float(by_sample.std() / 3**0.5))
        assert layer["heads"] == pytest.approx(found.values[:, index, :, 0].mean(0).tolist())
        assert layer["stable_rank"] == pytest.approx(float(found.values[:, index, :, 1].mean()))
        assert layer["entropy"] == pytest.approx(float(found.values[:, index, :, 2].mean()))
        assert layer["width"] == 32 and layer["weights"] == 2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48
    assert arank.measure(llava, [inputs(llava, [[1, 2]])]).layers()[0]["stderr"] is None


def test_a_tighter_tolerance_finds_more(llava: nn.Module) -> None:
    ranks = [arank.measure(llava, [inputs(llava)], rtol=rtol).values[..., 0] for rtol in (0.2, 1e-2, 1e-5)]
    assert (ranks[0] <= ranks[1]).all() and (ranks[1] <= ranks[2]).all() and (ranks[0] < ranks[2]).any()


def test_some_heads_and_image_rows(llava: nn.Module) -> None:
    batch = inputs(llava)
    whole = arank.measure(llava, [batch])
    torch.testing.assert_close(arank.measure(llava, [batch], heads=2).values, whole.values[:, :, [0, 3]])
    torch.testing.assert_close(arank.measure(llava, [batch], heads=9).values, whole.values)
    images = arank.measure(llava, [batch], rows="image").values
    llava.set_attn_implementation("eager")
    with torch.no_grad():
        maps = llava(**batch, output_attentions=True).attentions[1][1]
    mask = batch["attention_mask"][1].bool()
    square = maps[:, mask][..., mask].float() * (1 - torch.eye(41))
    rows = square[:, batch["input_ids"][1][mask] == IMAGE]
    assert rows.shape[1] == 32
    torch.testing.assert_close(images[1, 1, :, 0], torch.linalg.matrix_rank(rows, rtol=1e-2).double() / 32)


def implementations(model: nn.Module) -> dict[str, str]:
    return {name: part.config._attn_implementation for name, part in model.named_modules() if hasattr(part, "config")}


def test_the_model_comes_back_as_it_was(llava: nn.Module) -> None:
    llava.train()
    before = implementations(llava)
    seen: list[set[str]] = []
    towers: list[str] = []

    def look(maps: int) -> None:
        seen.append({llava.get_decoder().config._attn_implementation})
        towers.append(llava.model.vision_tower.config._attn_implementation)

    assert before["model.language_model"] == "sdpa"
    arank.measure(llava, [inputs(llava)], progress=look)
    assert len(seen) == 3 * 4 and all(each == {"eager"} for each in seen) and set(towers) == {"sdpa"}

    def stop(maps: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        arank.measure(llava, [inputs(llava)], progress=stop)
    assert implementations(llava) == before and llava.training
    assert not any(module._forward_hooks for layer in llava.get_decoder().layers for module in layer.modules())


def test_one_layers_maps_are_held_at_a_time(llava: nn.Module) -> None:
    seen: list[weakref.ref[Tensor]] = []

    def look(module: nn.Module, args: tuple, output: Any) -> None:
        assert all(ref() is None for ref in seen), "the maps of an earlier layer are still held"
        seen.append(weakref.ref(output[1]))

    for layer in llava.get_decoder().layers:
        layer.self_attn.register_forward_hook(look)
    arank.measure(llava, [inputs(llava), inputs(llava)])
    assert len(seen) == 8


def test_what_cannot_be_measured(llava: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    text = LlamaForCausalLM(
        LlamaConfig(vocab_size=64, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
    )
    with pytest.raises(
        UserError, match="LlamaForCausalLM has no image token .* text-only model, .* give a multimodal one"
    ):
        arank.measure(text, [])
    with pytest.raises(UserError, match="there is no sample"):
        arank.measure(llava, [])
    with pytest.raises(UserError, match="rtol: 1.5 must be between 0 and 1"):
        arank.measure(llava, [], rtol=1.5)
    batch = inputs(llava)
    with pytest.raises(UserError, match=r"sample 3 has no image token: the id 63 of the model's config does not occur"):
        arank.measure(llava, [batch, {"input_ids": torch.ones(1, 5, dtype=torch.long)}])
    layer = llava.get_decoder().layers[2]
    with monkeypatch.context() as patch:
        patch.setattr(layer.self_attn, "forward", lambda hidden_states, **_: (hidden_states, None))
        with pytest.raises(
            UserError, match=r"layer 2 \(LlamaAttention\): attention weights are not available, its eager"
        ):
            arank.measure(llava, [batch])
    with monkeypatch.context() as patch:
        patch.setattr(type(llava), "set_attn_implementation", lambda self, which: None)
        said = (
            "^Llava.*: attention weights are not available, it has no eager attention; ARank cannot .* choose layers by"
            " a rule"
        )
        with pytest.raises(UserError, match=said):
            arank.measure(llava, [batch])
    with torch.no_grad():
        layer.self_attn.q_proj.weight.fill_(torch.nan)
    with pytest.raises(UserError, match="layer 2: its attention weights are not finite"):
        arank.measure(llava, [batch])
    del layer.self_attn
    with pytest.raises(UserError, match=r"layer 2 \(LlamaDecoderLayer\): .* it has no self_attn"):
        arank.measure(llava, [batch])
