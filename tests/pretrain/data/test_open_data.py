"""From shards to streams: tokens of documents, broken documents, the cache, several processes at once."""

import dataclasses
import json
import os
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from pretrain.data import DataConfig, DataError, open_data
from pretrain.data.cache import HIDDEN
from tests.pretrain import forked
from tests.pretrain.data.samples import IMAGE, TEXT, documents, keys, png, sample, write_shard
from zoo.config import ConfigError, UserError
from zoo.modalities import Bytes, parse_modalities

MODALITIES = {"text": TEXT, "image": IMAGE}


def quiet(line: str) -> None:
    pass


def opened(config: DataConfig, modalities=MODALITIES, log=quiet, **changes):
    return open_data(config.model_copy(update=changes), parse_modalities(modalities), seed=0, log=log)


def document(data, number: int) -> np.ndarray:
    return documents(data).document(number)


# ---------------------------------------------------------------------------------------------------------- config


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"sequence_length": 0}, r"^data.sequence_length: 0: must be greater than 0"),
        ({"sequence_lenght": 9}, r"^data.sequence_lenght: unknown key; .*did you mean 'sequence_length'"),
    ],
)
def test_config_errors_name_key_value_and_way_out(changes, message):
    with pytest.raises(ConfigError, match=message):
        DataConfig.parse({"path": "x", "sequence_length": 8} | changes, "data")


def test_an_item_must_fit_into_a_row(config):
    message = (
        r"^data.sequence_length: 7: is too short for one image: 4 positions, .* need 8 tokens; set"
        r" data.sequence_length "
        r"to at least 8, or in modalities.image make patch larger or image_size smaller"
    )
    with pytest.raises(ConfigError, match=message):
        opened(config, sequence_length=7)
    with pytest.raises(ConfigError, match=r"^data.sequence_length: 1: is too short for <bos> and <eos>"):
        opened(config, {"text": TEXT}, sequence_length=1)


# ------------------------------------------------------------------------------------------------ tokens of a document


def test_tokens_of_a_document(config):
    data = opened(config)
    words = data.vocabulary
    text, image = words.range("text")[0], words.range("image")[0]
    for number in range(10):
        picture = np.random.RandomState(number).randint(0, 256, (8, 8)).astype(np.uint8)
        expected = [
            words.bos,
            *(text + np.array(data.modalities["text"].encode(f"text {number}"))),
            words.begin("image"),
            *(image + data.modalities["image"].encode(picture)),
            words.end("image"),
            *(text + np.array(data.modalities["text"].encode("after"))),
            words.eos,
        ]
        assert document(data, number).tolist() == expected
    assert keys(data) == [f"{n:03d}" for n in range(10)]
    assert len(documents(data, "validation")) == 2


def test_trained_on_the_training_shards_only(config, folder):
    first = opened(config)
    write_shard(folder / "a-val-0.tar", [sample("000", png(99), "something else")])
    assert opened(config).modalities["image"].fingerprint == first.modalities["image"].fingerprint
    write_shard(folder / "a-train-1.tar", [sample("100", png(98), "something else")])
    assert opened(config).modalities["image"].fingerprint != first.modalities["image"].fingerprint


def test_text_alone_and_no_validation(config, folder):
    write_shard(folder / "b-train-0.tar", [sample("000", "ab"), sample("001", "")])
    data = opened(config, {"text": TEXT}, train="b-train*.tar", validation=None)
    assert document(data, 0).tolist() == [0, 2 + ord("a"), 2 + ord("b"), 1]
    assert document(data, 1).tolist() == [0, 1]
    assert data.validation is None and list(data.modalities) == ["text"]
    with pytest.raises(ValueError, match="the data has no validation split"):
        data.unigram_entropy("validation")


def test_fingerprint_follows_content_and_tokenizers(config, folder):
    first = opened(config)
    assert opened(config, sequence_length=64).fingerprint == first.fingerprint
    assert opened(config, {"text": TEXT, "image": IMAGE | {"codes": 5}}).fingerprint != first.fingerprint
    write_shard(folder / "a-train-0.tar", [sample("000", png(0), "x")])
    assert opened(config).fingerprint != first.fingerprint


def test_splits_must_not_share_a_shard(config):
    with pytest.raises(DataError, match=r"^data.validation: '\*.tar' and data.train: .* both match a-train-0.tar"):
        opened(config, validation="*.tar")


@pytest.mark.parametrize("key", ["train", "validation"])
def test_missing_shards_name_the_key(config, key):
    with pytest.raises(DataError, match=rf"^data.{key}: no shard in .* matches 'z\*'; it holds a-train-0.tar, a-val"):
        opened(config, **{key: "z*"})


