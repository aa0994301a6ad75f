"""Generation of channels: equal to the full forward at every step; and likelihoods of rows that carry some."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import zoo
from zoo.context import CAUSAL, TokenContext
from zoo.generate import Item, generate_channels, log_likelihood
from zoo.modalities import grammars, parse_modalities

MODALITIES = ("text", "speech")
ITEM = Item(place=9, end=3, modality=1, least=2, most=6)
PROMPT = torch.tensor([[0, 5, 2], [0, 7, 2], [0, 8, 2]])
LAYERS = {
    "attention": [{"mixer": {"type": "attention", "heads": 2}}],
    "mamba": [{"mixer": {"type": "mamba", "d_state": 4}}],
    "moma and depth": [
        {
            "mixer": {"type": "attention", "heads": 2},
            "feedforward": {"type": "moma", "experts": {"text": 2, "speech": 2}, "d_ff": 8},
            "depth": {"type": "mod", "capacity": 0.5},
        }
    ],
}


def model_of(layers: str) -> Any:
    ends = {"speech": {"type": "channels", "count": 3, "size": 4}}
    config = {
        "modalities": list(MODALITIES),
        "d_model": 16,
        "vocab_size": 10,
        "layers": LAYERS[layers],
        "repeat": 2,
        "stem": ends,
        "head": ends,
    }
    return zoo.build("model", config, seed=0).double().eval()


def stream(content: torch.Tensor) -> tuple[torch.Tensor, TokenContext]:
    """A prompt and the places of its item; one row."""
    tokens = torch.cat([PROMPT[0], torch.full((len(content),), ITEM.place)])[None]
    modality = (tokens == ITEM.place).long()
    return tokens, TokenContext.from_modality(modality, modalities=MODALITIES, routing=CAUSAL)


@pytest.mark.parametrize("layers", LAYERS)
def test_every_step_is_the_full_forward(layers: str) -> None:
    """The likeliest levels, and the likeliest end, of a model that sees the whole row at once."""
    model = model_of(layers)
    item = generate_channels(model, PROMPT, torch.zeros_like(PROMPT), ITEM, temperature=0)[0]
    assert ITEM.least <= len(item) <= ITEM.most and item.shape[1] == 3
    for n in range(ITEM.most):
        tokens, context = stream(item[:n])
        last = torch.tensor([tokens.shape[1] - 1])
        logits, heads = model(tokens, context, content={"speech": item[:n]}, read={"speech": last})
        ends = n >= ITEM.least and logits[0, -1, ITEM.end] > logits[0, -1, ITEM.place]
        assert bool(ends) == (n == len(item)) or n == ITEM.most
        if ends:
            break
        assert torch.equal(item[n], heads["speech"][0].argmax(-1))


def test_rows_do_not_see_each_other_and_draws_repeat() -> None:
    model = model_of("moma and depth")
    drawn = [
        generate_channels(model, PROMPT, torch.zeros_like(PROMPT), ITEM, 1.0, torch.Generator().manual_seed(seed))
        for seed in (0, 0, 1)
    ]
    assert all(torch.equal(a, b) for a, b in zip(drawn[0], drawn[1], strict=True))
    assert len({tuple(map(len, items)) for items in drawn}) > 1 or not torch.equal(drawn[0][0], drawn[2][0])
    together = generate_channels(model, PROMPT, torch.zeros_like(PROMPT), ITEM, 0)
    for row, item in enumerate(together):
        prompt = PROMPT[row : row + 1]
        assert torch.equal(generate_channels(model, prompt, torch.zeros_like(prompt), ITEM, 0)[0], item)


def test_lengths_keep_to_the_bounds() -> None:
    for end, length in ((1e4, ITEM.least), (-1e4, ITEM.most)):
        model = model_of("attention")
        model.head.register_forward_hook(
            lambda head, given, logits, end=end: logits.index_fill(-1, torch.tensor([ITEM.end]), end)
        )
        items = generate_channels(model, PROMPT, torch.zeros_like(PROMPT), ITEM, 1.0, torch.Generator().manual_seed(0))
        assert [len(item) for item in items] == [length] * 3


def test_the_grammar_knows_the_item() -> None:
    section = parse_modalities({"text": {"type": "bytes"}, "speech": {"type": "dmel", "max_seconds": 1.0}})
    grammar = grammars(section)
    assert grammar["speech"].item() == Item(place=260, end=3, modality=1, least=1, most=40)
    with pytest.raises(ValueError, match="its positions carry ids"):
        grammar["text"].item()


def test_the_likelihood_of_what_follows_channels() -> None:
    model = model_of("attention")
    content = torch.randint(4, (4, 3), generator=torch.Generator().manual_seed(0))
    tokens = torch.tensor([[0, 2, 9, 9, 9, 9, 3, 5, 1]])
    context = TokenContext.from_modality((tokens == 9).long(), modalities=MODALITIES, routing=CAUSAL)
    scored = torch.arange(9)[None] >= 7
    log_p = model(tokens, context, content={"speech": content})[0].log_softmax(-1).detach()
    found = log_likelihood(model, tokens, context, scored, {"speech": content})
    assert float(found) == pytest.approx(float(log_p[6, 5] + log_p[7, 1]), abs=1e-5)
