"""What a training run must say of itself: a `Loop` that leaves something out fails before it begins."""

from __future__ import annotations

from typing import Any

import pytest

from pretrain import train
from pretrain.finetune import train as finetune
from pretrain.loop import Loop


def test_a_subclass_that_lacks_a_method_fails_at_once() -> None:
    methods: dict[str, Any] = {name: lambda self: None for name in Loop.__abstractmethods__ - {"evaluate"}}
    with pytest.raises(TypeError, match="abstract method '?evaluate"):
        type("Partial", (Loop,), methods)()


@pytest.mark.parametrize("run", [train.Run, finetune.Run], ids=["pretraining", "fine-tuning"])
def test_the_runs_lack_none(run: type) -> None:
    assert len(Loop.__abstractmethods__) == 8 and not run.__abstractmethods__
