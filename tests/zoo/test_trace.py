"""Trace: what it takes in, and what its replay repeats."""

from __future__ import annotations

import torch

from zoo import Trace
from zoo.routing.statistics import RouterHits, RoutingStatistics


def test_a_replay_repeats_decisions_and_takes_nothing_in():
    trace, decisions = Trace(), iter("ab")
    assert trace.decide("block", lambda: next(decisions)) == "a"
    replay = trace.replay()
    assert replay.decide("block", lambda: next(decisions)) == "a"
    replay.add_loss("block", torch.ones(()), 1)
    replay.add_penalty("block", torch.ones(()))
    replay.add_hits("block", RouterHits(2, 1, 1, 0))
    replay.add_load("block", 1, 2)
    replay.add_expert_load("block", (1, 1))
    replay.add_update("block", {"sum": torch.ones(())})
    for taken in (trace, replay):
        assert not taken.losses and not taken.penalties and not taken.updates
        assert taken.statistics == RoutingStatistics()
    assert trace.decide("block", lambda: next(decisions)) == "b"
