"""Train a 90M recipe for some steps on a GPU by its documented entry point: python -m tools.gpu_check.training FOLDER

Its data are real handwritten digits, made larger: what is looked at is that the whole path runs under DeepSpeed in
bf16, that the loss falls, and how many tokens a second pass.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from pretrain import metrics

ROOT = Path(__file__).parents[2]
RECIPE = "recipes/models/mod_moma_4t4i_90m.yaml"
STEPS = 30


def main() -> int:
    folder = Path(sys.argv[1]).resolve()
    data, run = folder / "digits", folder / "run"
    if not data.exists():
        subprocess.run([sys.executable, "-m", "tools.examples.make_digits", str(data)], check=True, cwd=ROOT)
    overrides = [
        f"data.path={data}",
        f"run_dir={run}",
        f"train.steps={STEPS}",
        "train.global_batch=16",
        "train.micro_batch=8",
        "train.log_every=5",
        "schedule.warmup_steps=5",
        "evaluate.rows=8",
        "data.sequence_length=1024",
        "modalities.image.image_size=64",
        "modalities.image.codes=512",
        "deepspeed={zero_optimization: {stage: 1}}",
    ]
    launcher = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_accelerators", "1"]  # what `deepspeed` runs
    command = [*launcher, "--module", "pretrain.train", RECIPE, *overrides]
    subprocess.run(command, check=True, cwd=ROOT)
    lines = [line for line in metrics.read(run / "metrics.jsonl") if "tokens_per_second" in line]
    first, last = lines[0], lines[-1]
    speed = sorted(line["tokens_per_second"] for line in lines[1:])[len(lines) // 2 - 1]
    print(
        f"loss {first['loss']:.3f} after {first['step']} steps, {last['loss']:.3f} after {last['step']}; "
        f"{speed:,.0f} tokens a second (median of the log steps)"
    )
    return int(not last["loss"] < first["loss"])


if __name__ == "__main__":
    sys.exit(main())
