"""How tokens are chosen: shares of many draws, and what top-k, top-p and the penalty leave out."""

from __future__ import annotations

import pytest
import torch

from zoo.choosing import Choosing, choose, noise_keys, penalise
from zoo.config import ConfigError

LOGITS = torch.tensor([2.0, 1.0, 0.0, -1.0, -torch.inf])


def shares(**options: float) -> torch.Tensor:
    """How often each of five is chosen in 20,000 samples."""
    keys = noise_keys(0, range(20_000), [3] * 20_000)
    chosen = choose(LOGITS.expand(20_000, 5), Choosing.parse(options), keys, "test")
    return torch.bincount(chosen, minlength=5) / 20_000


def test_draws_follow_the_softmax():
    for temperature in (0.5, 1.0, 2.0):
        expected = (LOGITS / temperature).softmax(-1)
        torch.testing.assert_close(shares(temperature=temperature), expected, rtol=0, atol=0.012)
    assert shares(temperature=0.0).tolist() == [1, 0, 0, 0, 0]


def test_top_k_and_top_p_leave_out_the_unlikely():
    two = LOGITS[:2].softmax(-1)
    for options in ({"top_k": 2}, {"top_p": 0.8}, {"top_p": 0.65}):
        torch.testing.assert_close(shares(**options)[:2], two, rtol=0, atol=0.012)
        assert shares(**options)[2:].sum() == 0
    assert shares(top_p=0.6).tolist() == [1, 0, 0, 0, 0], "the likeliest alone reaches it"
    torch.testing.assert_close(shares(top_k=9), shares(), rtol=0, atol=0)


def test_a_penalty_moves_what_was_said_towards_the_unlikely():
    moved = penalise(torch.tensor([2.0, -1.0, 3.0]), torch.tensor([0, 1]), 2.0)
    assert moved.tolist() == [1.0, -2.0, 3.0]


def test_keys_are_of_seed_sample_and_position_alone():
    some, all_ = noise_keys(1, [4, 2], [7, 0]), noise_keys(1, [0, 2, 4], [7, 0, 7])
    assert some.tolist() == all_[[2, 1]].tolist()
    assert len({*noise_keys(0, [4], [7]).tolist(), *noise_keys(1, [4, 4], [7, 6]).tolist()}) == 3


@pytest.mark.parametrize("option", [{"temperature": -1.0}, {"top_k": 0}, {"top_p": 0.0}, {"temprature": 1.0}])
def test_a_wrong_option_is_named(option):
    with pytest.raises(ConfigError, match=rf"^generate\.{next(iter(option))}: "):
        Choosing.parse(option, "generate")
