"""Data: shards → documents → token stream → packed rows → batches."""

from pretrain.data.batches import micro_batches, tokens_by_rank
from pretrain.data.config import DataConfig, check_length
from pretrain.data.documents import Documents
from pretrain.data.errors import DataError
from pretrain.data.index import Skipped
from pretrain.data.mixture import Mixture
from pretrain.data.opening import Data, open_data, tokenize_part
from pretrain.data.packing import Row, TokenStream

__all__ = [
    "Data",
    "DataConfig",
    "DataError",
    "Documents",
    "Mixture",
    "Row",
    "Skipped",
    "TokenStream",
    "check_length",
    "micro_batches",
    "open_data",
    "tokenize_part",
    "tokens_by_rank",
]
