"""lmms-eval on a trained run: questions about pictures and sounds, by that harness's own interface of a model."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from lmms_eval.api.model import lmms
from lmms_eval.evaluator import simple_evaluate
from lmms_eval.tasks import TaskManager
from PIL import Image

from tools.evaluate.harness import RunHarness, options_of
from zoo.config import UserError
from zoo.generate import Part, modality_of_part
from zoo.likelihood import likelihoods
from zoo.modalities.speech.sounds import soundfile
from zoo.run import Run


class RunMultimodalHarness(lmms):
    """A trained run as lmms-eval asks it: pictures and sounds of a question stand before its words."""

    def __init__(self, run: Run, batch: int = 32) -> None:
        super().__init__()
        self.run, self.batch, self.words = run, batch, RunHarness(run, batch)

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """Log-likelihood in nats of each continuation, and whether it is the likeliest throughout."""
        documents = []
        for context, target, visual, number, task, split in (request.args for request in requests):
            question = self.task_dict[task][split][number]
            after = target if isinstance(target, str) else target(question)
            documents.append((self._prompt(context, visual(question), len(after.encode())), after))
        return [(each.nats, each.greedy) for each in likelihoods(self.run, documents, end=False, batch=self.batch)]

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """What follows each question, until one of the texts that end it."""
        written = []
        for context, said, visual, number, task, split in (request.args for request in requests):
            options = options_of(said)
            options["max_tokens"] = min(options["max_tokens"], self.run.length // 4)
            prompt = self._prompt(context, visual(self.task_dict[task][split][number]), options["max_tokens"])
            written.append("".join(part.item for part in self.run.generate(prompt, self.words.text.name, **options)))
        return written

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[str]:
        """Raises UserError: a run knows no rounds."""
        raise UserError("lmms-eval: tasks of several rounds ask for a model that was trained to talk")

    def _prompt(self, context: str, seen: Sequence[Any], after: int) -> list[Part]:
        """The parts of a question, its words shortened to what leaves room for so many tokens."""
        parts = [self._item(each) for each in seen]
        taken = 1 + sum(self._tokens(part) for part in parts)
        words = context.replace("<image>", "").replace("<audio>", "").strip()
        return [*parts, self.words.shortened(words, max(self.run.length - taken - after, 0))]

    def _tokens(self, part: Part) -> int:
        positions = self.run.modalities[part.modality].config.positions
        return 2 + (0 if positions is None else positions.most)

    def _item(self, seen: Any) -> Part:
        """A picture of Pillow's, or a sound as `datasets` gives it."""
        content = io.BytesIO()
        if isinstance(seen, Image.Image):
            seen.convert("RGB").save(content, "PNG")
            kind = "image"
        elif isinstance(seen, dict) and "array" in seen:
            soundfile().write(content, np.asarray(seen["array"]), seen["sampling_rate"], format="WAV", subtype="FLOAT")
            kind = "audio"
        else:
            raise UserError(f"lmms-eval: a {type(seen).__name__} in a question is neither a picture nor a sound")
        name = modality_of_part(self.run, kind)
        return Part(name, self.run.modalities[name].config.read(content.getvalue()))


def run_tasks(
    run: Run, tasks: Sequence[str], folder: Path | None, shots: int | None, limit: int | None
) -> dict[str, Mapping[str, float]]:
    """What the harness finds: task → metric → value; arguments as `tools.evaluate.harness.run_tasks`."""
    manager = TaskManager("ERROR", include_path=None if folder is None else str(folder))
    unknown = [task for task in tasks if not manager.match_tasks([task])]
    if unknown:
        raise UserError(f"--lmms-eval {' '.join(unknown)}: is no task that the harness knows")
    found = simple_evaluate(
        RunMultimodalHarness(run),
        tasks=list(tasks),
        task_manager=manager,
        num_fewshot=shots,
        limit=limit,
        bootstrap_iters=1000,
        batch_size=1,
    )
    return {
        task: {key: value for key, value in values.items() if isinstance(value, int | float)}
        for task, values in found["results"].items()
    }
