"""Packing: every token once per epoch, no image cut, an order that is a pure function of its arguments."""

import time

import numpy as np
import pytest

from pretrain.data.documents import Documents
from pretrain.data.index import ShardTokens
from pretrain.data.packing import TokenStream, cut, fill
from pretrain.data.strings import Strings
from zoo.modalities import Vocabulary

VOCABULARY = Vocabulary({"text": 100_000, "image": 50})
IMAGE = 6  # tokens of an image with its begin and end


def make_documents(lengths: list[list[int]], shards: int = 1) -> Documents:
    """Documents of parts: a length is text, -1 an image. Every text token occurs once, so it is its own name."""
    text, begin, end = VOCABULARY.range("text")[0], VOCABULARY.begin("image"), VOCABULARY.end("image")
    made = []
    for share in np.array_split(np.arange(len(lengths)), shards):
        tokens, starts, spans = [], [0], []
        for document in share.tolist():
            tokens.append(VOCABULARY.bos)
            for part in lengths[document]:
                if part < 0:
                    spans.append((len(tokens), len(tokens) + IMAGE))
                    tokens += [begin, *(VOCABULARY.range("image")[0] + np.arange(IMAGE - 2)).tolist(), end]
                else:
                    tokens += range(text, text + part)
                    text += part
            tokens.append(VOCABULARY.eos)
            starts.append(len(tokens))
        keys = Strings.pack(str(document) for document in share.tolist())
        spans = np.array(spans, np.int64).reshape(-1, 2)
        kinds, text_bytes = np.ones(len(spans), np.int8), np.zeros(len(keys), np.int64)
        made.append(ShardTokens(np.array(tokens, np.int32), keys, np.array(starts), text_bytes, spans, kinds, []))
    return Documents.join(made, VOCABULARY)


def random_documents(count: int = 200, seed: int = 0, shards: int = 3) -> Documents:
    random = np.random.RandomState(seed)
    parts = [
        [-1 if random.rand() < 0.5 else int(random.randint(0, 30)) for _ in range(random.randint(1, 9))]
        for _ in range(count)
    ]
    return make_documents(parts, shards)


def whole(documents: Documents) -> np.ndarray:
    return np.concatenate(documents.shards)


# ------------------------------------------------------------------------------------------------------------ cut


@pytest.mark.parametrize("length", [IMAGE, IMAGE + 1, 17, 64, 10_000])
def test_pieces_partition_the_documents_and_cut_no_image(length):
    documents = random_documents()
    pieces = cut(documents.starts, documents.spans, length)
    stops = pieces.starts + pieces.lengths
    assert pieces.starts[0] == 0 and stops[-1] == documents.total
    assert np.array_equal(stops[:-1], pieces.starts[1:])
    assert pieces.lengths.min() >= 1 and pieces.lengths.max() <= length
    assert np.isin(documents.starts[:-1], pieces.starts).all()  # no piece holds two documents
    for edge in pieces.starts:
        assert not ((documents.spans[:, 0] < edge) & (edge < documents.spans[:, 1])).any()


def test_cut_fills_pieces_up_to_the_image():
    documents = make_documents([[5, -1, 5]])  # 18 tokens: bos, 5, image of 6 at 6..12, 5, eos
    assert cut(documents.starts, documents.spans, 10).lengths.tolist() == [6, 10, 2]
    assert cut(documents.starts, documents.spans, 12).lengths.tolist() == [12, 6]
    assert cut(documents.starts, documents.spans, 18).lengths.tolist() == [18]


# ----------------------------------------------------------------------------------------------------------- fill


def test_fill_is_best_fit():
    assert fill(np.array([6, 5, 4, 5, 3, 1]), 10).tolist() == [0, 1, 0, 1, 2, 2]
    assert fill(np.array([7, 6, 3, 4]), 10).tolist() == [0, 1, 0, 1]  # the fullest row that has room


def test_fill_matches_a_search_over_all_rows():
    random = np.random.RandomState(0)
    lengths = random.randint(1, 65, 500)
    rows, room = fill(lengths, 64), []
    for length, row in zip(lengths, rows, strict=True):
        fitting = [r for r in room if r >= length]
        if fitting:
            assert room[row] == min(fitting)
        else:
            assert row == len(room)
            room.append(64)
        room[row] -= length


# --------------------------------------------------------------------------------------------------------- stream


def epoch_pieces(stream: TokenStream, epoch: int) -> list[list[int]]:
    first = epoch * stream.rows_per_epoch
    return [stream.pieces_of_row(number).tolist() for number in range(first, first + stream.rows_per_epoch)]


@pytest.mark.parametrize("seed", [None, 0, 2**40 + 1])
@pytest.mark.parametrize("length", [16, 50, 400])
def test_every_piece_once_per_epoch_in_rows_that_hold_it(seed, length):
    stream = TokenStream(random_documents(), length, seed)
    for epoch in (0, 1, 7):
        rows = epoch_pieces(stream, epoch)
        assert sorted(sum(rows, [])) == list(range(len(stream.pieces.lengths)))
        assert all(0 < sum(stream.pieces.lengths[row]) <= length for row in rows)
    padding = 1 - stream.documents.total / (len(rows) * length)
    assert stream.share_of_padding == pytest.approx(padding)


