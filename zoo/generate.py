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
        logits = model(step, context, states)[:, -1, start:stop].float()
        if temperature == 0:
            choice = logits.argmax(-1)
        else:
            choice = torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator)[:, 0]
        step = (start + choice)[:, None]
        drawn.append(step)
        context = prompt_context(step, torch.full_like(step, modality), model.modalities, first=length + offset)
    return torch.cat(drawn, dim=1)


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
