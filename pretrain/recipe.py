"""Recipes: YAML in, overrides on top, everything validated and cross-checked, the resolved copy out.

Nothing here starts a process or touches data, so every mistake is found before anything is launched.
"""

from __future__ import annotations

import dataclasses
import importlib
import re
import sys
import traceback
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BeforeValidator, Field, field_validator

import zoo
import zoo.kernels
from pretrain import compiling
from pretrain.data import DataConfig, check_length
from pretrain.optim import OptimizerConfig, ScheduleConfig
from pretrain.recipe_file import ImportsOfRun, read
from pretrain.recipe_kind import PRETRAINING, check_kind
from zoo.carries import Ids
from zoo.config import Config, ConfigError, dotted, shown
from zoo.depth import MixtureOfDepths
from zoo.experts import ExpertConfig
from zoo.feedforward import Dense
from zoo.heads import default_head
from zoo.modalities import ModalitiesSection, default_modalities, in_order, vocabulary
from zoo.model import MAX_IDS, ModelConfig
from zoo.objectives.autoregressive import Autoregressive
from zoo.recompute import Recompute
from zoo.registry import BlockConfig, ObjectiveSlot
from zoo.stems import default_stem

MOVED = {"data.text": "modalities.text", "data.image": "modalities.image"}
"""Keys of old, and where they stand now."""

RESUMABLE = re.compile(
    r"train\.(steps|(log|evaluate|checkpoint)_every|checkpoint_in_background|keep_checkpoints|max_bad_steps|calibrate_rows)"
    r"|train\.(activation_checkpointing|compile|deterministic)"
    r"|(evaluate|kernels)(\..*)?|optimizer\.(muon_)?lr|train\.clip|deepspeed\.gradient_clipping"
    r"|data\.(path|train|validation|cache|workers|max_broken_samples|max_broken_documents)"
    r"|data\.sources\.[^.]+\.(path|files|validation)"
)
"""Keys that may change when a run is resumed. Which data it is says their content, not where they lie."""
MICRO_BATCH = re.compile(rf"{RESUMABLE.pattern}|train\.micro_batch")
"""The same of a model in which every row is computed by itself, so that the split into micro-batches moves roundings
alone."""
CHANGES_TRAINING = re.compile(r"optimizer\.(muon_)?lr|train\.(clip|micro_batch)")
"""Those among them by which the run goes on otherwise."""


class LoopConfig(Config):
    """How a run trains, whatever it trains. A row is one packed sequence, or one sample of a fine-tuning."""

    steps: int = Field(gt=0)
    """Optimizer steps of the whole run."""
    global_batch: int = Field(gt=0)
    """Rows a step, over all ranks."""
    micro_batch: int = Field(gt=0)
    """Rows a forward pass on one rank; global_batch / (micro_batch · ranks) passes are accumulated."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Precision of weights and activations; under bf16 the optimizer keeps fp32 copies."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """"auto": the accelerator where there is one."""
    clip: float = Field(1.0, ge=0)
    """Largest global gradient norm; 0 turns clipping off."""
    activation_checkpointing: Recompute = False
    """true: keep only what enters each layer and compute the rest again in the backward pass: least memory, a third
    more compute. "selective": also keep what matrix products and attention give, and compute again what is cheap. The
    results are the same."""
    deterministic: bool = False
    """On a GPU take kernels alone that give the same bits for the same inputs, so that a resumed run is the
    uninterrupted one bit for bit, on as many ranks of the same machine; slower, and a kernel that cannot is an error
    that names it. On a CPU it is so anyway."""
    log_every: int = Field(10, gt=0)
    """Steps from one line of metrics.jsonl to the next."""
    evaluate_every: int = Field(0, ge=0)
    """Steps from one evaluation to the next; 0: only at the end."""
    checkpoint_every: int = Field(0, ge=0)
    """Steps from one checkpoint to the next; 0: only at the end, and when the run is told to stop."""
    checkpoint_in_background: bool = False
    """Copy what a checkpoint holds into the host's memory and write it from there, while training goes on; it counts
    once it is whole. The copy is as large as the files of a rank. The last checkpoint of a run is always waited for."""
    keep_checkpoints: int = Field(2, gt=0)
    """Newest checkpoints kept; the best by validation loss is kept besides."""
    max_bad_steps: int = Field(10, gt=0)
    """Steps in a row with a non-finite loss or gradient, all skipped, that end the run."""


def _what_trains(value: Any) -> Any:
    names = isinstance(value, list) and all(isinstance(name, str) for name in value)
    if not names and value not in ("all", "auxiliary"):
        raise ValueError("must be all, auxiliary, or a list of modalities, such as [image]")
    return value


Trainable = Annotated[Literal["all", "auxiliary"] | list[str], BeforeValidator(_what_trains)]
"""What of a model learns."""


class TrainConfig(LoopConfig):
    """How long, in which batches and how carefully a pretraining runs."""

    compile: bool = False
    """Compile the model's training steps into one graph (PyTorch's compiler): fewer passes over memory, fewer launches,
    after minutes at the first step; results differ by rounding. Attention, dense feed-forwards, expert choice, one
    capacity for all tokens of a row, ZeRO stages up to 2; the rest is refused with the reason."""
    trainable: Trainable = "all"
    """"auxiliary": only the causal routers of a trained model learn, the rest is frozen; see `tools.train_routers`. A
    list of modalities: only weights learn that no token of another modality meets, such as their own projections,
    experts, stems and heads, so that an upcycled language model stays what it is (`zoo.freezing`)."""
    calibrate_rows: int = Field(0, ge=0)
    """After the last step set the thresholds of the auxiliary routers on so many rows of training data; 0: leave them
    at 0. See `zoo.calibrate`."""


class EvaluateConfig(Config):
    """What an evaluation measures; it is causal and, for models with top-k routing, also as in training."""

    rows: int = Field(64, gt=0)
    """Rows of the validation split, from its beginning; fewer if it has fewer."""
    bits_per_byte: bool = False
    """Also report the loss of text in bits a byte of the documents' texts, by which runs with different tokenizers
    compare. Exact where the rows hold whole documents."""
    documents: bool = False
    """Also keep the loss of each document at each evaluation, in `documents/` of the run folder, so that comparisons
    can say how much hangs on the choice of the documents."""


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
    """Seed of first weights, the order of the data, dropout and the routers' noise."""
    if TYPE_CHECKING:  # each kind of recipe declares them where they stand among its own sections
        data: Any
        optimizer: OptimizerConfig
        schedule: ScheduleConfig
        train: LoopConfig
        deepspeed: DeepSpeedSection

    @field_validator("name")
    @classmethod
    def _names_a_folder(cls, name: str) -> str:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,199}", name):
            raise ValueError("must be letters, digits, '.', '_' and '-', 200 at most, and begin with a letter or digit")
        return name

    @property
    def folder(self) -> Path:
        return Path(self.run_dir or f"runs/{self.name}")

    @property
    def resumable(self) -> re.Pattern[str]:
        """Keys that may change when a run of this recipe is resumed."""
        return RESUMABLE

    def dump(self) -> dict[str, Any]:
        """As plain YAML data, defaults written out; parses to an equal recipe."""
        return self.model_dump(mode="json")


