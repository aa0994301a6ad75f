"""`python -m pretrain.finetune`; see `pretrain.finetune.train`."""

from pretrain.finetune.train import main
from pretrain.process_group import leave

leave(main())