def test_missing_tokenizer_file(config):
    image = IMAGE | {"path": "nowhere.safetensors"}
    with pytest.raises(UserError, match="image codebook nowhere.safetensors does not exist"):
        opened(config, {"text": TEXT, "image": image})


# -------------------------------------------------------------------------------------------------- broken documents


def with_parts(key: str, parts: str, **files: bytes) -> dict[str, bytes]:
    """A document whose JSON holds `parts` as written."""
    return {"__key__": key, "json": f'{{"parts": {parts}}}'.encode(), **files}


BROKEN = [
    (with_parts("json", "[{"), "its JSON is not"),
    ({"__key__": "list", "json": b"[1]"}, "its JSON is not"),
    (with_parts("empty", "[]"), "is not a list with an entry"),
    (with_parts("kind", '[{"type": "film"}]'), "part 0 has type 'film'; known: text, image, audio, video"),
    (with_parts("text", '[{"type": "text"}]'), 'text part 0 has no string "text"'),
    (with_parts("surrogate", r'[{"type": "text", "text": "\ud800"}]'), "is not valid Unicode"),
    (with_parts("nameless", '[{"type": "image"}]'), 'names no "file"'),
    (with_parts("missing", '[{"type": "image", "file": "7.png"}]'), "missing.7.png is missing"),
    (sample("picture", b"no picture"), "0.png does not decode"),
    (sample("half", png(0, side=64)[:2000]), "0.png does not decode"),
    (
        with_parts("speech", '[{"type": "audio", "file": "0.wav"}]', **{"0.wav": b"RIFF"}),
        "it has audio, for which the recipe has no modality",
    ),
    ({"__key__": "bare", "0.png": png(0)}, "its file bare.json is missing"),
]
KEYS = [document["__key__"] for document, _ in BROKEN]


def test_broken_documents_are_skipped_counted_and_named(config, folder):
    whole = opened(config)
    write_shard(folder / "b-train-0.tar", [broken for broken, _ in BROKEN])
    # The shard joins the training set, so the codebook is fitted anew, on the same pictures.
    lines = []
    data = opened(config, log=lines.append, max_broken_documents=len(BROKEN))
    assert [(s.shard, s.key) for s in data.skipped] == [("b-train-0.tar", key) for key in KEYS]
    for skipped, (_, reason) in zip(data.skipped, BROKEN, strict=True):
        assert reason in skipped.reason
    assert [document(data, n).size for n in range(10)] == [document(whole, n).size for n in range(10)]
    assert len(documents(data)) == 10
    assert any(line.startswith(f"skipping {len(BROKEN)} broken documents:") for line in lines)


def test_an_item_that_a_modality_cannot_encode_is_named_with_the_line_that_raised(config, monkeypatch):
    def encode(self: Bytes, item: str) -> np.ndarray:
        return np.array([{"text 3": [0], "text 5": [1]}.get(item, item == "text 7" and 1 / 0 or [2])]).reshape(-1)

    monkeypatch.setattr(Bytes, "encode", encode)
    data = opened(config, max_broken_documents=1)
    assert [skipped.key for skipped in data.skipped] == ["007"]
    assert data.skipped[0].reason.startswith(
        f"modalities.text cannot encode its text (ZeroDivisionError: division by zero, in {__file__} line "
    )


def test_too_many_broken_documents_is_one_error_from_the_cache_too(config, folder):
    write_shard(folder / "b-train-0.tar", [broken for broken, _ in BROKEN])
    message = (
        rf"(?s)^data.max_broken_documents: 11: {len(BROKEN)} documents cannot be used; repair them or set it to at "
        rf"least {len(BROKEN)}:\n  b-train-0.tar: json: its JSON is not.* and {len(BROKEN) - 5} more$"
    )
    for _ in range(2):
        with pytest.raises(DataError, match=message):
            opened(config, max_broken_documents=len(BROKEN) - 1)


def test_nothing_usable(config, folder):
    write_shard(folder / "a-val-0.tar", [BROKEN[0][0]])
    with pytest.raises(DataError, match="^data.validation: none of the documents can be used"):
        opened(config, max_broken_documents=1)


def test_damage_is_reported_through_open_data(config, folder):
    with open(folder / "a-train-0.tar", "r+b") as file:
        file.truncate(3000)
    with pytest.raises(DataError, match=r"a-train-0.tar: the shard is truncated, it ends at byte 3000"):
        opened(config)


# ----------------------------------------------------------------------------------------------------------- cache


