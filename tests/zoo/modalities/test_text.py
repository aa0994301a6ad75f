"""Bytes and byte-pair encoding: round trips, determinism, files, errors."""

import json
import random
import re
import subprocess
import sys

import numpy as np
import pytest
import tokenizers

from zoo.config import UserError
from zoo.modalities import BPE, Bytes, HuggingFace, Ids

TEXTS = [
    "the quick brown fox jumps over the lazy dog",
    "Ünïcödé 汉字 🙂\n\ttabs  and   spaces",
    "",
    "\x00\xff <bos> <eos>",
]


def test_text_round_trips():
    for tokenizer in (Bytes(Bytes.Config()), BPE.Config(vocab_size=300).fit(TEXTS)):
        for text in [*TEXTS, "never seen: żółw"]:
            ids = tokenizer.encode(text)
            assert ids.dtype == np.int32 and tokenizer.decode(ids) == text
            assert all(0 <= i < tokenizer.config.carries.size for i in ids)
            assert tokenizer.config.read(tokenizer.write(text)) == text


def test_bpe_shortens_frequent_text_and_keeps_its_size():
    config = BPE.Config(vocab_size=1000)
    tokenizer = config.fit(["seven " * 50])
    assert len(tokenizer.encode("seven seven")) <= 3
    assert config.carries == Ids(1000)  # although training found fewer


def test_bpe_is_a_function_of_its_texts_in_every_process():
    command = (
        "from zoo.modalities import BPE; import random; r = random.Random(0);"
        "print(BPE.Config(vocab_size=400).fit([''.join(r.choices('abcdef ', k=99)) for _ in range(99)]).fingerprint)"
    )
    other = subprocess.run([sys.executable, "-c", command], capture_output=True, text=True, check=True)
    r = random.Random(0)
    here = BPE.Config(vocab_size=400).fit(["".join(r.choices("abcdef ", k=99)) for _ in range(99)])
    assert other.stdout.strip() == here.fingerprint


def test_bpe_saves_and_loads(tmp_path):
    config = BPE.Config(vocab_size=300)
    tokenizer = config.fit(TEXTS)
    tokenizer.save(tmp_path / "text.json")
    loaded = config.load(tmp_path / "text.json")
    assert loaded.encode(TEXTS[0]).tolist() == tokenizer.encode(TEXTS[0]).tolist()
    assert loaded.fingerprint == tokenizer.fingerprint
    assert BPE.Config(vocab_size=301).load(tmp_path / "text.json").fingerprint != tokenizer.fingerprint
    with pytest.raises(UserError, match=r"uses ids up to 2\d\d, but vocab_size is 256; set vocab_size to"):
        BPE.Config(vocab_size=256).load(tmp_path / "text.json")
    with pytest.raises(UserError, match="nowhere.json does not exist"):
        config.load(tmp_path / "nowhere.json")
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(UserError, match="broken.json is not a tokenizer.json"):
        config.load(tmp_path / "broken.json")


def changed(tmp_path, **changes):
    """A saved tokenizer with other values in its file."""
    tokenizer = BPE.Config(vocab_size=300).fit(TEXTS)
    content = json.loads(tokenizer.inner.to_str())
    content["model"] |= changes.pop("model", {})
    (tmp_path / "text.json").write_text(json.dumps(content | changes))
    return tokenizer, BPE.Config(vocab_size=300).load(tmp_path / "text.json")


@pytest.mark.parametrize(
    "changes",
    [
        {"model": {"dropout": 0.5}},
        {"truncation": {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}},
        {
            "padding": {
                "strategy": {"Fixed": 99},
                "direction": "Right",
                "pad_to_multiple_of": None,
                "pad_id": 0,
                "pad_type_id": 0,
                "pad_token": "!",
            }
        },
    ],
    ids=["dropout", "truncation", "padding"],
)
def test_what_rides_in_a_file_does_not_change_ids(tmp_path, changes):
    tokenizer, loaded = changed(tmp_path, **changes)
    for _ in range(3):
        assert loaded.encode(TEXTS[0]).tolist() == tokenizer.encode(TEXTS[0]).tolist()
    assert loaded.fingerprint == tokenizer.fingerprint


def test_a_file_that_loses_characters_is_refused(tmp_path):
    inner = tokenizers.Tokenizer(tokenizers.models.BPE())
    inner.train_from_iterator(["abc"], tokenizers.trainers.BpeTrainer(vocab_size=300, show_progress=False))
    inner.save(str(tmp_path / "text.json"))
    with pytest.raises(UserError, match="text.json drops characters that it does not know, such as 'Ж語'"):
        BPE.Config(vocab_size=300).load(tmp_path / "text.json")


@pytest.mark.parametrize("alphabet", ["ACGT", [chr(0x4E00 + n) for n in range(3000)], " ", "a"])
def test_text_without_spaces_trains_in_bounded_time(alphabet, monkeypatch):
    text = "".join(random.Random(0).choices(alphabet, k=20_000))
    longest = []
    train = tokenizers.Tokenizer.train_from_iterator

    def watched(self, items, trainer):
        items = list(items)
        longest.append(max(len(word) for item in items for word in re.findall(r"\S+|\s+", item)))
        assert "".join(items) == text
        train(self, items, trainer)

    monkeypatch.setattr("zoo.modalities.text.tokenizers.Tokenizer.train_from_iterator", watched)
    tokenizer = BPE.Config(vocab_size=400).fit([text])
    assert longest == [256] and tokenizer.decode(tokenizer.encode(text)) == text


def test_ordinary_text_trains_as_a_whole():
    texts = [f"{text} {'x' * 256} {' ' * 255}." for text in TEXTS]
    inner = tokenizers.Tokenizer(tokenizers.models.BPE())
    inner.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    inner.train_from_iterator(texts, trainer)
    assert BPE.Config(vocab_size=400).fit(texts).inner.to_str() == inner.to_str()


