"""The section `modalities`: order, names, parts, errors, and the vocabulary that follows."""

import dataclasses

import numpy as np
import pytest

from zoo.config import ConfigError
from zoo.modalities import default_modalities, grammars, in_order, parse_modalities, vocabulary

TEXT = {"type": "bytes"}
IMAGE = {"type": "patches", "image_size": 8, "patch": 4, "codes": 4, "channels": 1}


def test_the_vocabulary_follows_from_the_section_alone():
    words = vocabulary(parse_modalities({"text": {"type": "bpe", "vocab_size": 300}, "image": IMAGE}))
    assert words.size == 4 + 300 + 4 and words.modalities == ("text", "image")
    assert vocabulary(default_modalities()).size == 2 + 256


def test_the_name_is_the_users_and_the_part_the_kinds():
    words = vocabulary(parse_modalities({"text": TEXT, "drawings": IMAGE}))
    assert words.modalities == ("text", "drawings") and "<begin_drawings>" in words.specials


def test_text_is_first_wherever_it_is_written():
    assert list(parse_modalities({"image": IMAGE, "text": TEXT})) == ["text", "image"]


def test_text_is_known_by_its_kind_and_not_by_its_name():
    section = parse_modalities({"text": IMAGE, "caption": TEXT})
    assert list(section) == in_order({"text": IMAGE, "caption": TEXT}) == ["caption", "text"]
    plain = grammars(parse_modalities({"text": TEXT, "image": IMAGE}))
    own = grammars(section)
    for name, like in (("caption", "text"), ("text", "image")):
        assert own[name] == dataclasses.replace(plain[like], name=name)
    words = vocabulary(section)
    assert words.modality_of(np.array([words.bos, words.end("text")])).tolist() == [0, 0]


@pytest.mark.parametrize(
    "section, message",
    [
        ({"text": {"type": "bpee"}}, r"^modalities.text.type: 'bpee' is not known; .* \(did you mean 'bpe'\?\)"),
        ({"text": TEXT, "image": {}}, r"^modalities.image.type: this key is required; known: .*patches"),
        (
            {"text": {"type": "bpe", "vocab_size": 255}},
            r"^modalities.text.vocab_size: 255: must be greater than or equal",
        ),
        (
            {"text": {"type": "bpe", "vocabsize": 9}},
            r"^modalities.text.vocabsize: unknown key; .*did you mean 'vocab_size'",
        ),
        ({"text": "bpe"}, r"^modalities.text: 'bpe' is not a block; write {type: …}"),
        ({"text": TEXT, "image": IMAGE | {"patch": 5}}, r"^modalities.image.patch: 5: does not divide image_size = 8"),
        ({"image": IMAGE}, r"^modalities: has image, but no kind of text, .*; write `text: {type: bytes}` first"),
        ({"text": IMAGE}, r"^modalities: has text, but no kind of text"),
        ({}, r"^modalities: has none, but no kind of text"),
        ({"text": TEXT, "a": IMAGE, "b": IMAGE}, r"^modalities: a and b both read the image parts of a document"),
        ({"text": TEXT, "words": TEXT}, r"^modalities: text and words both read the text parts"),
        (
            {"text": TEXT, "My Image": IMAGE},
            r"^modalities: 'My Image' is not a name of a modality; use lower-case letters",
        ),
    ],
)
def test_errors(section, message):
    with pytest.raises(ConfigError, match=message):
        parse_modalities(section)
