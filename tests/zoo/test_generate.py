"""Generation: equal to the full forward at every step, equal however prompts are batched, and its errors."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import zoo
from zoo import Part, Run, UserError
from zoo.generate import document
from zoo.heads import default_head
from zoo.likelihood import likelihoods, of_pieces
from zoo.modalities import (
    Carries,
    Channels,
    Ids,
    Modality,
    ModalityConfig,
    Piece,
    Positions,
    Vectors,
    parse_modalities,
    vocabulary,
)
from zoo.objectives.autoregressive import Autoregressive
from zoo.prefix import together
from zoo.registry import register
from zoo.sampling import Sampling
from zoo.stems import default_stem


class Counted(Modality):
    """An item is a list of what its positions carry, 2 to 5 of them."""

    def encode(self, item: Any) -> np.ndarray:
        return np.array(item)

    def decode(self, content: np.ndarray) -> Any:
        return np.asarray(content).tolist()

    def write(self, item: Any) -> bytes:
        return repr(item).encode()


class CountedConfig(ModalityConfig):
    part = "counted"
    suffix = ".txt"

    @property
    def positions(self) -> Positions:
        return Positions(2, 5)

    def read(self, content: bytes) -> Any:
        raise NotImplementedError


@register("modality", "test_notes")
class Notes(Counted):
    class Config(CountedConfig):
        @property
        def carries(self) -> Carries:
            return Ids(6)


@register("modality", "test_chords")
class Chords(Counted):
    class Config(CountedConfig):
        @property
        def carries(self) -> Carries:
            return Channels(3, 4)


@register("modality", "test_strokes")
class Strokes(Counted):
    class Config(CountedConfig):
        @property
        def carries(self) -> Carries:
            return Vectors(3)


PICTURE = {"image_size": 4, "patch": 2, "channels": 1}
KINDS: dict[str, dict[str, Any]] = {
    "ids": {"type": "patches", "codes": 5, **PICTURE},
    "ids, open-ended": {"type": "test_notes"},
    "channels": {"type": "test_chords"},
    "vectors": {"type": "test_strokes"},
    "diffusion": {"type": "continuous_patches", "mask": "bidirectional", **PICTURE},
    "flow": {"type": "continuous_patches", "mask": "bidirectional", **PICTURE},
}
ATTENTION = {"mixer": {"type": "attention", "heads": 2, "qk_norm": True}}
SPARSE = {
    "mixer": {"type": "mamba2", "d_state": 3, "head_dim": 8},
    "feedforward": {"type": "moma", "experts": {"text": 2, "x": 2}, "d_ff": 12, "scope": "row"},
    "depth": {"type": "mod", "capacity": "1/2"},
}
LAYERS = {"dense": [ATTENTION, ATTENTION], "sparse": [ATTENTION, SPARSE, ATTENTION | {"depth": SPARSE["depth"]}]}


def make_recipe(kind: str, layers: str | list[dict[str, Any]] = "dense", length: int = 40) -> dict[str, Any]:
    """What a resolved recipe says of a run of text and one modality."""
    sections = {"text": {"type": "bytes"}, "x": KINDS[kind]}
    section = parse_modalities(sections)
    config = section["x"]
    ends: dict[str, Any] = {}
    if not isinstance(config.carries, Ids):
        assert config.positions is not None
        ends["stem"] = {"x": default_stem(config.carries, config.bidirectional).model_dump(mode="json")}
        ends["head"] = {"x": default_head(config.carries, not config.positions.fixed).model_dump(mode="json")}
    network = {"modalities": list(section), "d_model": 16, "vocab_size": vocabulary(section).size, **ends}
    return {
        "name": "untrained",
        "modalities": sections,
        "model": network | {"layers": LAYERS[layers] if isinstance(layers, str) else layers},
        "objective": {"type": {"diffusion": "transfusion", "flow": "flow"}.get(kind, "autoregressive")},
        "data": {"path": "data/somewhere", "sequence_length": length},
    }


def make_run(kind: str, layers: str | list[dict[str, Any]] = "dense", length: int = 40) -> Run:
    """An untrained run of text and one modality, in float64."""
    recipe = make_recipe(kind, layers, length)
    section = parse_modalities(recipe["modalities"])
    config = section["x"]
    objective = zoo.build(
        "objective",
        recipe["objective"],
        modalities=tuple(section),
        heads=zoo.ModelConfig.parse(recipe["model"]).own_heads,
        bidirectional=("x",) if config.bidirectional else (),
    )
    modalities: dict[str, Modality] = {"text": section["text"].open()}
    if kind == "ids":
        modalities["x"] = config.block(config, np.arange(20, dtype=np.uint8).reshape(5, 4) * 12)
    else:
        modalities["x"] = config.open()
    model = zoo.build("model", recipe["model"], seed=5)
    return Run(Path("run"), model.double().eval(), modalities, objective, length)


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


def item_of(run: Run) -> Part:
    """Something to show the model."""
    config = run.modalities["x"].config
    match config.carries:
        case Ids() if isinstance(run.modalities["x"], Notes):
            return Part("x", [1, 5, 0])
        case Channels():
            return Part("x", [[0, 3, 1], [2, 2, 2]])
        case Vectors() if isinstance(run.modalities["x"], Strokes):
            return Part("x", [[0.5, -1.0, 0.0], [0.25, 0.0, 1.0]])
    return Part("x", np.arange(16, dtype=np.uint8).reshape(4, 4) * 15)


def plain(parts: list[Part]) -> list[tuple[str, Any]]:
    return [(part.modality, np.asarray(part.item).tolist()) for part in parts]


PLANS: dict[str, tuple[Any, float]] = {"free": (None, 1.0), "planned": (("text", "x"), 1.0), "guided": ("x", 2.0)}


@pytest.mark.parametrize("plan", PLANS)
def test_a_prompt_gets_the_same_alone(kind: str, plan: str) -> None:
    """Whatever its length, the batch and what the others write; and other samples get something else."""
    run, (then, guidance) = make_run(kind, "sparse"), PLANS[plan]
    prompts: list[list[Part | str]] = [["a", item_of(run), "bcdef"], [], ["abc"], ["abc"]]
    options: dict[str, Any] = {"drawing": Sampling(steps=2, eta=0.5), "seed": 3, "max_tokens": 10, "temperature": 4.0}
    together = run.generate_all(prompts, then, guidance=guidance, **options)
    for batch in (1, 3):
        assert list(map(plain, run.generate_all(prompts, then, batch=batch, guidance=guidance, **options))) == list(
            map(plain, together)
        )
    assert plain(together[2]) != plain(together[3]), "the same prompt, another sample"
    if then is not None:
        expected = [then] if isinstance(then, str) else list(then)
        assert all([part.modality for part in row] == expected for row in together)


def steps(run: Run, parts: list[Part], content: np.ndarray) -> Iterator[tuple[torch.Tensor, torch.Tensor | None]]:
    """What the model says of each position of an item, and of the one after it, seeing all before it at once."""
    grammar = run.grammars["x"]
    for n in range(len(content) + 1):
        begun = Piece.join([document(run, parts), Piece.of([grammar.begin or 0], 0), grammar.places(content[:n])])
        batch = together([begun], run.model, [0], [0])
        last = torch.tensor([len(begun) - 1])
        read = dict.fromkeys(run.model.heads, last)
        logits, predicted = run.model(batch.tokens, batch.context, content=batch.content, read=read)
        yield logits[0, -1], predicted.get("x")


@torch.no_grad()
@pytest.mark.parametrize("layers", LAYERS)
@pytest.mark.parametrize("kind", ["ids", "ids, open-ended", "channels", "vectors"])
def test_the_likeliest_is_that_of_the_full_forward(kind: str, layers: str) -> None:
    run = make_run(kind, layers)
    grammar = run.grammars["x"]
    assert grammar.end is not None and grammar.positions is not None
    prompt = [Part("text", "ab"), item_of(run), Part("text", "c")]
    [written] = run.generate(prompt, "x", temperature=0.0)
    content = run.modalities["x"].encode(written.item) if kind != "ids" else None
    if content is None:  # what a picture decodes to is no unique code
        content = np.array(
            [
                int(np.flatnonzero((run.modalities["x"].codebook == row).all(1))[0])
                for row in run.modalities["x"].config.patches(written.item)
            ]
        )
    assert grammar.positions.least <= len(content) <= grammar.positions.most
    start, stop, _ = grammar.choice
    for n, (logits, predicted) in enumerate(steps(run, prompt, content)):
        ended = n == len(content)
        if grammar.holds_places and not ended:
            assert predicted is not None
            expected = predicted[0].argmax(-1) if kind == "channels" else predicted[0].float()
            np.testing.assert_allclose(content[n], expected.numpy(), rtol=0, atol=1e-6)
        elif not ended:
            assert int(logits[start:stop].argmax()) == content[n] or grammar.positions.least <= n
        if grammar.positions.least <= n < grammar.positions.most:
            assert bool(logits[grammar.end] > logits[start:stop].max()) == ended
    assert ended


def test_free_text_is_the_likeliest_too() -> None:
    run = make_run("ids")
    [text] = run.generate(["ab"], "text", temperature=0.0, max_tokens=6)
    piece = document(run, ["ab" + text.item])
    batch = together([piece], run.model, [0], [0])
    logits = run.model(batch.tokens, batch.context)[0, 2:]
    start, stop, _ = run.grammars["text"].choice
    ids = run.modalities["text"].encode(text.item)
    if "\ufffd" not in text.item:
        assert [int(row[start:stop].argmax()) for row in logits[: len(ids)]] == ids.tolist()


def test_guidance_moves_away_from_what_has_no_caption() -> None:
    """At w = 0 the prompt is not heard inside an item; large w exaggerates it."""
    run = make_run("ids")
    prompts = [["abc"], ["xyz!"], []]
    deaf = run.generate_all(prompts, "x", temperature=0.0, guidance=0.0)
    assert plain(deaf[0]) == plain(deaf[1]) == plain(deaf[2])
    one, plainly = (run.generate_all(prompts, "x", temperature=0.0, **more) for more in ({"guidance": 1.0}, {}))
    assert list(map(plain, one)) == list(map(plain, plainly))


def test_a_text_ends_before_a_stop() -> None:
    run = make_run("ids")
    rows = run.generate_all([["a"]] * 20, "text", max_tokens=30)
    texts = [part.item for row in rows for part in row]
    stop = texts[0][4]
    stopped = run.generate_all([["a"]] * 20, "text", max_tokens=30, stop=[stop])
    for (before,), after in zip(rows, stopped, strict=True):
        assert "".join(part.item for part in after) == before.item.split(stop)[0]


def test_nothing_goes_beyond_the_context(kind: str) -> None:
    run = make_run(kind, length=20)
    for row in run.generate_all([["abcd"]] * 6, seed=1, drawing=Sampling(steps=2)):
        sizes = [  # a character is at least a token
            len(part.item) if part.modality == "text" else len(document(run, [part])) - 1 for part in row
        ]
        assert 5 + sum(sizes) <= 20


def test_a_penalty_makes_text_repeat_itself_less() -> None:
    run = make_run("ids", length=60)
    texts = [run.generate(["ab"], "text", temperature=0.0, repetition_penalty=p)[0].item for p in (1.0, 10.0)]
    assert len(set(texts[1])) > len(set(texts[0]))


def test_likelihoods_are_of_the_full_forward(kind: str) -> None:
    run = make_run(kind, "sparse")
    documents = [(["a", item_of(run)], "bc"), ([], "a longer text"), ([item_of(run)], "")]
    found = run.log_likelihoods(documents, batch=2)
    for value, (prompt, text) in zip(found, documents, strict=True):
        piece = Piece.join([document(run, [*prompt, text]), Piece.of([run.vocabulary.eos], 0)])
        batch = together([piece], run.model, [0], [0])
        logits = run.model(batch.tokens, batch.context, content=batch.content)[0].log_softmax(-1)
        own = range(len(document(run, prompt)), len(piece))
        expected = sum(float(logits[place - 1, piece.tokens[place]]) for place in own)
        assert value == pytest.approx(expected, abs=1e-8)


@pytest.mark.parametrize("kind", ["ids", "ids, open-ended", "channels"])
def test_likelihoods_of_a_document_are_the_loss_of_it(kind: str) -> None:
    """Part after part, they add up to what the objective sums over the document, under causal routing."""
    run = make_run(kind, "sparse")
    parts = ["ab", item_of(run), "c"]
    whole = Piece.join([document(run, parts), Piece.of([run.vocabulary.eos], 0)])
    sums = run.objective(run.model, together([whole], run.model, [0], [0]))
    channels = 3 if kind == "channels" else 1  # the loss of a position is a mean over them
    expected = -float(sums["text"] + channels * sums["x"] + sums.get("x_length", 0))
    pairs = [(parts[:n], part) for n, part in enumerate(parts)]
    found = likelihoods(run, pairs, end=False, batch=2) + likelihoods(run, [(parts, "")], end=True)
    assert sum(each.nats for each in found) == pytest.approx(expected, rel=1e-12)
    assert [each.tokens for each in found] == [2, len(document(run, [item_of(run)])) - 1, 1, 1]


def test_a_greedy_continuation_is_said_to_be_one() -> None:
    run = make_run("ids")
    for prompt in ("a", "bcd"):
        piece, written = document(run, [prompt]), []
        while len(written) < 4:  # the likeliest of all ids, whatever the grammar allows
            tokens = Piece.of([*piece.tokens, *written], 0)
            batch = together([tokens], run.model, [0], [0])
            written.append(int(run.model(batch.tokens, batch.context)[0, -1].argmax()))
        other = [*written[:-1], (written[-1] + 1) % 200]
        found = of_pieces(run, [(piece, Piece.of(each, 0)) for each in (written, other)])
        assert [each.greedy for each in found] == [True, False] and found[0].nats > found[1].nats


def test_likelihoods_that_there_are_not() -> None:
    for kind, reason in (("vectors", "x: carries vectors in run"), ("flow", "x: carries vectors in run")):
        run = make_run(kind)
        with pytest.raises(UserError, match=reason):
            likelihoods(run, [(["a"], item_of(run))])
    with pytest.raises(UserError, match="a document of 52 tokens: run was trained on 40"):
        make_run("ids").log_likelihoods([(["a" * 30], "b" * 20)])


def bad(**changes: Any) -> Run:
    return dataclasses.replace(make_run("ids"), **changes)


def test_what_cannot_be_is_refused() -> None:
    run = make_run("ids")
    cases: list[tuple[Any, str]] = [
        (lambda: run.generate(["a"], "xx"), "then: 'xx' is no modality of run; it has text, x (did you mean 'x'?)"),
        (lambda: run.generate([Part("speech", 1)]), "part 1: 'speech' is no modality of run; it has text, x"),
        (
            lambda: run.generate(["a" * 50]),
            "prompt: takes 51 tokens, and there is no room to go on; run was trained on 40",
        ),
        (lambda: run.generate(["a" * 35], "x"), "prompt: takes 36 tokens, and x take at least 6 more"),
        (lambda: run.generate(["a"], "x", max_tokens=3), "max_tokens: 3: x take at least 6"),
        (lambda: run.generate([Part("x", np.zeros((4, 4)))]), "part 1: is no item of x (an array of shape (4, 4) and"),
        (lambda: run.generate(["ok", Part("text", 7)]), "part 2: is no item of text (a int)"),
        (lambda: run.generate(["a"], top_p=2.0), "generate.top_p: 2.0: must be less than or equal to 1"),
        (lambda: run.generate(["a"], stop=[""]), "stop: an empty text stands everywhere"),
        (lambda: run.read("audio", "a.wav"), "audio: run has no modality that reads it; it has text, x"),
        (lambda: run.read("image", "no.png"), "no.png: cannot be read (No such file or directory)"),
        (lambda: run.read("image", __file__), "is no image that x reads (cannot identify image file"),
    ]
    for call, reason in cases:
        with pytest.raises(UserError) as caught:
            call()
        assert reason in str(caught.value) and "\n" not in str(caught.value)


def test_blocks_that_look_ahead_need_their_auxiliary_routers() -> None:
    layer = ATTENTION | {"depth": {"type": "mod", "capacity": 0.5, "auxiliary": False}}
    config = {"modalities": ["text", "x"], "d_model": 16, "vocab_size": 265, "layers": [layer]}
    run = bad(model=zoo.build("model", config))
    with pytest.raises(UserError, match=r"^run: layers.0 and 0 other blocks .* python -m tools.train_routers run$"):
        run.generate(["a"])
    assert isinstance(run.objective, Autoregressive)
