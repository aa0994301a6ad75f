"""How items stand in the stream, and that generation follows it."""

from __future__ import annotations

import numpy as np

from zoo.modalities import Choice, Piece, Positions, grammars, parse_modalities, vocabulary

PICTURE = {"image_size": 4, "patch": 2}
IDS = parse_modalities({"text": {"type": "bytes"}, "image": {"type": "patches", "codes": 5, **PICTURE}})
VECTORS = parse_modalities({"text": {"type": "bytes"}, "image": {"type": "continuous_patches", **PICTURE}})


def test_text_has_no_markers_and_any_number_of_positions():
    text = grammars(IDS)["text"]
    assert (text.begin, text.end, text.positions, text.choice) == (None, None, None, Choice(4, 260, 0))
    assert text.tokens([0, 255]).tolist() == [4, 259] and text.tokens([]).tolist() == []


def test_an_image_stands_between_its_markers():
    image, words = grammars(IDS)["image"], vocabulary(IDS)
    assert image.positions == Positions(4, 4)
    tokens = image.tokens(np.array([0, 4, 2, 0]))
    assert (
        tokens.tolist() == [words.begin("image"), 260, 264, 262, 260, words.end("image")] and tokens.dtype == np.int32
    )
    assert image.choice == Choice(260, 265, 1)
    held = grammars(VECTORS)["image"]
    assert held.tokens(np.zeros((4, 12))).tolist() == [2, 260, 260, 260, 260, 3], "one id holds the places"
    piece = held.piece(np.zeros((4, 12), np.float32))
    assert piece.tokens.tolist() == [2, 260, 260, 260, 260, 3] and piece.modality.tolist() == [0, 1, 1, 1, 1, 0]
    assert piece.content["image"].shape == (4, 12) and set(piece.item.tolist()) == {-1}


def test_pieces_are_joined_in_order():
    section = parse_modalities({"text": {"type": "bytes"}, "image": {"type": "continuous_patches", **PICTURE}})
    section["image"] = section["image"].model_copy(update={"mask": "bidirectional"})
    image = grammars(section)["image"]
    one, two = (image.places(np.full((2, 12), n, np.float32)) for n in (1, 2))
    whole = Piece.join([Piece.of([0], 0), one, two, Piece.of([7], 0)])
    assert whole.tokens.tolist() == [0, 260, 260, 260, 260, 7] and whole.item.tolist() == [-1, 0, 0, 1, 1, -1]
    assert whole.content["image"][:, 0].tolist() == [1, 1, 2, 2]
