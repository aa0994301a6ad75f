"""Groups of a forward's tokens: images side by side, frames in every form families have them, and who competes."""

from __future__ import annotations

import types
from typing import Any

import pytest
import torch

from zoo import UserError
from zoo.adapt import AdaptConfig, AdaptContext
from zoo.adapt.family import IMAGE, VIDEO

LETTERS = {"t": 1, "i": 63, "v": 62, ".": 0}


def context(rows: list[str], model_type: str = "other", training: bool = False, **options: Any) -> AdaptContext:
    """Rows of t(ext), i(mage), v(ideo), `.` padding; options of AdaptConfig, or arguments of the forward."""
    ids = torch.tensor([[LETTERS[letter] for letter in row] for row in rows])
    names = set(AdaptConfig.model_fields) & set(options)
    config = AdaptConfig.parse(
        {"layers": [1], "capacity": {"type": "constant", "value": 0.5}} | {name: options.pop(name) for name in names}
    )
    vision = types.SimpleNamespace(spatial_merge_size=2, image_size=8, patch_size=4)
    answers = options.pop("answers", None)
    inputs = {"input_ids": ids, "attention_mask": ids != 0, "pixel_values": torch.zeros(1, 3, 8, 8)} | options
    model_config = types.SimpleNamespace(model_type=model_type, vision_config=vision)
    pictures = {63: IMAGE, 62: VIDEO}
    return AdaptContext.build(
        config, pictures, inputs, ids, model_config=model_config, training=training, answers=answers
    )


@pytest.mark.parametrize(
    "rows, options, groups, places",
    [
        (["tiiitiit", "..titttt"], {}, (3, 2, 1), (0, 0, 1)),
        (["tiiitiit", "..titttt"], {"group": "sample"}, (5, 1), (0, 1)),
        (["tiii", "iiit"], {}, (3, 3), (0, 1)),  # the end of a row is the end of an image
        (["tiivvvit"], {}, (2, 1, 3), (0, 0, 0)),
        (["tiivvvit"], {"candidates": "video"}, (3,), (0,)),
        (["tiivvvit"], {"candidates": "video", "group": "sample"}, (3,), (0,)),
        (["tiiiit"], {"model_type": "llava", "pixel_values": torch.zeros(2, 3, 8, 8)}, (2, 2), (0, 0)),
        (["iiiitt"], {"model_type": "paligemma", "pixel_values": torch.zeros(2, 3, 8, 8)}, (2, 2), (0, 0)),
        (["tiiiit"], {"model_type": "llava_next", "pixel_values": torch.zeros(2, 3, 8, 8)}, (4,), (0,)),
        (["tiiiiii"], {"model_type": "llava", "pixel_values": torch.zeros(4, 3, 8, 8)}, (6,), (0,)),  # not even
        (["tvvvvvvvvvvt"], {"model_type": "video_llava", "group": "frame"}, (5, 5), (0, 0)),
        (["tvvvvvvvvvvt"], {"model_type": "video_llava"}, (10,), (0,)),
        (["tvvvvt"], {"model_type": "llava_onevision", "group": "frame"}, (1, 1, 1, 1), (0,) * 4),
        (["tvvtvvtvv"], {"model_type": "qwen3_vl", "group": "frame"}, (2, 2, 2), (0,) * 3),
    ],
)
def test_groups(rows: list[str], options: dict[str, Any], groups: tuple[int, ...], places: tuple[int, ...]) -> None:
    built = context(rows, **options)
    assert (built.pools, built.pool_rows) == (groups, places)
    tokens = "".join(rows)
    wanted = "v" if options.get("candidates") == "video" else "iv"
    assert sorted(built.competing.tolist()) == [i for i, letter in enumerate(tokens) if letter in wanted]
    assert built.dense_counts == tuple(sum(letter not in wanted + "." for letter in row) for row in rows)
    assert int(built.dense.sum()) == sum(built.dense_counts) and not built.by_threshold.numel()


