"""Sources: from files in any of the formats people have to documents."""

from pretrain.data.sources.audio import AudioFolder
from pretrain.data.sources.captions import Captions
from pretrain.data.sources.documents import DocumentShards, open_shards
from pretrain.data.sources.files import Shard
from pretrain.data.sources.img2dataset import Img2dataset
from pretrain.data.sources.interleaved import Interleaved
from pretrain.data.sources.llava import Llava
from pretrain.data.sources.mmc4 import MMC4
from pretrain.data.sources.pages import Pages
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
from pretrain.data.sources.text import PlainText

__all__ = [
    "MMC4",
    "AudioFolder",
    "Captions",
    "Content",
    "Contents",
    "Document",
    "DocumentShards",
    "Img2dataset",
    "Interleaved",
    "Llava",
    "Loss",
    "Pages",
    "PlainText",
    "Shard",
    "Source",
    "SourceConfig",
    "SourceSlot",
    "open_shards",
    "share",
    "text_part",
]
