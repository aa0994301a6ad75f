"""One id space: a partition, names, errors."""

import numpy as np
import pytest

from zoo.modalities import Vocabulary


@pytest.mark.parametrize("sizes", [{"text": 5}, {"text": 5, "image": 3}, {"image": 3, "text": 5, "speech": 2}])
def test_vocabulary_is_a_partition(sizes):
    vocabulary = Vocabulary(sizes)
    ids = list(vocabulary.specials.values())
    for modality, size in sizes.items():
        start, stop = vocabulary.range(modality)
        assert stop - start == size
        ids += range(start, stop)
    assert sorted(ids) == list(range(vocabulary.size))
    assert len(vocabulary.specials) == 2 * len(sizes)  # bos and eos, and a pair for each modality but text
    assert vocabulary.modalities == tuple(sizes)


def test_modality_of_every_token():
    vocabulary = Vocabulary({"text": 5, "image": 3, "speech": 2})
    modality = vocabulary.modality_of(np.arange(vocabulary.size).reshape(2, 8))
    assert modality.dtype == np.int8
    assert modality.reshape(-1).tolist() == [0] * 6 + [0] * 5 + [1] * 3 + [2] * 2
    assert [vocabulary.name(t) for t in (0, 1, vocabulary.begin("image"), vocabulary.end("speech"), 6, 11, 15)] == [
        "<bos>",
        "<eos>",
        "<begin_image>",
        "<end_speech>",
        "text 0",
        "image 0",
        "speech 1",
    ]


def test_special_tokens_are_of_the_modality_of_text_whatever_its_name():
    first, second = Vocabulary({"words": 5, "image": 3}), Vocabulary({"image": 3, "words": 5}, text="words")
    for vocabulary in (first, second):
        specials = np.array(list(vocabulary.specials.values()))
        assert list(vocabulary.specials) == ["<bos>", "<eos>", "<begin_image>", "<end_image>"]
        assert set(vocabulary.modality_of(specials)) == {vocabulary.modalities.index("words")}
    assert first != Vocabulary({"words": 5, "image": 3}, text="image") and first == Vocabulary({"words": 5, "image": 3})


def test_vocabulary_refuses_what_it_cannot_hold():
    with pytest.raises(ValueError, match="lacks 'text'"):
        Vocabulary({"image": 4}, text="text")
    with pytest.raises(ValueError, match=r"of \[\] lacks"):
        Vocabulary({})
    with pytest.raises(ValueError, match="'image' has 0 ids"):
        Vocabulary({"text": 4, "image": 0})
    for token in (-1, 10):
        with pytest.raises(ValueError, match=r"the vocabulary has \[0, 5\]"):
            Vocabulary({"text": 4}).modality_of(np.array([0, token]))
