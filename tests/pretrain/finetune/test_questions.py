"""Questions from JSON lines and from shards: what is read, and what is refused with file, line and reason."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pretrain.data import DataError
from pretrain.finetune.questions import Question, about_other_images, one_an_image, read_questions, sample_questions
from tests.pretrain.data.samples import png, sample, write_shard
from tests.pretrain.finetune.processors import write_questions

LINE = {"image": "a.png", "question": "how many?", "answer": "two"}


def test_lines_become_questions(tmp_path: Path) -> None:
    talk = {
        "images": ["b.png", "c.png"],
        "turns": [{"question": "x?", "answer": "y"}, {"question": "z?", "answer": "w"}],
    }
    folder = write_questions(tmp_path, [LINE | {"kind": "count"}, "", talk, {"question": "one?", "answer": "1"}])
    first, second, third = read_questions(folder)
    assert first == Question(
        (folder / "a.png",), (("how many?", "two"),), f"{folder / 'train.jsonl'}:1", {"kind": "count"}
    )
    assert second.images == (folder / "b.png", folder / "c.png") and second.turns == (("x?", "y"), ("z?", "w"))
    assert second.source.endswith("train.jsonl:3") and third.images == ()
    assert [image.mode for image in second.pictures()] == ["RGB", "RGB"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "is not JSON"),
        ("[1]", "is list, not an object"),
        ('{"image": "gone.png", "question": "a", "answer": "b"}', "gone.png' does not exist"),
        ({"question": "a", "answer": 3}, "'answer' must be a text that is not empty, got 3"),
        ({"question": " ", "answer": "b"}, "'question' must be a text that is not empty"),
        ({"turns": []}, "'turns' must be a list"),
        ({"turns": [{"question": "a", "answer": "b"}, {"question": "a"}]}, "turns[1]: 'answer' must be a text"),
        (LINE | {"turns": [{"question": "a", "answer": "b"}]}, "has both 'turns' and 'question'"),
        (LINE | {"images": ["a.png"]}, "has both 'image' and 'images'"),
        ('{"image": 3, "question": "a", "answer": "b"}', "'image' must be the name of a file"),
        ('{"image": "/etc/a.png", "question": "a", "answer": "b"}', "its image '/etc/a.png' is outside the folder"),
        ('{"images": ["b/../../a.png"], "question": "a", "answer": "b"}', "its image 'b/../../a.png' is outside the"),
    ],
)
def test_a_wrong_line_is_named(tmp_path: Path, line: Any, message: str) -> None:
    folder = write_questions(tmp_path, [LINE, line])
    with pytest.raises(DataError) as error:
        read_questions(folder)
    assert str(error.value).startswith(f"{folder / 'train.jsonl'}:2: ") and message in str(error.value)


def test_wrong_folders(tmp_path: Path) -> None:
    folder = write_questions(tmp_path / "a", [LINE], "validation")
    with pytest.raises(DataError, match=r"train.jsonl: does not exist; .* holds validation.jsonl"):
        read_questions(folder)
    (folder / "train.jsonl").write_text("\n")
    with pytest.raises(DataError, match="is empty"):
        read_questions(folder)
    (folder / "train.jsonl").write_bytes(b"\xff\xfe")
    with pytest.raises(DataError, match="is not UTF-8"):
        read_questions(folder)
    (folder / "a.png").write_bytes(b"no picture")
    with pytest.raises(DataError, match=r"validation.jsonl:1: .*a.png does not decode"):
        read_questions(folder, "validation")[0].pictures()
    (tmp_path / "b").mkdir()
    for path, message in (
        (tmp_path / "c", "does not exist"),
        (tmp_path / "b", "neither .jsonl files nor .tar"),
        (folder / "a.png", "unknown extension '.png'"),
    ):
        with pytest.raises(DataError, match=message):
            sample_questions(path, "train", 1)


def test_samples_have_images_and_depend_on_the_seed(tmp_path: Path) -> None:
    lines = [LINE | {"question": f"number {n}?"} for n in range(20)]
    folder = write_questions(tmp_path, [*lines, {"question": "no image", "answer": "a"}])
    drawn = sample_questions(folder, "train", 5, seed=1)
    assert drawn == sample_questions(folder / "train.jsonl", "ignored", 5, seed=1)
    assert drawn != sample_questions(folder, "train", 5, seed=2) and len(drawn) == 5
    assert len(sample_questions(folder, "train", 100)) == 20
    write_questions(tmp_path / "text", [{"question": "a", "answer": "b"}])
    with pytest.raises(DataError, match=r"train\.jsonl: none of its 1 lines has an image; some must: \{"):
        sample_questions(tmp_path / "text", "train", 5)


def test_documents_of_shards(tmp_path: Path) -> None:
    documents = [sample(f"{n:03d}", "before", png(n), "after", png(n + 50)) for n in range(4)]
    write_shard(tmp_path / "a-train-0.tar", [*documents, sample("900", "text alone"), sample("901", b"broken")])
    drawn = sample_questions(tmp_path, "train", 10)
    assert len(drawn) == 4 and all(len(question.images) == 2 for question in drawn)
    assert drawn[0].turns == (("before\nafter", ""),) and isinstance(drawn[0].pictures()[0], Image.Image)
    assert sample_questions(tmp_path, "train", 2) == drawn[:2] or len(sample_questions(tmp_path, "train", 2)) == 2
    write_shard(tmp_path / "a-val-0.tar", [sample("000", "text alone")])
    with pytest.raises(DataError, match=r"none of the 1 documents of \*val\*.tar has an image"):
        sample_questions(tmp_path, "val", 2)


def test_which_images_are_exchanged() -> None:
    names = [("a",), ("a",), ("b", "c"), ("b",), ("d", "e")]
    asked = [Question(tuple(map(Path, own)), ((str(number), "x"),), "a line") for number, own in enumerate(names)]
    found = about_other_images(asked, 4)
    assert [tuple(map(str, question.images)) for question in found] == [("b",), ("b",), ("d", "e"), ("a",)]
    assert [question.turns for question in found] == [question.turns for question in asked[:4]]
    with pytest.raises(DataError, match="a line: no other question has 2 other images; add some"):
        about_other_images(asked[2:4])


def test_one_question_an_image() -> None:
    asked = [Question(tuple(map(Path, own)), (("q", "a"),), "") for own in ("a", "", "b", "a", "ab", "c")]
    assert one_an_image(asked, 3) == [asked[0], asked[2], asked[4]]


def test_photographs_are_upright(tmp_path: Path) -> None:
    """As Transformers opens them, whatever the camera was turned."""
    from transformers.image_utils import load_image

    scene = np.zeros((20, 40, 3), np.uint8)
    scene[:, :20] = 255
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = orientation
        Image.fromarray(scene).save(tmp_path / "a.jpg", exif=exif, quality=95)
        (picture,) = Question((tmp_path / "a.jpg",), (("q", "a"),), "").pictures()
        assert picture.size == ((40, 20) if orientation < 5 else (20, 40))
        np.testing.assert_array_equal(picture, load_image(str(tmp_path / "a.jpg")))


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparent_parts_are_white(tmp_path: Path, mode: str) -> None:
    logo = np.zeros((32, 32, 4), np.uint8)
    logo[8:24, 8:24, 3] = 255
    Image.fromarray(logo).convert(mode).save(tmp_path / "a.png")
    (picture,) = Question((tmp_path / "a.png",), (("q", "a"),), "").pictures()
    np.testing.assert_array_equal(np.asarray(picture), 255 - logo[..., 3:].repeat(3, 2))


def test_a_byte_order_mark_is_no_part_of_the_line(tmp_path: Path) -> None:
    write_questions(tmp_path, [LINE])
    (tmp_path / "train.jsonl").write_bytes(b"\xef\xbb\xbf" + (tmp_path / "train.jsonl").read_bytes())
    assert read_questions(tmp_path)[0].turns == ((LINE["question"], LINE["answer"]),)
