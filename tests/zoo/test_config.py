"""What a user reads after a mistake in a config, word for word; and that a config survives being written out."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest

import zoo
from tests.zoo.helpers import ATTENTION, DENSE, MOMA, layer, mod
from zoo import ConfigError, ModelConfig, known
from zoo.block import LayerConfig
from zoo.depth import MixtureOfDepths
from zoo.moma import MoMa
from zoo.routing.linear import LinearScorer

EXPERTS = {"type": "experts", "experts": 3, "d_ff": 12, "capacity": "1/3", "scope": "row"}


def config(**changes: Any) -> dict[str, Any]:
    """A right config of a model, with changes given as `layer=…`, a key of the only layer, or keys of the model."""
    one = layer(**changes.pop("layer", {}))
    return {"modalities": ["text", "image"], "d_model": 8, "vocab_size": 29, "layers": [one]} | copy.deepcopy(changes)


def mixer(**options: Any) -> dict[str, Any]:
    return config(layer={"mixer": ATTENTION | options})


def moma(**options: Any) -> dict[str, Any]:
    return config(layer={"feedforward": MOMA | options})


def keys(config: type[zoo.Config]) -> str:
    return ", ".join(config.model_fields)


FF, DEPTH, MIXER = "layers[0].feedforward", "layers[0].depth", "layers[0].mixer"
FEEDFORWARDS = ", ".join(known("feedforward"))
WRONG = {
    # unknown keys, at every level
    f"layres: unknown key; known: {keys(ModelConfig)} (did you mean 'layers'?)": config(layres=[]),
    f"layers[0].mixr: unknown key; known: {keys(LayerConfig)} (did you mean 'mixer'?)": config(
        layer={"mixr": ATTENTION}
    ),
    f"{FF}.dff: unknown key; known: {keys(MoMa.Config)} (did you mean 'd_ff'?)": moma(dff=12),
    f"{FF}.router.activaton: unknown key; known: {keys(LinearScorer.Config)} (did you mean 'activation'?)": moma(
        router={"type": "linear", "activaton": "raw"}
    ),
    f"{DEPTH}.capcity: unknown key; known: {keys(MixtureOfDepths.Config)} (did you mean 'capacity'?)": config(
        layer={"depth": {"type": "mod", "capcity": 0.5}}
    ),
    # names of blocks
    f"{FF}.type: 'momma' is not known; known: {FEEDFORWARDS} (did you mean 'moma'?)": config(
        layer={"feedforward": {"type": "momma"}}
    ),
    f"{FF}.type: this key is required; known: {FEEDFORWARDS}": config(layer={"feedforward": {"d_ff": 8}}),
    f"{FF}.type: ['moma'] is not known; known: {FEEDFORWARDS} (did you mean 'moma'?)": config(
        layer={"feedforward": {"type": ["moma"]}}
    ),
    f"{DEPTH}.type: 'modd' is not known; known: {', '.join(known('depth'))} (did you mean 'mod'?)": config(
        layer={"depth": {"type": "modd"}}
    ),
    f"{FF}.router.type: 'liner' is not known; known: {', '.join(known('router'))} (did you mean 'linear'?)": moma(
        router={"type": "liner"}
    ),
    f"{FF}: 'dense' is not a block; write {{type: …}}": config(layer={"feedforward": "dense"}),
    # values
    "d_model: '8': must be a valid integer": config(d_model="8"),
    f"{FF}.d_ff: 8.5: must be a valid integer": config(layer={"feedforward": DENSE | {"d_ff": 8.5}}),
    "layers[0].norm: 'both': must be 'pre' or 'post'": config(layer={"norm": "both"}),
    "layers[0].dropout: 1.0: must be less than 1": config(layer={"dropout": 1.0}),
    f"{MIXER}: this key is required; add it": config(layers=[{}]),
    "vocab_size: not set; give it, or a section `modalities` that decides it": config(vocab_size=None),
    "modalities: ['text', 'text']: names one modality twice; each stands once": config(modalities=["text", "text"]),
    # attention
    f"{MIXER}.heads: 3 does not divide d_model 8; change one or set head_dim": mixer(heads=3),
    f"{MIXER}.kv_heads: 3 does not divide heads 4; every group has equally many": mixer(kv_heads=3),
    f"{MIXER}.head_dim: 1 is odd; rotary embedding turns pairs, make it even": mixer(heads=8),
    f"{MIXER}.head_dim: 3 is odd; rotary embedding turns pairs, make it even": mixer(head_dim=3),
    # capacity and experts
    f"{FF}.capacity: 0: must be above 0 and at most 1": moma(capacity=0),
    f"{FF}.capacity: 1.5: must be above 0 and at most 1": moma(capacity=1.5),
    f"{FF}.capacity: 'a/b': must be a number or a fraction such as '1/4'": moma(capacity="a/b"),
    f"{FF}.capacity: [1]: must be a number or a fraction such as '1/4'": moma(capacity=[1]),
    f"{FF}.capacity: True: must be a number or a fraction such as '1/4'": moma(capacity=True),
    f"{DEPTH}.capacity: '5/4': must be above 0 and at most 1": config(
        layer={"depth": {"type": "mod", "capacity": "5/4"}}
    ),
    f"{FF}.experts.imag: unknown modality; model.modalities are text, image (did you mean 'image'?)": moma(
        experts={"text": 1, "imag": 1}
    ),
    f"{FF}.experts: no entry for 'image'; give every modality its number of experts": moma(experts={"text": 1}),
    f"{FF}.experts: image has 0 experts; every modality needs at least 1": moma(experts={"text": 1, "image": 0}),
    f"{FF}.experts: 0: must be greater than 0": config(layer={"feedforward": EXPERTS | {"experts": 0}}),
}


@pytest.mark.parametrize("message", WRONG)
def test_a_mistake_is_named_with_its_key_value_rule_and_way_out(message):
    with pytest.raises(ConfigError) as error:
        zoo.build("model", WRONG[message])
    assert str(error.value) == f"model.{message}"


def test_all_mistakes_are_listed_at_once():
    wrong = config(d_model=0, layers=[layer(norm="both"), layer(feedforward=MOMA | {"d_ff": "x", "scope": "batch"})])
    with pytest.raises(ConfigError) as error:
        zoo.build("model", wrong)
    assert str(error.value).splitlines() == [
        "model.d_model: 0: must be greater than 0",
        "model.layers[0].norm: 'both': must be 'pre' or 'post'",
        "model.layers[1].feedforward.d_ff: 'x': must be a valid integer",
        "model.layers[1].feedforward.scope: 'batch': must be 'microbatch' or 'row'",
    ]


def test_a_block_alone_is_checked_too():
    with pytest.raises(ConfigError, match="^feedforward.experts: no entry for 'image'; give every modality"):
        zoo.build("feedforward", MOMA | {"experts": {"text": 1}}, d_model=8)
    with pytest.raises(ConfigError, match="^build: d_model is 0; give the width of the stream"):
        zoo.build("feedforward", DENSE)
    with pytest.raises(ConfigError, match="^build: slot 'layer' is not known; slots: model, mixer, feedforward"):
        zoo.build("layer", {})
    with pytest.raises(ConfigError, match="^model: 3 is not a mapping of keys; write it as `key: value` lines$"):
        zoo.build("model", 3)


@pytest.mark.parametrize(
    "one",
    [
        layer(),
        mod(),
        layer(feedforward=DENSE),
        layer(feedforward=EXPERTS, norm="post"),
        layer(feedforward=None),
    ],
    ids=["moma", "mod", "dense", "experts", "no feed-forward"],
)
def test_what_is_written_out_reads_back_as_the_same_config(one):
    parsed = ModelConfig.parse(config(layers=[one, layer(repeat=2)]), "model")
    written = parsed.model_dump()
    for slot in ("mixer", "feedforward", "depth"):
        if one.get(slot):
            assert written["layers"][0][slot]["type"] == one[slot]["type"]
    assert ModelConfig.parse(written) == parsed
    assert ModelConfig.parse(json.loads(parsed.model_dump_json())) == parsed


def test_routers_keep_their_type_when_written_out():
    written = ModelConfig.parse(config(layers=[mod()])).model_dump()["layers"][0]
    assert written["feedforward"]["router"]["type"] == written["depth"]["router"]["type"] == "linear"
