"""Recipes: YAML in, overrides on top, everything validated and cross-checked, the resolved copy out.

Nothing here starts a process or touches data, so every mistake is found before anything is launched.
"""

from __future__ import annotations

import importlib
import re
import sys
import traceback
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import yaml
from pydantic import BeforeValidator, Field, field_validator

import zoo
import zoo.kernels
from pretrain.data import DataConfig, check_length
from pretrain.optim import OptimizerConfig, ScheduleConfig
from zoo.config import Config, ConfigError, dotted
from zoo.modalities import ModalitiesSection, default_modalities, in_order, vocabulary
from zoo.model import ModelConfig
from zoo.objectives.autoregressive import Autoregressive
from zoo.registry import ObjectiveSlot

MOVED = {"data.text": "modalities.text", "data.image": "modalities.image"}
"""Keys of old, and where they stand now."""

RESUMABLE = re.compile(
    r"train\.(steps|(log|evaluate|checkpoint)_every|keep_checkpoints|max_bad_steps|calibrate_rows)|(evaluate|kernels)(\..*)?"
    r"|data\.workers"
)
"""Keys that may change when a run is resumed."""


class LoopConfig(Config):
    """How a run trains, whatever it trains. A row is one packed sequence, or one sample of a fine-tuning."""

    steps: int = Field(gt=0)
    """Optimizer steps."""
    global_batch: int = Field(gt=0)
    """Rows a step, over all ranks."""
    micro_batch: int = Field(gt=0)
    """Rows a forward pass on one rank; global_batch / (micro_batch · ranks) passes are accumulated."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Of weights and activations; the optimizer keeps fp32 copies under bf16."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """"auto": the accelerator where there is one."""
    clip: float = Field(1.0, ge=0)
    """Largest global gradient norm; 0 turns clipping off."""
    activation_checkpointing: bool = False
    """Recompute each layer in the backward pass: less memory, a third more compute, the same results."""
    log_every: int = Field(10, gt=0)
    """Steps from one line of metrics.jsonl to the next."""
    evaluate_every: int = Field(0, ge=0)
    """Steps from one evaluation to the next; 0: only at the end."""
    checkpoint_every: int = Field(0, ge=0)
    """Steps from one checkpoint to the next; 0: only at the end, and when the run is told to stop."""
    keep_checkpoints: int = Field(2, gt=0)
    """Newest checkpoints kept; the best by validation loss is kept besides."""
    max_bad_steps: int = Field(10, gt=0)
    """Steps in a row with a non-finite loss or gradient, all skipped, that end the run."""


class TrainConfig(LoopConfig):
    """How long, in which batches and how carefully a pretraining runs."""

    trainable: Literal["all", "auxiliary"] = "all"
    """"auxiliary": only the causal routers of a trained model learn, the rest is frozen; see `tools.train_routers`."""
    calibrate_rows: int = Field(0, ge=0)
    """After the last step set the thresholds of the auxiliary routers on so many rows of training data; 0: leave them
    at 0. See `zoo.calibrate`."""


class EvaluateConfig(Config):
    """What an evaluation measures; it is causal and, for models with top-k routing, also as in training."""

    rows: int = Field(64, gt=0)
    """Rows of the validation split, from its beginning; fewer if it has fewer."""


def _section_or_path(section: Any) -> Any:
    if not isinstance(section, Mapping | str):
        raise ValueError("must be a mapping of DeepSpeed's keys, or the path of a JSON file with them")
    return section


DeepSpeedSection = Annotated[dict[str, Any] | str, BeforeValidator(_section_or_path)]
"""DeepSpeed's own config, or the path of a JSON file with it; see `pretrain.deepspeed_config`."""


