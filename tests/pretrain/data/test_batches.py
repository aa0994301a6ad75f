"""Batches: rows by arithmetic, equal for any number of ranks and any micro-batch; resuming equals continuing."""

import time

import pytest
import torch

from pretrain.data import DataConfig, micro_batches, open_data
from pretrain.process_group import Ranks
from zoo.modalities import parse_modalities

NAMES = ("modality", "document", "position", "key")


@pytest.fixture(scope="module")
def data(digits):
    image = {"type": "patches", "image_size": 8, "patch": 2, "codes": 64, "channels": 1}
    config = DataConfig.parse({"path": str(digits), "sequence_length": 128}, "data")
    modalities = parse_modalities({"text": {"type": "bytes"}, "image": image})
    return open_data(config, modalities, seed=0, log=lambda line: None)


def step_rows(data, first_row, rows, micro_batch, world, **options) -> dict[str, torch.Tensor]:
    """All rows of a step, put together from the batches of all ranks."""
    batches = [
        batch
        for rank in range(world)
        for batch in micro_batches(
            data.train, range(first_row, first_row + rows), micro_batch, Ranks(rank, world), step=3, seed=7, **options
        )
    ]
    assert all(batch.tokens.shape == (micro_batch, 128) for batch in batches)
    whole = {name: torch.cat([getattr(batch.context, name) for batch in batches]) for name in NAMES}
    return whole | {"tokens": torch.cat([batch.tokens for batch in batches])}


@pytest.mark.parametrize("world, micro_batch", [(1, 1), (1, 4), (2, 3), (2, 6), (3, 1), (3, 2), (3, 4)])
def test_rows_do_not_depend_on_ranks_or_micro_batches(data, world, micro_batch):
    reference = step_rows(data, 500, 12, 12, 1)
    found = step_rows(data, 500, 12, micro_batch, world)
    assert found.keys() == reference.keys()
    for name, values in reference.items():
        assert torch.equal(found[name], values), name


def test_resuming_at_any_row_equals_continuing(data):
    rows = data.train.rows_per_epoch
    first = rows - 9  # over the end of the epoch
    continued = step_rows(data, first, 24, 24, 1)
    for skipped in (1, 8, 9, 10, 23):
        resumed = step_rows(data, first + skipped, 24 - skipped, 1, 1)
        for name, values in continued.items():
            assert torch.equal(resumed[name], values[skipped:]), name


def test_context_says_what_the_rows_say(data):
    (batch,) = micro_batches(data.train, range(4), 4, step=11, seed=7)
    context = batch.context
    assert context.step == 11 and context.modalities == ("text", "image")
    modality = torch.from_numpy(data.vocabulary.modality_of(batch.tokens.numpy())).long()
    padding = context.document < 0
    assert torch.equal(context.modality, modality.masked_fill(padding, -1))
    assert batch.tokens.dtype == torch.int64 and context.key.dtype == torch.int32
    assert (batch.tokens[context.position == 0].eq(data.vocabulary.bos) | padding[context.position == 0]).all()


def test_noise_keys_differ_between_tokens_rows_and_seeds(data):
    keys = step_rows(data, 0, 8, 8, 1)["key"]
    assert len(keys.unique()) == keys.numel()
    (other,) = micro_batches(data.train, range(8), 8, step=3, seed=8)
    assert not torch.equal(other.context.key, keys)


def test_rows_past_the_end_are_padding(data):
    found = step_rows(data, 10, 6, 2, 1, end=13)
    full = step_rows(data, 10, 6, 2, 1)
    assert torch.equal(found["tokens"][:3], full["tokens"][:3])
    assert (found["tokens"][3:] == 0).all()
    assert (found["modality"][3:] == -1).all() and (found["document"][3:] == -1).all()


def test_rows_that_do_not_divide_are_refused(data):
    with pytest.raises(ValueError, match="10 rows a step do not divide into micro-batches of 2 on 3 ranks"):
        micro_batches(data.train, range(10), 2, Ranks(0, 3))


def test_a_row_costs_less_than_a_millisecond(data):
    begin = time.process_time()  # what else runs on the machine does not count
    micro_batches(data.train, range(256), 8)
    assert (time.process_time() - begin) / 256 < 1e-3
