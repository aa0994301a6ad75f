"""The digits: split, pictures that survive the tokenizer, documents that say what they show."""

import io
import json

import numpy as np
import webdataset
from PIL import Image

from pretrain.data import DataConfig, open_data
from tests.pretrain.data.samples import documents
from tools.examples import make_digits
from tools.examples.make_digits import NAMES, from_grey, load_digits_split, shift, to_grey
from zoo.modalities import parse_modalities


def read(shard) -> list[dict]:
    return list(webdataset.WebDataset(str(shard), shardshuffle=False))


def test_split_is_stratified_and_complete():
    images, labels, val_images, val_labels = load_digits_split()
    assert images.shape == (1500, 8, 8) and val_images.shape == (297, 8, 8) and images.dtype == np.uint8
    shares = [np.bincount(part, minlength=10) / len(part) for part in (labels, val_labels)]
    assert np.abs(shares[0] - shares[1]).max() < 0.005


def test_grey_is_invertible():
    assert np.array_equal(from_grey(to_grey(np.arange(17))), np.arange(17))


def test_shift_moves_and_fills_with_black():
    image = np.arange(1, 10, dtype=np.uint8).reshape(3, 3)
    assert shift(image, 0, 0).tolist() == image.tolist()
    assert shift(image, 1, 0).tolist() == [[0, 0, 0], [1, 2, 3], [4, 5, 6]]
    assert shift(image, 0, -1).tolist() == [[2, 3, 0], [5, 6, 0], [8, 9, 0]]


def test_documents_show_what_they_say(tmp_path):
    make_digits.write(tmp_path, shifts=2)
    images, labels, val_images, val_labels = load_digits_split()
    train, validation = read(tmp_path / "digits-train-000.tar"), read(tmp_path / "digits-val-000.tar")
    assert len(train) == 9000 and len(validation) == 594
    originals = {}
    for item in train + validation:
        document = json.loads(item["json"])
        parts = document["parts"] if item["__key__"].endswith("caption") else document["parts"][::-1]
        assert parts == [{"type": "text", "text": NAMES[document["label"]]}, {"type": "image", "file": "png"}]
        picture = np.array(Image.open(io.BytesIO(item["png"])))
        if document["shift"] == [0, 0]:
            originals.setdefault(document["split"], {})[document["index"]] = (picture, document["label"])
        else:
            assert document["split"] == "train"
            whole = originals["train"][document["index"]][0]
            assert np.array_equal(picture, shift(whole, *document["shift"]))
    for split, pictures, names in (("train", images, labels), ("val", val_images, val_labels)):
        found = [originals[split][index] for index in sorted(originals[split])]
        assert np.array_equal([picture for picture, _ in found], pictures)
        assert [label for _, label in found] == names.tolist()


def test_writing_is_deterministic_quick_to_repeat_and_careful(digit_shards, tmp_path, capsys):
    assert make_digits.main([str(tmp_path), "--shifts", "0"]) == 0
    assert capsys.readouterr().out.endswith("3,000 train documents and 594 val documents written\n")
    for name in ("digits-train-000.tar", "digits-val-000.tar"):
        assert (tmp_path / name).read_bytes() == (digit_shards / name).read_bytes()
    assert make_digits.main([str(tmp_path), "--shifts", "0"]) == 0
    assert "already there" in capsys.readouterr().out
    assert make_digits.main([str(tmp_path), "--shifts", "1"]) == 2
    assert "holds digits made with --shifts 0; give that or another folder" in capsys.readouterr().err
    assert make_digits.main([str(tmp_path), "--shifts", "9"]) == 2
    assert "--shifts 9: must be 0 to 8" in capsys.readouterr().err


def test_pictures_survive_the_tokenizer(digit_shards):
    image = {"type": "patches", "image_size": 8, "patch": 2, "codes": 64, "channels": 1}
    config = DataConfig.parse({"path": str(digit_shards), "sequence_length": 64}, "data")
    modalities = parse_modalities({"text": {"type": "bytes"}, "image": image})
    data = open_data(config, modalities, seed=0, log=lambda line: None)
    text, image = data.modalities.values()
    _, _, pictures, labels = load_digits_split()
    assert np.array_equal(image.config.square(pictures[0])[:, :, 0], pictures[0])
    decoded = np.array([image.decode(image.encode(picture))[:, :, 0] for picture in pictures])
    error = np.mean((decoded - pictures.astype(float)) ** 2) / pictures.var()
    assert error < 0.12
    # The stream holds the same codes: each validation picture, in the document where it comes first.
    start, stop = data.vocabulary.range("image")
    tokens = documents(data, "validation").document(1)
    codes = tokens[(tokens >= start) & (tokens < stop)] - start
    assert np.array_equal(codes, image.encode(pictures[0]))
    assert text.decode(tokens[-1 - len(NAMES[labels[0]]) : -1] - data.vocabulary.range("text")[0]) == NAMES[labels[0]]
