"""How likely a trained run finds what stands in a document after what stands before it, by causal routing.

    [said] = likelihoods(run, [([Part("image", picture)], "seven")])
    said.nats

Ids are predicted, and channels are; of vectors, and of items that are denoised whole, a model says no likelihood.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from zoo.batch import Batch
from zoo.carries import Channels, Vectors
from zoo.config import UserError
from zoo.generate import Part, Trained, check_causal, document, piece_of
from zoo.modalities.grammar import Piece
from zoo.objectives.denoising import Denoising
from zoo.prefix import together


class Likelihood(NamedTuple):
    """How likely something is after what stands before it."""

    nats: float
    """Log-likelihood, 0 at most."""
    tokens: int
    """How many tokens it is of."""
    greedy: bool
    """Whether each of its tokens is the likeliest after those before it."""


def likelihoods(
    run: Trained, documents: Sequence[tuple[Sequence[Part | str], Part | str]], end: bool = True, batch: int = 64
) -> list[Likelihood]:
    """How likely each part is after its prompt.

    Args:
        documents: (prompt, part) each; a string is text.
        end: whether the end of the document counts as well.
        batch: rows of a forward pass.
    Raises:
        UserError: a part is of no modality of the run or of one without likelihoods, a document is longer than the
            run knows, or routed blocks have no auxiliary router.
    """
    check_causal(run)
    eos = Piece.of([run.vocabulary.eos] if end else [], run.grammars[run.vocabulary.text].text)
    for name in dict.fromkeys(run.vocabulary.text if isinstance(part, str) else part[0] for _, part in documents):
        check_likelihood(run, name)
    prompts = {id(prompt): prompt for prompt, _ in documents}
    read = {number: document(run, prompt) for number, prompt in prompts.items()}  # each once, however often it stands
    parts = {id(part): part for _, part in documents}
    said = {number: piece_of(run, part, "what follows") for number, part in parts.items()}
    return of_pieces(run, [(read[id(prompt)], Piece.join([said[id(part)], eos])) for prompt, part in documents], batch)


def check_likelihood(run: Trained, name: str) -> None:
    """Raise UserError where the model says no likelihood of the items of a modality."""
    if name not in run.modalities:
        return  # `piece_of` says so
    config = run.modalities[name].config
    if isinstance(config.carries, Vectors):
        raise UserError(f"{name}: carries vectors in {run.folder}, of which a model says no likelihood")
    if isinstance(run.objective, Denoising) and config.bidirectional:
        raise UserError(f"{name}: {run.folder} denoises its items whole; it says no likelihood of them")


@torch.no_grad()
def of_pieces(run: Trained, pairs: Sequence[tuple[Piece, Piece]], batch: int = 64) -> list[Likelihood]:
    """The same of pieces of the stream.

    Args:
        pairs: (what stands before, at least the token that begins a document; what follows) each.
    """
    check_causal(run)
    longest = max((len(before) + len(after) for before, after in pairs), default=0)
    if longest > run.length:
        raise UserError(
            f"a document of {longest} tokens: {run.folder} was trained on {run.length} tokens and knows no longer one: "
            "shorten it"
        )
    found: list[Likelihood] = []
    for start in range(0, len(pairs), batch):
        found += _of_rows(run, pairs[start : start + batch])
    return found


def _of_rows(run: Trained, pairs: Sequence[tuple[Piece, Piece]]) -> list[Likelihood]:
    rows = together([Piece.join(pair) for pair in pairs], run.model, [0] * len(pairs), [0] * len(pairs))
    width, device = rows.tokens.shape[1], rows.tokens.device
    row = np.repeat(np.arange(len(pairs)), [len(after) for _, after in pairs])
    columns = np.concatenate([np.arange(len(before), len(before) + len(after)) for before, after in pairs])
    place = torch.from_numpy(row * width + columns).to(device)
    modality = rows.context.modality.flatten()[place]
    own = {name: modality == run.model.modalities.index(name) for name in run.model.heads}
    logits, predicted = run.model(
        rows.tokens,
        rows.context,
        content=rows.content,
        logits_at=place - 1,
        read={name: place[mask] - 1 for name, mask in own.items()},
    )
    target = rows.tokens.flatten()[place]
    nats = logits.double().log_softmax(-1).gather(-1, target[:, None])[:, 0]
    likeliest = logits.argmax(-1) == target
    for name, mask in own.items():
        if mask.any():
            _add_head(run, name, predicted[name], place, mask, rows, nats, likeliest)
    totals, missed = np.zeros(len(pairs)), np.zeros(len(pairs), np.int64)
    np.add.at(totals, row, nats.cpu().numpy())
    np.add.at(missed, row, (~likeliest).cpu().numpy())
    return [
        Likelihood(float(total), len(after), not wrong)
        for total, wrong, (_, after) in zip(totals, missed, pairs, strict=True)
    ]


def _add_head(
    run: Trained,
    name: str,
    predicted: Tensor,
    place: Tensor,
    mask: Tensor,
    rows: Batch,
    nats: Tensor,
    likeliest: Tensor,
) -> None:
    """Bring what a modality's own head says into `nats` and `likeliest` (n,), in place.

    The ids say of a position of it only whether another follows, and nothing where their number is fixed.

    Args:
        predicted: (r, count, size) logits of the channels at the positions of `place` (n,) where `mask` (n,) is true.
    """
    carries = run.model.carries[name]
    assert isinstance(carries, Channels), "vectors have been refused"
    inside = torch.isin(rows.context.index(run.model.modalities.index(name)), place[mask])
    carried = rows.content[name][inside]  # (r, count)
    said = predicted.double().log_softmax(-1).gather(-1, carried[..., None])[..., 0].sum(-1)
    right = (predicted.argmax(-1) == carried).all(-1)
    positions = run.grammars[name].positions
    if positions is not None and positions.fixed:
        nats[mask], likeliest[mask] = said, right
    else:
        nats[mask], likeliest[mask] = nats[mask] + said, likeliest[mask] & right
