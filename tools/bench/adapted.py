"""Adapted multimodal LLMs of Transformers beside the dense one: prefill against its FLOPs, a decode step, the cache."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pretrain import recipe as recipes
from tools.bench.benchmark import LOWER, Comparison, Goal, Group, Settings, TableRow, Unavailable, benchmark, goals
from tools.bench.measure import FORWARD, Task

RECIPES = Path(__file__).parents[2] / "recipes" / "adapt"
METHODS = {
    "γ-MoD": ("gamma_mod", ["adapt.layers={first: 1, leave_last: 1}", "adapt.inference={rule: topk}"], "value"),
    "p-MoD": ("p_mod", [], "centre"),
}
"""Name → recipe, what is changed in it (all layers but the first and last, and the share of training), and the key of
its capacity that says how much is kept."""
SHARES = (0.5, 0.2)
TEXT, VOCABULARY, LAYERS, IMAGE_ID = 32, 1024, 8, 1
DENSE = "dense"


@benchmark("adapt.prefill", images=1024, width=512, hidden=1344)
@benchmark("cuda.adapt.prefill", "cuda", images=4096, width=2048, hidden=5632)
def prefill(settings: Settings, images: int, width: int, hidden: int) -> Group:
    """Prefill of an adapted LLaVA over the dense one's, relative to their FLOPs, one image: 1,024 tokens D=512 F=1344
    L=8 in fp32; on a GPU 4,096 tokens D=2048 F=5632 in bf16."""
    models, inputs = build(settings, images, width, hidden)
    za, tokens = _adapt_library(), inputs["input_ids"].shape[1]
    candidates = tokens - TEXT
    dense = za.decoder_flops(models[DENSE], tokens).total
    pairs = []
    for name, model in models.items():
        if name != DENSE:
            predicted = za.decoder_flops(model, tokens, groups=(candidates,)).total / dense
            note = f"{candidates} image and {TEXT} text tokens, cache filled; a vision tower of one thin layer included"
            pairs.append(Comparison(name, DENSE, goals=goals(Goal(1.15)), expected=predicted, note=note))
    return Group({FORWARD: {name: prefilling(model, inputs) for name, model in models.items()}}, pairs)


@benchmark("adapt.decode", images=1024, width=512, hidden=1344)
@benchmark("cuda.adapt.decode", "cuda", images=4096, width=2048, hidden=5632)
def decode(settings: Settings, images: int, width: int, hidden: int) -> Group:
    """One generated token of the same models after that prefill, and the bytes of their keys and values over dense."""
    models, inputs = build(settings, images, width, hidden)
    za, steps, figures = _adapt_library(), {}, []
    for name, model in models.items():
        cache = prefilling(model, inputs)().past_key_values
        steps[name] = step(model, cache, inputs)
        if name != DENSE:
            held = za.cache_report(cache)
            note = f"{held.bytes / 2**20:.1f} of {held.dense_bytes / 2**20:.1f} MiB, as allocated"
            share = held.bytes / held.dense_bytes
            figures.append(
                TableRow(f"keys and values of {name} / dense", FORWARD, None, None, share, LOWER, None, None, note=note)
            )
    pairs = [Comparison(name, DENSE) for name in models if name != DENSE]
    return Group({FORWARD: steps}, pairs, figures)


def build(settings: Settings, images: int, width: int, hidden: int) -> tuple[dict[str, nn.Module], dict[str, Tensor]]:
    """The dense model and its adaptations, of the same weights, by name; and a sample of one image and TEXT tokens."""
    za = _adapt_library()
    side, dtype = math.isqrt(settings.size(images)), torch.bfloat16 if settings.device == "cuda" else torch.float32
    dense = llava(side, settings.size(width), settings.size(hidden)).to(settings.device, dtype).eval()
    models = {DENSE: dense}
    for share in SHARES:
        for method, (file, changes, key) in METHODS.items():
            config = recipes.read(RECIPES / f"{file}.yaml", [*changes, f"adapt.capacity.{key}={share}"])["adapt"]
            models[f"{method} {share}"] = za.adapt(copy.deepcopy(dense), config)
    ids = torch.full((1, side * side + TEXT), IMAGE_ID)
    ids[:, side * side :] = torch.arange(2, 2 + TEXT)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    inputs["pixel_values"] = torch.randn(1, 3, side, side, dtype=dtype)
    return models, {name: value.to(settings.device) for name, value in inputs.items()}


def llava(side: int, width: int, hidden: int) -> nn.Module:
    """A LLaVA of random weights: a pixel a patch, side² image tokens, a tower too thin to matter, a Llama decoder."""
    import transformers

    tower = transformers.CLIPVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=1, image_size=side, patch_size=1
    )
    decoder = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=width,
        intermediate_size=hidden,
        num_hidden_layers=LAYERS,
        num_attention_heads=8,
        num_key_value_heads=8,
        max_position_embeddings=side * side + 2 * TEXT,
    )
    config = transformers.LlavaConfig(
        vision_config=tower,
        text_config=decoder,
        image_token_index=IMAGE_ID,
        image_seq_length=side * side,
        vision_feature_layer=-1,
    )
    return transformers.LlavaForConditionalGeneration(config)


def prefilling(model: nn.Module, inputs: dict[str, Tensor]) -> Callable[[], Any]:
    @torch.no_grad()
    def task() -> Any:
        return model(**inputs, use_cache=True, logits_to_keep=1)

    return task


def step(model: nn.Module, cache: Any, inputs: dict[str, Tensor]) -> Task:
    """One token after `cache`, which stays as it is: its layers put longer tensors in place of theirs."""
    token = inputs["input_ids"][:, -1:]
    mask = torch.ones_like(inputs["input_ids"][:, :1]).expand(-1, inputs["input_ids"].shape[1] + 1)

    @torch.no_grad()
    def task() -> None:
        again = copy.copy(cache)
        again.layers = [copy.copy(layer) for layer in cache.layers]
        model(input_ids=token, attention_mask=mask, past_key_values=again, use_cache=True, logits_to_keep=1)

    return task


def _adapt_library() -> Any:
    try:
        import zoo.adapt
    except ImportError as error:
        raise Unavailable(f"needs Transformers ({error}): pip install -e .[adapt]") from None
    return zoo.adapt
