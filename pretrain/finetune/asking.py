"""How a model is asked: it says its own answers, or is told the right ones and says how likely each of their tokens
was."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import zoo.adapt as za
from pretrain.finetune.batcher import moved
from pretrain.finetune.generation import generate, is_right, longest_answer, texts
from pretrain.finetune.prompt_batches import PromptBatch, Prompts
from pretrain.finetune.prompts import IGNORED, padding_id


class Asking(Protocol):
    """One way to ask one model, batch after batch."""

    def read(self, batch: PromptBatch, trace: za.Trace | None) -> za.CacheReport:
        """Prefill a batch of prompts, and answer them.

        Args:
            trace: what the prefill of an adapted model reports to; None for a dense one.
        """

    def values(self) -> dict[str, Any]:
        """How well everything so far was answered."""


class PromptsOnly:
    """Prompts are read, for what the decoder does, and nothing is said of answers.

    Args:
        model: in evaluation.
        prompts: all that will be read.
    """

    def __init__(self, model: Any, prompts: Prompts) -> None:
        self.model, self.processor = model, prompts.processor

    def read(self, batch: PromptBatch, trace: za.Trace | None) -> za.CacheReport:
        """As `Asking.read`."""
        with watched(self.model, trace):
            made = generate(self.model, self.processor, _placed(self.model, batch), 1)
        return za.cache_report(made.past_key_values)

    def values(self) -> dict[str, Any]:
        """Nothing: prompts have no answers to judge."""
        return {}


class Generated:
    """Greedily, in batches, with the cache; an answer is right if it is the right text exactly.

    Args:
        model: in evaluation.
        prompts: all that will be asked: no answer may become longer than their longest, and its end.
    """

    def __init__(self, model: Any, prompts: Prompts) -> None:
        self.model, self.processor = model, prompts.processor
        self.most = 1 + longest_answer([each for batch in prompts.batches for each in batch.questions], self.processor)
        self.kinds: list[str] = []
        self.marks: list[int] = []

    def read(self, batch: PromptBatch, trace: za.Trace | None) -> za.CacheReport:
        """As `Asking.read`; what is reported of the cache are prompts and generated tokens."""
        inputs = _placed(self.model, batch)
        with watched(self.model, trace):
            made = generate(self.model, self.processor, inputs, self.most)
        for question, text in zip(batch.questions, texts(made, inputs, self.processor), strict=True):
            self.kinds.append(question.extra["kind"])
            self.marks.append(int(is_right(text, question)))
        return za.cache_report(made.past_key_values)

    def values(self) -> dict[str, Any]:
        """`accuracy`, share of right answers; `kinds`, that of each kind of question; `marks`, 1 for each right one, in
        order."""
        total, right = Counter(self.kinds), Counter()
        for kind, mark in zip(self.kinds, self.marks, strict=True):
            right[kind] += mark
        return {
            "accuracy": sum(self.marks) / len(self.marks),
            "kinds": {kind: right[kind] / total[kind] for kind in sorted(total) if kind},
            "marks": self.marks,
        }


class Forced:
    """The right answers' tokens, fed on the cache of their prompts, as generation feeds what it has said: routers
    choose among the prompt's tokens before any of the answer is known, and an answer's tokens go through every layer.

    Args:
        model: in evaluation.
        prompts: encoded with their answers.
    """

    def __init__(self, model: Any, prompts: Prompts) -> None:
        self.model, self.processor = model, prompts.processor
        self.losses: list[float] = []
        self.tokens: list[int] = []

    def read(self, batch: PromptBatch, trace: za.Trace | None) -> za.CacheReport:
        """As `Asking.read`; what is reported of the cache are prompts alone."""
        with watched(self.model, trace) as positions:
            prefill = generate(self.model, self.processor, _placed(self.model, batch), 1)  # its one token is not read
        report = za.cache_report(prefill.past_key_values)
        assert batch.answers is not None, "the prompts were encoded without their answers"
        right = batch.answers.to(self.model.device)  # (B, A)
        logits = self._logits(prefill, positions[0], batch, right).float().flatten(0, 1)  # (B·A, V)
        losses = F.cross_entropy(logits, right.flatten(), ignore_index=IGNORED, reduction="none").view_as(right)
        self.losses += losses.double().sum(1).tolist()
        self.tokens += (right != IGNORED).sum(1).tolist()
        return report

    def values(self) -> dict[str, Any]:
        """`loss`, nats a token over all answers; `losses`, nats of each answer, and `tokens`, how many it has, in
        order."""
        return {"loss": sum(self.losses) / sum(self.tokens), "losses": self.losses, "tokens": self.tokens}

    def _logits(self, prefill: Any, positions: Tensor, batch: PromptBatch, right: Tensor) -> Tensor:
        """Logits (B, A, V) of each token of `right` (B, A), given those before it.

        Args:
            positions: (…, B, T) of the prompts' tokens.
        """
        first, said = prefill.logits[0][:, None], right[:, :-1]
        if not said.shape[1]:
            return first
        known, mask = said != IGNORED, batch.inputs["attention_mask"].to(right.device)
        others = self.model(
            input_ids=said.masked_fill(~known, padding_id(self.processor)),
            attention_mask=torch.cat((mask, known.to(mask.dtype)), 1),
            position_ids=positions[..., -1:] + torch.arange(1, right.shape[1], device=right.device),
            past_key_values=prefill.past_key_values,
            use_cache=True,
        ).logits
        return torch.cat((first, others), 1)


ASKING: dict[str, type[Generated] | type[Forced]] = {"accuracy": Generated, "perplexity": Forced}
"""How a model answers, by metric."""


@contextlib.contextmanager
def watched(model: nn.Module, trace: za.Trace | None) -> Iterator[list[Tensor]]:
    """Let the model's forward passes report to a trace, of which steps of one token leave nothing.

    Yields:
        A list that gets the positions (…, B, T) of each pass's tokens: families count in ways of their own, and
        generation goes on counting from the last.
    """
    positions: list[Any] = []

    def watch(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        positions.append(kwargs.get("position_ids"))
        return args, kwargs if trace is None else kwargs | {"mod_trace": trace}

    handle = model.register_forward_pre_hook(watch, with_kwargs=True)
    try:
        yield positions
    finally:
        handle.remove()


def _placed(model: Any, batch: PromptBatch) -> dict[str, Tensor]:
    return moved(batch.inputs, model.device, model.dtype)
