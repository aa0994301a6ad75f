"""The config of an exported model: the sections of its recipe that decide what it computes, and what Transformers asks
of every config."""

from __future__ import annotations

import hashlib
import json
import sys
from typing import Any, Literal

import transformers

from zoo.config import ConfigError, UserError, shown
from zoo.modalities import Modalities, Vocabulary, parse_modalities, vocabulary
from zoo.model import ModelConfig


class ZooConfig(transformers.PreTrainedConfig):
    """What `config.json` of an exported model says.

    Raises:
        UserError: it was altered since it was written, names code of its own, or no such model can be built.
    """

    model_type = "early_fusion_zoo"
    keys_to_ignore_at_inference = ["past_key_values"]

    network: dict[str, Any] | None = None
    """Section `model` of the recipe."""
    modalities: dict[str, Any] | None = None
    """Section `modalities` of the recipe."""
    objective: dict[str, Any] | None = None
    """Section `objective` of the recipe: what the model was trained for."""
    imports: list[str] | None = None
    """Modules with blocks of the run's own. Whoever opens the model imports them first; a folder imports nothing."""
    checksum: str | None = None
    """Hash of what stands above; it is set by itself."""
    routing: Literal["causal", "topk"] = "causal"
    """"causal": auxiliary routers decide token by token. "topk": as in training; a token then sees those after it."""
    grammar: bool = True
    """`generate` keeps to the grammar of the modalities: after a begin marker exactly the positions of an item."""
    use_cache: bool = True
    tie_word_embeddings: bool = False
    vocab_size: int = 0
    hidden_size: int = 0
    num_hidden_layers: int = 0
    max_position_embeddings: int = 0
    """T: tokens of the rows that the model was trained on."""
    bos_token_id: int | None = Vocabulary.bos
    eos_token_id: int | list[int] | None = Vocabulary.eos
    pad_token_id: int | None = Vocabulary.eos
    """What `generate` puts after the end of a document; where padding is, the attention mask says."""

    def __post_init__(self, **kwargs: Any) -> None:
        if "auto_map" in kwargs:
            raise UserError(
                "config.json: auto_map: names code that came with the folder, which an exported model never needs; "
                "remove the key if you trust the rest"
            )
        super().__post_init__(**kwargs)
        if self.network is None:  # Transformers makes an empty one, to know the defaults
            return
        if self.checksum not in (None, self._sum()):
            raise UserError("config.json: was altered since it was written; restore it, or export the run anew")
        self.checksum = self._sum()
        network, words = self.model_config(), vocabulary(self.modality_configs())
        if words.modalities != tuple(network.modalities) or words.size > (network.vocab_size or 0):
            raise UserError("config.json: network and modalities do not go together; restore it")
        self.vocab_size, self.hidden_size = network.vocab_size or 0, network.d_model
        self.num_hidden_layers = len(network.pattern())

    def _sum(self) -> str:
        parts = (self.network, self.modalities, self.objective, self.imports, self.max_position_embeddings)
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    def model_config(self) -> ModelConfig:
        """The validated section `network`."""
        if self.network is None:
            raise UserError("config.json: has no network; give the folder of an exported model")
        try:
            return ModelConfig.parse(self.network, "network")
        except ConfigError as error:
            raise UserError(f"config.json: {'; '.join(str(error).splitlines())}{self._unknown()}") from None

    def modality_configs(self) -> Modalities:
        """The validated section `modalities`."""
        try:
            return parse_modalities(self.modalities or {})
        except ConfigError as error:
            raise UserError(f"config.json: {'; '.join(str(error).splitlines())}{self._unknown()}") from None

    def _unknown(self) -> str:
        missing = [module for module in self.imports or [] if module not in sys.modules]
        return f"; if you trust the modules {shown(missing)}, import them first" if missing else ""
