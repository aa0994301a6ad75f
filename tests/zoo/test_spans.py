"""Spans, by hand; `test_context.py` holds them against brute force."""

from __future__ import annotations

import torch

from zoo.spans import Spans


def test_boundaries_and_what_is_left_between_them():
    document = torch.tensor([[-1, 0, 0, 0, 1], [5, 5, 5, 7, 7]])
    item = torch.tensor([[-1, -1, 0, 0, -1], [-1, -1, -1, 3, 3]])
    spans = Spans.of(document, item)
    assert spans.documents == ((0, 1, 3), (0, 4, 1), (1, 0, 3), (1, 3, 2))
    assert spans.items == ((0, 2, 2), (1, 3, 2))
    assert spans.boundaries(5) == [0, 1, 4, 0, 4, 5, 5, 5, 8, 5, 8, 10, 0, 2, 4, 5, 8, 10]
    kept = [False, True, False, True, False, True, True, False, False, False]
    before = [sum(kept[:place]) for place in spans.boundaries(5)]
    assert spans.narrowed(before) == Spans(((0, 0, 2), (1, 0, 2)), ((0, 1, 1),))


def test_a_batch_of_no_tokens_has_no_spans():
    assert Spans.of(torch.empty(2, 0, dtype=torch.int64), None) == Spans((), ())
