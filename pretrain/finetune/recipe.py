"""Recipes of fine-tuning: which multimodal LLM, made sparse how, tuned on which questions; see `pretrain.finetune`."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from pydantic import Field

from pretrain import recipe as recipes
from pretrain.optim import OptimizerConfig, ScheduleConfig
from pretrain.recipe import DeepSpeedSection, LoopConfig, RunRecipe
from pretrain.recipe_kind import FINE_TUNING, check_kind
from zoo.adapt import AdaptConfig
from zoo.config import Config, ConfigError


class LoraConfig(Config):
    """Adapters of PEFT (arXiv 2106.09685) on linear maps of the decoder; all else is frozen, but the routers and
    `modules_to_save`."""

    r: int = Field(gt=0)
    """Rank of the update of each linear map."""
    alpha: float = Field(gt=0)
    """The update is scaled by alpha / r."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """On the input of the adapters."""
    targets: list[str] | None = Field(None, min_length=1)
    """Names of the linear maps in a decoder layer, such as [q_proj, v_proj]; null: all of them."""
    modules_to_save: list[str] = Field(default_factory=list)
    """Modules that are trained in full and saved beside the adapters, by their dotted names or the end of them:
    [multi_modal_projector]."""


class QuestionsConfig(Config):
    """Questions about images; see `pretrain.finetune.questions`."""

    path: str
    """Folder with train.jsonl, validation.jsonl, test.jsonl and the images."""
    maximum_length: int | None = Field(None, gt=1)
    """Tokens of a sample, those of its images included. The text of a longer one is cut off at the end; one whose
    images or first answer do not fit is unusable."""
    workers: int = Field(0, ge=0)
    """Processes of each rank that read images ahead; 0: they are read between two steps."""
    max_broken_samples: int = Field(0, ge=0)
    """How many unusable samples may be skipped, in an epoch of training and of those that are evaluated. Each is named.
    Unusable are an image that does not decode, an image token in the text, and what the processor or `maximum_length`
    refuses."""


class AnswersConfig(Config):
    """How a model is judged: by its loss, and by the answers that it generates; see `pretrain.finetune.evaluate`."""

    split: str = "validation"
    """The questions it is judged on."""
    samples: int | None = Field(256, gt=0)
    """From the beginning of the split; null: all."""
    batch: int | None = Field(None, gt=0)
    """Samples a forward pass; null: train.micro_batch."""
    generate: bool = True
    """Also let the model answer by itself, greedily, with its cache."""


class FinetuneRecipe(RunRecipe):
    """The recipe of a fine-tuning. Keys at its top:"""

    base: str
    """Folder (or name on the hub) of a multimodal model of Transformers with its processor. One that was adapted before
    goes on with its own layers and routers."""
    adapt: AdaptConfig | None = None
    """The layers that become Mixture-of-Depths layers; null: the base is trained as it is."""
    lora: LoraConfig | None = None
    """null: all weights are tuned."""
    freeze: list[str] = Field(default_factory=list)
    """Parts that are not tuned, by their dotted names or a piece of them: [vision_tower, multi_modal_projector]."""
    data: QuestionsConfig
    optimizer: OptimizerConfig
    schedule: ScheduleConfig = ScheduleConfig()
    train: LoopConfig
    evaluate: AnswersConfig = AnswersConfig()
    deepspeed: DeepSpeedSection = Field(default_factory=dict)
    """DeepSpeed's own keys, or the path of a JSON file with them, as in a pretraining."""


def load(path: str | Path, overrides: Iterable[str] = ()) -> FinetuneRecipe:
    """Read, override and validate a recipe; what the base has to say is checked by `pretrain.finetune.model`.

    Args:
        path, overrides: as for `pretrain.recipe.read`.
    Raises:
        ConfigError: naming the dotted key or the file, the value, the rule and the way out.
    """
    data = recipes.read(path, overrides)
    check_kind(data, path, FINE_TUNING, FinetuneRecipe)
    recipe = FinetuneRecipe.parse(data)
    recipes.check_batches(recipe.train)
    if recipe.train.activation_checkpointing == "selective":
        raise ConfigError(
            "train.activation_checkpointing: 'selective' is for models of this library; layers of Transformers' models "
            "are recomputed whole or not at all: true or false"
        )
    return recipe
