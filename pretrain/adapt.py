"""The old name of `pretrain.finetune`."""

import sys

if __name__ == "__main__":
    print("error: pretrain.adapt is now pretrain.finetune: python -m pretrain.finetune RECIPE.yaml", file=sys.stderr)
    sys.exit(2)
