"""Recipes that are wrong in many ways: shipped ones with values, keys, text or overrides changed at random."""

from __future__ import annotations

import copy
import dataclasses
import random
from collections.abc import Iterator
from typing import Any

import yaml

from pretrain import recipe as recipes
from tests.pretrain.runs import ROOT

SOURCES = [
    "quickstart",
    "tiny/hybrid_mod_moma",
    "tiny/mixer_gate",
    "tiny/mode_integrated",
    "tiny/mot_moma",
    "tiny/shared_experts",
    "tiny/token_choice_bias",
    "tiny/mixture_of_mamba2",
    "tiny/mod_progressive",
    "models/moma_4t4i_90m",
    "examples/digits_gamma_mod",
    "examples/digits_p_mod",
]
VALUES: list[Any] = [
    *(None, True, False, 0, 1, -1, 2, 3, 7, 0.5, -0.5, 1e-9, 1e300, -1e300, 1.6e10),
    *("", "x", "auto", "null", "1e5", "…", "\x00", "x" * 10_000),
    *(10**9, 10**18, 2**31, 2**53, 2**63, 2**64, 16_000_000_000, -(10**18), 10**40, 2**18, 2**24),
    *([], {}, [1], [[]], {"type": "x"}, {"type": [1]}, {"type": {}}, {"type": None}, [{"type": 1}], {"a": {"b": 1}}),
    *(["text"], ["image"], ["text", "text"], {"text": 1}, {"text": 10**18, "image": 2}, {"image": -1}),
    *([0.9], [0.9, 0.95, 1], [1] * 5000),
]
SCALARS = [
    *("2024-02-30", "2024-02-28", "0x", "0b", "0o9", "1_", "1:99:99", ".inf", "-.inf", ".nan", "1e", "~", "=", "<<"),
    *("!!int x", "!!float x", "!!bool x", "!!timestamp x", "!!binary x", "!!set {a}", "!!omap [a]", "!!pairs [a: 1]"),
    *("!x y", "!!python/object/apply:os.system [exit]", "[", "{", "]", "}", "'", '"', "|", ">", "? a", "- -"),
    *("a: b: c", "@", "`", "%", "9" * 5000, "0x" + "f" * 5000, "1" + "0" * 400, "\t", "\ud7ff", "&a [*a]", "{<<: 1}"),
    *("[" * 2000, "[" * 100_000, "{a: " * 300, "[" * 80 + "]" * 80, "*a", "&a x"),
    "{a: &a [x, x, x, x], b: &b [*a, *a, *a, *a], c: &c [*b, *b, *b, *b], d: &d [*c, *c, *c, *c, *c], "
    "e: &e [*d, *d, *d, *d], f: &f [*e, *e, *e, *e], g: &g [*f, *f, *f, *f], h: [*g, *g, *g, *g]}",
]
OVERRIDES = [
    *("", "=", "name", "name=", "=1", ".=1", "..=1", "name=[[[", "name=" + "[" * 3000, "name=2024-02-30", "model=1"),
    *("model=", "model.layers=", "model.layers.0=1", "model.layers.9.norm=pre", "model.layers.x=1", "a.b.c.d=1"),
    *("model.layers[-1].norm=pre", ".".join("a" * 3000) + "=1"),
    *("imports=[tests.pretrain.exits]", "imports=x", "imports=[1]", "imports=['']", "imports=[.]", "imports=[..a]"),
    *("imports=[no.such]", "imports=[tests.pretrain.exits, 1]", "deepspeed=nowhere.json", "deepspeed=recipes"),
    *("deepspeed={a: 1}", "run_dir=\x00", "name=../x", "seed=1.5", "seed=-1", "extends=x"),
    *("model.repeat=1000000000", "model.d_model=1000000000000000000", "data.sequence_length=100000000000000000000"),
    *("modalities.image.codes=16000000000", "modalities.text.vocab_size=9000000000000000000"),
]


@dataclasses.dataclass(frozen=True)
class Case:
    """A recipe's text and the overrides it is read with."""

    text: str
    overrides: list[str]
    finetuning: bool
    """Whether it began as a recipe of a fine-tuning."""


def case(number: int) -> Case:
    """Case `number`; the same number gives the same case."""
    draw = random.Random(number)
    name = draw.choice(SOURCES)
    data = source(name)
    for _ in range(draw.choice([0, 1, 1, 1, 2, 3])):
        change(draw, data)
    text = yaml.safe_dump(data, sort_keys=False, allow_unicode=True)
    if draw.random() < 0.3:
        text = disturb(draw, text)
    overrides = []
    if draw.random() < 0.2:
        key = ".".join(map(str, draw.choice(list(places(data)) or [("name",)])))
        overrides = [draw.choice([draw.choice(OVERRIDES), f"{key}={draw.choice(SCALARS)}"])]
    return Case(text, overrides, name.startswith("examples/"))


def source(name: str, read: dict[str, dict[str, Any]] = {}) -> dict[str, Any]:  # noqa: B006  kept between calls
    """The data of a shipped recipe."""
    if name not in read:
        read[name] = recipes.read(ROOT / "recipes" / f"{name}.yaml")
    return copy.deepcopy(read[name])


def places(data: Any, path: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    """The paths of all values inside `data`."""
    for key, value in data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ():
        yield (*path, key)
        yield from places(value, (*path, key))


def change(draw: random.Random, data: dict[str, Any]) -> None:
    """Put another value at one place of `data`, remove it, move it, or add a key beside it."""
    *outer, last = draw.choice(list(places(data)) or [("name",)])
    node: Any = data
    for key in outer:
        node = node[key]
    what = draw.choice(["value", "value", "value", "remove", "add", "swap", "double"])
    if what == "value" or isinstance(node, list):
        node[last] = copy.deepcopy(draw.choice(VALUES))
    elif what == "remove":
        node.pop(last, None)
    elif what == "add":
        node[draw.choice(["x", "type", "repeat", 1, None, 2.5, True, "experts", str(last) + "s"])] = draw.choice(VALUES)
    elif what == "swap":
        path = draw.choice(list(places(data)))
        found: Any = data
        for key in path:
            found = found[key]
        node[last] = copy.deepcopy(found)
    else:
        node[last] = [copy.deepcopy(node.get(last))] * 2


def disturb(draw: random.Random, text: str) -> str:
    """Change the text itself: cut it, repeat a line, put an odd scalar in place of one, or insert characters."""
    lines = text.splitlines()
    at = draw.randrange(len(lines))
    what = draw.choice(["scalar", "scalar", "scalar", "cut", "repeat", "insert", "indent"])
    if what == "cut":
        return text[: draw.randrange(len(text))]
    if what == "insert":
        place = draw.randrange(len(text))
        return (
            text[:place]
            + draw.choice(["\x00", "\t", ":", "- ", "#", "\n", "{", "]", "é", "\u2028", "*", "&", "!"])
            + text[place:]
        )
    key, colon, _ = lines[at].partition(":")
    if what == "scalar" and colon:
        lines[at] = f"{key}: {draw.choice(SCALARS)}"
    elif what == "repeat":
        lines.insert(at, lines[at])
    else:
        lines[at] = " " * draw.randrange(6) + lines[at].lstrip()
    return "\n".join(lines)
