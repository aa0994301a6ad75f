"""`python -m pretrain.finetune`; see `pretrain.finetune.train`."""

from pretrain.engine import leave
from pretrain.finetune.train import main

leave(main())
