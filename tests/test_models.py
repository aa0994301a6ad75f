"""Every recipe of recipes/models: parameters and FLOPs by the papers' layers and widths, DeepSpeed sections, the
page."""

from __future__ import annotations

import functools
import math
import re
from pathlib import Path

import pytest
import yaml
from torch import nn

from pretrain import recipe as recipes
from pretrain.describe import blueprint
from pretrain.recipe import Recipe
from tools.describe import __main__ as describe
from zoo import ConfigError
from zoo.flops import Cost

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "recipes/models"
NAMES = sorted(file.stem for file in FOLDER.glob("*.yaml"))
VOCABULARY, LENGTH = 65_536, 4096
DENSE = {"90m": (8, 512), "435m": (24, 1024), "1.4b": (24, 2048)}
"""Layers and width: MoMa (arXiv 2407.21770), Table 1."""
MOD = {"90m": (14, 512), "435m": (40, 1024), "1.4b": (32, 2304)}
"""The same table's layers and widths with Mixture-of-Depths."""
MOT = {"37m": (4, 256), "94m": (8, 512), "443m": (24, 1024), "880m": (24, 1536), "1.5b": (24, 2048), "7b": (32, 4096)}
"""Mixture-of-Transformers (arXiv 2411.04996), Chameleon setting; our Mamba and Mixture-of-Mamba follow all but 7B."""
TRANSFUSION = {"0.16b": (16, 768), "0.37b": (24, 1024), "0.76b": (24, 1536), "1.4b": (24, 2048), "7b": (32, 4096)}
"""Transfusion (arXiv 2408.11039), Table 2."""
UNET_SHARE = {"0.16b": 1.061, "0.37b": 0.713, "0.76b": 0.355, "1.4b": 0.193, "7b": 0.038}
"""The same table: parameters of the U-Net blocks beside the Transformer's."""
EXPECTED = {
    *(f"{kind}_{size}" for kind in ("dense", "moma_1t1i", "moma_4t4i", "ec_8x", "mod_moma_4t4i") for size in DENSE),
    *(f"mot_{size}" for size in MOT),
    *(f"{kind}_{size}" for kind in ("mamba", "mixture_of_mamba") for size in MOT if size != "7b"),
    *(f"{kind}_{size}" for kind in ("transfusion", "transfusion_unet") for size in TRANSFUSION),
    *(f"mot_transfusion_{size}" for size in TRANSFUSION if size != "0.37b"),
}


@functools.cache
def built(name: str, *overrides: str) -> tuple[Recipe, nn.Module]:
    recipe = recipes.load(FOLDER / f"{name}.yaml", overrides)
    return recipe, blueprint(recipe)


def cost(name: str, *overrides: str) -> Cost:
    return built(name, *overrides)[1].cost(LENGTH)


def header(name: str) -> str:
    """The comment above a recipe, or above one of the files it is made of."""
    return (FOLDER / f"{name}.yaml").read_text(encoding="utf-8").split("\nextends:")[0].split("\nmodel:")[0]


def derived(name: str) -> tuple[float, float]:
    """(total, active) parameters by arithmetic on layers and width alone: norms and routers are left out."""
    kind, size = name.rsplit("_", 1)
    table = MOD if kind.startswith("mod_") else DENSE if size in DENSE else MOT
    layers, d = (TRANSFUSION if "transfusion" in kind else table)[size]
    ends = 2 * vocabulary(name) * d
    attention, feedforward = 4 * d * d, 3 * d * 256 * math.ceil(8 * d / 3 / 256)
    dense = layers * (attention + feedforward)
    if kind in ("mamba", "mixture_of_mamba"):
        inner, rank, states = 2 * d, d // 16, 16
        projections = d * 2 * inner + inner * (rank + 2 * states) + (rank + 1) * inner + inner * d
        block = projections + inner * (4 + 1 + states + 1)  # convolution and its bias, A, D
        active = 2 * layers * block
        return ends + active + (2 * layers * projections if kind == "mixture_of_mamba" else 0), ends + active
    if kind == "transfusion_unet":
        return ends + (1 + UNET_SHARE[size]) * dense + UNET_SHARE[size] * ends, 0.0
    if kind == "transfusion":
        return ends + dense, ends + dense
    if kind in ("mot", "mot_transfusion"):
        return ends + 2 * dense, ends + dense
    experts = {"dense": 1, "moma_1t1i": 2}.get(kind, 8)
    kept = (1 + 0.25) / 2 if kind.startswith("mod_") else 1  # every other layer for a quarter of the tokens
    return ends + layers * (attention + experts * feedforward), ends + kept * dense


def vocabulary(name: str) -> int:
    return 32_000 if "transfusion" in name else VOCABULARY


def size_file(name: str) -> str:
    """The file of layers and width that a recipe extends."""
    kind, size = name.rsplit("_", 1)
    return f"sizes/transfusion_{size}.yaml" if "transfusion" in kind else f"sizes/{size}.yaml"