def test_second_opening_reads_the_cache(config, monkeypatch):
    first = opened(config)
    monkeypatch.setattr("pretrain.data.index.tokenize", None)
    monkeypatch.setattr("pretrain.data.sources.DocumentShards.open", None)
    second = opened(config)
    assert second.fingerprint == first.fingerprint
    assert np.array_equal(second.train.row(3).tokens, first.train.row(3).tokens)


def test_a_changed_shard_is_indexed_again_and_an_unchanged_copy_is_not(config, folder, monkeypatch):
    first = opened(config)
    shard = folder / "a-train-0.tar"
    os.utime(shard, ns=(0, 0))
    monkeypatch.setattr("pretrain.data.index.tokenize", None)
    assert opened(config).fingerprint == first.fingerprint  # listed again, same content
    monkeypatch.undo()
    write_shard(shard, [sample("new", "x", png(0))])
    assert keys(opened(config)) == ["new"]


@pytest.mark.parametrize("pattern", ["*.listing.npz", "record.json", "starts", "tokens", "*.items"])
def test_damaged_cache_is_made_again(config, folder, pattern):
    tokens = opened(config).train.row(1).tokens
    for file in (folder / HIDDEN).rglob(pattern):
        file.write_bytes(file.read_bytes()[:150])
    assert np.array_equal(opened(config).train.row(1).tokens, tokens)


def test_read_only_folder_caches_under_the_user(config, folder, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user"))
    before = sorted(folder.iterdir())
    (folder / HIDDEN).touch()  # no folder can be made here, not even by root
    data = opened(config)
    (folder / HIDDEN).unlink()
    assert sorted(folder.iterdir()) == before
    (place,) = (tmp_path / "user" / "pretrain-data").iterdir()
    assert len(list(place.glob("*.tokens"))) == 2
    assert np.array_equal(data.train.row(0).tokens, opened(config).train.row(0).tokens)


def test_cache_can_be_chosen_and_must_be_writable(config, folder, tmp_path):
    opened(config, cache=str(tmp_path / "chosen"))
    assert (tmp_path / "chosen").is_dir() and not (folder / HIDDEN).exists()
    (tmp_path / "file").touch()
    with pytest.raises(
        DataError, match="^data.cache: no folder to keep the index in .*; set data.cache to a writable one"
    ):
        opened(config, cache=str(tmp_path / "file" / "below"))


def open_and_tell(digits: Path, cache: Path, said: Path) -> None:
    """Open the digits with a cache, and write down what was opened and what was logged."""
    lines: list[str] = []
    config = DataConfig.parse({"path": str(digits), "sequence_length": 64, "cache": str(cache)}, "data")
    modalities = parse_modalities(MODALITIES | {"image": IMAGE | {"patch": 2, "codes": 64}})
    data = open_data(config, modalities, seed=0, log=lines.append)
    said.write_text(json.dumps([data.fingerprint, data.train.row(5).tokens.tolist(), lines]))


def test_two_processes_at_once_build_once(digits, tmp_path):
    said = [tmp_path / "first", tmp_path / "second"]
    processes = [
        forked.start(open_and_tell, (digits, tmp_path / "cache", file), os.environ, tmp_path / "printed")
        for file in said
    ]
    assert [process.wait(60) for process in processes] == [0, 0], (tmp_path / "printed").read_text()
    first, second = (json.loads(file.read_text()) for file in said)
    assert first[:2] == second[:2]
    assert sum(line.startswith("indexing") for line in first[2] + second[2]) == 1
    shutil.rmtree(tmp_path / "cache")


# ---------------------------------------------------------------------------------------------------------- entropy


@pytest.mark.parametrize("length", [8, 12, 200])
def test_unigram_entropy_against_a_direct_count(config, length):
    data = opened(config, sequence_length=length)
    for split, stream in (("train", data.train), ("validation", data.validation)):
        counts: dict[int, Counter] = {0: Counter(), 1: Counter()}
        for number in range(stream.rows_per_epoch):
            row = stream.row(number)
            for t in range(1, length):
                if row.document[t] >= 0 and row.document[t] == row.document[t - 1]:
                    counts[int(row.modality[t])][int(row.tokens[t])] += 1
        for number, modality in enumerate(data.vocabulary.modalities):
            share = np.array(list(counts[number].values())) / counts[number].total()
            assert data.unigram_entropy(split)[modality] == pytest.approx(-(share * np.log(share)).sum(), abs=1e-12)


def test_data_is_immutable(config):
    with pytest.raises(dataclasses.FrozenInstanceError):
        opened(config).train = None
