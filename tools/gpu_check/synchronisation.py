"""Run every tiny recipe's step on a GPU with synchronisation made an error: python -m tools.gpu_check.synchronisation

A copy to the host, or a blocking copy from it, makes the device wait for the host and the host for the device. Prints a
line for each recipe with the place of its first one; exits 1 where a recipe that needs none has one.
"""

from __future__ import annotations

import sys
import traceback
from pathlib import Path

import torch

import zoo
from pretrain import recipe as recipes
from zoo.carries import nothing
from zoo.config import UserError
from zoo.context import TokenContext
from zoo.trace import Trace

RECIPES = Path(__file__).parents[2] / "recipes" / "tiny"
ROWS, LENGTH, VOCABULARY = 4, 256, 400
WAITS = {
    "mod_microbatch": "the rows of a micro-batch compete, so how many tokens each keeps, and with it a shape, depends "
    "on the data",
    "mod_moma": "the same",
    "hybrid_mod_moma": "the experts of each modality choose among the tokens that a depth router kept without looking "
    "at modalities, and must know how many of each there are",
}
"""Recipes whose step must wait for the device, once a layer, and why. What waits once a step stands in
docs/architecture.md."""


def main() -> int:
    if not torch.cuda.is_available():
        print("error: there is no CUDA device here; python -m tools.doctor says why", file=sys.stderr)
        return 2
    unexpected = 0
    for path in sorted(RECIPES.glob("*.yaml")):
        place = first_synchronisation(path, torch.device("cuda"))
        unexpected += place is not None and path.stem not in WAITS
        print(f"{path.stem}: {'none' if place is None else place}", flush=True)
    print(f"{unexpected} recipes synchronise without a reason")
    return int(unexpected > 0)


def first_synchronisation(path: Path, device: torch.device) -> str | None:
    """Where the step of a recipe's model first waits for the device; None where it never does."""
    config = recipes.load(path).model.model_copy(update={"vocab_size": VOCABULARY})
    model = zoo.build("model", config).to(device, torch.bfloat16).train()
    tokens = torch.randint(VOCABULARY, (ROWS, LENGTH)).to(device)
    try:
        for armed in (False, True):  # the first step makes what is made once
            context = _context(device)
            content = _content(model, context)
            torch.cuda.synchronize(device)
            _step(model, tokens, context, content, armed)
    except RuntimeError as error:
        return _place(error)
    return None


def _context(device: torch.device) -> TokenContext:
    """Documents of 100 tokens in which modalities alternate every 32."""
    column = torch.arange(LENGTH)
    modality, document = (column // 32 % 2).expand(ROWS, -1), (column // 100).expand(ROWS, -1)
    return TokenContext.from_modality(modality.contiguous(), document.contiguous(), trace=Trace()).to(device)


def _content(model: zoo.Model, context: TokenContext) -> dict[str, torch.Tensor]:
    """Random content of the modalities that carry no ids."""
    content = {}
    for name, carries in model.carries.items():
        count = context.totals[model.modalities.index(name)]
        content[name] = nothing(carries, context.modality.device).new_zeros(count, *nothing(carries).shape[1:])
    return content


def _step(
    model: zoo.Model, tokens: torch.Tensor, context: TokenContext, content: dict[str, torch.Tensor], armed: bool
) -> None:
    torch.cuda.set_sync_debug_mode("error" if armed else "default")
    try:
        loss = model(tokens, context, content=content).float().square().mean()
        assert context.trace is not None
        for total, _ in context.trace.losses.values():
            loss = loss + total
        loss.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def _place(error: RuntimeError) -> str:
    """The zoo's line that synchronised; the error itself where it is another one."""
    if "synchronizing" not in str(error):
        return f"{type(error).__name__}: {error}"
    ours = [frame for frame in traceback.extract_tb(error.__traceback__) if "zoo" in Path(frame.filename).parts]
    return " ← ".join(f"{Path(frame.filename).name}:{frame.lineno}" for frame in ours[:-3:-1]) or "in the backward pass"


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