def test_every_size_of_the_papers_is_here() -> None:
    assert set(NAMES) == EXPECTED


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_is_an_architecture_and_a_size(name: str) -> None:
    """Two files to extend, its name, and where layers count otherwise than the size's, their number or width; and what
    makes it fit into memory where the size's would not."""
    data = yaml.safe_load((FOLDER / f"{name}.yaml").read_text(encoding="utf-8"))
    kind = name.rsplit("_", 1)[0]
    assert set(data.pop("extends")) == {f"architectures/{kind}.yaml", size_file(name)}
    assert data.pop("name") == name
    ends = {"stem", "head"} if kind == "transfusion_unet" else set()
    assert set(data) <= {"model", "train"} and set(data.get("model", {})) <= {"repeat", "d_model", "layers"} | ends
    assert set(data.get("train", {})) <= {"micro_batch", "activation_checkpointing"}, "what makes it fit"


@pytest.mark.parametrize("name", NAMES)
def test_parameters_are_those_derived_from_the_papers_layers_and_widths(name: str) -> None:
    recipe, model = built(name)
    total, active = derived(name)
    counted = sum(p.numel() for p in model.parameters())
    assert recipe.name == name and recipe.model.vocab_size == vocabulary(name)
    if "unet" in name:  # ours, to have the paper's share
        plain = sum(p.numel() for p in built(name.replace("_unet", ""))[1].parameters())
        assert counted / plain - 1 == pytest.approx(total / plain - 1, rel=0.06)
        assert max(cost(name).active) == counted
        return
    assert (counted, max(cost(name).active)) == (pytest.approx(total, rel=0.005), pytest.approx(active, rel=0.005))


@pytest.mark.parametrize("name", [name for name in NAMES if not name.startswith("mot_") and "transfusion" not in name])
def test_flops_are_the_baselines(name: str) -> None:
    """Routers and auxiliary routers apart, with causal scores and the head at T = 4096."""
    kind, size = name.rsplit("_", 1)
    baseline = cost(f"mamba_{size}" if kind.endswith("mamba") else f"dense_{size}").flops
    if kind.startswith("mod_"):  # whole layers: 1.8 %, 0.3 % and 1.1 % more
        assert cost(name).flops == (pytest.approx(baseline[0], rel=0.02), pytest.approx(baseline[1], rel=0.02))
    else:
        assert cost(name).flops == baseline


@pytest.mark.parametrize("size", MOT)
def test_mixture_of_transformers_costs_what_its_dense_baseline_does(size: str) -> None:
    """The baseline is the recipe with the overrides that the architecture's header gives."""
    name = f"mot_{size}"
    overrides = [
        f"name=dense_{size}" if text.startswith("name=") else text
        for text in re.findall(r"\S+=\S+", header("architectures/mot"))
    ]
    dense = cost(name, *overrides)
    assert len(overrides) == 4 and built(name, *overrides)[0].name == f"dense_{size}"
    assert (dense.flops, dense.active) == (cost(name).flops, cost(name).active)
    assert sum(p.numel() for p in built(name, *overrides)[1].parameters()) == dense.active[0]


@pytest.mark.parametrize("size", TRANSFUSION)
def test_a_unet_costs_images_alone_and_untying_nothing(size: str) -> None:
    plain, unet = cost(f"transfusion_{size}").flops, cost(f"transfusion_unet_{size}").flops
    assert unet[0] == plain[0] and unet[1] > plain[1] > plain[0]
    if size != "0.37b":
        untied = cost(f"mot_transfusion_{size}")
        assert (untied.flops, untied.active) == (plain, cost(f"transfusion_{size}").active)


@pytest.mark.parametrize("name", [name for name in NAMES if "mamba" in name])
def test_sizes_that_are_ours_say_so(name: str) -> None:
    page = (ROOT / "docs/models.md").read_text(encoding="utf-8")
    assert "Sizes are ours" in header(name) and re.search(rf"^\| {name} \|.*\| ours, after mot_", page, re.MULTILINE)


@pytest.mark.parametrize("ranks", [1, 8, 256])
@pytest.mark.parametrize("name", NAMES)
def test_deepspeed_sections(name: str, ranks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """On 256 ranks with the micro-batch that the size's header gives, where the recipe's own does not divide."""
    monkeypatch.chdir(ROOT)
    recipe, overrides = built(name)[0], [f"deepspeed=recipes/deepspeed/{ranks}gpu.json"]
    text = header(size_file(name).removesuffix(".yaml"))
    smaller = re.search(r"train\.micro_batch=\d+", text)
    if ranks == 256 and recipe.train.global_batch % (256 * recipe.train.micro_batch):
        assert smaller is not None
        with pytest.raises(ConfigError, match=f"^train.global_batch: {recipe.train.global_batch} is not a multiple"):
            recipes.launch_config(recipes.load(FOLDER / f"{name}.yaml", overrides), ranks)
        ranks, overrides = 128 if "; 128 do" in text else 256, [*overrides, smaller[0]]
    changed = recipes.load(FOLDER / f"{name}.yaml", overrides)
    config = recipes.launch_config(changed, ranks)
    assert (
        config["train_batch_size"]
        == recipe.train.global_batch
        == (config["gradient_accumulation_steps"] * changed.train.micro_batch * ranks)
    )
    assert config["bf16"]["enabled"] and config["zero_optimization"]["stage"] == (1 if ranks == 1 else 2)


def test_the_page_is_what_the_command_prints(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    page = (ROOT / "docs/models.md").read_text(encoding="utf-8")
    command = re.search(r"`python -m tools\.describe (.*?) > docs/models\.md`", page)
    assert command is not None
    assert describe.main(command[1].split()) == 0
    assert capsys.readouterr().out == page, "docs/models.md is stale; run the command that it names"
    assert all(f"| {name} |" in page for name in NAMES)
