"""The models that `pretrain.finetune` trains: opened from a folder, adapted, with adapters or frozen parts, written
back."""

from __future__ import annotations

import copy
import dataclasses
import sys
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers.initialization import no_init_weights

import zoo.adapt as za
from pretrain.finetune.model_folder import open_folder
from pretrain.finetune.recipe import FinetuneRecipe
from pretrain.finetune.tuning import freeze, lora_config, tuned
from zoo.adapt.family import parts, picture_ids
from zoo.adapt.folder import CONFIG, cannot_open, open_whole, read_about
from zoo.adapt.save import weights_hash
from zoo.config import ConfigError, UserError
from zoo.files import atomic_path

Gather = Callable[[list[nn.Parameter]], Any]


@dataclasses.dataclass(frozen=True)
class Base:
    """What a recipe's `base` is, without its weights."""

    name: str
    config: Any
    """The model's config, as Transformers has it."""
    processor: Any
    adapt: za.AdaptConfig | None
    """How the model that is trained is adapted: as the recipe says, or as the base was before."""
    adapted: bool
    """Whether the base was adapted before."""
    blueprint: nn.Module
    """The model, adapted but without adapters, on the meta device: says what it is made of and what it costs."""

    @property
    def d_model(self) -> int:
        return parts(self.blueprint).text_config.hidden_size

    @property
    def pictures(self) -> dict[int, int]:
        """Placeholder id → what it stands for."""
        return picture_ids(self.config, self.name)

    @property
    def layers(self) -> list[str]:
        """What a trace calls the routed layers."""
        return [layer.routing.name for layer in za.routed_layers(self.blueprint)]


def quiet(rank: int) -> None:
    """Let rank 0 alone say what Transformers has to say, and that in short."""
    transformers.utils.logging.set_verbosity_error()
    if rank or not sys.stderr.isatty():
        transformers.utils.logging.disable_progress_bar()
    warnings.filterwarnings(
        "ignore", r".*zero-element tensors is a no-op", UserWarning
    )  # partitioned weights are empty
    warnings.filterwarnings(
        "ignore", r".*gradient_checkpointing.* is deprecated", FutureWarning
    )  # 5.20 has no other name


def open_base(recipe: FinetuneRecipe) -> Base:
    """Open everything but the weights, and check what the recipe wants of it.

    Raises:
        ConfigError: no such folder, no multimodal model, no processor, or `adapt`, `lora` or `freeze` do not fit it.
    """
    name = recipe.base
    try:
        config, processor = open_folder(name)
        before = read_about(Path(name)).adapt if (Path(name) / CONFIG).is_file() else None
        with torch.device("meta"):
            dense = _dense(config)
    except UserError as error:
        raise ConfigError(f"base: {error}") from None
    except Exception as error:  # Transformers raises anything for a config it does not take
        raise ConfigError(f"base: {cannot_open(name, error)}") from None
    if before is not None and recipe.adapt not in (None, before):
        raise ConfigError(
            f"adapt: the base {name!r} is adapted already, in another way; leave adapt out to go on with its routers, "
            "or start from the model it was made of"
        )
    adapt = recipe.adapt or before
    if adapt is not None:
        try:
            za.adapt(dense, adapt)
        except UserError as error:
            raise ConfigError(f"adapt: {error}") from None
    try:
        za.decoder_flops(dense, 1)
    except UserError as error:
        raise ConfigError(f"base: {error}") from None
    if recipe.lora is not None:
        lora_config(dense, recipe.lora, recipe.freeze)
    freeze(dense, recipe.freeze)
    return Base(name, config, processor, adapt, before is not None, dense)


def skeleton(recipe: FinetuneRecipe, base: Base) -> nn.Module:
    """The model as it is trained, its weights not yet set; may be called under `deepspeed.zero.Init`."""
    model = _dense(base.config)
    if base.adapt is not None:
        za.adapt(model, base.adapt)
    return tuned(model, recipe)


def first_model(recipe: FinetuneRecipe, base: Base, dtype: torch.dtype = torch.float32) -> nn.Module:
    """The model with its first weights, on the CPU: the base's own; those of routers and adapters follow from the
    seed."""
    if base.adapted:
        model = za.load_adapted(base.name, dtype=dtype)
    else:
        try:
            model = open_whole(transformers.AutoModelForImageTextToText, base.name, dtype=dtype)
        except UserError as error:
            raise UserError(f"base: {error}") from None
        if base.adapt is not None:
            za.adapt(model, base.adapt, recipe.seed)
    return tuned(model, recipe)


def initialise(model: nn.Module, recipe: FinetuneRecipe, base: Base, gather: Gather) -> str:
    """Set every weight of `skeleton`'s model from `first_model`.

    Partitioned weights (ZeRO-3) are read by rank 0 alone.

    Returns:
        Hash of the base's weights where a part of them is frozen, on the ranks that read them; else "".
    """
    partitioned = any(hasattr(parameter, "ds_id") for parameter in model.parameters())
    reads = not partitioned or torch.distributed.get_rank() == 0
    source = first_model(recipe, base) if reads else None
    weights = dict(source.named_parameters()) if source is not None else {}
    for name, parameter in model.named_parameters():
        with gather([parameter]), torch.no_grad():
            if source is not None:
                parameter.copy_(weights[name])
    buffers = {name: buffer.cpu() for name, buffer in source.named_buffers()} if source is not None else {}
    if partitioned:  # zero.Init rounds those of floating point, rotary frequencies too, to the weights' type
        box = [buffers]
        torch.distributed.broadcast_object_list(box, src=0)
        buffers = box[0]
    for name, buffer in model.named_buffers():
        buffer.data = buffers[name].to(buffer.device)
    frozen = not all(parameter.requires_grad for parameter in model.parameters())
    return weights_hash(source) if frozen and source is not None else ""


def save(recipe: FinetuneRecipe, base: Base, weights: Mapping[str, Tensor], folder: Path) -> Path:
    """Write the trained model to `folder`, in the precision it was trained in; atomic.

    An adapted one is what `zoo.adapt.load_adapted` opens; a dense one what `from_pretrained` opens. Under LoRA both
    hold the adapters without the base. The processor's files stand beside it.

    Args:
        weights: whole, by name, as `Engine.full_state_dict` gives them.
    Raises:
        UserError: the disk is full.
    """
    model = first_model(recipe, base, torch.bfloat16 if recipe.train.precision == "bf16" else torch.float32)
    model.load_state_dict(weights)
    source = str(Path(base.name).resolve()) if Path(base.name).is_dir() else base.name
    try:
        with atomic_path(folder) as temporary:
            if base.adapt is None:
                saved: Any = model  # of Transformers, or PEFT's wrapper of one
                saved.save_pretrained(temporary)
            else:
                za.save_adapted(model, temporary, base=source)
            base.processor.save_pretrained(temporary)
    except SafetensorError as error:
        raise UserError(
            f"{str(folder)!r} cannot be written ({error}); free space and give the same command again, it goes on from "
            "the newest checkpoint"
        ) from None
    return folder


def decoder_trains(recipe: FinetuneRecipe, base: Base) -> bool:
    """Whether weights of the decoder's layers get gradients of their own, those of routers and adapters apart."""
    return recipe.lora is None and any(p.requires_grad for p in parts(base.blueprint).layers[0].parameters())


def _dense(config: Any) -> nn.Module:
    with no_init_weights():
        model = transformers.AutoModelForImageTextToText.from_config(
            copy.deepcopy(config), dtype=torch.float32, trust_remote_code=False
        )
    return model
