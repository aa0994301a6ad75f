"""Drawing items: distributions whose best prediction is known, and a cached prefix against the whole row."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

import zoo
from tests.zoo.helpers import ATTENTION, D_MODEL, DENSE, MOMA, stream
from zoo.modalities import Piece, grammars, parse_modalities
from zoo.objectives.processes import Diffusion, Process, RectifiedFlow
from zoo.prefix import Prefix
from zoo.sampling import Sampling, draw_item

MODALITIES = parse_modalities(
    {
        "text": {"type": "bytes"},
        "image": {"type": "continuous_patches", "image_size": 4, "patch": 2, "channels": 1, "mask": "bidirectional"},
    }
)
GRAMMAR = grammars(MODALITIES)["image"]
PROCESSES: dict[str, Process] = {"diffusion": Diffusion(), "flow": RectifiedFlow()}
POINT = torch.tensor([[0.5, -0.25, 1.0]], dtype=torch.float64)


@dataclasses.dataclass
class Known:
    """A prefix whose model knows the data: normal round `mean` with a standard deviation of `spread`."""

    process: Process
    mean: Tensor
    spread: float = 0.0

    def denoise(self, model: Any, grammar: Any, mixture: Tensor, time: Tensor) -> Tensor:
        a, b = self.process.scales(time)
        variance = a**2 * self.spread**2 + b**2
        noise = b * (mixture - a * self.mean) / variance
        data = self.mean + a * self.spread**2 * (mixture - a * self.mean) / variance
        return self.process.target(data, noise)


def draw(process: Process, known: Known, noise: Tensor, without: Known | None = None, **sampling: Any) -> Tensor:
    generator = torch.Generator().manual_seed(3)

    def fresh(step: int) -> Tensor:
        return torch.randn(noise.shape, generator=generator, dtype=noise.dtype)

    model = zoo.Model.__new__(zoo.Model)
    return draw_item(model, GRAMMAR, known, process, Sampling(**sampling), noise, without, fresh)


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(4))


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES)
def test_one_point_is_always_found(process, eta):
    for steps in (1, 2, 7, 50):
        drawn = draw(process, Known(process, POINT), normal(2, 1, 3), steps=steps, eta=eta)
        torch.testing.assert_close(drawn, POINT.expand(2, 1, 3), rtol=0, atol=1e-9)


@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES)
def test_a_normal_distribution_is_drawn(process, eta):
    """Mean and spread, and without fresh noise a monotone function of the noise."""
    noise, known = normal(1, 8000, 1), Known(process, torch.tensor([[[0.7]]]), 0.3)
    drawn = draw(process, known, noise, steps=200, eta=eta)
    assert float(drawn.mean()) == pytest.approx(0.7, abs=0.02)
    assert float(drawn.std()) == pytest.approx(0.3, rel=0.05)
    correlation = float(torch.corrcoef(torch.stack([noise.flatten(), drawn.flatten()]))[0, 1])
    assert correlation > 0.999 if eta == 0 else abs(correlation) < 0.9


@pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES)
def test_guidance_goes_beyond_the_caption(process):
    """Two points: u + w (c − u) of predictions is a point that lies beyond the captioned one."""
    known, plain = Known(process, POINT), Known(process, 0 * POINT)
    for guidance, factor in ((0.0, 0.0), (1.0, 1.0), (3.0, 3.0)):
        drawn = draw(process, known, normal(1, 1, 3), plain, guidance=guidance, steps=9)
        torch.testing.assert_close(drawn, factor * POINT[None], rtol=0, atol=1e-9)
    clipped = draw(process, known, normal(1, 1, 3), plain, guidance=3.0, steps=9, clip=1.0)
    torch.testing.assert_close(clipped, (3 * POINT[None]).clamp(-1, 1), rtol=0, atol=1e-9)
    with pytest.raises(ValueError, match="^guidance 3.0 compares with what would be drawn `without` a caption"):
        draw(process, known, normal(1, 1, 3), guidance=3.0)


@pytest.mark.parametrize("sparse", [False, True])
def test_a_cached_prefix_is_the_whole_row(sparse):
    """What the head says of an item, and of text after it, whatever was drawn from the prefix in between."""
    layer = {"mixer": ATTENTION, "feedforward": MOMA if sparse else DENSE}
    config = {"modalities": list(MODALITIES), "d_model": D_MODEL, "vocab_size": 300, "layers": [layer] * 2}
    if sparse:
        config["layers"][1] = layer | {"depth": {"type": "mod", "capacity": "1/2"}}
    ends = {
        "stem": {"image": {"type": "noisy_vectors", "width": 4}},
        "head": {"image": {"type": "vectors", "width": 4}},
    }
    model: Any = zoo.build("model", config | ends).double().eval()
    tokens = torch.tensor([[0, 70, 71, GRAMMAR.begin], [0, 80, 81, GRAMMAR.begin]])
    mixture, time = normal(2, 4, 4), torch.tensor(0.4, dtype=torch.float64)
    prefix = Prefix(model, 2, length=10)
    prefix.feed([Piece.of(row, 0) for row in tokens.numpy()])
    said = prefix.denoise(model, GRAMMAR, mixture, time)
    draw_item(model, GRAMMAR, prefix, RectifiedFlow(), Sampling(steps=3), mixture)
    assert torch.equal(prefix.denoise(model, GRAMMAR, mixture, time), said)
    end = Piece.of([GRAMMAR.end], 0)
    logits = prefix.feed([Piece.join([GRAMMAR.places(item), end]) for item in mixture.numpy()]).logits

    context = stream("tttt[iiii]t", "tttt[iiii]t", routing="causal")
    row = torch.cat([tokens, torch.full((2, 4), GRAMMAR.choice.start), torch.full((2, 1), GRAMMAR.end)], 1)
    places, content = {"image": context.index(1)}, {"image": mixture.flatten(0, 1)}
    for told in (time.expand(8), torch.zeros(8)):
        whole, predicted = model(row, context, content=content, time={"image": told}, read=places)
        if told[0]:
            torch.testing.assert_close(said.flatten(0, 1), predicted["image"], rtol=0, atol=1e-10)
        else:
            torch.testing.assert_close(logits, whole[:, -1], rtol=0, atol=1e-10)
