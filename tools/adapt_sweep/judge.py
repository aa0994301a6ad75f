"""How well a model answers, and what its decoder does for it: accuracy, FLOPs, skipped tokens, keys and values."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

import zoo.adapt as za
from pretrain import answers
from pretrain.data.prompts import collate, encode, padding_id
from pretrain.data.questions import Question
from pretrain.data.samples import moved
from tools.adapt_sweep.plan import Shapes
from zoo.adapt import AdaptConfig, AdaptContext, Trace
from zoo.adapt.family import picture_ids

EDGE = 1e-6
"""Thresholds keep so far from 0 and 1."""


@dataclasses.dataclass(frozen=True)
class Prompts:
    """Questions, encoded once for all models of a run."""

    batches: list[tuple[dict[str, Tensor], list[Question]]]
    """Inputs padded on the left, and the questions, of which the last answer is asked for."""
    processor: Any

    @classmethod
    def encode(cls, questions: Sequence[Question], processor: Any, size: int) -> Prompts:
        """`size` a batch; every answer of a conversation is asked for, given the right ones before it."""
        asked = [
            dataclasses.replace(
                question, turns=question.turns[: turn + 1], extra={"kind": answers.kinds_of(question)[turn]}
            )
            for question in questions
            if question.images
            for turn in range(len(question.turns))
        ]
        chunks = [asked[start : start + size] for start in range(0, len(asked), size)]
        padding = padding_id(processor)
        return cls(
            [(collate([encode(q, processor, answers=False) for q in chunk], padding, "left"), chunk) for chunk in chunks],
            processor,
        )

    def shapes(self, config: AdaptConfig, model_config: Any) -> Shapes:
        """See `plan.Shapes`."""
        pictures = picture_ids(model_config, type(model_config).__name__)
        found: Shapes = Counter()
        for inputs, asked in self.batches:
            made = AdaptContext.build(config, pictures, inputs, inputs["input_ids"], model_config=model_config)
            pairs = list(zip(made.rows, made.groups, strict=True))
            for row, tokens in enumerate(_lengths(inputs)[: len(asked)]):
                found[tokens, tuple(size for own, size in pairs if own == row)] += 1
        return found


def one_an_image(questions: Sequence[Question], count: int) -> list[Question]:
    """The first `count` questions about images that none before was about."""
    first: dict[tuple, Question] = {}
    for question in questions:
        if question.images:
            first.setdefault(question.images, question)
    return list(first.values())[:count]


@torch.no_grad()
def judge(model: nn.Module, prompts: Prompts, new_tokens: int | None = None) -> dict[str, Any]:
    """Let a model answer greedily, in batches, with its cache.

    Args:
        model: in evaluation, dense or adapted.
        new_tokens: to generate at most; None: those of the longest answer, and its end.
    Returns:
        `accuracy`, share of answers that are the right text exactly; `kinds`, of each kind of question; `questions`; `marks`,
        1 for each that was right, in order;
        `flops`, of the decoder's prefill with its routers, measured, over dense; `keys_and_values`, bytes over dense;
        `skip`, share of candidates skipped in each routed layer, by its name; `routers`, how well they foresee who is
        kept; `logits`, (n,) of all candidates.
    """
    tokenizer = prompts.processor.tokenizer
    layers = [layer.routing.name for layer in za.routed_layers(model)]
    longest = max(
        len(tokenizer(q.turns[-1][1], add_special_tokens=False).input_ids) for _, asked in prompts.batches for q in asked
    )
    right: Counter[str] = Counter()
    total: Counter[str] = Counter()
    sums: Counter[str] = Counter()
    marks: list[int] = []
    logits = []
    for inputs, asked in prompts.batches:
        trace = Trace()
        handle = model.register_forward_pre_hook(_tracing(trace), with_kwargs=True) if layers else None
        try:
            made = model.generate(
                **moved(inputs, model.device, model.dtype), max_new_tokens=new_tokens or longest + 1, do_sample=False,
                num_beams=1, eos_token_id=answers.ends(model, tokenizer), pad_token_id=padding_id(prompts.processor),
                return_dict_in_generate=True,
            )  # fmt: skip
        finally:
            if handle is not None:
                handle.remove()
        texts = tokenizer.batch_decode(made.sequences[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        for question, text in zip(asked, texts, strict=True):
            kind = question.extra["kind"]
            total[kind] += 1
            marks.append(int(text.strip() == question.turns[-1][1].strip()))
            right[kind] += marks[-1]
        lengths = _lengths(inputs)
        cache = za.cache_report(made.past_key_values)
        sums["flops"] += za.traced_flops(model, trace, lengths).total
        sums["dense"] += sum(n * za.decoder_flops(model, length).total for length, n in Counter(lengths).items())
        sums["bytes"] += cache.bytes
        sums["dense bytes"] += cache.dense_bytes
        sums.update({name: float(value) for name, value in answers.routing_sums(trace, layers).items()})
        logits += [decision.logits for decision in trace.decisions.values()]
    values = answers.routing_values(sums, layers)
    return {
        "accuracy": sum(right.values()) / sum(total.values()),
        "kinds": {kind: right[kind] / total[kind] for kind in sorted(total) if kind},
        "questions": sum(total.values()),
        "marks": marks,
        "flops": sums["flops"] / sums["dense"],
        "keys_and_values": sums["bytes"] / sums["dense bytes"],
        "skip": {layer: values[f"skip/{layer}"] for layer in layers},
        "routers": {key.partition("/")[2]: value for key, value in values.items() if key.startswith("auxiliary/")},
        "logits": torch.cat(logits) if logits else torch.zeros(0),
    }


def with_inference(model: nn.Module, **rule: Any) -> nn.Module:
    """Give an adapted model another rule of inference, in place; weights stay."""
    config = za.adaptation(model)
    weights = {name: router.state_dict() for name, router in za.routers(model)}
    za.restore(model)
    za.adapt(model, AdaptConfig.parse({**config.model_dump(mode="json"), "inference": rule}))
    for name, router in za.routers(model):
        router.load_state_dict(weights[name])
    return model


def tune_threshold(model: nn.Module, prompts: Prompts, target: float, tolerance: float, rounds: int) -> dict[str, Any]:
    """Leave a model with learned routers under the threshold whose measured prefill FLOPs are nearest to the target.

    By false position on the share of the top-k rule's logits that are below it: what a threshold does in one layer
    changes the logits of the next, so each try is a pass.

    Args:
        target: decoder FLOPs over dense.
        tolerance: relative; a try within a quarter of it ends the search.
        rounds: passes at most.
    Returns:
        `threshold`, `flops` on these prompts, and `reached`, whether they are within the tolerance.
    """
    logits = judge(with_inference(model, rule="topk"), prompts, 1)["logits"].double().sort().values
    tried: dict[float, float] = {}

    def flops(share: float) -> float:
        where = logits[round(share * (len(logits) - 1))]
        threshold = min(max(float(where.sigmoid()), EDGE), 1 - EDGE)
        if threshold not in tried:
            with_inference(model, rule="threshold", threshold=threshold)
            tried[threshold] = judge(model, prompts, 1)["flops"]
        return tried[threshold]

    low, high = 0.0, 1.0
    at_low, at_high = flops(low), flops(high)
    for _ in range(rounds - 2):
        if at_low <= target or at_high >= target:
            break
        slope = (at_low - target) / (at_low - at_high)
        share = low + (high - low) * min(max(slope, 0.1), 0.9)
        at = flops(share)
        if math.isclose(at, target, rel_tol=tolerance / 4):
            break
        if at > target:
            low, at_low = share, at
        else:
            high, at_high = share, at
    threshold = min(tried, key=lambda each: abs(tried[each] - target))
    with_inference(model, rule="threshold", threshold=threshold)
    reached = abs(tried[threshold] / target - 1) <= tolerance
    return {"threshold": threshold, "flops": tried[threshold], "reached": reached}


def _lengths(inputs: dict[str, Tensor]) -> list[int]:
    """Tokens of each prompt, padding apart."""
    return inputs["attention_mask"].sum(1).tolist()


def _tracing(trace: Trace) -> Any:
    """A hook by which a forward inside `generate` fills the trace; those of single tokens route nothing and leave it."""

    def add(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        return args, kwargs | {"mod_trace": trace}

    return add
