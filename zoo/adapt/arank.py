"""ARank: how far the attention maps of each layer are from full rank, and which layers to route for it (γ-MoD, arXiv
2410.13859).

A causal softmax map has a positive diagonal and therefore full rank, whatever it attends to; with the diagonal set to 0
it still has nearly that. ARank is a numerical rank: the tolerance is the metric. Here a singular value counts if it is
above rtol times the largest one. The published code takes the tolerance of floating point, under which every map looks
full, and prints one sample's numbers; averaging them, normalising by length and dropping padding are this project's.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from zoo.adapt.family import Parts, parts, picture_ids
from zoo.adapt.flops import attention_width
from zoo.config import UserError

RTOL = 1e-2
FLOAT64_BELOW = 1e-4
"""A smaller rtol is too near to float32's rounding errors in an SVD: the singular values are computed in float64."""
STATISTICS = ("rank_over_length", "stable_rank", "entropy")


def spectrum(maps: Tensor, rtol: float = RTOL) -> Tensor:
    """What is said of attention maps: (N, 3) float64, in the order of STATISTICS, each divided by R.

    - rank: singular values above rtol · σ_max.
    - stable rank: ‖A‖_F² / σ_max².
    - entropy: exp(−Σ p log p), p = σ / Σ σ, the effective rank of Roy & Vetterli (EUSIPCO 2007).

    A map of zeros has 0 of each. Diagonals are taken as they are; see `reduce`.

    Args:
        maps: (N, R, S), any floating dtype.
        rtol: relative to the largest singular value of each map.
    """
    values = torch.linalg.svdvals(maps.to(torch.float64 if rtol < FLOAT64_BELOW else torch.float32)).double()
    largest = values[:, :1]
    rank = (values > rtol * largest).sum(1)
    tiny = torch.finfo(values.dtype).tiny
    stable = values.square().sum(1) / largest[:, 0].square().clamp_min(tiny)
    share = values / values.sum(1, keepdim=True).clamp_min(tiny)
    effective = torch.special.entr(share).sum(1).exp() * (largest[:, 0] > 0)
    return torch.stack((rank, stable, effective), dim=1) / maps.shape[1]


def reduce(maps: Tensor, tokens: Tensor, queries: Tensor | None = None, rtol: float = RTOL) -> Tensor:
    """Statistics (H, 3) of one sample's maps: padding dropped, diagonal set to 0.

    Args:
        maps: (H, T, T) attention weights of all columns.
        tokens: (S,) columns that hold tokens.
        queries: (R,) of those, counted among `tokens`, whose rows are looked at; None for all S.
    """
    square = maps[:, tokens[:, None], tokens].clone()  # (H, S, S)
    square.diagonal(dim1=1, dim2=2).zero_()
    return spectrum(square if queries is None else square[:, queries], rtol)


@dataclasses.dataclass(frozen=True)
class Measurement:
    """What was measured on n samples in L layers of H heads."""

    values: Tensor
    """(n, L, H, 3) float64, in the order of STATISTICS."""
    tokens: tuple[int, ...]
    """Tokens of each sample, padding not counted."""
    image_tokens: tuple[int, ...]
    """How many of them are placeholders of images and videos."""
    weights: tuple[int, ...]
    """Weights in the matrices of each layer: what a token is multiplied with (all experts of a mixture counted)."""
    width: int
    """Heads · head dim."""
    dtype: str
    """Type of the attention weights as the layers give them; their softmax is float32 in all models tried."""

    def layers(self) -> list[dict[str, Any]]:
        """Each layer in plain numbers: means over heads and samples; `stderr` is that of rank_over_length over samples,
        None for a single one; `heads` is rank_over_length of each head."""
        by_sample = self.values.mean(2)  # (n, L, 3)
        count = len(by_sample)
        error = by_sample[..., 0].std(0) / count**0.5 if count > 1 else None
        by_head = self.values[..., 0].mean(0)  # (L, H)
        rows = []
        for index, means in enumerate(by_sample.mean(0).tolist()):
            row = {"index": index} | dict(zip(STATISTICS, means, strict=True))
            row["stderr"] = None if error is None else float(error[index])
            row["heads"] = by_head[index].tolist()
            row["weights"], row["width"] = self.weights[index], self.width
            rows.append(row)
        return rows


def measure(
    model: nn.Module,
    batches: Iterable[Mapping[str, Tensor]],
    *,
    rtol: float = RTOL,
    heads: int | None = None,
    rows: Literal["all", "image"] = "all",
    progress: Callable[[int], object] = lambda maps: None,
) -> Measurement:
    """ARank of every layer, over prompts with images: one pass without a cache.

    Each layer's maps are reduced as they appear and dropped, so one layer's are held at a time. The decoder runs under
    eager attention meanwhile; its own implementation and mode come back afterwards, whatever happens.

    Args:
        model: a multimodal model of Transformers, on its device.
        batches: arguments of its forward, input_ids (B, T) among them; attention_mask (B, T) tells padding.
        rtol: see `spectrum`; 0 < rtol < 1.
        heads: look at so many heads of each layer, evenly spaced; None for all.
        rows: "image": only the rows of image tokens, over all columns; ranks are then divided by their number.
        progress: is told how many more samples of a layer are done.
    Raises:
        UserError: a text-only model; attention weights are not to be had or not finite; a sample without image tokens;
            no sample.
    """
    if not 0 < rtol < 1:
        raise UserError(f"rtol: {rtol} must be between 0 and 1; 0.01 is usual")
    found = parts(model)
    pictures = torch.tensor(list(picture_ids(found.top.config, type(found.top).__name__)))
    values, tokens, image_tokens = [], [], []
    dtype = ""
    device = next(found.decoder.parameters()).device
    with eager_attention(found), torch.no_grad():
        for inputs in batches:
            columns, images = _columns(inputs, pictures, len(tokens))
            reducer = _Reducer(columns, images if rows == "image" else None, rtol, heads, progress, device)
            with reducer.hooked(found.layers):
                found.base(**_moved(inputs, found.base, device), use_cache=False)
            values.append(reducer.result(len(found.layers)))
            dtype = reducer.dtype
            tokens += [len(each) for each in columns]
            image_tokens += [len(each) for each in images]
    if not values:
        raise UserError("there is no sample to measure")
    weights = tuple(sum(p.numel() for p in layer.parameters() if p.dim() > 1) for layer in found.layers)
    width = attention_width(found.text_config)
    return Measurement(torch.cat(values), tuple(tokens), tuple(image_tokens), weights, width, dtype)


