"""How well a multimodal LLM answers questions: loss, exact match, and what its routers do; see `evaluate`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

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


@dataclasses.dataclass(frozen=True)
class EvaluatedModel:
    """A model in evaluation, and how it is called."""

    model: Any
    """The model itself; it generates."""
    forward: nn.Module
    """What is called as the model: an engine's wrapper, or the model."""
    blueprint: nn.Module
    """For its layers and their cost; may be on the meta device, or the model itself."""
    device: torch.device | str
    dtype: torch.dtype
    """Type of the weights."""
    ranks: Ranks = ALONE
    """Over which the questions are dealt out, equally many batches to each."""
    together: bool = False
    """Whether the ranks must call the model equally often while they generate, as ZeRO-3 has it."""

    @property
    def layers(self) -> list[str]:
        """What a trace calls the routed layers."""
        return [layer.routing.name for layer in za.routed_layers(self.blueprint)]


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

    def values(self, generated: bool = True, told: bool = True) -> dict[str, float]:
        """The figures that follow, of sums over all ranks.

        Args:
            generated: whether answers were generated.
            told: whether what is seen in one pass with the right answers counts; an attention router chooses otherwise
                there.
        Returns:
            `eval/loss`, nats a token of the answers. `eval/accuracy[/<kind>]`, share of generated answers that are the
            right text exactly, spaces at the ends apart. `eval/forced_accuracy[/<kind>]`, share of answers of which
            every token is the likeliest after the right ones before it, in one pass: the same for a model that
            generates greedily and has one way to write an answer. Of an adapted model `eval/skip…` and
            `eval/auxiliary/…`, as `routing_values` has them. `eval/decoder_flops` of a sample with its answers, as
            measured, `eval/dense_decoder_flops`, without skipping, and `eval/flops_ratio` of the two.
        """
        values = {"eval/loss": float(self.loss) / max(self.tokens, 1)} if told else {}
        if generated:
            values |= self._accuracies("accuracy", self.generated)
        if told:
            values |= self._accuracies("forced_accuracy", self.forced)
        values |= {f"eval/{key}": value for key, value in routing_values(self.routing, each=True).items()}
        samples = max(self.samples, 1)
        return values | {
            "eval/decoder_flops": self.flops / samples,
            "eval/dense_decoder_flops": self.dense_flops / samples,
            "eval/flops_ratio": self.flops / max(self.dense_flops, 1),
        }

    def _accuracies(self, name: str, right: Mapping[str, float]) -> dict[str, float]:
        whole = {f"eval/{name}": sum(right.values()) / sum(self.answers.values())}
        return whole | {f"eval/{name}/{kind}": right[kind] / self.answers[kind] for kind in filter(None, self.answers)}


@torch.no_grad()
def evaluate(
    model: EvaluatedModel,
    batcher: Batcher,
    questions: Sequence[Question],
    batch: int,
    generate: bool = True,
    progress: Progress = lambda samples: None,
) -> AnswerSums:
    """Loss and answers of a model, added up over all ranks; collective. `AnswerSums.values` gives the figures.

    Every answer of a conversation counts, given the right ones before it. A question's `kind` key (one, or one an
    answer) splits accuracies.

    Args:
        batcher: with training=False.
        questions: at least one.
        batch: samples a forward.
        generate: also generate each answer greedily, in batches, with the cache.
        progress: is called with the size of each batch of this rank: first of questions, then, under `generate`, of
            answers.
    """
    kinds = sorted({kind for question in questions for kind in kinds_of(question)})
    sums = AnswerSums.empty(kinds, model.layers)
    _tell(model, batcher, questions, batch, sums, progress)
    if generate:
        _generate(model, batcher, questions, batch, sums, progress)
    return sums.over(model.ranks, model.device)


def _tell(
    model: EvaluatedModel,
    batcher: Batcher,
    questions: Sequence[Question],
    batch: int,
    sums: AnswerSums,
    progress: Progress,
) -> None:
    """Count what one pass over each question with its right answers says."""
    layers, blueprint = model.layers, model.blueprint
    for share in _shares(questions, batch, model.ranks):
        made = batcher.batch(share.items)
        trace = za.Trace() if layers else None
        logits, labels = predict(model.forward, made.to(model.device, model.dtype), trace)
        seen = trace if share.counted and not made.filler else None
        sums.routing += routing_sums(seen, layers)
        if not share.counted:
            continue
        losses = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="sum")
        sums.loss += losses.double()
        sums.tokens += made.answers
        sums.samples += len(share.items)
        sums.flops += za.traced_flops(blueprint, seen or za.Trace(), made.tokens).total
        sums.dense_flops += sum(za.decoder_flops(blueprint, tokens).prefill for tokens in made.tokens)
        right, labels = (logits.argmax(-1) == labels).cpu(), labels.cpu()
        for row, question in enumerate(share.items):
            answers = _answers(made.labels[row, 1:], right[row], labels[row])
            for kind, answer in zip(kinds_of(question), answers, strict=True):
                sums.answers[kind] += 1.0
                sums.forced[kind] += answer
        progress(len(share.items))


def _generate(
    model: EvaluatedModel,
    batcher: Batcher,
    questions: Sequence[Question],
    batch: int,
    sums: AnswerSums,
    progress: Progress,
) -> None:
    """Count the generated answers that are right, by their kinds."""
    processor, single = batcher.processor, generation.each_answer(questions)
    most = generation.longest_answer(single, processor) + SLACK
    for share in _shares(single, batch, model.ranks):
        inputs = moved(batcher.prompts(share.items), model.device, model.dtype)
        made = generation.generate(model.model, processor, inputs, most, model.together)
        said = generation.texts(made, inputs, processor)
        for question, text in zip(share.items, said, strict=False):  # a filler's is left
            if share.counted and generation.is_right(text, question):
                sums.generated[question.extra["kind"]] += 1.0
        progress(share.counted * len(share.items))


class _Share(NamedTuple):
    """Some questions that a rank puts to the model at once."""

    items: Sequence[Question]
    counted: bool
    """False: there is nothing left for this rank, which only takes part with the others."""


def _shares(items: Sequence[Question], size: int, ranks: Ranks) -> list[_Share]:
    """This rank's share of `items`, `size` at a time; every rank has equally many."""
    chunks = [items[start : start + size] for start in range(0, len(items), size)]
    mine = [_Share(chunk, True) for chunk in chunks[ranks.rank :: ranks.world]]
    idle = -(-len(chunks) // ranks.world) - len(mine)
    return mine + [_Share(items[:1], False)] * idle


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
