"""Several sources: one alone is its own stream, shares are kept everywhere, and the row at a position is arithmetic."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from pretrain import recipe as recipes
from pretrain.data import (
    Data,
    DataConfig,
    DataError,
    Documents,
    Mixture,
    TokenStream,
    micro_batches,
    open_data,
    tokens_by_rank,
)
from pretrain.data.index import OpenShards
from pretrain.data.mixture import BLOCK, apportion
from pretrain.data.ratio import deal, imbalance, weights_for
from pretrain.process_group import Ranks
from tests.pretrain.data.samples import IMAGE, TEXT, documents, png, sample, write_shard
from zoo.config import ConfigError
from zoo.modalities import parse_modalities

LENGTH = 32
SOURCES = {
    "words": {"type": "documents", "path": "words", "files": "*train*.tar", "validation": "*val*.tar"},
    "pictures": {"type": "documents", "path": "pictures", "weight": 3, "validation": 0.25},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two sources: words alone, in a training and a validation shard, and pictures with a word, in two shards."""
    root = tmp_path_factory.mktemp("sources")
    (root / "words").mkdir()
    (root / "pictures").mkdir()
    for split, count in (("train", 30), ("val", 4)):
        made = [sample(f"w{n:02}", f"{split} {'word ' * (n % 4)}{n}") for n in range(count)]
        write_shard(root / "words" / f"{split}.tar", made)
    for shard in range(2):
        made = [sample(f"p{shard}{n:02}", png(100 * shard + n), png(n), f"{n}") for n in range(20)]
        write_shard(root / "pictures" / f"{shard}.tar", made)
    return root


def opened(folder: Path, lines: list[str] | None = None, **changes) -> Data:
    keys = {"path": str(folder), "sources": SOURCES, "sequence_length": LENGTH}
    log = (lambda line: None) if lines is None else lines.append
    modalities = parse_modalities({"text": TEXT, "image": IMAGE | {"path": None}})
    return open_data(DataConfig.parse(keys | changes, "data"), modalities, seed=3, log=log)


def names(found: Documents) -> list[str]:
    """The keys of documents."""
    assert isinstance(found.shards, OpenShards)
    return found.shards.keys()


def source_of(mixture: Mixture, rows: range) -> list[int]:
    names = list(mixture.streams.values())
    return [names.index(mixture.place(row)[0]) for row in rows]


# ----------------------------------------------------------------------------------------------------------- one source


def test_one_source_is_its_own_stream(folder: Path) -> None:
    """The short form, one source of any weight, and the stream itself give the same rows, and are the same data."""
    one = {"only": {"type": "documents", "path": str(folder / "pictures"), "weight": 7.0}}
    short = opened(folder, path=str(folder / "pictures"), sources={}, train="*.tar", validation=None)
    long = opened(folder, sources=one, path=None)
    stream = TokenStream(documents(short), LENGTH, 3)
    assert short.train.rows_per_epoch == long.train.rows_per_epoch == stream.rows_per_epoch
    for row in range(3 * stream.rows_per_epoch):
        assert np.array_equal(short.train.row(row).tokens, stream.row(row).tokens)
        assert np.array_equal(long.train.row(row).tokens, stream.row(row).tokens)
    assert short.fingerprint == long.fingerprint


# -------------------------------------------------------------------------------------------------------------- shares


@pytest.mark.parametrize("weights", [[1, 1], [3, 1, 0.1], [1e-4, 1]])
def test_every_stretch_has_the_shares(folder: Path, weights: list[float]) -> None:
    """In a block to the row, in any stretch to three; rows of a source come in order and none is left out."""
    stream = next(iter(opened(folder).train.streams.values()))
    streams = {f"s{n}": TokenStream(stream.documents, LENGTH, n) for n in range(len(weights))}
    mixture = Mixture(streams, dict(zip(streams, weights, strict=True)), 5)
    rows = range(BLOCK - 3000, BLOCK + 3000)
    sources = np.array(source_of(mixture, rows))
    for source, name in enumerate(streams):
        share = weights[source] / sum(weights)
        assert mixture.shares[name] == pytest.approx(share, abs=1 / BLOCK)
        for length in (8, 100, 2000):
            counts = np.convolve(sources == source, np.ones(length), "valid")
            assert abs(counts - share * length).max() <= 3 + length / BLOCK
        taken = [mixture.place(row)[1] for row, one in zip(rows, sources.tolist(), strict=True) if one == source]
        first = mixture.rows_before(rows[0])[name]
        assert taken == list(range(first, first + len(taken)))
    assert mixture.rows_before(BLOCK) == dict(zip(streams, mixture.rows_per_block.tolist(), strict=True))


