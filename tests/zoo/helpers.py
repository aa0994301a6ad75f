"""What the tests of the library share: token streams written as strings, small models, finite differences."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

import zoo
from zoo import TokenContext

MODALITIES = ("text", "image")
D_MODEL, D_FF, VOCABULARY = 8, 12, 29
MOMA = {"type": "moma", "experts": {"text": 2, "image": 3}, "d_ff": D_FF}
DENSE = {"type": "dense", "d_ff": D_FF}
ATTENTION = {"type": "attention", "heads": 4, "kv_heads": 2, "qk_norm": True}
UNTIED_ATTENTION = ATTENTION | {"untied": ["q_proj", "k_proj", "v_proj", "o_proj", "qk_norm"]}


def stream(*rows: str, modalities: tuple[str, ...] = MODALITIES, **options: Any) -> TokenContext:
    """A context drawn as text: a letter is a token (the first of its modality), `|` ends a document, `.` is padding,
    and brackets enclose an item with bidirectional attention.

    `stream("tiit|t[ii]", "tt...")` has two documents in the first row, an item of two tokens at the end of the second,
    and places of padding in the second row. Shorter rows are padded at their end.
    """
    letters = {name[0]: index for index, name in enumerate(modalities)}
    length = max(sum(row.count(letter) for letter in (*letters, ".")) for row in rows)
    modality, document, item = [], [], []
    for row in rows:
        places, current_document, current_item, items = [], 0, -1, 0
        for letter in row:
            if letter == "|":
                current_document += 1
            elif letter == "[":
                current_item, items = items, items + 1
            elif letter == "]":
                current_item = -1
            else:
                kind = letters.get(letter, -1)
                places.append((kind, -1 if kind < 0 else current_document, current_item))
        places += [(-1, -1, -1)] * (length - len(places))
        for values, part in zip((modality, document, item), zip(*places, strict=True), strict=True):
            values.append(part)
    given = {"item": torch.tensor(item)} if any("[" in row for row in rows) else {}
    return TokenContext.from_modality(
        torch.tensor(modality), torch.tensor(document), modalities=modalities, **given, **options
    )


def columns(context: TokenContext, start: int, stop: int, **options: Any) -> TokenContext:
    """The context of the columns [start, stop), as a caller who decodes builds it: original positions, documents
    and items."""
    modality, document, position, key = (
        x[:, start:stop] for x in (context.modality, context.document, context.position, context.key)
    )
    return TokenContext.from_modality(
        modality,
        document,
        position,
        key=key,
        item=None if context.item is None else context.item[:, start:stop],
        modalities=context.modalities,
        routing=context.routing,
        **options,
    )


def rows(context: TokenContext, start: int, stop: int, **options: Any) -> TokenContext:
    """The context of the rows [start, stop), with the keys those rows have in the whole batch."""
    modality, document, position, key = (
        x[start:stop] for x in (context.modality, context.document, context.position, context.key)
    )
    return TokenContext.from_modality(
        modality,
        document,
        position,
        key=key,
        item=None if context.item is None else context.item[start:stop],
        modalities=context.modalities,
        routing=context.routing,
        **options,
    )


def random_rows(count: int, length: int, seed: int = 0) -> list[str]:
    """Rows of `stream`: runs of text and image in documents of uneven length, every third row padded at its end."""
    generator = torch.Generator().manual_seed(seed)
    result = []
    for row in range(count):
        draw = torch.rand(length, generator=generator).tolist()
        letters = ["ti"[value < 0.4] + "|" * (value > 0.85) for value in draw]
        padding = row % 3 * (length // 6)
        result.append("".join(letters[: length - padding]).rstrip("|") + "." * padding)
    return result


def values(context: TokenContext, width: int = D_MODEL, seed: int = 1) -> Tensor:
    """Random (B, T, width) float64 inputs of a block, 0 at padding; a leaf that wants its gradient."""
    x = torch.randn(*context.shape, width, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return x.masked_fill(~context.valid.unsqueeze(-1), 0.0).requires_grad_()


def ids(context: TokenContext, seed: int = 2) -> Tensor:
    """Random token ids (B, T)."""
    return torch.randint(VOCABULARY, context.shape, generator=torch.Generator().manual_seed(seed))


def layer(**changes: Any) -> dict[str, Any]:
    """A layer's config: attention and MoMa unless said otherwise; experts and depth choose within rows."""
    return {"mixer": ATTENTION, "feedforward": MOMA | {"scope": "row"}} | changes


def untied(**changes: Any) -> dict[str, Any]:
    """A layer's config with weights of its own for each modality throughout (Mixture-of-Transformers)."""
    feedforward = DENSE | {"untied": True}
    return {"mixer": UNTIED_ATTENTION, "feedforward": feedforward, "untied_norms": True} | changes


def mod(**changes: Any) -> dict[str, Any]:
    """A layer's config under Mixture-of-Depths."""
    return layer(depth={"type": "mod", "capacity": "1/2"}) | changes


def build_model(*layers: Mapping[str, Any], seed: int = 0, **options: Any) -> nn.Module:
    """A float64 model of the given layers."""
    config = {
        "modalities": list(MODALITIES),
        "d_model": D_MODEL,
        "vocab_size": VOCABULARY,
        "layers": list(layers),
    }
    return zoo.build("model", config, seed=seed, **options).double()


def build_block(slot: str, config: Mapping[str, Any], **options: Any) -> nn.Module:
    """A float64 block in evaluation of nothing but its config."""
    return zoo.build(slot, config, **{"d_model": D_MODEL, "modalities": MODALITIES, **options}).double()


def gradients(loss: Tensor, module: nn.Module, **inputs: Tensor) -> dict[str, Tensor | None]:
    """Gradient of every parameter by name, and of `inputs`; None where the loss does not depend on it."""
    named = {**dict(module.named_parameters()), **inputs}
    return dict(zip(named, torch.autograd.grad(loss, list(named.values()), allow_unused=True), strict=True))


def assert_equal(ours: Mapping[str, Any], theirs: Mapping[str, Any], tolerance: float = 0.0) -> None:
    """The same names, and under each the same tensor up to `tolerance` relative to its largest entry.

    An entry below 10⁻³ counts as that large: zeros are compared with what rounding leaves of them.
    """
    assert list(ours) == list(theirs)
    for name, value in ours.items():
        other = theirs[name]
        assert (value is None) == (other is None), name
        if value is not None:
            largest = float(other.detach().abs().max()) if other.numel() else 0.0
            torch.testing.assert_close(
                value, other, rtol=0, atol=tolerance * max(largest, 1e-3), msg=lambda text, name=name: f"{name}: {text}"
            )


def assert_derivative(
    loss: Callable[[], float],
    parameter: Tensor,
    gradient: Tensor,
    step: float = 1e-6,
    tolerance: float = 1e-6,
) -> None:
    """`gradient` is that of `loss` at `parameter`: a central difference along a random direction, every entry in it."""
    direction = torch.randn(parameter.shape, dtype=parameter.dtype, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        parameter += step * direction
        above = loss()
        parameter -= 2 * step * direction
        below = loss()
        parameter += step * direction
    measured, stated = (above - below) / (2 * step), float((gradient * direction).sum())
    assert abs(measured - stated) <= tolerance * max(1.0, abs(measured)), (measured, stated)
