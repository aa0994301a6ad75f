"""zoo.adapt: Mixture-of-Depths for pretrained multimodal LLMs of Transformers. Everything public is named here."""

import importlib.util

if importlib.util.find_spec("transformers") is None:
    raise ModuleNotFoundError("zoo.adapt needs Transformers: pip install -e .[adapt]", name="transformers")

from zoo.adapt.cache import CacheReport, cache_report
from zoo.adapt.config import AdaptConfig
from zoo.adapt.context import AdaptContext
from zoo.adapt.flops import Flops, decoder_flops, traced_flops
from zoo.adapt.hooks import auxiliary_loss
from zoo.adapt.layer import Decision
from zoo.adapt.save import load_adapted, save_adapted
from zoo.adapt.wrap import adapt, adaptation, restore, routed_layers, routers
from zoo.trace import Trace

__all__ = [
    "AdaptConfig",
    "AdaptContext",
    "CacheReport",
    "Decision",
    "Flops",
    "Trace",
    "adapt",
    "adaptation",
    "auxiliary_loss",
    "cache_report",
    "decoder_flops",
    "load_adapted",
    "restore",
    "routed_layers",
    "routers",
    "save_adapted",
    "traced_flops",
]
