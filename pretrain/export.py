"""From a run folder to a folder that Transformers opens: weights, config, processor, tokenizer, model card."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from pretrain import metrics
from pretrain.consolidate import StoredWeights, stored_in_checkpoint, stored_in_safetensors
from pretrain.engine import TAG
from pretrain.run_folder import CHECKPOINTS, INITIAL, WEIGHTS, newest_checkpoint
from zoo.auxiliary import check_causal
from zoo.build import build_model
from zoo.config import UserError
from zoo.files import atomic_write
from zoo.hf import ZooConfig, ZooForCausalLM, ZooProcessor
from zoo.hf.folder import write_weights
from zoo.hf.plain import plain_config, plain_weights
from zoo.kept import open_modalities
from zoo.run import RECIPE, import_named, read_recipe

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SHARD = 5 << 30
"""Bytes of the largest file of weights, unless one weight alone is larger."""
CARD = "README.md"


@dataclasses.dataclass(frozen=True)
class Exported:
    """What was written."""

    architecture: str
    """Name of the class of Transformers."""
    files: list[Path]
    """Those with weights."""
    parameters: int
    tokenizer: bool
    """Whether AutoTokenizer opens the folder."""


def export(
    run: Path,
    out: Path,
    *,
    plain: bool = False,
    dtype: str = "float32",
    shard: int = SHARD,
    checkpoint: str | None = None,
    imports: Iterable[str] = (),
) -> Exported:
    """Write a run's model to a new folder. No more than the weights of one file of it are in memory at a time.

    Args:
        run: the run folder; its data may be gone.
        plain: as Llama or Qwen3, for those who have no zoo.
        dtype: of the weights, a key of `DTYPES`.
        checkpoint: "step-1000", the folder's name; default: the weights with which the run ended, or, where it has not,
            its newest checkpoint.
        imports: modules with blocks of the run's own.
    Raises:
        UserError: the run is not whole, it is no plain architecture, or `out` exists.
    """
    if out.exists() and any(out.iterdir() if out.is_dir() else [out]):
        raise UserError(f"{out}: exists; give a new folder, or remove it")
    recipe = read_recipe(run / RECIPE)
    import_named(recipe.get("imports") or [], imports)
    config = config_of(recipe, run, dtype)
    plainly = plain_config(config) if plain else None
    modalities = open_modalities(run, config.modality_configs())
    found = stored_weights(run, checkpoint)
    names = _check(config, found, run)
    out.mkdir(parents=True, exist_ok=True)
    written = {f"{ZooForCausalLM.base_model_prefix}.{name}": (name, lambda weight: weight) for name in names}
    written = plain_weights(config) if plainly is not None else written
    shapes = {}
    for target, (name, change) in written.items():
        kind = found[name].dtype
        whole = torch.empty(found[name].shape, device="meta", dtype=DTYPES[dtype] if kind.is_floating_point else kind)
        shapes[target] = (tuple(change(whole).shape), whole.dtype)
    files = write_weights(out, shapes, lambda target: written[target][1](found[written[target][0]].read()), shard)
    (plainly or config).save_pretrained(out)
    generation = ZooForCausalLM.generation_config_class(
        bos_token_id=config.bos_token_id,
        eos_token_id=config.eos_token_id,
        pad_token_id=config.pad_token_id,
        max_length=config.max_position_embeddings,
    )
    generation.save_pretrained(out)
    ZooProcessor(modalities, run).save_pretrained(out)
    architecture = str(((plainly or config).architectures or [""])[0])
    atomic_write(out / CARD, card(run, recipe, config, architecture))
    parameters = sum(torch.Size(shape).numel() for shape, kind in shapes.values() if kind.is_floating_point)
    return Exported(architecture, files, parameters, (out / "tokenizer.json").exists())


def config_of(recipe: Mapping[str, Any], run: Path, dtype: str = "float32") -> ZooConfig:
    """The config of a run's model, from its resolved recipe."""
    try:
        return ZooConfig(
            network=recipe["model"],
            modalities={name: _without_place(section) for name, section in recipe["modalities"].items()},
            objective=recipe["objective"],
            imports=recipe.get("imports") or [],
            max_position_embeddings=recipe["data"]["sequence_length"],
            architectures=[ZooForCausalLM.__name__],
            dtype=dtype,
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{run / RECIPE}: is no resolved recipe of a pretraining ({error!r})") from None


def _without_place(section: Mapping[str, Any]) -> dict[str, Any]:
    """A modality's section without where its file lay in training; an export has it at a place of its own."""
    return {**section, "path": ""} if section.get("path") is not None else dict(section)


def stored_weights(run: Path, checkpoint: str | None) -> StoredWeights:
    """Where the weights of a run lie.

    Raises:
        UserError: there are none.
    """
    if checkpoint is None and (run / WEIGHTS).exists():
        return stored_in_safetensors(run / WEIGHTS)
    if checkpoint is None:
        folder = newest_checkpoint(run)
    else:
        folder = run / CHECKPOINTS / checkpoint
    if not (folder / TAG).is_dir():
        known = sorted(path.name for path in (run / CHECKPOINTS).glob("step-*") if path.is_dir())
        raise UserError(f"--checkpoint: {checkpoint!r} is none of {', '.join(known) or 'none'} in {run / CHECKPOINTS}")
    frozen = stored_in_safetensors(run / INITIAL) if (run / INITIAL).exists() else {}
    return frozen | stored_in_checkpoint(folder / TAG)


def _check(config: ZooConfig, found: StoredWeights, run: Path) -> list[str]:
    """Names of the model's weights and buffers, in order; they are all there, in their shapes."""
    with torch.device("meta"):
        model = build_model(config.model_config(), seed=None)
    check_causal(model, run)
    state = model.state_dict()
    for name, value in state.items():
        if name not in found or found[name].shape != tuple(value.shape):
            there = f"has shape {found[name].shape}" if name in found else "is not there"
            raise UserError(f"{run}: {name} of the recipe's model {there}, but has {tuple(value.shape)}; restore both")
    return list(state)


# ------------------------------------------------------------------------------------------------------- the model card


def card(run: Path, recipe: Mapping[str, Any], config: ZooConfig, architecture: str) -> str:
    """What the model is, what it was trained on, how good it is, and what it cannot do; Markdown."""
    with torch.device("meta"):
        model = build_model(config.model_config(), seed=None)
    total, cost = sum(p.numel() for p in model.parameters()), model.cost(config.max_position_embeddings)
    lines = ["---", "library_name: transformers", "pipeline_tag: text-generation", "tags: [early-fusion, mixed-modal]"]
    lines += ["---", "", f"# {recipe['name']}", ""]
    lines += [
        f"A mixed-modal early-fusion decoder over one stream of {', '.join(model.modalities)}: {len(model.layers)} "
        f"layers of width {config.hidden_size}, {total:,} parameters, {round(max(cost.active)):,} of them active a "
        f"token, contexts of {config.max_position_embeddings} tokens. `{architecture}`.",
        "",
    ]
    lines += ["## Use", "", "```python", *_use(architecture), "```", ""]
    lines += ["## Training data", "", *_data(recipe["data"]), ""]
    lines += ["## Cost", "", "| | " + " | ".join(model.modalities) + " |", "|---" * (len(model.modalities) + 1) + "|"]
    lines += [f"| forward FLOPs a token | {' | '.join(f'{each:,.0f}' for each in cost.flops)} |", ""]
    return "\n".join([*lines, *_losses(run, list(model.modalities)), *_limits(config, model)]) + "\n"


def _use(architecture: str) -> list[str]:
    if architecture != ZooForCausalLM.__name__:
        return [
            f"from transformers import AutoTokenizer, {architecture}",
            "",
            f'model = {architecture}.from_pretrained("FOLDER")',
            'tokenizer = AutoTokenizer.from_pretrained("FOLDER")',
        ]
    return [
        "import zoo.hf",
        "from transformers import AutoModelForCausalLM, AutoProcessor",
        "",
        'model = AutoModelForCausalLM.from_pretrained("FOLDER")',
        'processor = AutoProcessor.from_pretrained("FOLDER")',
        'rows = processor.batch_parts(model.generate(**processor([["a text"]])))',
    ]


def _data(data: Mapping[str, Any]) -> list[str]:
    """What the recipe says of its data; places on the machine of the training apart."""
    sources = data.get("sources") or {}
    lines = [f"- {name}: {_source(source)}" for name, source in sources.items()]
    if data.get("path") is not None:
        lines.append(f"- `{Path(str(data['path'])).name}`: {data.get('train')}, held out: {data.get('validation')}")
    return lines or ["- not said"]


def _source(source: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} {source[key]}" for key in ("type", "weight") if source.get(key) is not None) or "documents"


def _losses(run: Path, modalities: list[str]) -> list[str]:
    """The last evaluation that the run has written."""
    path = run / "metrics.jsonl"
    found = (
        [line for line in metrics.read(path) if any(name.startswith("eval/") for name in line)] if path.exists() else []
    )
    if not found:
        return ["## Loss", "", "The run has no evaluation.", ""]
    last = found[-1]
    lines = ["## Loss", "", f"Held-out data after step {last['step']:,}, {last.get('tokens', 0):,.0f} tokens and "]
    lines[-1] += (
        f"{last.get('flops', 0):.3g} FLOPs of training; nats a token, a mean over terms for what carries no ids."
    )
    lines += ["", "| | causal | top-k |", "|---|---|---|"]
    for name in ("", *modalities):
        row = [last.get(f"eval/{routing}/loss{'/' * bool(name)}{name}") for routing in ("causal", "topk")]
        if any(value is not None for value in row):
            shown = " | ".join("–" if value is None else f"{value:.4f}" for value in row)
            lines.append(f"| {name or 'objective'} | {shown} |")
    if "eval/causal/flops_per_token" in last:
        lines += ["", f"Causal use takes {last['eval/causal/flops_per_token']:,.0f} forward FLOPs a token."]
    return [*lines, ""]


def _limits(config: ZooConfig, model: Any) -> list[str]:
    lines = ["## Limits", "", f"- It knows no document longer than {config.max_position_embeddings} tokens."]
    lines.append(
        "- Routing is causal here; top-k, as in training, sees later tokens, and its loss is no language model's."
    )
    if model.heads:
        lines.append(
            f"- `generate` writes ids: items of {', '.join(model.heads)} may stand in a prompt, but are not written; "
            "`zoo.load` of the run writes them."
        )
    if config.imports:
        lines.append(f"- It needs blocks of its own: import {', '.join(config.imports)} first.")
    return lines
