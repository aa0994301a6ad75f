"""Training of an image tokenizer: an autoencoder with a quantizer between, on the pictures of shards.

One process, plain PyTorch. The pictures are kept in memory, so many as the recipe allows; a step takes those of one
size. The loss is the absolute error of pixels and the quantizer's own; there is no perceptual and no adversarial one,
so fine texture comes out smooth.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pydantic
import torch
import tqdm
from torch import Tensor

from pretrain import report
from pretrain.data.errors import BrokenDocument, DataError
from pretrain.data.reading import read_parts
from pretrain.data.shards import find_shards
from pretrain.data.sources import open_shards
from pretrain.metrics import Metrics
from zoo.config import Config, UserError
from zoo.files import atomic_path
from zoo.modalities.coded_pictures import Size
from zoo.modalities.vq import VQ, Autoencoder, AutoencoderConfig, save_autoencoder

FILE = "image.safetensors"
SHOWN = 12
"""Pictures beside their reconstructions."""


class PicturesConfig(Config):
    """The pictures that it learns from."""

    path: str
    """Folder of WebDataset tar shards of documents."""
    train: str = "*train*.tar"
    """Pattern of the training shards' names inside `path`."""
    validation: str = "*val*.tar"
    """Pattern of the validation shards' names inside `path`."""
    most: pydantic.PositiveInt = 20_000
    """Most pictures of a split; they are held in memory, at three bytes a pixel."""