def test_row_is_its_pieces_one_after_the_other():
    stream = TokenStream(random_documents(), 40, 3)
    tokens = whole(stream.documents)
    for number in range(3 * stream.rows_per_epoch):
        row = stream.row(number)
        stop = 0
        for order, piece in enumerate(stream.pieces_of_row(number)):
            start, size = stream.pieces.starts[piece], stream.pieces.lengths[piece]
            place = slice(stop, stop + size)
            stop += size
            assert np.array_equal(row.tokens[place], tokens[start : start + size])
            assert np.array_equal(row.modality[place], VOCABULARY.modality_of(tokens[start : start + size]))
            assert np.array_equal(row.position[place], np.arange(size))
            assert (row.document[place] == order).all()
        padding = stream.padding_row()
        for name in ("tokens", "modality", "position", "document"):
            values, expected = getattr(row, name), getattr(padding, name)
            assert values.dtype == expected.dtype and values.shape == expected.shape == (40,)
            assert np.array_equal(values[stop:], expected[stop:])


def test_order_is_a_pure_function_of_seed_and_epoch():
    documents = random_documents()
    first, second = TokenStream(documents, 50, 5), TokenStream(documents, 50, 5)
    second.row(6 * second.rows_per_epoch)  # a stream that began elsewhere
    assert epoch_pieces(first, 3) == epoch_pieces(second, 3)
    assert epoch_pieces(first, 3) != epoch_pieces(first, 4)
    assert epoch_pieces(first, 3) != epoch_pieces(TokenStream(documents, 50, 6), 3)


def test_order_does_not_depend_on_the_cut_into_shards():
    one, three = (TokenStream(random_documents(shards=n), 50, 5) for n in (1, 3))
    for number in range(0, 2 * one.rows_per_epoch, 7):
        assert np.array_equal(one.row(number).tokens, three.row(number).tokens)


def test_without_a_seed_documents_keep_their_order():
    stream = TokenStream(make_documents([[4]] * 8), 20, None)  # 6 tokens each, three a row
    assert epoch_pieces(stream, 0) == epoch_pieces(stream, 1) == [[0, 1, 2], [3, 4, 5], [6, 7]]


def test_shuffling_mixes_neighbours_and_positions():
    stream = TokenStream(make_documents([[4]] * 3000), 60, 0)
    orders = [np.array(sum(epoch_pieces(stream, epoch), [])) for epoch in range(2)]
    for order in orders:
        assert abs(np.corrcoef(order, np.arange(3000))[0, 1]) < 0.1
    assert abs(np.corrcoef(*orders)[0, 1]) < 0.1
    together = [{frozenset(row) for row in epoch_pieces(stream, epoch)} for epoch in range(2)]
    assert not together[0] & together[1]  # other documents share a row in another epoch


def test_padding_is_small_and_planning_is_fast():
    random = np.random.RandomState(0)
    lengths = np.minimum(random.lognormal(5, 1, 100_000).astype(np.int64) + 1, 4000)
    starts = np.concatenate([[0], np.cumsum(lengths)])
    documents = Documents(
        VOCABULARY,
        starts,
        np.zeros(len(lengths), np.int64),
        np.zeros((0, 2), np.int64),
        [np.zeros(starts[-1], np.int32)],
        starts[[0, -1]],
        np.zeros(len(lengths), np.str_),
    )
    begin = time.perf_counter()
    stream = TokenStream(documents, 1024, 0)
    stream.row(0)
    assert time.perf_counter() - begin < 5
    assert stream.share_of_padding < 0.02


def test_bytes_of_cut_documents_add_up():
    """A piece has the share of its text tokens; all pieces together have all bytes."""
    begin, end = VOCABULARY.begin("image"), VOCABULARY.end("image")
    image = [begin, *[VOCABULARY.range("image")[0]] * 4, end]
    text = VOCABULARY.range("text")[0]
    tokens = np.array([0, text, text, text, *image, text, 1, 0, text, 1], np.int32)
    spans = np.array([[4, 10]], np.int64)
    keys = Strings.pack(["long", "short"])
    shard = ShardTokens(tokens, keys, np.array([0, 12, 15]), np.array([80, 7]), spans, np.ones(1, np.int8), [])
    stream = TokenStream(Documents.join([shard], VOCABULARY), 8, None)
    assert stream.pieces.lengths.tolist() == [4, 8, 3]
    shares = [stream.text_bytes(range(row, row + 1)) for row in range(stream.rows_per_epoch)]
    assert sorted(shares) == [20.0, 67.0] and stream.text_bytes(range(stream.rows_per_epoch)) == 87.0


def test_negative_rows_are_refused():
    with pytest.raises(ValueError, match="row -1: rows are numbered from 0"):
        TokenStream(random_documents(), 40, 0).row(-1)
