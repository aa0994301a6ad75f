"""Writes the keys of docs/recipes.md from the configs: their docstrings, types and defaults.

    python -m tools.document_recipes

What stands above the marker of that page is written by hand and stays.
"""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap
import types
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import annotated_types as limits
from pydantic.fields import FieldInfo

from pretrain.finetune.recipe import FinetuneRecipe
from pretrain.image_tokenizer import ImageTokenizerRecipe
from pretrain.recipe import Recipe
from tools.examples.make_llava import LlavaFolderConfig
from tools.mixture.settings import MixtureConfig
from tools.sweep.adapt.settings import SweepConfig
from tools.sweep.pretrain.settings import SweepConfig as PretrainSweepConfig
from zoo import registry
from zoo.config import Config

PAGE = Path(__file__).parents[1] / "docs" / "recipes.md"
MARKER = "<!-- Written by `python -m tools.document_recipes`: edit the docstrings of the configs instead. -->\n"
ROOTS: Sequence[tuple[str, type[Config]]] = (
    ("Keys of a pretraining", Recipe),
    ("Keys of a fine-tuning", FinetuneRecipe),
    ("Keys of a sweep of adaptations", SweepConfig),
    ("Keys of a sweep of pretrainings", PretrainSweepConfig),
    ("Keys of a choice of mixtures", MixtureConfig),
    ("Keys of a small LLaVA", LlavaFolderConfig),
    ("Keys of an image tokenizer", ImageTokenizerRecipe),
)
"""Heading and config of each kind of file; the blocks stand after the first."""
PLAIN = {int: "integer", float: "number", str: "text", bool: "`true` or `false`", type(None): "`null`", Any: "anything"}
SIGNS = {limits.Gt: ">", limits.Ge: "≥", limits.Lt: "<", limits.Le: "≤"}


def meanings(config: type[Config]) -> dict[str, str]:
    """The docstring under each field of a config, those of its base classes too, on one line each."""
    found: dict[str, str] = {}
    for cls in reversed(config.__mro__):
        if issubclass(cls, Config) and cls is not Config:
            body = _class_of(cls).body
            for field, after in zip(body, body[1:], strict=False):
                text = _text(after)
                if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and text:
                    found[field.target.id] = " ".join(text.split())
    return found


def page() -> str:
    """The generated part of the page."""
    seen: dict[type[Config], str] = {}
    parts = []
    for number, (title, root) in enumerate(ROOTS):
        parts += [f"## {title}", *_sections(root, "", seen)]
        if number == 0:
            parts += ["## Blocks", "A block is written `{type: NAME, …}` with its own keys.", *_blocks(seen)]
    return "\n\n".join(parts) + "\n"


def written(text: str) -> str:
    """`text`, the page, with its generated part renewed."""
    head, marker, _ = text.partition(MARKER)
    if not marker:
        raise ValueError(f"{PAGE.name} has lost the line that begins its generated part: {MARKER.strip()}")
    return head + MARKER + "\n" + page()


def _class_of(cls: type) -> ast.ClassDef:
    (node,) = ast.parse(textwrap.dedent(inspect.getsource(cls))).body
    assert isinstance(node, ast.ClassDef)
    return node


def _text(node: ast.stmt) -> str | None:
    """The text of a statement that is nothing but a text, as docstrings are."""
    value = node.value if isinstance(node, ast.Expr) else None
    return value.value if isinstance(value, ast.Constant) and isinstance(value.value, str) else None


def _blocks(seen: dict[type[Config], str]) -> Iterator[str]:
    for slot in registry.SLOTS:
        for name in registry.known(slot):
            config = registry.config_of(slot, name)
            if not config.block.__module__.startswith(("zoo.", "pretrain.")):  # a user's
                continue
            text = vars(config).get("__doc__") or vars(config.block).get("__doc__")
            yield from _section(config, f"{slot}: {name}", f"{name}.", seen, text)


def _sections(config: type[Config], path: str, seen: dict[type[Config], str]) -> Iterator[str]:
    """The table of `config`, whose keys begin with `path`, and after it those of the configs inside."""
    yield from _section(config, path.rstrip("."), path, seen, vars(config).get("__doc__"))