class StepsConfig(Config):
    """How it is trained: AdamW, the learning rate falling linearly to 0."""

    lr: pydantic.PositiveFloat = 1e-3
    """Learning rate of the first step."""
    steps: pydantic.PositiveInt
    """Steps of the whole training."""
    batch: pydantic.PositiveInt = 32
    """Pictures of a step."""
    log_every: pydantic.PositiveInt = 50
    """Steps from one line of metrics.jsonl to the next."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """"auto": the accelerator where there is one."""


class ImageTokenizerRecipe(Config):
    """The recipe of an image tokenizer."""

    name: str = pydantic.Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """It names the folder of the result."""
    run_dir: str | None = None
    """Folder of the result; default: runs/NAME."""
    seed: int = pydantic.Field(default=0, ge=0)
    """Seed of first weights, of the order of the pictures and of revived codes."""
    sizes: list[Size] = pydantic.Field(min_length=1)
    """As of the modality `vq`."""
    aspect: Literal["crop", "pad", "stretch"] = "crop"
    """As of the modality `vq`."""
    network: AutoencoderConfig
    data: PicturesConfig
    optimizer: StepsConfig

    @property
    def folder(self) -> Path:
        return Path(self.run_dir or f"runs/{self.name}")

    @property
    def modality(self) -> VQ.Config:
        """How a recipe of a pretraining names the result."""
        return VQ.Config(
            path=str(self.folder / FILE),
            sizes=self.sizes,
            aspect=self.aspect,
            patch=self.network.patch,
            codes=self.network.quantizer.size,
        )


@dataclasses.dataclass(frozen=True)
class Pictures:
    """The pictures of a split, by size: (n, height, width, 3) uint8."""

    by_size: Mapping[tuple[int, int], np.ndarray]
    broken: list[str]
    """Documents that cannot be used: which, and why."""

    def __len__(self) -> int:
        return sum(map(len, self.by_size.values()))

    def batch(self, step: int, count: int, seed: int) -> np.ndarray:
        """(count, height, width, 3): some pictures of one size, a function of the arguments alone."""
        random = np.random.Generator(np.random.Philox(key=[seed, step]))
        groups = list(self.by_size.values())
        group = groups[random.choice(len(groups), p=[len(group) / len(self) for group in groups])]
        return group[random.integers(0, len(group), count)]


def read_pictures(folder: Path, pattern: str, key: str, config: VQ.Config, most: int) -> Pictures:
    """The first `most` pictures of some shards.

    Raises:
        DataError: no shard, a damaged one, or no picture in any.
    """
    found: dict[tuple[int, int], list[np.ndarray]] = {}
    broken: list[str] = []
    with open_shards(find_shards(folder, pattern, key)) as shards:
        every = [(shard, document) for shard, documents in shards.items() for document in documents]
        for shard, document in tqdm.tqdm(every, desc=f"pictures of {pattern}", disable=None, leave=False):
            if sum(map(len, found.values())) >= most:
                break
            try:
                for part in read_parts(document, {"image": config.read}):
                    if part.type == "image":
                        found.setdefault(part.item.shape[:2], []).append(part.item)
            except BrokenDocument as error:
                broken.append(f"{shard.name}: {document.key}: {error}")
    if not found:
        why = f"; {len(broken)} documents cannot be used, such as {broken[0]}" if broken else ""
        raise DataError(f"{key}: {pattern!r}: there is no picture in these shards{why}")
    return Pictures({size: np.stack(group) for size, group in found.items()}, broken)


def train(recipe: ImageTokenizerRecipe, log: Callable[[str], None] = print) -> dict[str, float]:
    """Train, and leave the tokenizer, its metrics and a picture in the recipe's folder.

    Returns:
        The last evaluation.
    Raises:
        UserError: the folder holds a tokenizer already, or the pictures cannot be read.
    """
    folder, target = recipe.folder, recipe.folder / FILE
    if target.exists():
        raise UserError(f"{target} is already there; choose another name or run_dir")
    config, data = recipe.modality, recipe.data
    training = read_pictures(Path(data.path), data.train, "data.train", config, data.most)
    held_out = read_pictures(Path(data.path), data.validation, "data.validation", config, data.most)
    for split, pictures in (("training", training), ("validation", held_out)):
        log(f"{split}: {len(pictures):,} pictures; {len(pictures.broken)} broken documents passed over")
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(recipe.seed)  # the quantizer draws from torch's random state
    device = _device(recipe.optimizer.device)
    model = Autoencoder(recipe.network).to(device)
    metrics = Metrics(folder, None)
    for step, loss in _steps(model, training, recipe, device):
        if step % recipe.optimizer.log_every == 0 or step == recipe.optimizer.steps:
            metrics.log(step, {"loss": loss})
    values = evaluate(model.eval(), held_out)
    metrics.log(recipe.optimizer.steps, values)
    metrics.close()
    with atomic_path(target) as temporary:
        save_autoencoder(temporary, model)
    draw(model, held_out, report.folder_of(folder) / "reconstructions.png", recipe.name)
    return values


def _steps(model: Autoencoder, pictures: Pictures, recipe: ImageTokenizerRecipe, device: torch.device) -> Any:
    """Train, step by step: (number of the step from 1, its loss)."""
    steps = recipe.optimizer.steps
    optimizer = torch.optim.AdamW(model.parameters(), recipe.optimizer.lr, betas=(0.9, 0.99), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    bar = tqdm.tqdm(range(1, steps + 1), desc="training", unit="step", disable=None)
    for step in bar:
        x = _pixels(pictures.batch(step, recipe.optimizer.batch, recipe.seed), device)
        again, _, quantizer_loss = model(x)
        loss = (again - x).abs().mean() + quantizer_loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        bar.set_postfix(loss=f"{float(loss.detach()):.3f}")
        yield step, float(loss.detach())


@torch.no_grad()
def evaluate(model: Autoencoder, pictures: Pictures, batch: int = 64) -> dict[str, float]:
    """How near reconstructions come, and how evenly the codes are used.

    Returns:
        `eval/psnr` in dB of 8-bit pixels; `eval/perplexity`, e to the entropy of the codes of all pictures, at most
        their number; `eval/used`, the share of the codes that any picture has.
    """
    error, values = 0.0, 0
    counts = torch.zeros(model.config.quantizer.size, dtype=torch.float64)
    device = next(model.parameters()).device
    for group in pictures.by_size.values():
        for start in range(0, len(group), batch):
            x = _pixels(group[start : start + batch], device)
            again, codes, _ = model(x)
            error += float((again.clamp(-1, 1) - x).double().square().sum()) / 4
            values += x.numel()
            counts += torch.bincount(codes.flatten().cpu().long(), minlength=len(counts))
    share = counts[counts > 0] / counts.sum()
    return {
        "eval/psnr": -10 * math.log10(max(error / values, 1e-12)),
        "eval/perplexity": float(torch.exp(-(share * share.log()).sum())),
        "eval/used": float((counts > 0).double().mean()),
    }


@torch.no_grad()
def draw(model: Autoencoder, pictures: Pictures, path: Path, title: str) -> None:
    """The first pictures of the most frequent size, and beside each its reconstruction."""
    shown = max(pictures.by_size.values(), key=len)[:SHOWN]
    again = model(_pixels(shown, next(model.parameters()).device))[0].clamp(-1, 1)
    decoded = ((again.permute(0, 2, 3, 1).cpu() + 1) * 127.5).round().to(torch.uint8).numpy()
    report.draw_images({"original": list(shown), "codes": list(decoded)}, path, f"{title}: originals, and out of codes")


def _pixels(pictures: np.ndarray, device: torch.device) -> Tensor:
    """(B, 3, height, width) from −1 to 1 of (B, height, width, 3) uint8."""
    return torch.from_numpy(pictures).to(device).permute(0, 3, 1, 2).float() / 127.5 - 1


def _device(wanted: str) -> torch.device:
    name = wanted if wanted != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)