def test_apportioned_seats_add_up() -> None:
    assert apportion([1, 1, 1], 10).tolist() == [4, 3, 3] and apportion([0.5, 99.5], 100).tolist() == [1, 99]
    assert apportion([2, 6], 8).tolist() == [2, 6]


def test_a_weight_that_no_block_can_meet_is_refused(folder: Path) -> None:
    sources = SOURCES | {"words": SOURCES["words"] | {"weight": 1e-7}}
    with pytest.raises(DataError, match=r"^data.sources.words.weight: 1e-07: is less than one row of 65,536; raise it"):
        opened(folder, sources=sources)


# -------------------------------------------------------------------------------------------------- a function of rows


def step_tokens(data: Data, first: int, world: int, balanced: bool = False) -> torch.Tensor:
    batches = [
        batch
        for rank in range(world)
        for batch in micro_batches(
            data.train, range(first, first + 24), 3, Ranks(rank, world), step=1, seed=3, balanced=balanced
        )
    ]
    return torch.cat([torch.cat([batch.tokens, batch.context.key], 1) for batch in batches])


@pytest.mark.parametrize("balanced", [False, True])
def test_ranks_and_places_of_resuming_change_nothing(folder: Path, balanced: bool) -> None:
    one = opened(folder)
    again = opened(folder)  # a process that begins in the middle
    for first in (0, 24, BLOCK - 7):
        reference = step_tokens(one, first, 1, balanced)
        for world in (2, 4, 8):
            assert torch.equal(step_tokens(again, first, world, balanced), reference)
    assert not torch.equal(step_tokens(one, 0, 1), step_tokens(one, 24, 1))


def test_epochs_are_counted_by_source(folder: Path) -> None:
    mixture = opened(folder).train
    before = mixture.rows_before(1000)
    assert sum(before.values()) == 1000 and before["pictures"] == pytest.approx(750, abs=2)
    assert mixture.epochs(1000)["words"] == before["words"] / mixture.streams["words"].rows_per_epoch
    places = [mixture.place(row) for row in range(mixture.rows_per_epoch + 1)]
    assert all(row < stream.rows_per_epoch for stream, row in places[:-1])
    assert places[-1][1] == places[-1][0].rows_per_epoch  # the first row that comes again


# ----------------------------------------------------------------------------------------------------- what is held out


def test_a_share_is_held_out_by_hash(folder: Path) -> None:
    """Every document is in one split, whatever shard it lies in; without a share all are in training."""
    data, whole = (
        opened(folder),
        opened(folder, sources=SOURCES | {"pictures": SOURCES["pictures"] | {"validation": None}}),
    )
    assert data.validation is not None and whole.validation is not None
    train, held_out, everything = (
        names(mixture.streams["pictures"].documents) for mixture in (data.train, data.validation, whole.train)
    )
    assert sorted(train + held_out) == everything and len(everything) == 40
    assert 2 <= len(held_out) <= 20 and list(whole.validation.streams) == ["words"]
    assert data.fingerprint != whole.fingerprint


def test_what_is_held_out_is_not_learned_from(folder: Path) -> None:
    data, whole = (
        opened(folder),
        opened(folder, sources=SOURCES | {"pictures": SOURCES["pictures"] | {"validation": None}}),
    )
    assert data.modalities["image"].fingerprint != whole.modalities["image"].fingerprint


# ------------------------------------------------------------------------------------------------------ ratio of tokens


def test_weights_move_until_tokens_have_the_ratio(folder: Path) -> None:
    data = opened(folder, token_ratio={"text": 1, "image": 1})
    mixture = data.train
    assert data.balanced
    totals = sum(mixture.counts(row) for row in range(0, BLOCK, 16))
    assert totals[1] / totals.sum() == pytest.approx(0.5, abs=0.01)
    plain = opened(folder)
    assert plain.train.shares != mixture.shares and plain.fingerprint != data.fingerprint