class Recipe(RunRecipe):
    """The recipe of a pretraining. Keys at its top:"""

    imports: list[str] = Field(default_factory=list)
    """Modules to import first; they register blocks of one's own."""
    modalities: ModalitiesSection = Field(default_factory=default_modalities)
    """The modalities of the stream by name, in order, a kind of text first; see `zoo.modalities`."""
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

    @property
    def bidirectional(self) -> tuple[str, ...]:
        """Modalities whose positions see all of their item."""
        return tuple(name for name, modality in self.modalities.items() if modality.bidirectional)

    @property
    def resumable(self) -> re.Pattern[str]:
        """Keys that may differ when a run goes on; `train.micro_batch` among them where rows do not meet."""
        layers = self.model.layers
        blocks = [block for layer in layers for block in (layer.feedforward, layer.depth) if block is not None]
        by_row = all(
            isinstance(block, Dense.Config)
            or (isinstance(block, ExpertConfig | MixtureOfDepths.Config) and block.scope == "row")
            for block in blocks
        )
        ours = all(layer.mixer.block.__module__.startswith("zoo.") for layer in layers)
        return MICRO_BATCH if by_row and ours else RESUMABLE


def load(path: str | Path, overrides: Iterable[str] = (), over: Mapping[str, Any] | None = None) -> Recipe:
    """Read, override, validate and cross-check a recipe; arguments as for `read`.

    Raises:
        ConfigError: naming the dotted key or the file, the value, the rule and the way out.
    """
    data = read(path, overrides, over)
    check_kind(data, path, PRETRAINING, Recipe)
    return resolve(data)


def resolve(data: Mapping[str, Any]) -> Recipe:
    """Validate and cross-check a recipe given as a mapping.

    Raises:
        ConfigError: as `load`.
    """
    _import_all(data.get("imports") or [])
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
    if words.size > MAX_IDS:
        raise ConfigError(f"modalities: need {words.size:,} ids together; at most {MAX_IDS:,}; make them fewer")
    check_length(recipe.data, recipe.modalities)
    size = recipe.model.vocab_size
    if size is None:
        recipe = recipe.model_copy(update={"model": recipe.model.model_copy(update={"vocab_size": words.size})})
    elif size < words.size:
        raise ConfigError(
            f"model.vocab_size: {size} is less than the {words.size} ids of the modalities; remove the key"
        )
    recipe = recipe.model_copy(update={"model": recipe.model.model_copy(update=_ends(recipe))})
    recipe.model.check()
    place = dataclasses.replace(recipe.model.place(recipe.kernels), bidirectional=recipe.bidirectional)
    recipe.objective.check(place, "objective")
    zoo.kernels.check(recipe.kernels)
    check_batches(recipe.train)
    if recipe.train.compile:
        compiling.check(recipe.model, recipe.kernels, bool(recipe.train.activation_checkpointing))
    _check_trainable(recipe)
    if recipe.evaluate.documents and not recipe.objective.block.tells_terms:
        raise ConfigError(
            f"evaluate.documents: true, but the objective {recipe.objective.type_name!r} does not tell what each "
            "position adds to its loss; let it put that into Trace.terms and say tells_terms = True, or remove the key"
        )
    return recipe


