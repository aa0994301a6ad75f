"""A run behind lm-evaluation-harness and lmms-eval: what they are told is what the run says, on tasks of our own."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import zoo
from tools.evaluate.__main__ import main
from zoo.config import UserError
from zoo.generate import Part
from zoo.run import Run

pytestmark = pytest.mark.slow  # the harness takes seconds to be imported

TASK = """
task: which_digit
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: {kind}
doc_to_text: "{{{{question}}}}"
doc_to_target: {target}
"""
CHOICE = TASK + 'doc_to_choice: ["one", "two", "three"]\nmetric_list: [{{metric: acc}}, {{metric: acc_norm}}]\n'
WRITING = TASK + "generation_kwargs: {{until: ['x'], max_gen_toks: 8}}\nmetric_list: [{{metric: exact_match}}]\n"


@pytest.fixture(scope="module")
def run(trained_run: Path) -> Run:
    return zoo.load(trained_run / "run")


@dataclasses.dataclass
class Request:
    """What harnesses hand over."""

    args: tuple[Any, ...]


def harness(run: Run) -> Any:
    pytest.importorskip("lm_eval")
    from tools.evaluate.harness import RunHarness

    return RunHarness(run, batch=2)


def test_likelihoods_are_those_of_the_run(run: Run) -> None:
    asked = [("seven and ", "eight"), ("", "two"), ("a", "b c")]
    found = harness(run).loglikelihood([Request(pair) for pair in asked])
    plain = run.log_likelihoods([(["seven and"], " eight"), ([], "two"), (["a"], "b c")], end=False)
    np.testing.assert_allclose([nats for nats, _ in found], plain, rtol=1e-6)
    assert all(isinstance(greedy, bool) for _, greedy in found)


def test_a_long_text_is_read_in_windows(run: Run) -> None:
    """For what fits it is the likelihood of the text; each token of a longer one is predicted once."""
    short, long = "seven", "one two three " * 40
    one, other = harness(run).loglikelihood_rolling([Request((short,)), Request((long,))])
    assert one == pytest.approx(run.log_likelihoods([([], short)], end=False)[0], rel=1e-6)
    tokens = len(run.modalities["text"].encode(long))
    assert tokens > 2 * run.length and -20 * tokens < other < one
    context, after = "x " * 500, "seven"
    (nats, _), (same, _) = harness(run).loglikelihood([Request((context[n:], after)) for n in (0, 2)])
    assert nats == same, "what stands too far before is cut off"


def test_generation_is_greedy_until_a_stop(run: Run) -> None:
    model = harness(run)
    said = model.generate_until([Request(("one", {"until": ["q"], "max_gen_toks": 6})), Request(("two", {}))])
    [plain] = run.generate(["one"], "text", temperature=0.0, stop=["q"], max_tokens=6)
    assert said[0] == plain.item
    long = "one two " * 100
    (cut,) = model.generate_until([Request((long, {"max_gen_toks": 6}))])
    assert isinstance(cut, str) and len(run.modalities["text"].encode(model.shortened(long, 30).item)) <= 30


def test_a_task_of_ones_own(trained_run: Path, run: Run, tmp_path: Path, capsys: Any) -> None:
    pytest.importorskip("lm_eval")
    questions = [{"question": f"the number {n}", "answer": n % 3} for n in range(7)]
    (tmp_path / "questions.jsonl").write_text("\n".join(map(json.dumps, questions)))
    given = {"file": tmp_path / "questions.jsonl"}
    (tmp_path / "choice.yaml").write_text(CHOICE.format(**given, kind="multiple_choice", target="answer"))
    writing = WRITING.format(**given, kind="generate_until", target="'{{answer}}'").replace("which_digit", "say_digit")
    (tmp_path / "writing.yaml").write_text(writing)
    folder = str(trained_run / "run")
    command = [folder, "--lm-eval", "which_digit", "say_digit", "--task-folder", str(tmp_path), "--out", str(tmp_path)]
    assert main([*command, "--shots", "0"]) == 0
    found = json.loads((tmp_path / "evaluation.json").read_text())
    choices = ["one", "two", "three"]
    pairs = [([each["question"]], f" {choice}") for each in questions for choice in choices]
    best = run.log_likelihoods(pairs, end=False).reshape(7, 3).argmax(1)
    expected = np.mean([pick == each["answer"] for pick, each in zip(best, questions, strict=True)])
    assert found["tasks"]["which_digit"]["acc,none"] == pytest.approx(expected) and found["data"] == {}
    assert 0 <= found["tasks"]["say_digit"]["exact_match,none"] <= 1
    assert main([folder, "--lm-eval", "no_such_task", "--out", str(tmp_path)]) == 2
    assert "--lm-eval no_such_task: is no task that the harness knows" in capsys.readouterr().err


def test_pictures_in_questions(run: Run) -> None:
    """lmms-eval hands over pictures as Pillow has them; they stand before the words."""
    pytest.importorskip("lmms_eval")
    from tools.evaluate.multimodal_harness import RunMultimodalHarness

    model = RunMultimodalHarness(run, batch=2)
    picture = Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8) * 4)
    model.task_dict["digits"] = {"test": [{"picture": picture, "answer": "seven"}]}

    def seen(question: Any) -> list[Image.Image]:
        return [question["picture"]]

    place = (seen, 0, "digits", "test")
    ((nats, _),) = model.loglikelihood([Request(("which?", lambda question: question["answer"], *place))])
    parts = [Part("image", np.asarray(picture)[..., None]), "which?"]
    assert nats == pytest.approx(run.log_likelihoods([(parts, "seven")], end=False)[0], rel=1e-6)
    (said,) = model.generate_until([Request(("<image> which?", {"max_new_tokens": 5, "until": ["\n"]}, *place))])
    assert said == run.generate(parts, "text", temperature=0.0, max_tokens=5, stop=["\n"])[0].item
    with pytest.raises(UserError, match="a float in a question is neither a picture nor a sound"):
        model.generate_until([Request(("a", {}, lambda question: [1.0], 0, "digits", "test"))])
