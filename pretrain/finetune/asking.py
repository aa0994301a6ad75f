"""How a model is asked: it says its own answers, or is told the right ones and says how likely each of their tokens was."""

from __future__ import annotations

from collections import Counter
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import zoo.adapt as za
from pretrain.finetune import answers
from pretrain.finetune.prompt_batches import Batch, Prompts
from pretrain.finetune.prompts import IGNORED, padding_id
from pretrain.finetune.samples import moved
from zoo.adapt import Trace


class Answering(Protocol):
    """One way to ask one model, batch after batch."""

    def read(self, batch: Batch, trace: Trace | None) -> za.CacheReport:
        """Prefill a batch of prompts, and answer them.

        Args:
            trace: what the prefill of an adapted model reports to; None for a dense one.
        """

    def values(self) -> dict[str, Any]:
        """How well everything so far was answered."""


class Unasked:
    """Prompts are read, for what the decoder does, and nothing is said of answers.

    Args:
        model: in evaluation.
        prompts: all that will be read.
    """

    def __init__(self, model: nn.Module, prompts: Prompts) -> None:
        self.model, self.processor = model, prompts.processor

    def read(self, batch: Batch, trace: Trace | None) -> za.CacheReport:
        """As `Answering`."""
        made, _ = generate(self.model, self.processor, batch, 1, trace)
        return za.cache_report(made.past_key_values)

    def values(self) -> dict[str, Any]:
        """None."""
        return {}


class Generated:
    """Greedily, in batches, with the cache; an answer is right if it is the right text exactly.

    Args:
        model: in evaluation.
        prompts: all that will be asked: no answer may become longer than their longest, and its end.
    """

    def __init__(self, model: nn.Module, prompts: Prompts) -> None:
        self.model, self.processor = model, prompts.processor
        tokenizer = self.processor.tokenizer
        right = [question.turns[-1][1] for batch in prompts.batches for question in batch.asked]
        self.most = 1 + max(len(tokenizer(text, add_special_tokens=False).input_ids) for text in right)
        self.kinds: list[str] = []
        self.marks: list[int] = []

    def read(self, batch: Batch, trace: Trace | None) -> za.CacheReport:
        """As `Answering`; what is reported of the cache are prompts and generated tokens."""
        made, _ = generate(self.model, self.processor, batch, self.most, trace)
        begin = batch.inputs["input_ids"].shape[1]
        texts = self.processor.tokenizer.batch_decode(made.sequences[:, begin:], skip_special_tokens=True)
        for question, text in zip(batch.asked, texts, strict=True):
            self.kinds.append(question.extra["kind"])
            self.marks.append(int(text.strip() == question.turns[-1][1].strip()))
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
    """The right answers' tokens, fed on the cache of their prompts, as generation feeds what it has said: routers choose
    among the prompt's tokens before any of the answer is known, and an answer's tokens go through every layer.

    Args:
        model: in evaluation.
        prompts: encoded with their answers.
    """

    def __init__(self, model: Any, prompts: Prompts) -> None:
        self.model, self.processor = model, prompts.processor
        self.losses: list[float] = []
        self.tokens: list[int] = []

    def read(self, batch: Batch, trace: Trace | None) -> za.CacheReport:
        """As `Answering`; what is reported of the cache are prompts alone."""
        prefill, positions = generate(self.model, self.processor, batch, 1, trace)  # its one token is not read
        report = za.cache_report(prefill.past_key_values)
        assert batch.answers is not None, "the prompts were encoded without their answers"
        right = batch.answers.to(self.model.device)  # (B, A)
        logits = self._logits(prefill, positions, batch, right).float().flatten(0, 1)  # (B·A, V)
        losses = F.cross_entropy(logits, right.flatten(), ignore_index=IGNORED, reduction="none").view_as(right)
        self.losses += losses.double().sum(1).tolist()
        self.tokens += (right != IGNORED).sum(1).tolist()
        return report

    def _logits(self, prefill: Any, positions: Tensor, batch: Batch, right: Tensor) -> Tensor:
        """Of each token of `right` (B, A), given those before it: (B, A, V)."""
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

    def values(self) -> dict[str, Any]:
        """`loss`, nats a token over all answers; `losses`, nats of each answer, and `tokens`, how many it has, in order."""
        return {"loss": sum(self.losses) / sum(self.tokens), "losses": self.losses, "tokens": self.tokens}


ANSWERING: dict[str, type[Generated] | type[Forced]] = {"accuracy": Generated, "perplexity": Forced}
"""By metric."""


def generate(model: Any, processor: Any, batch: Batch, most: int, trace: Trace | None) -> tuple[Any, Tensor]:
    """Generate at most `most` tokens after each prompt.

    Returns:
        What Transformers' `generate` does, of a single token with its logits; and the positions (…, B, P) that it gave the
        prompts: families count in ways of their own, and generation goes on counting from the last.
    """
    seen: list[Any] = []

    def watch(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        seen.append(kwargs.get("position_ids"))
        return args, kwargs if trace is None else kwargs | {"mod_trace": trace}  # steps of a token leave it as it is

    handle = model.register_forward_pre_hook(watch, with_kwargs=True)
    try:
        made = model.generate(
            **moved(batch.inputs, model.device, model.dtype),
            max_new_tokens=most,
            do_sample=False,
            num_beams=1,
            eos_token_id=answers.ends(model, processor.tokenizer),
            pad_token_id=padding_id(processor),
            return_dict_in_generate=True,
            output_logits=most == 1,
        )
    finally:
        handle.remove()
    return made, seen[0]