# ------------------------------------------------------------------------------------------ tokenizers of other models


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tokenizer with special tokens, as Transformers saves it."""
    import transformers

    inner = BPE.Config(vocab_size=300).fit(TEXTS).inner
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<s>", eos_token="</s>", additional_special_tokens=["<|image|>"]
    )
    path = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save_pretrained(path)
    return path


def test_a_folder_of_transformers(folder):
    import transformers

    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    config = HuggingFace.Config(path=str(folder), vocab_size=len(theirs) + 5)
    tokenizer = HuggingFace(config)
    assert config.carries == Ids(len(theirs) + 5)
    for text in TEXTS[:3]:
        ids = tokenizer.encode(text)
        assert ids.tolist() == theirs.encode(text, add_special_tokens=False)
        assert tokenizer.decode(ids) == text == config.read(tokenizer.write(text))


def test_names_of_special_tokens_are_text(folder):
    tokenizer = HuggingFace(HuggingFace.Config(path=str(folder), vocab_size=400))
    specials = set(tokenizer.inner.get_added_tokens_decoder())
    text = "one</s><|image|>two"
    assert specials and not specials & set(tokenizer.encode(text).tolist())
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_without_a_tokenizer_json(tmp_path, folder):
    """Transformers makes a fast tokenizer of other files, here of GPT-2's."""
    model = json.loads((folder / "tokenizer.json").read_text())["model"]
    (tmp_path / "vocab.json").write_text(json.dumps(model["vocab"]))
    merges = "\n".join(" ".join(pair) if isinstance(pair, list) else pair for pair in model["merges"])
    (tmp_path / "merges.txt").write_text(f"#version: 0.2\n{merges}\n")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "GPT2Tokenizer"}))
    tokenizer, other = (HuggingFace(HuggingFace.Config(path=str(path), vocab_size=400)) for path in (tmp_path, folder))
    assert tokenizer.encode(TEXTS[0]).tolist() == other.encode(TEXTS[0]).tolist()


def test_folders_that_do_not_fit(tmp_path, folder):
    with pytest.raises(UserError, match=r"uses ids up to 30\d, but vocab_size is 256; set vocab_size to 30\d"):
        HuggingFace(HuggingFace.Config(path=str(folder), vocab_size=256))
    with pytest.raises(UserError, match="nowhere is no folder; give the folder of a model or a tokenizer"):
        HuggingFace(HuggingFace.Config(path=str(tmp_path / "nowhere"), vocab_size=256))
    with pytest.raises(UserError, match="cannot be read"):
        HuggingFace(HuggingFace.Config(path=str(tmp_path), vocab_size=256))
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match="cannot be read"):
        HuggingFace(HuggingFace.Config(path=str(tmp_path), vocab_size=256))


def saved(path, change):
    """A tokenizer of the library, changed and saved; with ids for everything that the tests write."""
    inner = BPE.Config(vocab_size=400).fit(["the quick brown fox jumps over the lazy dog"] * 3).inner
    change(inner)
    inner.save(str(path))
    return BPE.Config(vocab_size=400)


@pytest.mark.parametrize(
    ("change", "altered"),
    [
        (lambda t: setattr(t, "normalizer", tokenizers.normalizers.Lowercase()), "'A Fox jumps.* becomes 'a fox jumps"),
        (lambda t: setattr(t, "normalizer", tokenizers.normalizers.NFKC()), "'ﬁne ½ Ⅷ' becomes 'fine 1⁄2 VIII'"),
        (lambda t: setattr(t, "normalizer", tokenizers.normalizers.StripAccents()), "Crème Bru.*becomes .Crème Brulee"),
        (lambda t: t.add_tokens([tokenizers.AddedToken("fox", lstrip=True, rstrip=True)]), "'a fox b' becomes 'afoxb'"),
    ],
)
def test_a_tokenizer_that_alters_texts_is_refused_or_accepted_by_name(tmp_path, change, altered):
    config = saved(tmp_path / "x.json", change)
    with pytest.raises(
        UserError, match=f"x.json alters texts: .*{altered}.*; use another .* or accept it by lossy: true"
    ):
        config.load(tmp_path / "x.json")
    assert config.model_copy(update={"lossy": True}).load(tmp_path / "x.json").encode("fox").size


def test_a_small_vocabulary_hides_no_change_behind_unknown_characters(tmp_path):
    words = tokenizers.Tokenizer(tokenizers.models.WordPiece(unk_token="[UNK]"))
    words.normalizer, words.pre_tokenizer = (
        tokenizers.normalizers.BertNormalizer(),
        tokenizers.pre_tokenizers.BertPreTokenizer(),
    )
    words.decoder = tokenizers.decoders.WordPiece()
    trainer = tokenizers.trainers.WordPieceTrainer(vocab_size=60, special_tokens=["[UNK]"], show_progress=False)
    words.train_from_iterator(["a fox and a dog"] * 20, trainer)
    words.save(str(tmp_path / "words.json"))
    with pytest.raises(UserError, match="words.json alters texts: 'A Fox' becomes 'a fox'"):
        BPE.Config(vocab_size=256).load(tmp_path / "words.json")


@pytest.mark.parametrize(
    "change",
    [
        lambda t: setattr(t, "normalizer", tokenizers.normalizers.NFC()),
        lambda t: setattr(t, "pre_tokenizer", tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=True)),
        lambda t: t.add_special_tokens(["<|end|>", "<image>"]),
    ],
)
def test_a_tokenizer_may_compose_letters_and_move_white_space_in_front(tmp_path, change):
    assert saved(tmp_path / "x.json", change).load(tmp_path / "x.json").encode("fox").size