class RunRecipe(Config):
    """What the recipe of every run has, whatever is trained."""

    name: str
    """Letters, digits, '.', '_' and '-'; it names the run folder."""
    run_dir: str | None = None
    """Folder of the run; default: runs/NAME."""
    seed: int = Field(0, ge=0)
    """Of first weights, the order of the data, dropout and the routers' noise."""
    if TYPE_CHECKING:  # each kind of recipe declares them where they stand among its own sections
        optimizer: OptimizerConfig
        schedule: ScheduleConfig
        train: LoopConfig
        deepspeed: DeepSpeedSection

    @field_validator("name")
    @classmethod
    def _names_a_folder(cls, name: str) -> str:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
            raise ValueError("must be letters, digits, '.', '_' and '-', and begin with a letter or digit")
        return name

    @property
    def folder(self) -> Path:
        return Path(self.run_dir or f"runs/{self.name}")

    def dump(self) -> dict[str, Any]:
        """As plain YAML data, defaults written out; parses to an equal recipe."""
        return self.model_dump(mode="json")


class Recipe(RunRecipe):
    """The recipe of a pretraining. Keys at its top:"""

    imports: list[str] = Field(default_factory=list)
    """Modules to import first; they register blocks of one's own."""
    modalities: ModalitiesSection = Field(default_factory=default_modalities)
    """The modalities of the stream by name, in order, text first; see `zoo.modalities`."""
    model: ModelConfig
    objective: ObjectiveSlot = Field(default_factory=Autoregressive.Config)
    """What is trained: a loss for each modality."""
    data: DataConfig
    optimizer: OptimizerConfig
    schedule: ScheduleConfig = ScheduleConfig()
    train: TrainConfig
    evaluate: EvaluateConfig = EvaluateConfig()
    kernels: dict[str, str] = Field(default_factory=dict)
    """The backend of `attention`, `experts`, `scan`, `ssd` and `conv`: `auto` (the default of each) or a name that
    `python -m tools.doctor` lists; one that is missing here is an error."""
    deepspeed: DeepSpeedSection = Field(default_factory=dict)
    """DeepSpeed's own keys, or the path of a JSON file with them. Each is checked; what is left out is filled in."""


def load(path: str | Path, overrides: Iterable[str] = (), over: Mapping[str, Any] | None = None) -> Recipe:
    """Read, override, validate and cross-check a recipe; arguments as for `read`.

    Raises:
        ConfigError: naming the dotted key or the file, the value, the rule and the way out.
    """
    return resolve(read(path, overrides, over))


