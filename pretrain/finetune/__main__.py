"""`python -m pretrain.finetune`; see `pretrain.finetune.train`."""

from pretrain.finetune.train import script

script()