def test_a_ratio_that_is_there_moves_nothing(folder: Path) -> None:
    streams = opened(folder).train.streams
    rows = {name: np.array(list(s.documents.counts.values())) / s.rows_per_epoch for name, s in streams.items()}
    text, image = 0.25 * rows["words"] + 0.75 * rows["pictures"]
    found = weights_for({"text": text, "image": image}, {"words": 1.0, "pictures": 3.0}, streams)
    assert found == pytest.approx({"words": 0.25, "pictures": 0.75}, abs=1e-6)


def test_a_ratio_that_cannot_be_is_refused_with_what_there_is(folder: Path) -> None:
    with pytest.raises(
        DataError, match=r"^data.token_ratio: .*no weights of these sources give it \(words 100.0% text"
    ):
        opened(folder, token_ratio={"text": 1, "image": 9})
    with pytest.raises(
        DataError, match=r"^data.token_ratio.speech: is no modality of the recipe; they are text, image"
    ):
        opened(folder, token_ratio={"text": 1, "speech": 9})


def test_dealt_rows_make_ranks_alike(folder: Path) -> None:
    mixture, rows = opened(folder).train, range(240, 264)
    plain, dealt = (tokens_by_rank(mixture, rows, 3, 4, balanced) for balanced in (False, True))
    assert plain.sum(0).tolist() == dealt.sum(0).tolist()
    batches = micro_batches(mixture, rows, 3, Ranks(1, 4), balanced=True)
    assert sum(np.array(batch.context.totals) for batch in batches).tolist() == dealt[1].tolist()


@pytest.mark.parametrize("world", [2, 4, 16])
def test_a_deal_keeps_every_row_and_evens_out(world: int) -> None:
    random, found = np.random.default_rng(0), []
    for _ in range(20):
        image = random.integers(0, 4, 64) * 256
        counts = np.stack([1024 - image, image], 1)
        order = deal(counts, 16)
        assert order.shape == (16, 4) and sorted(order.reshape(-1).tolist()) == list(range(64))
        found.append([imbalance(each.reshape(world, -1, 2).sum(1)) for each in (counts, counts[order.reshape(-1)])])
    plain, dealt = np.mean(found, axis=0).tolist()
    assert dealt < 0.35 * plain, (plain, dealt)


# ------------------------------------------------------------------------------------------------- recipes and resuming


def test_lists_braces_and_folders_are_joined(folder: Path) -> None:
    several = {"type": "documents", "path": ["words/{train,val}.tar", str(folder / "pictures")]}
    data = opened(folder, sources={"all": several})
    assert len(documents(data)) == 30 + 4 + 40


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"path": None, "sources": {}}, "has neither path nor sources"),
        ({"sources": {"a b": SOURCES["words"]}}, "'a b' must be letters, digits"),
        ({"sources": {"w": SOURCES["words"] | {"weight": 0}}}, r"data.sources.w.weight: 0: must be greater than 0"),
        (
            {"sources": {"w": SOURCES["words"] | {"validation": 1.5}}},
            r"data.sources.w.validation: 1.5: must be a share",
        ),
        ({"sources": {"w": SOURCES["words"] | {"typ": "x"}}}, r"data.sources.w.typ: unknown key"),
    ],
)
def test_wrong_sources_are_named(folder: Path, changes: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        opened(folder, **changes)


def test_shards_that_are_missing_or_in_both_splits_are_named_with_their_source(folder: Path) -> None:
    with pytest.raises(DataError, match=r"^data.sources.words.path: .* leads to no file"):
        opened(folder, sources={"words": SOURCES["words"] | {"path": "nowhere"}})
    with pytest.raises(
        DataError, match=r"^data.sources.words.validation: '\*.tar' and data.sources.words.files: .*both"
    ):
        opened(folder, sources={"words": SOURCES["words"] | {"validation": "*.tar"}})


def test_places_of_sources_may_change_and_weights_may_not() -> None:
    def flat(**changes) -> dict:
        return {"data": {"sources": {"a": {"path": "x", "files": "*", "weight": 1.0} | changes}}}

    assert recipes.differences(flat(), flat(path="y", files="*.tar")) == []
    assert recipes.differences(flat(), flat(weight=2.0)) == ["data.sources.a.weight: 1.0 there, 2.0 here"]