def read(path: str | Path, overrides: Iterable[str] = (), over: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """A recipe's data, as yet unchecked.

    Args:
        path: of the YAML file. Its `extends: other.yaml` (relative to it) takes that recipe first and lays this one's
            keys over it. `extends: [one.yaml, two.yaml]` lays the second over the first. A list replaces a list whole;
            keys laid over a list of mappings are laid over each of its entries.
        overrides: `key.sub=value` with the value as YAML; list entries by number, `model.layers.0.dropout=0`.
        over: laid over the file's data, before the overrides.
    Raises:
        ConfigError: a file that cannot be read or is no YAML, or an override that does not fit.
    """
    return overridden(_merge(_read(Path(path), ()), over or {}), overrides)


def overridden(data: dict[str, Any], overrides: Iterable[str]) -> dict[str, Any]:
    """`data` with each `key.sub=value` of `overrides` set in it, in place.

    Raises:
        ConfigError: an override that does not fit.
    """
    for text in overrides:
        _override(data, text)
    return data


def resolve(data: Mapping[str, Any]) -> Recipe:
    """Validate and cross-check a recipe given as a mapping.

    Raises:
        ConfigError: as `load`.
    """
    modules = data.get("imports") or []
    if not isinstance(modules, list) or not all(isinstance(module, str) for module in modules):
        raise ConfigError(f"imports: {modules!r}: must be a list of module names, such as [my_blocks]")
    for module in modules:
        _import(module)
    for old, new in MOVED.items():
        section, key = old.split(".")
        if isinstance(data.get(section), Mapping) and key in data[section]:
            raise ConfigError(f"{old}: is {new} now, a section of its own beside data; move it there")
    recipe = Recipe.parse(_with_modalities(data))
    words = vocabulary(recipe.modalities)
    if tuple(recipe.model.modalities) != words.modalities:
        raise ConfigError(
            f"model.modalities: {recipe.model.modalities}, but the section modalities has {list(words.modalities)}, in "
            "that order; remove the key, it follows from the section"
        )
    check_length(recipe.data, recipe.modalities)
    size = recipe.model.vocab_size
    if size is None:
        recipe = recipe.model_copy(update={"model": recipe.model.model_copy(update={"vocab_size": words.size})})
    elif size < words.size:
        raise ConfigError(
            f"model.vocab_size: {size} is less than the {words.size} ids of the modalities; remove the key"
        )
    recipe.model.check()
    recipe.objective.check(recipe.model.place(recipe.kernels), "objective")
    zoo.kernels.check(recipe.kernels)
    check_batches(recipe.train)
    return recipe


def _with_modalities(data: Mapping[str, Any]) -> Mapping[str, Any]:
    """`data` whose model has the modalities of the section, where it names none itself."""
    model, section = data.get("model"), data.get("modalities")
    if not isinstance(model, Mapping) or "modalities" in model:
        return data
    names = map(str, section) if isinstance(section, Mapping) and section else default_modalities()
    return {**data, "model": {"modalities": in_order(names), **model}}


def check_batches(train: LoopConfig) -> None:
    """Raise ConfigError where a step cannot be cut into micro-batches."""
    if train.global_batch % train.micro_batch:
        raise ConfigError(
            f"train.micro_batch: {train.micro_batch} does not divide train.global_batch {train.global_batch}; "
            "choose a divisor, or another global_batch"
        )


def launch_config(recipe: Recipe, world: int) -> dict[str, Any]:
    """The dictionary DeepSpeed gets for `world` ranks; see `deepspeed_for`."""
    return deepspeed_for(recipe, world, recipe.model.d_model)


def deepspeed_for(recipe: RunRecipe, world: int, d_model: int) -> dict[str, Any]:
    """The dictionary DeepSpeed gets for `world` ranks and a model of width `d_model`.

    Raises:
        ConfigError: the `deepspeed` section has an unknown key or contradicts the recipe.
    """
    from pretrain import deepspeed_config

    train = recipe.train
    return deepspeed_config.effective(
        recipe.deepspeed,
        world=world,
        precision=train.precision,
        global_batch=train.global_batch,
        micro_batch=train.micro_batch,
        clip=train.clip,
        optimizer=recipe.optimizer,
        d_model=d_model,
    )


def differences(old: Mapping[str, Any], new: Mapping[str, Any], only: re.Pattern[str] = re.compile(".*")) -> list[str]:
    """One line for each key, among those that match `only`, that differs and may not change when a run is resumed."""
    flat_old, flat_new = _flatten(old), _flatten(new)
    lines = []
    for key in sorted(flat_old.keys() | flat_new.keys()):
        before, after = flat_old.get(key, "(absent)"), flat_new.get(key, "(absent)")
        if before != after and only.fullmatch(key) and not RESUMABLE.fullmatch(key) and key != "run_dir":
            lines.append(f"{key}: {before!r} there, {after!r} here")
    return lines


# ------------------------------------------------------------------------------------------------------------- YAML


class _Loader(yaml.SafeLoader):
    """Safe YAML 1.1, except that 1e-4 is a number and a key that stands twice is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            key = key_node.value
            if not isinstance(key_node, yaml.ScalarNode):
                problem = "a key must be a word; text with braces or brackets needs quotes"
                raise yaml.constructor.ConstructorError(None, None, problem, key_node.start_mark)
            if key in seen and key_node.tag != "tag:yaml.org,2002:merge":
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key!r} stands twice", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d[\d_]*)(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
)


def _parse(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}); give the path of a recipe") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: is not a text file; a recipe is YAML") from None
    try:
        data = yaml.load(text, _Loader)  # noqa: S506  a SafeLoader
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or "not valid YAML"
        hint = (
            "; recipes are plain data, tags that run code are refused" if "!!python" in text else "; correct the file"
        )
        raise ConfigError(f"{path}:{where} {problem}{hint}") from None
    except RecursionError:
        raise ConfigError(f"{path}: is nested too deeply to be a recipe; correct the file") from None
    if data is None:
        raise ConfigError(f"{path}: is empty; a recipe needs at least model, data, optimizer and train")
    if not isinstance(data, dict):
        raise ConfigError(
            f"{path}: holds a {type(data).__name__}, not a mapping of keys; a recipe is `key: value` lines"
        )
    return data


def _read(path: Path, chain: tuple[Path, ...]) -> dict[str, Any]:
    """The file's data over that of the recipes it extends; `chain` are the files that led here."""
    if path.resolve() in chain:
        names = " → ".join(str(link) for link in (*chain, path.resolve()))
        raise ConfigError(f"{path}: extends itself ({names}); remove one `extends`")
    if chain and not path.exists():
        raise ConfigError(
            f"{chain[-1]}: extends: {str(path)!r} does not exist; the path is relative to the file it stands in"
        )
    data = _parse(path)
    parents = data.pop("extends", None) or []
    if isinstance(parents, str):
        parents = [parents]
    if not isinstance(parents, list) or not all(isinstance(parent, str) for parent in parents):
        raise ConfigError(f"{path}: extends: {parents!r} is not the path of a recipe file; write extends: other.yaml")
    merged: dict[str, Any] = {}
    for parent in parents:
        merged = _merge(merged, _read(path.parent / parent, (*chain, path.resolve())))
    return _merge(merged, data)


def _merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`over` laid over `base`. A mapping with another `type` replaces the whole block; one over a list of mappings is laid
    over each of them."""
    merged = dict(base)
    for key, value in over.items():
        below = merged.get(key)
        if isinstance(value, Mapping) and _mappings(below):
            merged[key] = [_merge(entry, value) for entry in below]
        elif _mappings([below, value]) and value.get("type", below.get("type")) == below.get("type"):
            merged[key] = _merge(below, value)
        else:
            merged[key] = value
    return merged


def _mappings(value: Any) -> bool:
    """Whether it is a list of mappings, at least one."""
    return isinstance(value, list) and bool(value) and all(isinstance(entry, Mapping) for entry in value)


def _override(data: dict[str, Any], text: str) -> None:
    key, equals, value = text.partition("=")
    parts = [part for part in re.split(r"[.\[\]]+", key.strip()) if part]
    if not equals or not parts:
        raise ConfigError(f"{text!r}: an override is key.sub=value, for example train.steps=100")
    try:
        parsed = yaml.load(value, _Loader)  # noqa: S506  a SafeLoader
    except yaml.YAMLError:
        raise ConfigError(f"{key}: {value!r} is not valid YAML; quote it") from None
    node: Any = data
    for depth, part in enumerate(parts):
        last = depth == len(parts) - 1
        if isinstance(node, list):
            if not part.isdigit() or int(part) >= len(node):
                raise ConfigError(
                    f"{key}: {part!r} is no entry of {'.'.join(parts[:depth])}, which has {len(node)}, from 0"
                )
            position: Any = int(part)
        elif isinstance(node, dict):
            position = part
            if not last and node.get(part) is None:
                node[part] = {}
        else:
            raise ConfigError(f"{key}: {'.'.join(parts[:depth])} is {node!r}, a single value without keys")
        if last:
            node[position] = parsed
        else:
            node = node[position]


def _import(module: str) -> None:
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        importlib.import_module(module)
    except Exception as error:  # a module of the user's may raise anything
        place = traceback.extract_tb(error.__traceback__)[-1]
        where = f", {place.filename} line {place.lineno}" if not isinstance(error, ImportError | SyntaxError) else ""
        raise ConfigError(
            f"imports: {module!r} cannot be imported ({type(error).__name__}: {error}{where}); modules are looked for "
            f"in {Path.cwd()} and among the installed ones"
        ) from None


def _flatten(value: Any, path: str = "") -> dict[str, Any]:
    if isinstance(value, Mapping) and value:
        return {k: v for key, item in value.items() for k, v in _flatten(item, dotted(path, [str(key)])).items()}
    if isinstance(value, list) and value and isinstance(value[0], Mapping):
        return {k: v for i, item in enumerate(value) for k, v in _flatten(item, dotted(path, [i])).items()}
    return {path: value}
