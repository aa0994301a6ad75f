"""Roles of parameters: declared in our own blocks, suggested by kind and shape in a pretrained model."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import zoo.adapt as za
from tests.zoo.adapt.families import FAMILIES
from tests.zoo.helpers import ATTENTION, DENSE, build_model, mod, untied
from zoo.roles import ParameterOwner, Role, parameter_roles, role_by_kind

CHAMELEON = "model.layers.0.self_attn.q_norm"
INTERNVL = "model.vision_tower.embeddings"


def test_every_parameter_of_ours_has_a_declared_role():
    model = build_model(mod(norm="post"), untied(), {"mixer": {"type": "mamba", "d_state": 4}, "feedforward": DENSE})
    for module in model.modules():
        own = {name for name, _ in module.named_parameters(recurse=False)}
        assert not own or (isinstance(module, ParameterOwner) and own == own & set(module.roles)), type(module)


def test_roles_are_by_name_in_the_models_order():
    model = build_model(mod(feedforward=DENSE), untied(mixer=ATTENTION))
    roles = parameter_roles(model)
    assert list(roles) == [name for name, _ in model.named_parameters()]
    assert roles["embedding.weight"] is Role.EMBEDDING and roles["head.weight"] is Role.HEAD
    assert roles["layers.0.router.weight"] is Role.ROUTER and roles["layers.0.auxiliary.w_in"] is Role.AUXILIARY
    assert roles["layers.0.block.feedforward.w_in.weight"] is Role.MATRIX
    assert roles["layers.1.feedforward.w_in.weight"] is Role.MODALITY_MATRIX
    assert roles["layers.1.mixer_norm.weight"] is roles["norm.weight"] is Role.GAIN


class Own(ParameterOwner):
    roles = {"taught": Role.EMBEDDING}

    def __init__(self) -> None:
        super().__init__()
        self.taught, self.other = nn.Parameter(torch.zeros(3, 2)), nn.Parameter(torch.zeros(3, 2))
        self.linear = nn.Linear(2, 2)


def test_what_a_module_does_not_declare_goes_by_its_kind():
    assert parameter_roles(Own()) == {
        "taught": Role.EMBEDDING,
        "other": Role.MATRIX,
        "linear.weight": Role.MATRIX,
        "linear.bias": Role.BIAS,
    }


@pytest.mark.parametrize(
    ("module", "role"),
    [
        (nn.Linear(4, 4), Role.MATRIX),
        (nn.Embedding(4, 4), Role.EMBEDDING),
        (nn.Conv2d(3, 4, 2, stride=2), Role.EMBEDDING),
        (nn.Conv2d(3, 4, 3, stride=2), Role.CONVOLUTION),
        (nn.Conv2d(3, 4, 1), Role.CONVOLUTION),
        (nn.LayerNorm(4), Role.BIAS),
        (nn.LayerNorm((2, 4)), Role.GAIN),
    ],
    ids=str,
)
def test_kinds(module, role):
    assert role_by_kind(module, "weight", tuple(module.weight.shape)) is role


def test_the_shape_is_that_of_the_whole_parameter():
    """A partitioned one is an empty vector by itself."""
    model = nn.Sequential(nn.Linear(4, 4, bias=False))
    whole = {id(model[0].weight): (4, 4)}
    model[0].weight.data = torch.empty(0)
    assert parameter_roles(model) == {"0.weight": Role.BIAS}
    assert parameter_roles(model, lambda parameter: whole[id(parameter)]) == {"0.weight": Role.MATRIX}


@pytest.mark.parametrize("family", FAMILIES)
def test_roles_in_a_pretrained_model(family):
    model = FAMILIES[family].build()
    za.adapt(model, {"layers": list(FAMILIES[family].layers), "capacity": {"type": "constant", "value": 0.5}})
    roles, modules = parameter_roles(model), dict(model.named_modules())
    assert {Role.EMBEDDING, Role.MATRIX, Role.BIAS, Role.ADDED_ROUTER} <= set(roles.values())
    for name, parameter in model.named_parameters():
        module = modules[name.rpartition(".")[0]]
        if ".mod_router." in name:
            assert roles[name] is Role.ADDED_ROUTER, name
        elif parameter.dim() < 2:
            assert roles[name] is Role.BIAS, name
        elif parameter.squeeze().dim() < 2 and name.endswith("extensor"):  # Phi-4's marks between rows and tiles
            assert roles[name] is Role.BIAS, name
        elif "embed" in name and family not in (
            "gemma4",
            "phi4_multimodal",
        ):  # Transformers calls tables, patches and class tokens so
            assert roles[name] is Role.EMBEDDING, name
        elif module is model.get_output_embeddings():
            assert roles[name] is Role.HEAD, name
        elif isinstance(module, nn.Linear):
            assert roles[name] is Role.MATRIX, name
    if family == "chameleon":
        assert (
            roles[f"{CHAMELEON}.weight"] is Role.GAIN and roles["model.vqmodel.quant_conv.weight"] is Role.CONVOLUTION
        )
    if family == "gemma4":
        assert roles["model.vision_tower.patch_embedder.position_embedding_table"] is Role.EMBEDDING
    if family == "internvl":
        assert roles[f"{INTERNVL}.cls_token"] is roles[f"{INTERNVL}.position_embeddings"] is Role.EMBEDDING
