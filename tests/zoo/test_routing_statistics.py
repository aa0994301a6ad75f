"""What is read from the statistics of routers."""

from __future__ import annotations

from zoo.routing_statistics import rates


def test_rates_by_hand():
    # of 20 decisions 5 were chosen; the router said yes to 4, of which 3 rightly: 1 false alarm, 2 missed
    assert rates({"total": 20, "chosen": 5, "said": 4, "both": 3}) == {
        "accuracy": 1 - 3 / 20,
        "precision": 3 / 4,
        "recall": 3 / 5,
        "always_skip": 15 / 20,
    }
    assert rates({"total": 4, "chosen": 0, "said": 0, "both": 0})["accuracy"] == 1
    assert rates({"total": 0, "chosen": 0, "said": 0, "both": 0}) == {}
