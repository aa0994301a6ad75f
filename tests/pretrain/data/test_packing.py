"""Packing: every token once per epoch, no image cut, an order that is a pure function of its arguments."""

import time

import numpy as np
import pytest

from pretrain.data import plan, shuffle
from pretrain.data.documents import Documents
from pretrain.data.errors import DataError
from pretrain.data.items import Items, ShardTokens
from pretrain.data.packing import TokenStream
from pretrain.data.plan import BestFit, Pieces, cut
from pretrain.data.shuffle import Shuffle, shuffled
from zoo.modalities import Vocabulary
from zoo.noise import hash32, unhash32

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
        items = np.array(spans, np.int64).reshape(-1, 2).T + np.array([[1], [-1]])  # without their markers
        before = np.arange(items.shape[1]) * (IMAGE - 2)
        images = {"image": Items(np.stack([*items, before]))}
        made.append(ShardTokens(np.array(tokens, np.int32), np.array(starts), np.zeros(len(starts) - 1), images))
    return Documents.join(made, VOCABULARY)


def random_documents(count: int = 200, seed: int = 0, shards: int = 3) -> Documents:
    random = np.random.RandomState(seed)
    parts = [
        [-1 if random.rand() < 0.5 else int(random.randint(0, 30)) for _ in range(random.randint(1, 9))]
        for _ in range(count)
    ]
    return make_documents(parts, shards)


def whole(documents: Documents) -> np.ndarray:
    return np.concatenate([shard.tokens for shard in documents.shards])


def starts_and_spans(documents: Documents) -> tuple[np.ndarray, np.ndarray]:
    """First tokens of the documents and the stretches that are never cut, of all shards."""
    (shard,) = documents.shards
    return shard.starts, shard.spans()


# ------------------------------------------------------------------------------------------------------------ cut


@pytest.mark.parametrize("length", [IMAGE, IMAGE + 1, 17, 64, 10_000])
def test_pieces_partition_the_documents_and_cut_no_image(length):
    documents = random_documents(shards=1)
    starts, spans = starts_and_spans(documents)
    first = cut(starts, spans, length)
    sizes = np.diff(first, append=documents.total)
    assert first[0] == 0 and sizes.min() >= 1 and sizes.max() <= length
    assert np.isin(starts[:-1], first).all()  # no piece holds two documents
    for edge in first:
        assert not ((spans[:, 0] < edge) & (edge < spans[:, 1])).any()


def test_cut_fills_pieces_up_to_the_image():
    documents = make_documents([[5, -1, 5]])  # 18 tokens: bos, 5, image of 6 at 6..12, 5, eos
    assert np.diff(cut(*starts_and_spans(documents), 10), append=18).tolist() == [6, 10, 2]
    assert np.diff(cut(*starts_and_spans(documents), 12), append=18).tolist() == [12, 6]
    assert np.diff(cut(*starts_and_spans(documents), 18), append=18).tolist() == [18]


# ----------------------------------------------------------------------------------------------------------- fill


def test_fill_is_best_fit():
    assert BestFit(10).place(np.array([6, 5, 4, 5, 3, 1])) == [0, 1, 0, 1, 2, 2]
    assert BestFit(10).place(np.array([7, 6, 3, 4])) == [0, 1, 0, 1]  # the fullest row that has room


def test_fill_matches_a_search_over_all_rows():
    random = np.random.RandomState(0)
    lengths = random.randint(1, 65, 500)
    filling, room = BestFit(64), []
    rows = filling.place(lengths[:200]) + filling.place(lengths[200:])
    for length, row in zip(lengths, rows, strict=True):
        fitting = [r for r in room if r >= length]
        if fitting:
            assert room[row] == min(fitting)
        else:
            assert row == len(room)
            room.append(64)
        room[row] -= length
    assert filling.rows == len(room)


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
        assert sorted(sum(rows, [])) == list(range(len(stream.plan.pieces)))
        assert all(0 < stream.plan.pieces.lengths(np.array(row)).sum() <= length for row in rows)
    padding = 1 - stream.documents.total / (len(rows) * length)
    assert stream.share_of_padding == pytest.approx(padding)


def test_row_is_its_pieces_one_after_the_other():
    stream = TokenStream(random_documents(), 40, 3)
    tokens = whole(stream.documents)
    for number in range(3 * stream.rows_per_epoch):
        row = stream.row(number)
        stop = 0
        for order, piece in enumerate(stream.pieces_of_row(number)):
            (start,), (size,) = (f(np.array([piece])) for f in (stream.plan.pieces.starts, stream.plan.pieces.lengths))
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
    documents = Documents.join([ShardTokens(np.zeros(starts[-1], np.int32), starts, lengths, {})], VOCABULARY)
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
    images = {"image": Items(np.array([[5], [9], [0]]))}
    shard = ShardTokens(tokens, np.array([0, 12, 15]), np.array([80, 7]), images)
    stream = TokenStream(Documents.join([shard], VOCABULARY), 8, None)
    assert stream.plan.pieces.lengths(slice(0, 3)).tolist() == [4, 8, 3]
    assert sorted(map(stream.text_bytes, range(stream.rows_per_epoch))) == [20.0, 67.0]


def test_negative_rows_are_refused():
    with pytest.raises(ValueError, match="row -1: rows are numbered from 0"):
        TokenStream(random_documents(), 40, 0).row(-1)


