"""How well a multimodal LLM answers questions: loss, exact match, and what its routers do; see `evaluate`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import zoo.adapt as za
from pretrain.finetune import generation
from pretrain.finetune.batcher import Batcher, QuestionBatch, moved
from pretrain.finetune.generation import kinds_of
from pretrain.finetune.prompts import IGNORED
from pretrain.finetune.questions import Question
from pretrain.finetune.routing import routing_sums, routing_values
from pretrain.process_group import ALONE, Ranks
from zoo.routing.statistics import RoutingStatistics

Progress = Callable[[int], Any]
SLACK = 4
"""Tokens that a generated answer may be longer than the right one: its end, and enough to be seen to be wrong."""


def predict(forward: nn.Module, batch: QuestionBatch, trace: za.Trace | None) -> tuple[Tensor, Tensor]:
    """Logits (B, P, V) in fp32 for the P columns after which any row has a label, and their labels (B, P), else
    IGNORED.

    Args:
        trace: of an adapted model; None for a dense one.
    """
    labels = batch.labels[:, 1:]
    columns = (labels != IGNORED).any(0).nonzero()[:, 0]
    if not len(columns):  # no sample could be used: one column, which is not predicted either
        columns = torch.zeros(1, dtype=torch.long, device=labels.device)
    options = {} if trace is None else {"mod_trace": trace, "mod_answers": batch.labels != IGNORED}
    logits = forward(**batch.inputs, **options, use_cache=False, logits_to_keep=columns).logits
    return logits.float(), labels[:, columns]


@dataclasses.dataclass
class AnswerSums:
    """What an evaluation adds up, on one rank or over all."""

    answers: dict[str, float]
    """Answers by kind; every rank has the same kinds, whatever its share asks."""
    forced: dict[str, float]
    """Those of which every token is the likeliest after the right ones before it."""
    generated: dict[str, float]
    """Those that the model generates."""
    routing: RoutingStatistics
    loss: Tensor | float = 0.0
    """Loss of all answer tokens, in nats."""
    tokens: float = 0.0
    """Tokens of the answers."""
    samples: float = 0.0
    flops: float = 0.0
    """FLOPs of the decoder, as measured."""
    dense_flops: float = 0.0
    """FLOPs of the decoder if nothing were skipped."""

    @classmethod
    def empty(cls, kinds: Sequence[str], layers: Sequence[str]) -> AnswerSums:
        """Zeros, for answers of these kinds and routers of these layers."""
        answers, forced, generated = (dict.fromkeys(kinds, 0.0) for _ in range(3))
        return cls(answers, forced, generated, routing_sums(None, layers))

    def over(self, ranks: Ranks, device: torch.device | str) -> AnswerSums:
        """Summed over the ranks, as numbers on the host; collective."""
        counts = (self.tokens, self.samples, self.flops, self.dense_flops)
        kinds = [n for part in (self.answers, self.forced, self.generated) for n in part.values()]
        loss = torch.as_tensor(self.loss, dtype=torch.float64, device=device).reshape(1)
        numbers = torch.tensor([*counts, *kinds], dtype=torch.float64, device=device)
        flat = ranks.sum(torch.cat((loss, numbers, self.routing.flat(device))))
        routing = self.routing.with_counts(flat[1 + len(numbers) :])
        rest = iter(flat[: 1 + len(numbers)].tolist())
        loss, tokens, samples, flops, dense_flops = (next(rest) for _ in range(1 + len(counts)))
        answers, forced, generated = (
            {kind: next(rest) for kind in part} for part in (self.answers, self.forced, self.generated)
        )
        return AnswerSums(answers, forced, generated, routing, loss, tokens, samples, flops, dense_flops)


@torch.no_grad()
def evaluate(
    forward: nn.Module,
    model: nn.Module,
    blueprint: nn.Module,
    batcher: Batcher,
    questions: Sequence[Question],
    batch: int,
    generate: bool = True,
    ranks: Ranks = ALONE,
    together: bool = False,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    progress: Progress = lambda samples: None,
) -> dict[str, float]:
    """Loss and answers of a model in evaluation; collective over ranks.

    Every answer of a conversation counts, given the right ones before it. A question's `kind` key (one, or one an
    answer) splits accuracies.

    Args:
        forward: what is called as the model (an engine's wrapper, or the model itself).
        model: the model itself, in evaluation; it generates.
        blueprint: for its layers and their cost; may be on the meta device, or the model itself.
        batcher: with training=False.
        questions: at least one.
        batch: samples a forward.
        generate: also generate each answer greedily, in batches, with the cache.
        ranks: over which the questions are dealt out, equally many batches to each; default: this process alone.
        together: whether the ranks must call the model equally often while they generate, as ZeRO-3 has it.
        device, dtype: of the model's weights.
        progress: is called with the size of each batch of this rank: first of questions, then, under `generate`, of
            answers.
    Returns:
        `eval/loss`, nats a token of the answers. `eval/accuracy[/<kind>]`, share of generated answers that are the
        right text exactly, spaces at the ends apart; absent without `generate`. `eval/forced_accuracy[/<kind>]`, share
        of answers of which every token is the likeliest after the right ones before it, in one pass: the same for a
        model that generates greedily and has one way to write an answer. Of an adapted model `eval/skip…` and
        `eval/auxiliary/…`, as `routing_values` has them. `eval/decoder_flops` of a sample with its answers, as
        measured, `eval/dense_decoder_flops`, without skipping, and `eval/flops_ratio` of the two.
    """
    layers = [layer.routing.name for layer in za.routed_layers(blueprint)]
    sums = AnswerSums.empty(sorted({kind for question in questions for kind in kinds_of(question)}), layers)
    for counted, chunk in _chunks(questions, batch, ranks):
        made = batcher.batch(chunk)
        trace = za.Trace() if layers else None
        logits, labels = predict(forward, made.to(device, dtype), trace)
        seen = trace if counted and not made.filler else None
        sums.routing += routing_sums(seen, layers)
        if not counted:
            continue
        losses = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="sum")
        sums.loss += losses.double()
        sums.tokens += made.answers
        sums.samples += len(chunk)
        sums.flops += za.traced_flops(blueprint, seen or za.Trace(), made.tokens).total
        sums.dense_flops += sum(za.decoder_flops(blueprint, tokens).prefill for tokens in made.tokens)
        right, labels = (logits.argmax(-1) == labels).cpu(), labels.cpu()
        for row, question in enumerate(chunk):
            for kind, answer in zip(
                kinds_of(question), _answers(made.labels[row, 1:], right[row], labels[row]), strict=True
            ):
                sums.answers[kind] += 1.0
                sums.forced[kind] += answer
        progress(len(chunk))
    if generate:
        _generate(model, batcher, questions, batch, ranks, together, device, dtype, sums.generated, progress)
    return _values(sums.over(ranks, device), generate)


def _generate(
    model: Any,
    batcher: Batcher,
    questions: Sequence[Question],
    batch: int,
    ranks: Ranks,
    together: bool,
    device: torch.device | str,
    dtype: torch.dtype,
    right: dict[str, float],
    progress: Progress,
) -> None:
    """Count the generated answers that are right into `right`, by their kinds."""
    processor, single = batcher.processor, generation.each_answer(questions)
    most = generation.longest_answer(single, processor) + SLACK
    for counted, chunk in _chunks(single, batch, ranks):
        inputs = moved(batcher.prompts(chunk), device, dtype)
        said = generation.texts(generation.generate(model, processor, inputs, most, together), inputs, processor)
        for question, text in zip(chunk, said, strict=False):  # a filler's is left
            if counted and generation.is_right(text, question):
                right[question.extra["kind"]] += 1.0
        progress(counted * len(chunk))


def _chunks(items: Sequence[Any], size: int, ranks: Ranks) -> list[tuple[bool, Sequence[Any]]]:
    """This rank's share, `size` at a time; (False, one item) where there is nothing left to take part with."""
    chunks = [items[start : start + size] for start in range(0, len(items), size)]
    mine = [(True, chunk) for chunk in chunks[ranks.rank :: ranks.world]]
    idle = -(-len(chunks) // ranks.world) - len(mine)
    return mine + [(False, items[:1])] * idle


def _answers(whole: Tensor, right: Tensor, labels: Tensor) -> list[float]:
    """1.0 for each answer of a row whose tokens are all right.

    Args:
        whole: (T,) labels, in whose runs the answers are seen.
        right, labels: (P,) at the columns of T where any row has a label.
    """
    said = whole != IGNORED
    starts = said & ~F.pad(said[:-1], (1, 0))
    number = starts.cumsum(0)[said].tolist()
    hits = right[labels != IGNORED].tolist()
    return [
        float(all(hit for hit, own in zip(hits, number, strict=True) if own == answer))
        for answer in range(1, number[-1] + 1)
    ]


def _values(totals: AnswerSums, generate: bool) -> dict[str, float]:
    values = {"eval/loss": float(totals.loss) / max(totals.tokens, 1)}
    answers = totals.answers
    for name, right in (("accuracy", totals.generated), ("forced_accuracy", totals.forced)):
        if name == "accuracy" and not generate:
            continue
        values[f"eval/{name}"] = sum(right.values()) / sum(answers.values())
        values |= {f"eval/{name}/{kind}": right[kind] / answers[kind] for kind in filter(None, answers)}
    values |= {f"eval/{key}": value for key, value in routing_values(totals.routing, each=True).items()}
    samples = max(totals.samples, 1)
    return values | {
        "eval/decoder_flops": totals.flops / samples,
        "eval/dense_decoder_flops": totals.dense_flops / samples,
        "eval/flops_ratio": totals.flops / max(totals.dense_flops, 1),
    }
