"""Sources: from files in any of the formats people have to documents."""

from pretrain.data.sources.documents import DocumentShards, open_shards
from pretrain.data.sources.files import Shard
from pretrain.data.sources.source import (
    Content,
    Contents,
    Document,
    Loss,
    Source,
    SourceConfig,
    SourceSlot,
    share,
    text_part,
)

__all__ = [
    "Content",
    "Contents",
    "Document",
    "DocumentShards",
    "Loss",
    "Shard",
    "Source",
    "SourceConfig",
    "SourceSlot",
    "open_shards",
    "share",
    "text_part",
]