def _section(
    config: type[Config], heading: str, path: str, seen: dict[type[Config], str], text: str | None
) -> Iterator[str]:
    if heading:
        yield f"### `{heading}`"
    if text:
        yield inspect.cleandoc(text)
    seen[config] = heading
    meaning = meanings(config)
    rows = [
        _row(name, field, meaning.get(name) or _first_sentence(field), seen)
        for name, field in config.model_fields.items()
    ]
    if rows:
        yield "\n".join(["| key | value | default | meaning |", "|---|---|---|---|", *rows])
    for name, field in config.model_fields.items():
        for inner in _configs(field.annotation):
            if inner not in seen:
                kind = inner.model_fields.get("type")
                several = len(list(_configs(field.annotation))) > 1 and kind is not None
                key = f"{path}{name}{'[i]' if get_origin(field.annotation) is list else ''}"
                choice = f", type: {get_args(kind.annotation)[0]}" if several and kind else ""
                yield from _section(inner, key + choice, f"{key}.", seen, vars(inner).get("__doc__"))


def _row(name: str, field: FieldInfo, meaning: str, seen: dict[type[Config], str]) -> str:
    value = _spelled(field.annotation, seen)
    slot = _slot(field.metadata)
    if slot:
        value = _block(slot)
    bounds = [f"{SIGNS[type(m)]} {getattr(m, type(m).__name__.lower())}" for m in field.metadata if type(m) in SIGNS]
    cells = (f"`{name}`", ", ".join([value, *bounds]), _default(field), meaning)
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True, validated_data={})
    if isinstance(value, Config) and not isinstance(value, registry.BlockConfig):
        return "its defaults"
    return f"`{_yaml(value)}`"


def _yaml(value: Any) -> str:
    if isinstance(value, registry.BlockConfig):
        return f"{{type: {value.type_name}}}"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{name}: {_yaml(each)}" for name, each in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_yaml, value)) + "]"
    return str(value).lower() if isinstance(value, bool) else "null" if value is None else str(value)


def _first_sentence(field: FieldInfo) -> str:
    """What the docstring of the one config that stands in a field begins with; empty for other fields."""
    inner = list(_configs(field.annotation))
    return inspect.cleandoc(inner[0].__doc__ or "").split("\n\n")[0].replace("\n", " ") if len(inner) == 1 else ""


def _slot(metadata: Sequence[Any]) -> str | None:
    """The slot that a field's validator looks blocks up in, if it is one of `registry`'s."""
    for entry in metadata:
        function = getattr(entry, "func", None)
        if isinstance(function, functools.partial) and function.func is registry.resolve:
            return function.args[0]
    return None


def _block(slot: str) -> str:
    return f"{'an' if slot[0] in 'aeio' else 'a'} {slot} block"


def _spelled(annotation: Any, seen: dict[type[Config], str]) -> str:
    """A type in the words of YAML."""
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        slot = _slot(inner[1:])
        return _block(slot) if slot else _spelled(inner[0], seen)
    if origin is Literal:
        return " or ".join(f"`{value}`" for value in inner)
    if origin in (Union, types.UnionType):
        if float in inner and str in inner:  # a Fraction, exactly as it is written
            inner = (float, *(part for part in inner if part not in (float, str)))
            return " or ".join(["number", "fraction such as `1/4`", *(_spelled(part, seen) for part in inner[1:])])
        return " or ".join(dict.fromkeys(_spelled(part, seen) for part in inner))
    if origin is list:
        each = _spelled(inner[0], seen)
        return "list, keys below" if each == "keys below" else f"list of {each}"
    if origin is tuple:
        return f"[{', '.join(_spelled(part, seen) for part in inner)}]"
    if origin is dict:
        each = _spelled(inner[1], seen)
        return "mapping" if each == "anything" else f"mapping of names to {each}"
    if isinstance(annotation, type) and issubclass(annotation, Config):
        where = seen.get(annotation)
        return f"as `{where}`" if where else "keys below"
    return PLAIN[annotation]


def _configs(annotation: Any) -> Iterator[type[Config]]:
    """The configs, other than blocks in a slot, that a field of this type holds."""
    if isinstance(annotation, type) and issubclass(annotation, Config):
        if annotation is not registry.BlockConfig:
            yield annotation
    else:
        for inner in get_args(annotation):
            yield from _configs(inner)


def main() -> None:
    """Renew the page."""
    PAGE.write_text(written(PAGE.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
