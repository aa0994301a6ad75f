"""Recipe files: YAML in, `extends` followed, overrides on top; plain data out, of a bounded size and not yet
validated."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from pretrain.recipe_kind import nearest
from zoo.config import ConfigError, shown


def read(path: str | Path, overrides: Iterable[str] = (), over: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """A recipe's data, as yet unchecked.

    Args:
        path: of the YAML file. Its `extends: other.yaml` (relative to it) takes that recipe first and lays this one's
            keys over it. `extends: [one.yaml, two.yaml]` lays the second over the first. A list replaces a list whole;
            keys laid over a list of mappings are laid over each of its entries.
        overrides: `key.sub=value` with the value as YAML; list entries by number, `model.layers.0.dropout=0`.
        over: laid over the file's data, before the overrides.
    Raises:
        ConfigError: a file that cannot be read or is not YAML, or an override that does not fit.
    """
    return overridden(merge(_read(shipped(path), ()), over or {}), overrides)


INSTALLED = Path(__file__).parents[1]
"""Where this project lies: its checkout, or the folder that it has been installed into."""


def shipped(path: str | Path) -> Path:
    """`path`; where there is no such file here, and it begins with `recipes`, that of the recipes installed beside the
    code."""
    path = Path(path)
    beside = INSTALLED / path
    return beside if not path.exists() and path.parts[:1] == ("recipes",) and beside.exists() else path


def overridden(data: dict[str, Any], overrides: Iterable[str]) -> dict[str, Any]:
    """`data` with each `key.sub=value` of `overrides` set in it, in place.

    Raises:
        ConfigError: an override that does not fit.
    """
    for text in overrides:
        _override(data, text)
    return data


RUN_RECIPE = "recipe.yaml"
"""The file in a run folder that holds the whole recipe of the run."""
_OF_A_RUN = ("checkpoints", "deepspeed.json", "metrics.jsonl", "model.safetensors", "initial.json")


class ImportsOfRun(list[Any]):
    """The `imports` that the recipe of a run folder names: whoever wrote the folder names them, not who opens it."""


def in_run_folder(path: Path) -> bool:
    """Whether `path` is the recipe that a run has left in its folder."""
    return path.name == RUN_RECIPE and any((path.parent / name).exists() for name in _OF_A_RUN)


MAX_BYTES, MAX_DEPTH, MAX_VALUES = 1 << 20, 50, 100_000
"""Bounds of a recipe's file: its size, how deeply its values lie in one another, how many they are with aliases written
out."""
_TIMESTAMP = "tag:yaml.org,2002:timestamp"


class _Loader(yaml.SafeLoader):
    """Safe YAML 1.1, except that 1e-4 is a number, a date is a text, and a key that stands twice is an error."""

    yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in resolvers if tag != _TIMESTAMP]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        self._go_deeper(self.peek_event().start_mark)
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def _go_deeper(self, mark: yaml.Mark) -> None:
        self.depth += 1
        if self.depth > MAX_DEPTH:
            problem = f"nested too deeply to be a recipe; values may lie {MAX_DEPTH} deep in one another"
            raise yaml.composer.ComposerError(None, None, problem, mark)

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            value = super().construct_object(node, deep)
        except yaml.YAMLError:
            raise
        except Exception:  # what PyYAML raises for `!!int x` and its like is anything
            what = node.tag.removeprefix("tag:yaml.org,2002:")
            raise yaml.constructor.ConstructorError(None, None, f"no valid {what}", node.start_mark) from None
        if isinstance(value, int) and value.bit_length() > 64:
            raise yaml.constructor.ConstructorError(None, None, "a number of more than 64 bits", node.start_mark)
        return value

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        for key, value in node.value:
            if key.tag == "tag:yaml.org,2002:merge":
                merged = value.value if isinstance(value, yaml.SequenceNode) else [value]
                maps = [each for each in merged if isinstance(each, yaml.MappingNode)]
                self._go_deeper(key.start_mark)
                for each in maps:
                    self.flatten_mapping(each)
                self.depth -= 1
                if sum(len(each.value) for each in maps) > MAX_VALUES:
                    problem = f"too many values; at most {MAX_VALUES:,}, aliases written out"
                    raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
        super().flatten_mapping(node)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            key = key_node.value
            if not isinstance(key_node, yaml.ScalarNode):
                problem = "a key must be a word; text with braces or brackets needs quotes"
                raise yaml.constructor.ConstructorError(None, None, problem, key_node.start_mark)
            if key in seen and key_node.tag != "tag:yaml.org,2002:merge":
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {shown(key)} stands twice", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d[\d_]*)(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
)


def parse_yaml(text: str, where: str) -> Any:
    """The value that the text of a YAML file stands for.

    Args:
        where: the file or key it comes from; begins every message.
    Raises:
        ConfigError: no YAML, or beyond the bounds above.
    """
    try:
        value = yaml.load(text, _Loader)  # noqa: S506  a SafeLoader
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f" line {mark.line + 1}" if mark else ""
        code = "recipes are plain data, tags that run code are refused"
        hint = code if "!!python" in text else "correct the file"
        raise ConfigError(f"{where}:{line} {_problem(error)}; {hint}") from None
    check_bounds(value, where)
    return value


def _problem(error: yaml.YAMLError) -> str:
    return getattr(error, "problem", None) or "not valid YAML"


def check_bounds(value: Any, where: str) -> None:
    """Raise ConfigError where plain data exceed the bounds above, or hold a number of more than 64 bits."""
    waiting, count = [(value, 0)], 0
    while waiting:
        item, depth = waiting.pop()
        count += 1
        if depth > MAX_DEPTH:
            raise ConfigError(
                f"{where}: is nested too deeply to be a recipe; values may lie {MAX_DEPTH} deep in one another"
            )
        if count > MAX_VALUES:
            raise ConfigError(f"{where}: holds too many values; at most {MAX_VALUES:,}, aliases written out")
        if isinstance(item, int) and item.bit_length() > 64:
            raise ConfigError(f"{where}: holds a number of more than 64 bits; correct it")
        inside = item.values() if isinstance(item, Mapping) else item if isinstance(item, list | tuple | set) else ()
        waiting.extend((each, depth + 1) for each in inside)


def _parse(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > MAX_BYTES:
            raise ConfigError(f"{path}: is larger than {MAX_BYTES:,} bytes, no recipe is; give the path of a recipe")
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(
            f"{path}: cannot be read ({error.strerror}); give the path of a recipe{nearest(path)}"
        ) from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: is not a text file; a recipe is YAML") from None
    data = parse_yaml(text, str(path))
    if data is None:
        raise ConfigError(f"{path}: is empty; a recipe needs at least model, data, optimizer and train")
    if not isinstance(data, dict):
        raise ConfigError(
            f"{path}: holds a {type(data).__name__}, not a mapping of keys; a recipe is `key: value` lines"
        )
    return data


def _read(path: Path, chain: tuple[Path, ...]) -> dict[str, Any]:
    """The file's data over that of the recipes it extends; `chain` are the files that led here.

    The `imports` that a run folder's recipe names, itself or in what it extends, are marked as `ImportsOfRun`.
    """
    if path.resolve() in chain:
        names = " → ".join(str(link) for link in (*chain, path.resolve()))
        raise ConfigError(f"{path}: extends itself ({names}); remove one `extends`")
    if chain and not path.exists():
        raise ConfigError(
            f"{chain[-1]}: extends: {str(path)!r} does not exist; the path is relative to the file it stands in"
        )
    data = _parse(path)
    if isinstance(data.get("imports"), list) and any(map(in_run_folder, (*chain, path))):
        data["imports"] = ImportsOfRun(data["imports"])
    parents = data.pop("extends", None) or []
    if isinstance(parents, str):
        parents = [parents]
    if not isinstance(parents, list) or not all(isinstance(parent, str) for parent in parents):
        raise ConfigError(
            f"{path}: extends: {shown(parents)} is not the path of a recipe file; write extends: other.yaml"
        )
    merged: dict[str, Any] = {}
    for parent in parents:
        merged = merge(merged, _read(path.parent / parent, (*chain, path.resolve())))
    return merge(merged, data)


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`over` laid over `base`, neither of which changes. A mapping with another `type` replaces the whole block; one
    over a list of mappings is laid over each of them."""
    merged = dict(base)
    for key, value in over.items():
        below = merged.get(key)
        if isinstance(value, Mapping) and isinstance(below, list) and below and all(map(_is_mapping, below)):
            merged[key] = [merge(entry, value) for entry in below]
        elif isinstance(value, Mapping) and isinstance(below, Mapping) and _same_type(value, below):
            merged[key] = merge(below, value)
        else:
            merged[key] = value
    return merged


