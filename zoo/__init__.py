"""zoo: composable blocks for early-fusion models. Everything public is named here."""

from zoo import (  # noqa: F401  they register their blocks
    attention,
    depth,
    experts,
    feedforward,
    mamba,
    mamba2,
    mixer_gate,
    moma,
    token_choice,
    unet,
)
from zoo.batch import Batch
from zoo.build import build, build_block, build_model
from zoo.calibrate import calibrate
from zoo.config import Config, ConfigError, UserError
from zoo.context import TokenContext
from zoo.flops import Cost
from zoo.generate import Part
from zoo.modality import Modality
from zoo.model import Model, ModelConfig, initialise
from zoo.objectives import autoregressive, denoising  # noqa: F401
from zoo.registry import BlockConfig, Place, known, register
from zoo.routing.scorer import Router, Scorer
from zoo.run import Run, load
from zoo.slots import Depth, FeedForward, Head, Mixer, Objective, Stem
from zoo.trace import Trace

__all__ = [
    "Batch",
    "BlockConfig",
    "Config",
    "ConfigError",
    "Cost",
    "Depth",
    "FeedForward",
    "Head",
    "Mixer",
    "Modality",
    "Model",
    "ModelConfig",
    "Objective",
    "Part",
    "Place",
    "Router",
    "Run",
    "Scorer",
    "Stem",
    "TokenContext",
    "Trace",
    "UserError",
    "build",
    "build_block",
    "build_model",
    "calibrate",
    "initialise",
    "known",
    "load",
    "register",
]
