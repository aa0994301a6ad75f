"""`python -m tools.document_recipes`: docs/recipes.md says of every key what its config says."""

from __future__ import annotations

import pytest

from tools import document_recipes
from tools.document_recipes import PAGE, ROOTS, page, written
from zoo import registry
from zoo.config import Config


def configs() -> list[type[Config]]:
    """Every config whose keys the page explains."""
    seen: dict[type[Config], str] = {}
    for _, root in ROOTS:
        list(document_recipes._sections(root, "", seen))
    list(document_recipes._blocks(seen))
    return list(seen)


def test_the_page_is_fresh() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert written(text) == text, "a config has changed; run python -m tools.document_recipes"


@pytest.mark.parametrize("config", configs(), ids=lambda config: config.__qualname__)
def test_every_key_has_a_meaning(config: type[Config]) -> None:
    meanings = document_recipes.meanings(config)
    explained = {name for name, field in config.model_fields.items() if document_recipes._first_sentence(field)}
    assert set(config.model_fields) - set(meanings) - explained - {"type"} == set()


def test_every_block_is_there() -> None:
    text = page()
    for slot in registry.SLOTS:
        for name in registry.known(slot):
            if registry.config_of(slot, name).block.__module__.startswith(("zoo.", "pretrain.")):
                assert f"### `{slot}: {name}`" in text


def test_a_key_in_words() -> None:
    text = page()
    assert "| `capacity` | number or fraction such as `1/4` or `null` | `null` | Expert choice: share of" in text
    assert "| `gate` | `outside` or `inside` | `outside` | With post-norm:" in text
    assert "| `router` | a router block | `{type: linear}` |" in text


def test_what_is_written_by_hand_stays() -> None:
    head = PAGE.read_text(encoding="utf-8").partition(document_recipes.MARKER)[0]
    assert written("Mine.\n" + head + document_recipes.MARKER + "old").startswith("Mine.\n" + head)
    with pytest.raises(ValueError, match="has lost the line that begins its generated part"):
        written("no marker")