def test_frames_on_a_grid_come_from_it_or_from_positions() -> None:
    """Two frames of 2 × 1 and one of 1 × 1 tokens, and a second video of two frames of one token."""
    row, grid = "tvvvvtvvt", torch.tensor([[2, 4, 2], [2, 2, 2]])
    options = {"model_type": "qwen2_vl", "group": "frame"}
    by_grid = context([row], video_grid_thw=grid, **options)
    assert by_grid.pools == (2, 2, 1, 1)
    height = torch.tensor([[0, 1, 2, 1, 2, 3, 4, 4, 5]])
    width = torch.tensor([[0, 1, 1, 1, 1, 3, 4, 4, 5]])
    positions = torch.stack((torch.zeros_like(height), height, width))
    assert context([row], position_ids=positions, **options).pools == by_grid.pools
    with pytest.raises(UserError, match="video_grid_thw"):
        context([row], **options)
    assert context([row], model_type="qwen2_vl").pools == (4, 2)


def test_answers_compete_in_training() -> None:
    answers = torch.tensor([[0, 0, 0, 1, 1, 1], [0, 0, 0, 0, 0, 1]], dtype=torch.bool)
    options = {"candidates": "image_and_answer", "answers": answers}
    built = context(["tiittt", "..titt"], training=True, **options)
    assert built.pools == (2, 1, 3, 1) and built.pool_rows == (0, 1, 0, 1) and built.dense_counts == (1, 2)
    assert context(["tiittt", "..titt"], training=True, group="sample", **options).pools == (5, 2)
    assert context(["tiittt", "..titt"], **options).pools == (2, 1)
    text = context(["tttt"], training=True, pixel_values=None, candidates="image_and_answer", answers=answers[:1, :4])
    assert text.pools == (1,)


def test_whether_a_part_may_begin_with_image_tokens() -> None:
    """Right after those of the part before: where nothing stands between images or frames anyway."""
    for model_type, group, whole in [
        ("other", "image", (IMAGE, VIDEO)),
        ("llava", "image", (VIDEO,)),
        ("video_llava", "image", (VIDEO,)),
        ("video_llava", "frame", ()),
        ("qwen3_vl", "frame", (IMAGE, VIDEO)),
    ]:
        assert context(["tiit"], model_type=model_type, group=group).indivisible == whole
    encoded = {"pixel_values": None, "mm_encoder_outputs": {"image": {"last_hidden_state": None}}}
    with pytest.raises(UserError, match="prefill_chunk_size cuts the prompt anywhere"):
        context(["tiit"], model_type="llava", **encoded)


def test_keys_of_random_draws_count_tokens_not_columns() -> None:
    """A key counts places in a row, padding apart; an image that comes later has the place it has in one forward."""
    router = {"router": {"type": "random"}, "gate": {"activation": "none"}}
    one = context(["tiiit", "..tii"], **router).key.view(2, 5)
    assert torch.equal(one[1, 2:], one[0, :3]) and len(set(one[0].tolist())) == 5
    later = context(["iit"], attention_mask=torch.tensor([[0, 1, 1, 1, 1, 1]]), **router).key
    assert torch.equal(later, one[0, 2:])
    trained = context(["tiit", "tiii"], training=True, **router).key.view(2, 4)
    assert not torch.equal(trained[0], trained[1])


def test_pictures_may_be_masked_whole() -> None:
    built = context(["tiit", "tttt"], attention_mask=torch.tensor([[1, 0, 0, 1], [1, 1, 1, 1]]))
    assert (
        not built.routes
        and built.pools == ()
        and built.dense_counts == (2, 4)
        and built.dense.tolist().count(False) == 2
    )


def test_pictures_without_a_place_are_refused() -> None:
    with pytest.raises(UserError, match="63 or 62 never occurs in input_ids"):
        context(["tttt"])


def test_a_forward_without_pictures_is_never_looked_at() -> None:
    built = context(["tiit"], pixel_values=None, mm_encoder_outputs={"image": None})
    assert not built.routes and built.kind is None