def _is_mapping(value: Any) -> bool:
    return isinstance(value, Mapping)


def _same_type(over: Mapping[str, Any], base: Mapping[str, Any]) -> bool:
    """Whether `over` names no `type` or that of `base`."""
    return over.get("type", base.get("type")) == base.get("type")


def _override(data: dict[str, Any], text: str) -> None:
    key, equals, value = text.partition("=")
    parts = [part for part in re.split(r"[.\[\]]+", key.strip()) if part]
    if not equals or not parts:
        raise ConfigError(f"{shown(text)}: an override is key.sub=value, for example train.steps=100")
    where = f"{key.strip()}: {shown(value)}"
    try:
        parsed = yaml.load(value, _Loader)  # noqa: S506  a SafeLoader
    except yaml.YAMLError as error:
        raise ConfigError(f"{where} is not valid YAML; quote it ({_problem(error)})") from None
    check_bounds(parsed, where)
    node: Any = data
    for depth, part in enumerate(parts):
        last = depth == len(parts) - 1
        if isinstance(node, list):
            if not part.isdigit() or int(part) >= len(node):
                raise ConfigError(
                    f"{key}: {part!r} is not an entry of {'.'.join(parts[:depth])}, which has {len(node)}, from 0"
                )
            position: Any = int(part)
        elif isinstance(node, dict):
            position = part
            if not last and node.get(part) is None:
                node[part] = {}
        else:
            raise ConfigError(f"{key}: {'.'.join(parts[:depth])} is {shown(node)}, a single value without keys")
        if last:
            node[position] = parsed
        else:
            node = node[position]
