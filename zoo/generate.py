"""Generation: token by token with states, each step restricted to the ids that may come next."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from zoo.context import CAUSAL, TokenContext
from zoo.model import Model


def prompt_context(tokens: Tensor, modality: Tensor, modalities: tuple[str, ...], first: int = 0) -> TokenContext:
    """Causal context of one document a row; `first` is the position of the first column.

    Args:
        tokens, modality: (B, T); modality −1 for padding.
    """
    position = (first + torch.arange(tokens.shape[1], device=tokens.device)).expand(tokens.shape)
    return TokenContext.from_modality(modality, position=position, modalities=modalities, routing=CAUSAL)


class Choice(NamedTuple):
    """What one new token is chosen from: the ids [start, stop), all of one modality (its number in the model)."""

    start: int
    stop: int
    modality: int


class Item(NamedTuple):
    """An item whose positions carry no ids, as the stream holds it."""

    place: int
    """The id that holds its places."""
    end: int
    """Its end marker."""
    modality: int
    """Number of its modality in the model."""
    least: int
    most: int
    """How many positions it has."""


@torch.no_grad()
def generate(
    model: Model,
    prompt: Tensor,
    prompt_modality: Tensor,
    choices: Sequence[Choice],
    temperature: float = 1.0,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Continue prompts, in causal routing, with a cache that holds only the tokens each layer kept.

    Args:
        prompt: (B, T) token ids; shorter rows are padded on the left.
        prompt_modality: (B, T) index into the model's modalities, −1 for padding.
        choices: one for each new token, such as `Grammar.choices` of an image, whose length is never left to chance
            (Chameleon §2.2 masks the same way).
        temperature: 0 takes the likeliest.
        generator: on the prompt's device; makes the draw reproducible.
    Returns:
        (B, len(choices)) new token ids.
    """
    if bool((prompt_modality[:, -1] < 0).any()):
        raise ValueError("prompt: a row ends in padding, there is nothing to continue; pad on the left")
    rows, length = prompt.shape
    states = model.init_state(rows, length + len(choices))
    step, context = prompt, prompt_context(prompt, prompt_modality, model.modalities)
    drawn = []
    for offset, (start, stop, modality) in enumerate(choices):
        choice = _draw(model(step, context, states)[:, -1, start:stop].float(), temperature, generator)
        step = (start + choice)[:, None]
        drawn.append(step)
        context = prompt_context(step, torch.full_like(step, modality), model.modalities, first=length + offset)
    return torch.cat(drawn, dim=1)


@torch.no_grad()
def generate_channels(
    model: Model,
    prompt: Tensor,
    prompt_modality: Tensor,
    item: Item,
    temperature: float = 1.0,
    generator: torch.Generator | None = None,
) -> list[Tensor]:
    """An item of channels after each prompt, position by position, in causal routing; the model says where it ends.

    All channels of a position are drawn at once, each by itself, as their head predicts them.

    Args:
        prompt: (B, T) token ids, none of the item's modality; each row ends with the item's begin marker.
        prompt_modality: (B, T) index into the model's modalities.
        temperature: 0 takes the likeliest.
        generator: on the prompt's device; makes the draw reproducible.
    Returns:
        Of each row (n, count) ids of the channels, `item.least` ≤ n ≤ `item.most`.
    """
    rows, length = prompt.shape
    name = model.modalities[item.modality]
    states, last = model.init_state(rows, length + item.most), torch.arange(rows, device=prompt.device)
    context = prompt_context(prompt, prompt_modality, model.modalities)
    logits, heads = model(prompt, context, states, read={name: last * length + length - 1})
    drawn: list[Tensor] = []
    lengths = torch.full((rows,), item.most, device=prompt.device)
    ended = torch.zeros(rows, dtype=torch.bool, device=prompt.device)
    while len(drawn) < item.most:
        if len(drawn) >= item.least:
            choice = logits[:, -1, [item.place, item.end]]
            stop = _draw(choice, temperature, generator) == 1
            lengths = torch.where(stop & ~ended, len(drawn), lengths)
            ended |= stop
            if bool(ended.all()):
                break
        drawn.append(_draw(heads[name], temperature, generator))
        step = torch.full((rows, 1), item.place, device=prompt.device)
        first = length + len(drawn) - 1
        context = prompt_context(step, torch.full_like(step, item.modality), model.modalities, first=first)
        logits, heads = model(step, context, states, content={name: drawn[-1]}, read={name: last})
    content = torch.stack(drawn, dim=1)
    return [row[:count] for row, count in zip(content, lengths.tolist(), strict=True)]


def _draw(logits: Tensor, temperature: float, generator: torch.Generator | None) -> Tensor:
    """(…,) numbers drawn from logits (…, n)."""
    if temperature == 0:
        return logits.argmax(-1)
    share = (logits.float() / temperature).softmax(-1)
    return torch.multinomial(share.flatten(0, -2), 1, generator=generator).view(share.shape[:-1])


@torch.no_grad()
def log_likelihood(
    model: Model,
    tokens: Tensor,
    context: TokenContext,
    scored: Tensor,
    content: Mapping[str, Tensor] | None = None,
) -> Tensor:
    """Σ log p of the scored tokens of each row: (B,) in nats.

    Args:
        tokens: (B, T).
        context: of the tokens; its `routing` is what is used.
        scored: (B, T) bool, the tokens whose probability counts; column 0 has no predecessor and never does.
        content: what positions carry that carry no ids, as for the model.
    """
    logits = model(tokens, context, content=content)[:, :-1].float()
    picked = logits.log_softmax(-1).gather(-1, tokens[:, 1:, None])[..., 0]
    return picked.masked_fill(~scored[:, 1:], 0.0).sum(1)
