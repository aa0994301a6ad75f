"""EleutherAI's lm-evaluation-harness on a trained run: multiple choice and generation of text, by the harness's own
interface of a language model (the extra `evaluate`)."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.tasks import TaskManager
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from zoo.config import UserError
from zoo.generate import Part, check_causal
from zoo.likelihood import of_pieces
from zoo.modalities.grammar import Piece
from zoo.run import Run

GENERATED = 256
"""Most tokens that follow a prompt, where a task does not say."""


class RunHarness(LM):
    """A trained run as lm-evaluation-harness asks it. What stands before an answer is shortened from its beginning to
    what the model knows."""

    def __init__(self, run: Run, batch: int = 64) -> None:
        super().__init__()
        check_causal(run)
        self.run, self.batch = run, batch
        self.text = run.grammars[run.vocabulary.text]

    def loglikelihood(self, requests: Sequence[Instance]) -> list[tuple[float, bool]]:
        """Log-likelihood in nats of each continuation, and whether it is the likeliest throughout."""
        pairs = []
        for context, continuation in (request.args for request in requests):
            words = context.rstrip()  # a space belongs to the word after it
            after = self._ids(context[len(words) :] + continuation)
            pairs.append((self._before(self._ids(words), len(after)), self._piece(after)))
        return [(each.nats, each.greedy) for each in of_pieces(self.run, pairs, self.batch)]

    def loglikelihood_rolling(self, requests: Sequence[Instance]) -> list[float]:
        """Log-likelihood of each whole text, in windows as long as the model's context."""
        found = []
        for (text,) in (request.args for request in requests):
            windows = get_rolling_token_windows(self._ids(text), self.run.vocabulary.bos, self.run.length - 1, 1)
            parts = (make_disjoint_window(window) for window in windows)
            pairs = [(self._piece(before), self._piece(after)) for before, after in parts]
            found.append(sum(each.nats for each in of_pieces(self.run, pairs, self.batch)))
        return found

    def generate_until(self, requests: Sequence[Instance]) -> list[str]:
        """What follows each context, until one of the texts that end it."""
        written: dict[int, str] = {}
        for options, numbers in _alike(requests):
            most = min(options["max_tokens"], self.run.length // 2)
            prompts = [[self.shortened(requests[n].args[0], self.run.length - 1 - most)] for n in numbers]
            rows = self.run.generate_all(
                prompts, self.text.name, batch=self.batch, progress=True, **options | {"max_tokens": most}
            )
            written |= {n: "".join(part.item for part in row) for n, row in zip(numbers, rows, strict=True)}
        return [written[n] for n in range(len(requests))]

    def shortened(self, text: str, room: int) -> Part:
        """The end of a text that takes `room` tokens at most."""
        while (taken := len(self._ids(text))) > room:
            text = text[min(len(text), max(1, len(text) - len(text) * room // taken)) :]
        return Part(self.text.name, text)

    def _ids(self, text: str) -> list[int]:
        return self.text.tokens(self.run.modalities[self.text.name].encode(text)).tolist()

    def _piece(self, ids: Sequence[int]) -> Piece:
        return Piece.of(ids, self.text.text)

    def _before(self, ids: Sequence[int], after: int) -> Piece:
        """The beginning of a document, and as much of `ids` as leaves room for so many tokens."""
        room = max(self.run.length - 1 - after, 0)
        return self._piece([self.run.vocabulary.bos, *ids[max(len(ids) - room, 0) :]])


def _alike(requests: Sequence[Instance]) -> Iterator[tuple[dict[str, Any], list[int]]]:
    """Options of generation, and the numbers of the requests that have them."""
    groups: dict[str, list[int]] = {}
    for number, request in enumerate(requests):
        _, said = request.args
        groups.setdefault(json.dumps(options_of(said), sort_keys=True), []).append(number)
    for options, numbers in groups.items():
        yield json.loads(options), numbers


def options_of(said: dict[str, Any]) -> dict[str, Any]:
    """What a task says of generation, by the names of `Run.generate_all`."""
    until = said.get("until") or []
    sampled = said.get("do_sample", bool(said.get("temperature")))
    options = {
        "stop": [until] if isinstance(until, str) else [each for each in until if each],
        "max_tokens": int(said.get("max_gen_toks") or said.get("max_new_tokens") or GENERATED),
        "temperature": float(said.get("temperature") or 1.0) if sampled else 0.0,
    }
    return options | {key: said[key] for key in ("top_k", "top_p") if sampled and said.get(key)}


def run_tasks(
    run: Run, tasks: Sequence[str], folder: Path | None, shots: int | None, limit: int | None
) -> dict[str, Any]:
    """What the harness finds: task → metric → value.

    Args:
        folder: of YAML files with tasks of one's own.
        shots: solved examples before each question; None: as the task says.
        limit: questions of a task; None: all.
    Raises:
        UserError: a task is not known, or its data cannot be had.
    """
    manager = TaskManager(include_path=None if folder is None else str(folder))
    unknown = [task for task in tasks if not manager.match_tasks([task])]
    if unknown:
        raise UserError(
            f"--lm-eval {' '.join(unknown)}: is no task that the harness knows; name a folder of your own "
            "with --task-folder"
        )
    try:
        found = simple_evaluate(
            RunHarness(run),
            tasks=list(tasks),
            task_manager=manager,
            num_fewshot=shots,
            limit=limit,
            bootstrap_iters=1000,
        )
    except (OSError, ConnectionError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"--lm-eval {' '.join(tasks)}: {' '.join(str(error).split())}") from None
    assert found is not None
    return {
        task: {key: each for key, each in values.items() if isinstance(each, int | float)}
        for task, values in found["results"].items()
    }
