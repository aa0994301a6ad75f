"""What a training run must say of itself: a task that leaves something out fails before it begins."""

from __future__ import annotations

from typing import Any

import pytest

from pretrain.finetune.task import FineTuning
from pretrain.pretraining import Pretraining
from pretrain.task import Task


def test_a_task_that_lacks_a_method_fails_at_once() -> None:
    methods: dict[str, Any] = {name: lambda self: None for name in Task.__abstractmethods__ - {"evaluate"}}
    with pytest.raises(TypeError, match="abstract method '?evaluate"):
        type("Partial", (Task,), methods)()


@pytest.mark.parametrize("task", [Pretraining, FineTuning])
def test_the_tasks_lack_none(task: type) -> None:
    assert len(Task.__abstractmethods__) == 10 and not task.__abstractmethods__  # type: ignore[attr-defined]
