"""A trained run, opened from its folder alone: model, modalities, objective. Nothing in it is executed or unpickled.

run = zoo.load("runs/quickstart")
run.model, run.modalities["image"], run.vocabulary
"""

from __future__ import annotations

import dataclasses
import importlib
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from zoo import generate, likelihood
from zoo.build import build_block, build_model
from zoo.choosing import Choosing
from zoo.config import ConfigError, UserError, shown
from zoo.generate import Part
from zoo.kept import open_modalities
from zoo.modalities import Grammar, Modality, Vocabulary, grammars, parse_modalities, vocabulary
from zoo.model import Model, ModelConfig
from zoo.sampling import Sampling
from zoo.slots import Objective

RECIPE, WEIGHTS = "recipe.yaml", "model.safetensors"
MAX_BYTES = 1 << 20
"""Bytes of the largest recipe."""


@dataclasses.dataclass(frozen=True)
class Run:
    """A trained run. `load` makes it."""

    folder: Path
    model: Model
    """In evaluation mode."""
    modalities: Mapping[str, Modality]
    """Ready for use, in the order of the model."""
    objective: Objective
    """What the model was trained for."""
    length: int
    """T: tokens of the rows it was trained on, the longest context it knows."""

    @property
    def vocabulary(self) -> Vocabulary:
        """The id space of the stream."""
        return vocabulary({name: modality.config for name, modality in self.modalities.items()})

    @property
    def grammars(self) -> dict[str, Grammar]:
        """How the items of each modality stand in the stream."""
        return grammars({name: modality.config for name, modality in self.modalities.items()})

    def generate(
        self, parts: Sequence[Part | str], then: str | Sequence[str] | None = None, **options: Any
    ) -> list[Part]:
        """What follows `parts`; everything else as `generate_all`."""
        return self.generate_all([parts], then, **options)[0]

    def generate_all(
        self,
        prompts: Sequence[Sequence[Part | str]],
        then: str | Sequence[str] | None = None,
        *,
        max_tokens: int | None = None,
        stop: Sequence[str] = (),
        drawing: Sampling | None = None,
        batch: int = 32,
        progress: bool = False,
        **choosing: Any,
    ) -> list[list[Part]]:
        """What follows each of several prompts. What a prompt gets depends neither on the others nor on `batch`.

        Args:
            prompts: of each the parts that stand there; a string is text. None stands there in an empty one.
            then: the modalities of the parts that follow, in order; None: the model decides, and ends the document.
            max_tokens: most tokens to write after a prompt; default: as many as the model's context holds.
            stop: texts that end a text; they are left out of it.
            drawing: how items are drawn from noise that the model has learned to denoise.
            batch: rows that are written at the same time.
            progress: show a bar, on a terminal.
            choosing: keys of `zoo.choosing.Choosing`: temperature, top_k, top_p, repetition_penalty, guidance, seed.
        Raises:
            UserError: a part or `then` is of no modality of the run, a prompt leaves no room, a file or option is
                wrong, or routed blocks have no auxiliary router.
        """
        options = Choosing.parse(choosing, "generate")
        return generate.generate(self, prompts, then, options, drawing or Sampling(), max_tokens, stop, batch, progress)

    def log_likelihoods(
        self, documents: Sequence[tuple[Sequence[Part | str], Part | str]], end: bool = True, batch: int = 64
    ) -> np.ndarray:
        """(n,) log-likelihood in nats of each part after its prompt, and of the document's end where `end`; see
        `zoo.likelihood`."""
        return np.array([each.nats for each in likelihood.likelihoods(self, documents, end, batch)])

    def read(self, part: str, path: str | Path) -> Part:
        """The item in a file, for the modality that reads parts of that type: "image", "audio"."""
        return generate.read_part(self, part, path)


def load(folder: str | Path, *, imports: Iterable[str] = (), device: str = "cpu") -> Run:
    """Open the folder of a run that has ended, or was told to stop.

    Args:
        imports: modules that register blocks of the run's own, such as its recipe's `imports`; a folder's word is not
            enough to import anything.
        device: where the model goes.
    Raises:
        UserError: the folder is no whole run, or its parts do not go together; names the file and the way out.
    """
    folder = Path(folder)
    recipe = read_recipe(folder / RECIPE)
    import_named(recipe.get("imports") or [], imports)
    try:
        config = ModelConfig.parse(recipe["model"], "model")
        model = build_model(config, seed=None)
        section = parse_modalities(recipe["modalities"])
        objective = build_block(
            "objective",
            recipe["objective"],
            d_model=config.d_model,
            modalities=tuple(config.modalities),
            heads=config.own_heads,
            bidirectional=tuple(name for name, modality in section.items() if modality.bidirectional),
        )
        length = int(recipe["data"]["sequence_length"])
    except ConfigError as error:
        raise UserError(f"{folder / RECIPE}: {'; '.join(str(error).splitlines())}") from None
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{folder / RECIPE}: is no resolved recipe of a pretraining ({error!r})") from None
    _load_weights(model, folder / WEIGHTS)
    modalities = open_modalities(folder, section)
    words = vocabulary(section)
    if words.modalities != model.modalities or words.size > (config.vocab_size or 0):
        raise UserError(f"{folder / RECIPE}: model and modalities do not go together; restore it")
    return Run(folder, model.to(device).eval(), modalities, objective, length)


def read_recipe(path: Path) -> dict[str, Any]:
    """A resolved recipe as plain data; it has no aliases, which could blow it up."""
    try:
        if path.stat().st_size > MAX_BYTES:
            raise ValueError(f"it has more than {MAX_BYTES:,} bytes")
        text = path.read_text(encoding="utf-8")
        if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text, Loader=yaml.SafeLoader)):
            raise ValueError("it has aliases, which none has that a run wrote")
        recipe = yaml.safe_load(text)
        if not isinstance(recipe, dict):
            raise ValueError("it holds no mapping of keys")
        return recipe
    except FileNotFoundError:
        raise UserError(f"{path}: does not exist; give the folder of a run") from None
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise UserError(f"{path}: cannot be read ({' '.join(str(error).split())}); restore it") from None


def import_named(wanted: Any, named: Iterable[str]) -> None:
    """Import what the user has named; a module that the recipe alone wants must have been imported before."""
    named = list(named)
    missing = [module for module in wanted if module not in named and module not in sys.modules]
    if missing:
        raise UserError(
            f"imports: {shown(missing)} stands in the recipe of a run folder, which runs no code of itself; if you "
            f"trust these modules, name them: imports={shown(missing)}, or --imports {' '.join(map(str, missing))}"
        )
    for module in named:
        if "" not in sys.path and str(Path.cwd()) not in sys.path:
            sys.path.insert(0, str(Path.cwd()))
        try:
            importlib.import_module(module)
        except ImportError as error:
            raise UserError(
                f"imports: {module!r} cannot be imported ({error}); modules are looked for in {Path.cwd()} and among "
                "the installed ones"
            ) from None


def _load_weights(model: Model, path: Path) -> None:
    """Set every parameter and buffer of the model."""
    if not path.exists():
        raise UserError(f"{path}: does not exist; it is written when the run ends or is told to stop")
    try:
        weights: dict[str, Tensor] = load_file(path)
        model.load_state_dict(weights)
    except SafetensorError as error:
        raise UserError(f"{path}: is damaged ({error}); restore it, or resume the run, which writes it anew") from None
    except RuntimeError as error:
        first = " ".join(str(error).splitlines()[1].split()) if len(str(error).splitlines()) > 1 else str(error)
        raise UserError(f"{path}: does not fit the recipe's model ({first}); restore both") from None
