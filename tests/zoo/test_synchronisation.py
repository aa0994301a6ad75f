"""A training step asks nothing of the device and sends it nothing but its batch.

Models stand on the meta device, which knows shapes and no values, so that a copy to the host is an error.
"""

from __future__ import annotations

import collections
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import zoo
from pretrain import recipe as recipes
from pretrain.describe import objective_of
from tools.gpu_check.synchronisation import RECIPES, WAITS
from zoo.batch import Batch
from zoo.carries import nothing
from zoo.context import TokenContext
from zoo.trace import Trace

NAMES = sorted(path.stem for path in RECIPES.glob("*.yaml"))
ROWS, LENGTH, VOCABULARY = 3, 32, 400
COPIES = (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)


class Sent(TorchDispatchMode):
    """Counts the copies from the host to the device, by what they hold."""

    def __init__(self) -> None:
        super().__init__()
        self.copies: collections.Counter[str] = collections.Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None):
        result = function(*args, **kwargs or {})
        source = args[1] if function is COPIES[1] else args[0] if function is COPIES[0] else None
        if source is not None and source.device.type == "cpu" and result.is_meta:
            self.copies[f"{source.dtype} {source.tolist()}"] += 1
        return result


def batch_of(model: zoo.Model, items: bool) -> Batch:
    """Documents of 12 tokens in which modalities alternate every 4, padding at the end of a row; a run of images is an
    item where `items`."""
    column = torch.arange(LENGTH)
    modality = (column // 4 % len(model.modalities)).expand(ROWS, -1).contiguous()
    document = (column // 12).expand(ROWS, -1).contiguous()
    modality[0, -4:] = document[0, -4:] = -1
    item = (column // 4).expand(ROWS, -1).masked_fill(modality != 1, -1) if items else None
    context = TokenContext.from_modality(modality, document, modalities=model.modalities, item=item)
    content = {}
    for name, carries in model.carries.items():
        count = context.totals[model.modalities.index(name)]
        content[name] = torch.zeros(count, *nothing(carries).shape[1:], dtype=nothing(carries).dtype)
    return Batch(torch.zeros(ROWS, LENGTH, dtype=torch.int64), context, content)


def sent_by(name: str) -> Mapping[str, int]:
    """What a step of a tiny recipe sends to the device."""
    recipe = recipes.load(RECIPES / f"{name}.yaml")
    config = recipe.model.model_copy(update={"vocab_size": VOCABULARY})
    with torch.device("meta"):
        model = zoo.build("model", config, kernels=recipe.kernels, seed=None).to(torch.bfloat16).train()
    objective = objective_of(recipe)
    batch = objective.prepare(batch_of(model, items=bool(recipe.bidirectional)))
    counts, trace = objective.counts(batch), Trace()
    batch = batch.under(trace=trace).to("meta")
    with Sent() as sent:
        loss: Tensor = objective.combine(objective(model, batch), counts)
        for term in (*(total for total, _ in trace.losses.values()), *trace.penalties.values()):
            loss = loss + term
        loss.backward()
    return sent.copies


@pytest.mark.parametrize("name", NAMES)
def test_a_step_waits_for_nothing(name: str) -> None:
    if name in WAITS:
        with pytest.raises(NotImplementedError, match="meta"):
            sent_by(name)
        return
    twice = {what for what, times in sent_by(name).items() if times > 1}
    assert not twice, "sent once a layer; once a batch is enough"


def test_what_waits_stands_on_the_page() -> None:
    page = (Path(__file__).parents[2] / "docs" / "architecture.md").read_text(encoding="utf-8")
    assert "## What waits for a GPU" in page
