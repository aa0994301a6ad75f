"""`python -m tools.examples.make_digit_grids`: what the questions say is what the pictures show, and splits share no
digit."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pretrain.finetune.questions import read_questions
from tools.examples import make_digit_grids as grids
from tools.examples.make_digits import NAMES, SHIFTS, shift

SMALL = ["--train", "12", "--validation", "6", "--test", "6", "--rows", "3", "--columns", "3", "--scale", "2"]


@pytest.fixture(scope="module")
def pools() -> dict[str, tuple[np.ndarray, ...]]:
    return grids.load_pools()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("grids")
    assert grids.main([str(path), *SMALL]) == 0
    return path


@pytest.fixture(scope="module")
def frames(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("frames")
    assert grids.main([str(path), *SMALL, "--rows", "2", "--columns", "2", "--frames", "3"]) == 0
    return path


@pytest.fixture(scope="module")
def relations(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("relations")
    assert grids.main([str(path), *SMALL, "--beside", "3"]) == 0
    return path


def lines(folder: Path, split: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / f"{split}.jsonl").read_text().splitlines()]


def lookup(pool: tuple[np.ndarray, ...], split: str) -> dict[bytes, int]:
    """What a cell can look like → its digit, -1 for a blank one."""
    known = {np.zeros((8, 8), np.uint8).tobytes(): -1}
    for digit, images in enumerate(pool):
        for image in images:
            for moved in [(0, 0), *(SHIFTS if split == "train" else ())]:
                known[shift(image, *moved).tobytes()] = digit
    return known


def see(folder: Path, line: dict[str, Any], known: dict[bytes, int]) -> np.ndarray:
    """Digits (F, R, C) of a line's pictures, -1 where blank; fails where a cell shows nothing of its split."""
    read = []
    for name in line.get("images") or [line["image"]]:
        picture = np.asarray(Image.open(folder / name))[::2, ::2]
        cells = picture.reshape(picture.shape[0] // 8, 8, -1, 8).swapaxes(1, 2)
        read.append([[known[cell.tobytes()] for cell in row] for row in cells])
    return np.array(read)


def answer(cells: np.ndarray, question: str) -> str:
    """The right answer, worked out from the words of the question; cells (F, R, C)."""
    if question.startswith("What shares"):
        unit, digit = re.fullmatch(r"What shares a (\w+) with the (\w+)\?", question).groups()
        parts = np.moveaxis(cells, ("frame", "row", "column").index(unit), 0)
        (part,) = (part for part in parts if NAMES.index(digit) in part)
        first, second = (NAMES[value] for value in np.ravel(part) if value >= 0)
        return second if first == digit else first
    at = {name: int(number) - 1 for name, number in re.findall(r"(frame|row|column) (\d)", question)}
    seen = cells[at.get("frame", slice(None)), ..., at.get("row", slice(None)), at.get("column", slice(None))]
    if question.startswith("What"):
        values = set(np.ravel(seen).tolist())
        assert len(values) == 1, question
        return (*NAMES, "nothing")[values.pop()]
    (digit,) = (i for i, name in enumerate(NAMES) if re.search(rf"\b{name}(e?s)?\b", question))
    if question.startswith("How"):
        return str(int((seen == digit).sum()))
    unit = question.split()[1]
    parts = np.moveaxis(cells, ("frame", "row", "column").index(unit), 0)
    (place,) = (i for i, part in enumerate(parts) if digit in part)
    return f"{unit} {place + 1}"


@pytest.mark.parametrize("kind", ["folder", "frames", "relations"])
@pytest.mark.parametrize("split", grids.SPLITS)
def test_answers_are_what_the_pictures_show(kind: str, split: str, pools: Any, request: pytest.FixtureRequest) -> None:
    folder = request.getfixturevalue(kind)
    known, asked = lookup(pools[split], split), 0
    for line in lines(folder, split):
        cells = see(folder, line, known)
        assert np.array_equal(np.squeeze(cells), np.array(line["cells"]))
        for turn in line.get("turns", [line]):
            assert turn["answer"] == answer(cells, turn["question"]), (line, turn)
            asked += 1
    assert asked >= 2 * len(lines(folder, split)) / 3


def test_no_digit_is_in_two_splits(pools: dict[str, tuple[np.ndarray, ...]]) -> None:
    shown = {split: {image.tobytes() for images in pool for image in images} for split, pool in pools.items()}
    assert [len(np.concatenate(pools[split])) for split in grids.SPLITS] == [1200, 300, 297]
    assert not shown["train"] & shown["validation"] and not (shown["train"] | shown["validation"]) & shown["test"]


def test_training_lines_have_turns_without_repeats(folder: Path) -> None:
    for line in lines(folder, "train"):
        assert len({turn["question"] for turn in line["turns"]}) == len(line["turns"]) <= 16
    assert {"cell", "count", "which"} in [{turn["kind"] for turn in line["turns"]} for line in lines(folder, "train")]


def test_training_grids_hold_few_digits_more_often_than_many(pools: dict[str, tuple[np.ndarray, ...]]) -> None:
    config = grids.GridsConfig()
    filled = {
        split: np.array(
            [(grids.make_line(config, pools[split], split, index).cells != grids.BLANK).sum() for index in range(200)]
        )
        for split in ("train", "test")
    }
    assert set(filled["train"]) == set(range(1, 13)) and np.mean(filled["train"] <= 3) > 0.4
    assert set(filled["test"]) == set(range(4, 13))


def test_the_emptiest_training_grid_can_be_set(pools: dict[str, tuple[np.ndarray, ...]]) -> None:
    for least, expected in ((5, set(range(5, 13))), (100, {12})):
        config = grids.GridsConfig(least=least)
        made = [grids.make_line(config, pools["train"], "train", index) for index in range(150)]
        assert {int((line.cells != grids.BLANK).sum()) for line in made} == expected


def test_held_out_lines_are_single_questions_of_every_kind(folder: Path) -> None:
    for split in ("validation", "test"):
        assert {line["kind"] for line in lines(folder, split)} == set(grids.SHARES)
        assert all({"image", "question", "answer", "kind", "cells"} == set(line) for line in lines(folder, split))


def test_questions_of_two_steps_come_when_asked_for(relations: Path) -> None:
    for split in grids.SPLITS:
        kinds = {turn["kind"] for line in lines(relations, split) for turn in line.get("turns", [line])}
        assert kinds == {"cell", "count", "which", "beside"}


def test_counts_are_zero_one_time_in_five(pools: dict[str, tuple[np.ndarray, ...]]) -> None:
    config, zero = grids.GridsConfig(), []
    for index in range(300):
        line = grids.make_line(config, pools["test"], "test", index)
        zero += [turn["answer"] == "0" for turn in line.turns if turn["kind"] == "count"]
    assert abs(np.mean(zero) - 0.2) < 4 * np.sqrt(0.2 * 0.8 / len(zero))


def test_the_trainer_reads_them(folder: Path, frames: Path) -> None:
    assert len(read_questions(folder, "train")) == 12 and len(read_questions(folder, "train")[0].turns) == 16
    assert {len(question.images) for question in read_questions(frames, "test")} == {3}


def test_same_arguments_same_bytes(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert grids.main([str(tmp_path / "again"), *SMALL]) == 0
    for file in folder.rglob("*.*"):
        assert file.read_bytes() == (tmp_path / "again" / file.relative_to(folder)).read_bytes(), file
    assert grids.main([str(tmp_path / "longer"), *SMALL, "--train", "13", "--seed", "0"]) == 0
    assert lines(tmp_path / "longer", "train")[:12] == lines(folder, "train")
    assert grids.main([str(tmp_path / "other"), *SMALL, "--seed", "1"]) == 0
    assert lines(tmp_path / "other", "train") != lines(folder, "train")
    asked = sum(len(line["turns"]) for line in lines(folder, "train"))
    assert f"{asked} questions on 12 train grids" in capsys.readouterr().out


def test_a_folder_of_other_grids_is_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert grids.main([str(folder), *SMALL]) == 0
    assert grids.main([str(folder), *SMALL, "--rows", "2"]) == 2
    marker = folder / "digit_grids.json"
    made = json.loads(marker.read_text())
    del made["settings"]["beside"]  # made before there was such an option
    marker.write_text(json.dumps(made))
    assert grids.main([str(folder), *SMALL]) == 0
    assert grids.main([str(folder), *SMALL, "--beside", "1"]) == 2
    assert "holds grids made with rows 3" in capsys.readouterr().err


@pytest.mark.parametrize("option", [("--train", "0"), ("--rows", "10")])
def test_bad_options(option: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert grids.main([str(tmp_path / "no"), *option]) == 2
    assert option[0].removeprefix("--") in capsys.readouterr().err
    assert not (tmp_path / "no").exists()
