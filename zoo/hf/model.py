"""An exported model as Transformers knows models: forward, loss, `generate`, saving and opening."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from transformers import GenerationMixin, LogitsProcessorList, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from zoo.build import build_model
from zoo.carries import Vectors
from zoo.config import UserError
from zoo.context import TokenContext
from zoo.hf.cache import UNBOUNDED, ZooCache
from zoo.hf.config import ZooConfig
from zoo.hf.folder import check_folder, local_folder
from zoo.hf.grammar import GrammarLogits
from zoo.modalities import grammars, vocabulary
from zoo.objectives.denoising import Denoising
from zoo.registry import parse_block
from zoo.roles import ParameterOwner


class ZooForCausalLM(PreTrainedModel, GenerationMixin):
    """A model of the zoo, `zoo.Model`, as `model`.

    Documents of a row are told apart by their `<bos>`, modalities by their ids, items by their markers. It is causal:
    auxiliary routers decide what passes (`config.routing`).
    """

    config_class = ZooConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _is_stateful = True
    _no_split_modules = ["Block", "MixtureOfDepths"]

    def __init__(self, config: ZooConfig) -> None:
        super().__init__(config)
        sections = config.modality_configs()
        self.vocabulary, self.grammars = vocabulary(sections), grammars(sections)
        self.model = build_model(config.model_config(), seed=None)
        two_way = tuple(name for name, modality in sections.items() if modality.bidirectional)
        self._two_way = [self.vocabulary.modalities.index(name) for name in two_way]
        denoised = config.objective is not None and issubclass(
            parse_block("objective", config.objective, "objective").block, Denoising
        )
        self.drawn = frozenset(two_way if denoised else ())
        """Modalities whose items are drawn from noise, which `generate` does not do."""
        self.post_init()

    # ------------------------------------------------------------------------------------------------------- forward

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: ZooCache | None = None,
        content: Mapping[str, Tensor] | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        inputs_embeds: Tensor | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast | tuple[Any, ...]:
        """Logits (B, T, V) of the ids (B, T); beside them a loss where there are labels.

        Args:
            attention_mask: (B, T), or (B, S) with what has been seen before; 0 at padding, which may stand anywhere.
            past_key_values: what has been seen of the rows; it is changed in place.
            content: what the positions of each modality carry that carries no ids: (B, T, …), 0 elsewhere.
            labels: (B, T) ids to predict, −100 where nothing is asked. The begin of a document, and positions that
                carry no ids, are never asked.
            logits_to_keep: how many of the last columns logits are wanted of, or which; 0: all.
        """
        if input_ids is None or inputs_embeds is not None:
            raise UserError("inputs_embeds: the ids say which modality a token is of; give input_ids")
        keep = use_cache if use_cache is not None else self.config.use_cache and not self.training
        cache = self._cache(past_key_values, len(input_ids)) if keep or past_key_values is not None else None
        context, carried = self._context(input_ids, attention_mask, cache, content or {})
        rows, width = input_ids.shape
        columns = torch.arange(width, device=input_ids.device)
        if isinstance(logits_to_keep, Tensor):
            columns = columns[logits_to_keep]
        elif logits_to_keep:
            columns = columns[-logits_to_keep:]
        places = (torch.arange(rows, device=input_ids.device)[:, None] * width + columns).flatten()
        states = None if cache is None else cast(Any, cache.states)
        valid = context.valid
        tokens = input_ids.masked_fill(~valid, 0) if context.padded else input_ids
        logits, _ = self.model(tokens, context, states, carried, read=self._nowhere(places), logits_at=places)
        logits = logits.view(rows, len(columns), -1)
        loss = None
        if labels is not None:
            if logits.shape[1] != width:
                raise UserError("logits_to_keep: a loss needs all logits; leave it out where labels are given")
            unasked = [self.vocabulary.bos, *self._places()]  # nothing stands before the begin of a document
            asked = valid & ~torch.isin(input_ids, input_ids.new_tensor(unasked))
            loss = self.loss_function(
                logits=logits, labels=labels.masked_fill(~asked, -100), vocab_size=logits.shape[-1], **kwargs
            )
        output = CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=cache)
        return output if return_dict is not False else output.to_tuple()

    def _cache(self, cache: Any, rows: int) -> ZooCache:
        """The cache to go on with, made for these rows if it is new."""
        cache = ZooCache() if cache is None else cache
        if not isinstance(cache, ZooCache):
            raise UserError(
                f"past_key_values: a {type(cache).__name__} cannot hold the states of routed and recurrent layers; "
                "leave it out, or give a zoo.hf.ZooCache()"
            )
        if not cache.states:
            cache.begin(self.model.init_state(rows, UNBOUNDED), rows)
        cache.check_rows(rows)
        return cache

    def _context(
        self, ids: Tensor, mask: Tensor | None, cache: ZooCache | None, content: Mapping[str, Tensor]
    ) -> tuple[TokenContext, dict[str, Tensor]]:
        """What the model is told of the tokens (B, T), and what their positions carry, as `zoo.Model` takes it."""
        host = ids.cpu().numpy()
        rows, width = host.shape
        valid = np.ones(host.shape, bool) if mask is None else mask[:, -width:].cpu().numpy().astype(bool)
        if mask is not None and valid.shape != host.shape:
            raise UserError(f"attention_mask: shape {tuple(mask.shape)} does not go with ids {tuple(ids.shape)}")
        try:
            modality = np.where(valid, self.vocabulary.modality_of(np.where(valid, host, 0)), -1).astype(np.int64)
        except ValueError as error:
            raise UserError(f"input_ids: {error}") from None
        begins = valid & (host == self.vocabulary.bos)
        before = ZooCache() if cache is None else cache
        if cache is None:
            before.begin([], rows)
        document = np.maximum(before.documents[:, None] + begins.cumsum(1), 0)
        length = _lengths(valid, begins, before.lengths)
        item, inside = self._items(modality, document, before.inside)
        if cache is not None:
            cache.documents, cache.lengths, cache.inside = document[:, -1], length[:, -1], inside
            cache.columns += width
        context = TokenContext.from_modality(
            torch.from_numpy(modality),
            torch.from_numpy(np.where(valid, document, -1)),
            torch.from_numpy(np.where(valid, length - 1, 0)),
            modalities=self.vocabulary.modalities,
            routing=self.config.routing,
            item=item,
            step=int(torch.randint(2**31, ())) if self.training else 0,
        )
        carried = {}
        for name, values in content.items():
            if name not in self.model.carries:
                raise UserError(f"content: {name!r} carries ids, or is no modality; {', '.join(self.model.carries)}")
            places = torch.from_numpy(modality == self.vocabulary.modalities.index(name)).to(values.device)
            wide = isinstance(self.model.carries[name], Vectors)
            carried[name] = values[places].to(ids.device, self.dtype if wide else torch.int64)
        return context.to(ids.device), carried

    def _items(
        self, modality: np.ndarray, document: np.ndarray, inside: np.ndarray
    ) -> tuple[Tensor | None, np.ndarray]:
        """(B, T) number of the item that sees all of itself, and (B,) whether a row's last token belongs to one."""
        here = np.isin(modality, self._two_way)
        if (here[:, 0] & inside).any():
            raise UserError("input_ids: an item that sees all of itself is in two pieces; give it whole, in one call")
        begins = here.copy()
        begins[:, 1:] &= ~here[:, :-1]
        item = np.where(here, begins.cumsum(1) - 1, -1)
        last = here[:, -1] if here.shape[1] else inside
        return (torch.from_numpy(item) if here.any() else None), last

    def _nowhere(self, places: Tensor) -> dict[str, Tensor]:
        """Heads of their own are run, on nothing, so that every rank uses every parameter."""
        return dict.fromkeys(self.model.heads, places[:0])

    def _places(self) -> list[int]:
        """The ids that hold places of what carries no ids."""
        return [each.choice.start for each in self.grammars.values() if each.holds_places]

    # ------------------------------------------------------------------------------------------------------ generate

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False  # the first forward makes a cache of its own

    def prepare_inputs_for_generation(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        inputs: dict[str, Any] = GenerationMixin.prepare_inputs_for_generation(cast(Any, self), *args, **kwargs)
        content, seen = inputs.get("content"), inputs.get("past_key_values")
        if content is not None:  # of the prompt alone; what is written carries ids
            columns = inputs["input_ids"].shape[1]
            first = 0 if seen is None else seen.get_seq_length()
            inputs["content"] = {name: _columns(values, first, columns) for name, values in content.items()}
        return inputs

    def _expand_inputs_for_generation(
        self, expand_size: int = 1, is_encoder_decoder: bool = False, input_ids: Any = None, **kwargs: Any
    ) -> tuple[Any, dict[str, Any]]:
        if kwargs.get("content") is not None:
            repeated = {name: v.repeat_interleave(expand_size, dim=0) for name, v in kwargs["content"].items()}
            kwargs["content"] = repeated
        return GenerationMixin._expand_inputs_for_generation(
            cast(Any, self), expand_size, is_encoder_decoder, input_ids, **kwargs
        )

    def _get_logits_processor(
        self, generation_config: Any, *args: Any, logits_processor: Any = None, **kwargs: Any
    ) -> LogitsProcessorList:
        processors = GenerationMixin._get_logits_processor(
            cast(Any, self), generation_config, *args, logits_processor=logits_processor, **kwargs
        )
        if self.config.grammar:  # before what keeps the likeliest
            length = generation_config.max_length
            processors.insert(0, GrammarLogits(self.grammars, self.vocabulary, length, self.drawn))
        return processors

    # ------------------------------------------------------------------------------------------- weights and folders

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """As Transformers', from safetensors alone.

        Raises:
            UserError: the folder is none of an exported model, or its weights do not fit its config.
        """
        source = pretrained_model_name_or_path
        if source is None:  # weights come as a state_dict
            return super().from_pretrained(source, *args, **kwargs)
        folder = local_folder(source, kwargs)
        config = kwargs.get("config")
        check_folder(folder, cls, config if isinstance(config, ZooConfig) else ZooConfig.from_pretrained(folder))
        return super().from_pretrained(folder, *args, **kwargs | {"use_safetensors": True})

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """First values of a new model, drawn from torch's random state."""
        if not isinstance(module, ParameterOwner):
            return
        for name, parameter in module.named_parameters(recurse=False):
            if getattr(parameter, "_is_hf_initialized", False) or parameter.is_meta or not parameter.numel():
                continue
            generator = torch.Generator().manual_seed(int(torch.randint(2**31, ())))
            value = torch.empty(parameter.shape, dtype=torch.promote_types(parameter.dtype, torch.float32))
            module.initialise(name, value, generator)
            parameter.copy_(value)

    def get_input_embeddings(self) -> nn.Module:
        return self.model.embedding

    def get_output_embeddings(self) -> nn.Module:
        return self.model.head

    def resize_token_embeddings(  # pyrefly: ignore[bad-override]  # whatever else is asked, ids stay
        self, new_num_tokens: int | None = None, *args: Any, **kwargs: Any
    ) -> nn.Module:
        if new_num_tokens not in (None, self.config.vocab_size):
            raise UserError(
                f"vocabulary: has {self.config.vocab_size} ids, a range of them for each modality, and cannot be "
                f"resized to {new_num_tokens}; start a run with tools.upcycle"
            )
        return self.model.embedding

    def _set_gradient_checkpointing(  # pyrefly: ignore[bad-override]  # the model recomputes with its own function
        self, enable: bool = True, every_n_layers: int = 1, **kwargs: Any
    ) -> None:
        if every_n_layers != 1:
            raise UserError(f"every_n_layers: {every_n_layers}: a model of the zoo recomputes every layer, or none")
        self.model.activation_checkpointing = enable

    @property
    def is_gradient_checkpointing(self) -> bool:
        return bool(self.model.activation_checkpointing)


def _lengths(valid: np.ndarray, begins: np.ndarray, before: np.ndarray) -> np.ndarray:
    """(B, T): how many tokens a row's document has at each column, the column's own included.

    Args:
        begins: (B, T) where a document begins.
        before: (B,) tokens of the document that a row goes on with.
    """
    count = before[:, None] + valid.cumsum(1)
    started = np.maximum.accumulate(np.where(begins, count - 1, 0), axis=1)
    return count - started


def _columns(values: Tensor, first: int, count: int) -> Tensor:
    """`count` columns of values (B, T, …) from `first` on, 0 past their end."""
    part = values[:, first : first + count]
    missing = count - part.shape[1]
    return part if not missing else torch.cat([part, part.new_zeros(len(part), missing, *part.shape[2:])], 1)