def _check_trainable(recipe: Recipe) -> None:
    """Raise ConfigError where modalities are to learn that there are not, or whose weights would change otherwise."""
    chosen = recipe.train.trainable
    if isinstance(chosen, str):
        return
    place = recipe.model.place({})
    for name in chosen:
        place.check_modality(name, "train.trainable")
    if not chosen or set(chosen) == set(place.modalities):
        raise ConfigError(
            f"train.trainable: {chosen}: names some of the modalities {', '.join(place.modalities)}, so that the "
            "others are frozen; 'all' freezes none"
        )
    if recipe.optimizer.weight_decay:
        raise ConfigError(
            f"optimizer.weight_decay: {recipe.optimizer.weight_decay:g} would shrink the frozen weights that stand in "
            "one parameter with those of train.trainable; set it to 0"
        )


def _with_modalities(data: Mapping[str, Any]) -> Mapping[str, Any]:
    """`data` whose model has the modalities of the section, where it names none itself."""
    model, section = data.get("model"), data.get("modalities")
    if not isinstance(model, Mapping) or "modalities" in model:
        return data
    modalities = section if isinstance(section, Mapping) and section else default_modalities()
    return {**data, "model": {"modalities": in_order(modalities), **model}}


def _ends(recipe: Recipe) -> dict[str, dict[str, BlockConfig]]:
    """Stems and heads of the model: of each modality whose positions carry no ids the recipe's, or those that fit it.

    Raises:
        ConfigError: one that does not fit what the modality carries.
    """
    stems, heads = dict(recipe.model.stem), dict(recipe.model.head)
    for name, modality in recipe.modalities.items():
        if not isinstance(modality.carries, Ids):
            open_ended = modality.positions is not None and not modality.positions.fixed
            stems.setdefault(name, default_stem(modality.carries, modality.bidirectional))
            heads.setdefault(name, default_head(modality.carries, open_ended))
        for slot, blocks in (("stem", stems), ("head", heads)):
            fits = None if isinstance(modality.carries, Ids) else modality.carries
            if name in blocks and blocks[name].carries != fits:
                raise ConfigError(
                    f"model.{slot}.{name}: is for {blocks[name].carries or 'ids'}, but a position of modalities.{name} "
                    f"carries {modality.carries}; remove the key, or make them agree"
                )
    return {"stem": stems, "head": heads}


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
    config = deepspeed_config.effective(
        recipe.deepspeed,
        world=world,
        precision=train.precision,
        global_batch=train.global_batch,
        micro_batch=train.micro_batch,
        clip=train.clip,
        optimizer=recipe.optimizer,
        d_model=d_model,
    )
    if isinstance(train, TrainConfig) and train.compile:
        compiling.check_stage(config["zero_optimization"]["stage"])
    return config


def differences(
    old: Mapping[str, Any],
    new: Mapping[str, Any],
    only: re.Pattern[str] = re.compile(".*"),
    but: re.Pattern[str] | None = RESUMABLE,
) -> list[str]:
    """One line for each key that differs, among those that match `only` and do not match `but`."""
    flat_old, flat_new = _flatten(old), _flatten(new)
    lines = []
    for key in sorted(flat_old.keys() | flat_new.keys()):
        before, after = flat_old.get(key, "(absent)"), flat_new.get(key, "(absent)")
        allowed = key == "run_dir" or (but is not None and but.fullmatch(key))
        if before != after and only.fullmatch(key) and not allowed:
            lines.append(f"{key}: {before!r} there, {after!r} here")
    return lines


def _import_all(modules: Any) -> None:
    """Import what a recipe names. What the recipe of a run folder names runs only where it has been imported before,
    or is named anew by the user."""
    if not isinstance(modules, list) or not all(isinstance(module, str) for module in modules):
        raise ConfigError(f"imports: {shown(modules)}: must be a list of module names, such as [my_blocks]")
    if isinstance(modules, ImportsOfRun) and (unknown := [name for name in modules if name not in sys.modules]):
        raise ConfigError(
            f"imports: {shown(unknown)} stands in the recipe of a run folder, which runs no code of itself; if you "
            f"trust these modules, name them: 'imports=[{', '.join(modules)}]'"
        )
    for module in modules:
        _import(module)


def _import(module: str) -> None:
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        importlib.import_module(module)
    except (Exception, SystemExit) as error:  # a module of the user's may raise anything
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
