"""Write a trained run as a folder that Transformers opens.

    python -m tools.export RUN OUT
    python -m tools.export RUN OUT --plain --dtype bfloat16

After `import zoo.hf`, AutoModelForCausalLM and AutoProcessor open OUT. With --plain OUT is a LlamaForCausalLM, or a
Qwen3ForCausalLM where queries and keys are normalised, and nothing of the zoo is needed; a model that is neither is
refused with the part that prevents it.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from tools.describe.tree import count
from zoo.config import UserError


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    try:
        if not options.shard_gb > 0:
            raise UserError(f"--shard-gb: {options.shard_gb}; give a size above 0")
        from pretrain.export import export

        done = export(
            options.run,
            options.out,
            plain=options.plain,
            dtype=options.dtype,
            shard=int(options.shard_gb * 1e9),
            checkpoint=options.checkpoint,
            imports=options.imports,
        )
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    opens = "AutoTokenizer opens it, too" if done.tokenizer else "its text has no tokenizer that AutoTokenizer opens"
    print(
        f"{options.out}: {done.architecture}, {count(done.parameters)} parameters in {len(done.files)} file(s); {opens}"
    )
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="tools.export", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, help="folder of the run")
    parser.add_argument("out", type=Path, help="new folder")
    parser.add_argument("--plain", action="store_true", help="as LlamaForCausalLM or Qwen3ForCausalLM")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32", help="(float32)")
    parser.add_argument("--shard-gb", type=float, default=5, metavar="N", help="largest file of weights (5)")
    parser.add_argument("--checkpoint", metavar="step-N", help="a checkpoint, in place of the weights at the end")
    parser.add_argument("--imports", nargs="+", default=[], metavar="MODULE", help="modules with blocks of your own")
    return parser


if __name__ == "__main__":
    sys.exit(main())
