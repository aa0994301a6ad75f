"""RoutedLayer through everything a cache may go through, and the masks made from it."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache, StaticCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from zoo import UserError
from zoo.adapt import cache_report
from zoo.adapt.cache import RoutedLayer, routed_layer, slot_mask


def filled() -> RoutedLayer:
    """Two rows: columns 0, 2, 3 and 1, 4 of five; keys hold their column."""
    layer = RoutedLayer()
    columns = torch.tensor([[0, 2, 3], [1, 4, -1]])
    assert torch.equal(layer.announce(columns, 5, True), columns)
    keys = columns[:, None, :, None].float().expand(2, 2, 3, 4).contiguous()
    layer.update(keys, keys + 100)
    return layer


def agree(layer: RoutedLayer, columns: list[list[int]]) -> None:
    assert layer.columns.tolist() == columns
    expected = torch.tensor(columns, dtype=torch.float32)[:, None, :, None].expand_as(layer.keys)
    used = expected >= 0
    assert torch.equal(layer.keys[used], expected[used]) and torch.equal(layer.values[used], expected[used] + 100)


def test_its_length_is_the_dense_one() -> None:
    layer = filled()
    assert (layer.get_seq_length(), layer.get_mask_sizes(1), layer.slots) == (5, (6, 0), 3)
    agree(layer, [[0, 2, 3], [1, 4, -1]])
    held = layer.announce(torch.tensor([[5], [5]]), 1, False)
    assert held.tolist() == [[0, 2, 3, 5], [1, 4, -1, 5]] and layer.ragged
    layer.update(torch.full((2, 2, 1, 4), 5.0), torch.full((2, 2, 1, 4), 105.0))
    agree(layer, held.tolist())


def test_rows_move_with_their_columns() -> None:
    layer = filled()
    layer.reorder_cache(torch.tensor([1, 1]))
    agree(layer, [[1, 4, -1], [1, 4, -1]])
    layer = filled()
    layer.batch_repeat_interleave(2)
    agree(layer, [[0, 2, 3], [0, 2, 3], [1, 4, -1], [1, 4, -1]])
    layer.batch_select_indices(torch.tensor([2, 0]))
    agree(layer, [[1, 4, -1], [0, 2, 3]])
    layer.offload()
    layer.prefetch()
    agree(layer, [[1, 4, -1], [0, 2, 3]])


@pytest.mark.parametrize("removed, columns", [(1, [[0, 2, 3], [1, -1, -1]]), (2, [[0, 2], [1, -1]]), (5, [[], []])])
def test_crop_forgets_tokens_of_the_dense_stream(removed: int, columns: list[list[int]]) -> None:
    layer = filled()
    layer.crop(0)
    agree(layer, [[0, 2, 3], [1, 4, -1]])
    layer.crop(-removed)
    assert layer.get_seq_length() == 5 - removed
    agree(layer, columns)
    with pytest.raises(ValueError, match="minus the number"):
        layer.crop(3)


def test_reset_and_empty() -> None:
    layer = filled()
    layer.reset()
    assert (layer.get_seq_length(), layer.slots, layer.columns, layer.ragged) == (0, 0, None, False)
    for empty in (layer, RoutedLayer()):
        empty.reorder_cache(torch.tensor([0]))
        empty.batch_repeat_interleave(2)
        empty.batch_select_indices(torch.tensor([0]))
        empty.crop(-1)
        assert empty.get_seq_length() == 0


def test_a_dense_layer_is_taken_over() -> None:
    cache = DynamicCache()
    keys = torch.arange(3.0)[None, None, :, None].expand(2, 2, 3, 4)
    for index in range(2):
        cache.update(keys, keys + 100, index)
    agree(routed_layer(cache, 1), [[0, 1, 2]] * 2)
    assert routed_layer(cache, 1) is cache.layers[1] and type(cache.layers[0]) is DynamicLayer
    assert routed_layer(cache, 4).get_seq_length() == 0 and len(cache.layers) == 5


def test_other_caches_are_refused() -> None:
    from transformers import LlamaConfig

    config = LlamaConfig(num_hidden_layers=2, hidden_size=8, num_attention_heads=2, vocab_size=8)
    said = (
        "^past_key_values: layer 1 of the StaticCache is a StaticLayer; .* only DynamicCache allows .*without "
        "cache_impl"
    )
    with pytest.raises(UserError, match=said):
        routed_layer(StaticCache(config=config, max_cache_len=8), 1)
    sliding = DynamicCache()
    sliding.layers, sliding.layer_class_to_replicate = [DynamicSlidingWindowLayer(4)], None
    with pytest.raises(UserError, match="DynamicSlidingWindowLayer"):
        routed_layer(sliding, 0)
    with pytest.raises(UserError, match="tuple cannot hold layers of different length"):
        routed_layer((), 0)


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
def test_a_mask_is_rows_and_columns_of_the_dense_one(dtype: torch.dtype) -> None:
    """Any mask, in the middle of a stream: 3 columns came before, 4 are queried, of which the layer keeps some."""
    dense = torch.rand(2, 1, 4, 7, generator=torch.Generator().manual_seed(1)) > 0.4
    mask = dense if dtype == torch.bool else torch.zeros(dense.shape).masked_fill(~dense, -1e9)
    queries = torch.tensor([[3, 5, 6], [4, -1, -1]])
    slots = torch.tensor([[0, 2, 3, 5, 6], [1, -1, 4, -1, -1]])
    found = slot_mask(mask, queries, slots, 3, True)
    for row in range(2):
        for i, query in enumerate(queries[row].tolist()):
            for j, slot in enumerate(slots[row].tolist()):
                value = found[row, 0, i, j]
                visible = bool(value if dtype == torch.bool else value > -1e8)
                if query >= 0:
                    assert visible == (slot >= 0 and bool(dense[row, 0, query - 3, slot]))
                else:
                    assert visible or j != 2 + i, "an unused query sees itself"
    shared = slot_mask(mask[:1], queries[:1], slots[:1], 3, False)
    assert torch.equal(shared, found[:1])


def test_masks_of_causality_and_of_flash_attention() -> None:
    queries, slots = torch.tensor([[3, 5], [4, -1]]), torch.tensor([[0, 3, 5], [1, 4, -1]])
    assert slot_mask(None, queries, slots, 3, False) is None
    found = slot_mask(None, queries, slots, 3, True)
    assert found[:, 0].tolist() == [
        [[True, True, False], [True, True, True]],
        [[True, True, False], [False, False, True]],
    ]
    flash = slot_mask(torch.tensor([[1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1]]), queries, slots, 3, True)
    assert flash.tolist() == [[1, 1, 1], [0, 1, 0]]
    with pytest.raises(UserError, match="attn_implementation sdpa, eager or flash_attention_2"):
        slot_mask(object(), queries, slots, 3, True)


def test_the_report_counts_bytes() -> None:
    cache = DynamicCache()
    keys = torch.zeros(2, 2, 5, 4)
    cache.update(keys, keys, 0)
    cache.layers.append(filled())
    report = cache_report(cache)
    assert report.bytes == 2 * (2 * 2 * 5 * 4 + 2 * 2 * 3 * 4) * 4
    assert report.dense_bytes == 2 * 2 * (2 * 2 * 5 * 4) * 4
    assert (report.slots, report.dense_slots) == ((5, 3), (5, 5)) and abs(report.saved - 0.2) < 1e-12