# ------------------------------------------------------------------------------------------------------------ at scale


def by_definition(stream: TokenStream, epoch: int) -> list[list[int]]:
    """The rows of an epoch by permutations of everything."""
    seed, count, rows = stream.plan.seed, len(stream.plan.pieces), stream.rows_per_epoch
    lengths = stream.plan.pieces.lengths(slice(0, count))
    order = np.arange(count) if seed is None else shuffled(count, seed, 0)
    row = np.empty(count, np.int64)
    row[order] = BestFit(stream.sequence_length).place(lengths[order])
    order = np.arange(count)
    if seed is not None:
        dealt, by_row, order = (shuffled(n, seed, 3 * epoch + k) for n, k in ((count, 1), (rows, 2), (count, 3)))
        places = np.argsort(lengths, kind="stable")
        pieces = dealt[np.argsort(lengths[dealt], kind="stable")]
        row[pieces] = by_row[row[places]]
    order = order[np.argsort(row[order], kind="stable")]
    return [each.tolist() for each in np.split(order, np.searchsorted(row[order], np.arange(1, rows)))]


@pytest.mark.parametrize("seed", [None, 3])
@pytest.mark.parametrize("chunk, in_memory", [(1 << 20, 1 << 20), (7, 1 << 20), (64, 0)])
def test_the_order_is_that_of_its_definition_however_it_is_computed(monkeypatch, tmp_path, seed, chunk, in_memory):
    monkeypatch.setattr(shuffle, "CHUNK", chunk)
    monkeypatch.setattr(plan, "IN_MEMORY", in_memory)
    stream = TokenStream(random_documents(), 40, seed, tmp_path)
    assert any(tmp_path.iterdir()) == (in_memory == 0)
    for epoch in (0, 1, 5):
        assert epoch_pieces(stream, epoch) == by_definition(stream, epoch)


def test_a_permutation_sorts_by_keys_that_lead_back():
    numbers = np.random.default_rng(0).integers(0, 1 << 32, 1000, dtype=np.uint64).astype(np.uint32)
    assert np.array_equal(unhash32(hash32(numbers)), numbers) and np.array_equal(hash32(unhash32(numbers)), numbers)
    order = Shuffle.of(2**40 + 1, 5)
    assert np.array_equal(order.numbers(order.keys(numbers)), numbers)
    expected = np.argsort(order.keys(np.arange(1000, dtype=np.uint32)), kind="stable")
    assert np.array_equal(shuffled(1000, 2**40 + 1, 5), expected)


def test_the_first_numbers_of_a_permutation_stay():
    assert shuffled(12, 7, 1).tolist() == [7, 2, 0, 6, 8, 11, 5, 3, 10, 4, 1, 9]


def test_pieces_beyond_four_thousand_million_tokens():
    edges = np.array([0, 5, 2**32 - 3, 2**32 + 4, 2**33 + 1, 3 * 2**32, 3 * 2**32 + 9])
    pieces = plan._pieces(lambda: iter([edges[:2], edges[2:]]), np.empty(len(edges), np.uint32))
    assert pieces.starts(slice(0, 6)).tolist() == edges[:-1].tolist()
    assert pieces.starts(np.array([4, 1])).tolist() == [2**33 + 1, 5]
    assert isinstance(pieces, Pieces) and pieces.lengths(np.array([1, 2, 5])).tolist() == [2**32 - 8, 7, 9]


def test_files_of_a_plan_are_shared_and_made_again_where_damaged(monkeypatch, tmp_path):
    monkeypatch.setattr(plan, "IN_MEMORY", 0)
    documents = random_documents()
    first = TokenStream(documents, 40, 3, tmp_path)
    rows = epoch_pieces(first, 2)
    monkeypatch.setattr(plan, "_made", None)  # another process of the machine makes nothing
    monkeypatch.setattr(plan.Plan, "_dealt", None)
    second = TokenStream(documents, 40, 3, tmp_path)
    assert epoch_pieces(second, 2) == rows and isinstance(second.plan.places.base, np.memmap)
    monkeypatch.undo()
    monkeypatch.setattr(plan, "IN_MEMORY", 0)
    (folder,) = tmp_path.glob("*.plan")
    for name in ("slots", "plan.json"):
        (folder / name).write_bytes(b"")
        assert epoch_pieces(TokenStream(documents, 40, 3, tmp_path), 2) == rows


def test_few_epochs_are_kept_in_files(monkeypatch, tmp_path):
    monkeypatch.setattr(plan, "IN_MEMORY", 0)
    stream = TokenStream(random_documents(), 40, 3, tmp_path)
    for epoch in range(plan.EPOCHS + 2):
        epoch_pieces(stream, epoch)
    assert len(list(tmp_path.glob("*.plan/epoch-*"))) == plan.EPOCHS


def test_counts_say_what_the_row_holds():
    stream = TokenStream(random_documents(), 40, 3)
    for number in range(stream.rows_per_epoch):
        modality = stream.row(number).modality
        assert stream.counts(number).tolist() == np.bincount(modality[modality >= 0], minlength=2).tolist()


def test_more_pieces_than_numbers_is_an_error(monkeypatch):
    monkeypatch.setattr(plan, "MOST", 100)
    with pytest.raises(DataError, match="pieces of documents; a source may have 99: divide it into several sources"):
        TokenStream(random_documents(), 40, 3)
