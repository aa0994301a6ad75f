"""One door to models and blocks, and the two rooms behind it."""

from __future__ import annotations

import pytest
import torch

import zoo
from tests.zoo.helpers import ATTENTION, DENSE

MODEL = {"modalities": ["text"], "d_model": 8, "vocab_size": 9, "layers": [{"mixer": ATTENTION, "feedforward": DENSE}]}


def test_the_front_builds_what_the_two_build():
    for front, own in [
        (zoo.build("model", MODEL, seed=3), zoo.build_model(MODEL, seed=3)),
        (zoo.build("feedforward", DENSE, d_model=8), zoo.build_block("feedforward", DENSE, d_model=8)),
    ]:
        assert type(front) is type(own)
        ours, theirs = front.state_dict(), own.state_dict()
        assert list(ours) == list(theirs) and all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize(
    ("slot", "config", "option"),
    [("model", MODEL, "d_model"), ("model", MODEL, "norm"), ("mixer", ATTENTION, "activation_checkpointing")],
)
def test_what_makes_sense_for_the_other_alone_is_no_option(slot, config, option):
    with pytest.raises(TypeError, match=f"unexpected keyword argument '{option}'"):
        zoo.build(slot, config, **{option: 8})