@contextlib.contextmanager
def eager_attention(found: Parts) -> Iterator[None]:
    """Within: the decoder in evaluation, with the attention implementation that gives its weights; the vision tower
    keeps its own.

    Raises:
        UserError: the model has none.
    """
    top, config = found.top, found.decoder.config
    part = "text_config" if "text_config" in top.config.sub_configs else ""  # Chameleon is its own decoder
    before, training = config._attn_implementation, top.training
    try:
        with contextlib.suppress(ValueError, ImportError):  # Transformers refuses; said below
            top.set_attn_implementation({part: "eager"})
        if config._attn_implementation != "eager":
            raise _unavailable(type(top).__name__, "it has no eager attention")
        top.eval()
        yield
    finally:
        top.train(training)
        top.set_attn_implementation({part: before})


class _Reducer:
    """Forward hooks of the attention of every layer, for one batch."""

    def __init__(
        self,
        columns: Sequence[Tensor],
        images: Sequence[Tensor] | None,
        rtol: float,
        heads: int | None,
        progress: Callable[[int], object],
        device: torch.device,
    ) -> None:
        # where image tokens stand among the tokens
        queries = [None] * len(columns) if images is None else map(torch.searchsorted, columns, images)
        self.rows = [
            (own.to(device), None if q is None else q.to(device)) for own, q in zip(columns, queries, strict=True)
        ]
        self.rtol, self.heads, self.progress = rtol, heads, progress
        self.found: dict[int, Tensor] = {}
        self.dtype = ""

    @contextlib.contextmanager
    def hooked(self, layers: nn.ModuleList) -> Iterator[None]:
        handles = []
        try:
            for index, layer in enumerate(layers):
                attention = getattr(layer, "self_attn", None)
                if attention is None:
                    raise _unavailable(f"layer {index} ({type(layer).__name__})", "it has no self_attn")
                handles.append(attention.register_forward_hook(self._hook(index)))
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _hook(self, index: int) -> Callable[..., tuple]:
        def reduce_and_drop(module: nn.Module, inputs: tuple, output: Any) -> tuple:
            weights = output[1] if isinstance(output, tuple) and len(output) > 1 else None
            if weights is None:
                raise _unavailable(f"layer {index} ({type(module).__name__})", "its eager attention returns none")
            self.dtype = str(weights.dtype).removeprefix("torch.")
            chosen = slice(None)
            if self.heads is not None and self.heads < weights.shape[1]:
                chosen = torch.linspace(0, weights.shape[1] - 1, self.heads).round().long()
            results = []
            for maps, (columns, queries) in zip(weights, self.rows, strict=True):
                if not bool(maps.isfinite().all(0)[columns][:, columns].all()):  # those of padding may be anything
                    raise UserError(
                        f"layer {index}: its attention weights are not finite; try another dtype, or batches of one"
                    )
                results.append(reduce(maps[chosen], columns, queries, self.rtol).cpu())
                self.progress(1)
            self.found[index] = torch.stack(results)
            return (output[0], None, *output[2:])

        return reduce_and_drop

    def result(self, layers: int) -> Tensor:
        """(B, L, H, 3)."""
        return torch.stack([self.found[index] for index in range(layers)], dim=1)


def _columns(inputs: Mapping[str, Tensor], pictures: Tensor, first: int) -> tuple[list[Tensor], list[Tensor]]:
    """The columns of each row's tokens, and those of its image tokens; `first` numbers the rows in errors."""
    ids = inputs["input_ids"].cpu()
    mask = inputs.get("attention_mask")
    valid = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.cpu().bool()
    images = torch.isin(ids, pictures) & valid
    for row, count in enumerate(images.sum(1).tolist()):
        if not count:
            raise UserError(
                f"sample {first + row} has no image token: the id {' or '.join(map(str, pictures.tolist()))} of the "
                "model's config does not occur in its input_ids; give samples with images, encoded by this model's own "
                "processor"
            )
    return [row.nonzero()[:, 0] for row in valid], [row.nonzero()[:, 0] for row in images]


def _moved(inputs: Mapping[str, Tensor], base: PreTrainedModel, device: torch.device) -> dict[str, Tensor]:
    moved = {name: value.to(device) for name, value in inputs.items() if name != "labels"}
    return {name: value.to(base.dtype) if value.is_floating_point() else value for name, value in moved.items()}


def _unavailable(where: str, why: str) -> UserError:
    return UserError(
        f"{where}: attention weights are not available, {why}; ARank cannot be measured on this model, so choose layers"
        " by a rule, such as {first: 1, leave_last: 1, every: 2}"
    )
