"""TokenContext against brute force over random rows."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.zoo.helpers import stream
from zoo import TokenContext, Trace
from zoo.context import Kept
from zoo.spans import Spans

MODALITIES = ("text", "image", "speech")


Rows = list[list[int]]


@st.composite
def batches(draw) -> tuple[Rows, Rows, Rows]:
    """Modality, document and item of every place: runs of documents, padding anywhere, items anywhere in documents."""
    rows, length, with_items = draw(st.integers(1, 4)), draw(st.integers(1, 12)), draw(st.booleans())
    batch: tuple[Rows, Rows, Rows] = ([], [], [])
    for _ in range(rows):
        places: list[tuple[int, int, int]] = []
        documents, items = 0, 0
        while len(places) < length:
            padding = draw(st.booleans())
            for _ in range(draw(st.integers(1, 3))):
                run, item = draw(st.integers(1, 3)), with_items and not padding and draw(st.booleans())
                kind = -1 if padding else draw(st.integers(0, 2))
                places += [(kind, -1 if padding else documents, items if item else -1)] * run
                items += item
            documents += not padding
        for rows_of, values in zip(batch, zip(*places[:length], strict=True), strict=True):
            rows_of.append(list(values))
    return batch


def context_of(batch: tuple[Rows, Rows, Rows], **options) -> TokenContext:
    modality, document, item = map(torch.tensor, batch)
    return TokenContext.from_modality(modality, document, item=item, modalities=MODALITIES, **options)


def spans(ids: Rows) -> tuple[tuple[int, int, int], ...]:
    """(row, start, length) of every id that is not −1."""
    return tuple((b, row.index(i), row.count(i)) for b, row in enumerate(ids) for i in dict.fromkeys(row) if i >= 0)


def real(modality: Rows) -> list[tuple[int, int]]:
    return [(b, t) for b, row in enumerate(modality) for t, m in enumerate(row) if m >= 0]


def assert_describes(context: TokenContext, modality: Rows, document: Rows, item: Rows) -> None:
    """Everything derived from modality, document and item, by brute force."""
    length, places = len(modality[0]), real(modality)
    flat = [m for row in modality for m in row]
    assert context.shape == (len(modality), length)
    assert context.counts == tuple(tuple(row.count(m) for m in range(3)) for row in modality)
    assert context.row_counts == tuple(sum(m >= 0 for m in row) for row in modality)
    assert context.totals == tuple(flat.count(m) for m in range(3))
    assert context.padded == (-1 in flat)
    assert context.valid.tolist() == [[m >= 0 for m in row] for row in modality]
    assert context.tokens.tolist() == [b * length + t for b, t in places]
    assert context.order.tolist() == sorted(range(len(flat)), key=lambda i: flat[i])
    for m in range(3):
        assert context.index(m).tolist() == [i for i, value in enumerate(flat) if value == m]
    for b, (row, items) in enumerate(zip(document, item, strict=True)):
        expected = [
            [row[s] == row[t] and (s <= t or items[s] == items[t] >= 0) for s in range(length)] for t in range(length)
        ]
        assert context.mask[b, 0].tolist() == expected
    assert context.document_spans == spans(document) and context.item_spans == spans(item)
    if context.single_document:
        assert all(row == sorted(row, key=lambda d: d < 0) and len({*row} - {-1}) <= 1 for row in document)


@settings(max_examples=60, deadline=None)
@given(batches())
def test_from_modality(batch):
    context = context_of(batch)
    modality, document, item = batch
    assert_describes(context, modality, document, item)
    starts = {(b, document[b][start]): start for b, start, _ in context.document_spans}
    for b, t in real(modality):
        assert context.position[b, t] == t - starts[b, document[b][t]]
    by_hand = all(
        len(places) <= 1 and (not places or places[0] == 0)
        for places in ([start for (row, _), start in starts.items() if row == b] for b in range(len(modality)))
    )
    assert context.single_document == by_hand
    assert (context.item is None) == (not context.item_spans)


@settings(max_examples=100, deadline=None)
@given(batches(), st.data())
def test_select_keeps_positions_documents_items_and_keys(batch, data):
    context, modality = context_of(batch, step=3), batch[0]
    kept = [[t for t, m in enumerate(row) if m >= 0 and data.draw(st.booleans())] for row in modality]
    width = max(1, max(map(len, kept)))
    index = torch.tensor([row + [0] * (width - len(row)) for row in kept])
    valid = torch.tensor([[i < len(row) for i in range(width)] for row in kept])
    keep = torch.tensor([[t in row for t in range(context.shape[1])] for row in kept])

    def take(values: Rows) -> Rows:
        return [[values[b][t] for t in row] + [-1] * (width - len(row)) for b, row in enumerate(kept)]

    told = context.kept(keep)
    for known in (
        None,
        told,
        Kept.of(told.counts),
        context.kept(keep, told.row_counts),
        context.kept(keep, counts=told.counts),
    ):
        narrow = context.select(index, valid, known)
        assert narrow.modality.tolist() == take(modality)
        assert_describes(narrow, *map(take, batch))
        for b, row in enumerate(kept):
            assert narrow.position[b, : len(row)].tolist() == context.position[b, row].tolist()
            assert narrow.key[b, : len(row)].tolist() == context.key[b, row].tolist()
        assert narrow.step == 3 and narrow.narrowed and not context.narrowed
    assert told.row_counts == tuple(map(len, kept))
    needed = not context.single_document or context.item is not None
    assert told.spans == (Spans(spans(take(batch[1])), spans(take(batch[2]))) if needed else None)


def test_defaults():
    context = TokenContext.from_modality(torch.tensor([[0, 1, 0, -1]]))
    assert context.modalities == ("text", "image")
    assert context.document.tolist() == [[0, 0, 0, -1]] and context.position[0, :3].tolist() == [0, 1, 2]
    assert (context.step, context.routing, context.trace) == (0, "topk", None)
    assert context.single_document and context.document_spans == ((0, 0, 3),)
    assert context.key.dtype == torch.int32 and len(context.key.unique()) == 4


def test_items():
    context = stream("t[ii][ii]t|[iii]", "..[ti]tt[i]")
    assert context.item.tolist() == [[-1, 0, 0, 1, 1, -1, 2, 2, 2], [-1, -1, 0, 0, -1, -1, 1, -1, -1]]
    assert context.item_spans == ((0, 1, 2), (0, 3, 2), (0, 6, 3), (1, 2, 2), (1, 6, 1))
    first = context.mask[0, 0]
    assert first[1, :6].tolist() == [True, True, True, False, False, False]  # sees its item, not the adjacent one
    assert first[3, :6].tolist() == [True, True, True, True, True, False]
    assert first[5, :9].tolist() == [True] * 6 + [False] * 3


def test_a_batch_without_items_has_none():
    modality = torch.tensor([[0, 1, 1, -1]])
    for item in (None, torch.full((1, 4), -1, dtype=torch.int32)):
        context = TokenContext.from_modality(modality, item=item)
        assert context.item is None and context.item_spans == ()


def test_what_a_router_keeps_of_an_item_is_one_run():
    context = stream("t[iii]t|[ii]t", "[ti]ttttt.")
    index = torch.tensor([[1, 3, 4, 6], [1, 2, 0, 0]])
    narrow = context.select(index, torch.tensor([[True] * 4, [True, True, False, False]]))
    assert narrow.item.tolist() == [[0, 0, -1, 1], [0, -1, -1, -1]]
    assert narrow.mask[0, 0].int().tolist() == [[1, 1, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [0, 0, 0, 1]]
    assert stream("tt|t").select(torch.tensor([[0]]), torch.tensor([[True]])).item is None


@pytest.mark.parametrize(
    ("item", "message"),
    [
        ([[0, 0, -1, 0, -1]], "item: an id stands in two places of a row; the tokens of one item stand together"),
        ([[-1, 0, 0, -1, -1]], "item: 0 of row 0, columns 1 to 2, is not inside one document"),
        ([[-1, -1, -1, 4, 4]], "item: 4 of row 0, columns 3 to 4, is not inside one document"),
        ([[-1, -1, -1, -1, 0]], "item: 0 of row 0, columns 4 to 4, is not inside one document"),
        ([[0, 0]], r"item: shape \(1, 2\); it must be that of modality, \(1, 5\)"),
    ],
)
def test_errors_of_items(item, message):
    modality, document = torch.tensor([[0, 1, 1, 1, -1]]), torch.tensor([[0, 0, 1, 1, -1]])
    with pytest.raises(ValueError, match=message):
        TokenContext.from_modality(modality, document, item=torch.tensor(item))


def test_replace_shares_what_was_derived_and_changes_the_rest():
    context = stream("tti|t.")
    other = context.replace(step=5, routing="causal", trace=Trace())
    assert other.mask is context.mask and other.order is context.order
    assert (other.step, other.routing) == (5, "causal")


@pytest.mark.parametrize(
    ("modality", "document", "message"),
    [
        ([0, 1], None, r"modality: shape \(2,\); it must be \(B, T\)"),
        ([[0, 3]], None, "modality: 3 is out of range; modalities are text, image"),
        ([[0, -1]], [[0, 0]], "modality and document disagree about padding"),
        ([[0, 1]], [[0, -1]], "modality and document disagree about padding"),
        ([[0, 1, 0]], [[0, 1, 0]], "document: an id stands in two places of a row"),
        ([[0, -1, 0]], None, "document: an id stands in two places of a row"),
    ],
)
def test_errors(modality, document, message):
    with pytest.raises(ValueError, match=message):
        TokenContext.from_modality(torch.tensor(modality), None if document is None else torch.tensor(document))
