"""From parts of documents to what a model of `zoo.hf` takes, and back."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import BatchFeature, ProcessorMixin

from zoo.carries import Channels, Vectors
from zoo.config import ConfigError, UserError
from zoo.files import atomic_write
from zoo.generate import Part, document, read_part
from zoo.hf.folder import local_folder
from zoo.hf.tokenizer import stream_tokenizer
from zoo.kept import FOLDER, keep_modalities, open_modalities
from zoo.modalities import Grammar, Modality, Piece, Vocabulary, grammars, parse_modalities, vocabulary

PROCESSOR = "processor_config.json"
Document = Sequence[Part | str]


class ZooProcessor(ProcessorMixin):
    """Encodes documents with a run's own modalities, and says what ids stand for.

    Args:
        modalities: of the run by name, ready for use, in order.
        folder: where they come from, for messages.
    """

    def __init__(self, modalities: Mapping[str, Modality], folder: Path = Path("processor")) -> None:
        self.modalities, self.folder, self.chat_template = dict(modalities), folder, None
        sections = {name: modality.config for name, modality in modalities.items()}
        self.vocabulary: Vocabulary = vocabulary(sections)
        self.grammars: dict[str, Grammar] = grammars(sections)
        self._names = {each.begin: name for name, each in self.grammars.items() if each.begin is not None}

    def __call__(self, documents: Sequence[Document], return_tensors: str = "pt", **options: Any) -> BatchFeature:
        """Prompts as `input_ids` and `attention_mask` (B, T), padded on the left, and `content` where a modality's
        positions carry no ids.

        Args:
            documents: of each prompt its parts, strings or `zoo.Part`; none of them ends its document.
        Raises:
            UserError: a part is of no modality of the run, or no such item.
        """
        if options or return_tensors != "pt":
            raise UserError(
                f"processor: takes documents and return_tensors='pt' alone, not {sorted(options) or return_tensors!r}"
            )
        if isinstance(documents, str) or any(isinstance(each, str | Part) for each in documents):
            raise UserError(
                "processor: give a list of documents, each a list of parts: processor([['seven'], ['two']])"
            )
        pieces = [document(self, parts) for parts in documents]
        width = max(map(len, pieces), default=0)
        ids = torch.full((len(pieces), width), self.vocabulary.eos)
        mask = torch.zeros_like(ids)
        for row, piece in enumerate(pieces):
            ids[row, width - len(piece) :], mask[row, width - len(piece) :] = torch.from_numpy(piece.tokens), 1
        features = {"input_ids": ids, "attention_mask": mask}
        content = {name: values for name in self.grammars if (values := self._carried(name, pieces, width)) is not None}
        return BatchFeature(features | ({"content": content} if content else {}))

    def _carried(self, name: str, pieces: Sequence[Piece], width: int) -> Tensor | None:
        """(B, T, …) what the positions of a modality carry; None where it carries ids, or none stands there."""
        match self.grammars[name].carries:
            case Vectors(size):
                values = torch.zeros(len(pieces), width, size)
            case Channels(count, _):
                values = torch.zeros(len(pieces), width, count, dtype=torch.int64)
            case _:
                return None
        number = self.vocabulary.modalities.index(name)
        for row, piece in enumerate(pieces):
            places = torch.from_numpy(np.flatnonzero(piece.modality == number)) + width - len(piece)
            if len(places):
                values[row, places] = torch.from_numpy(piece.content[name]).to(values.dtype)
        return values if any(name in piece.content for piece in pieces) else None

    def read(self, part: str, path: str | Path) -> Part:
        """The item in a file, for the modality that reads parts of that type: "image", "audio"."""
        return read_part(self, part, path)

    def parts(self, ids: Tensor | np.ndarray | Sequence[int]) -> list[Part]:
        """The parts that a row of ids (T,) stands for, up to the end of its document. An item that has no end yet, or
        whose positions carry no ids, is left out."""
        row = np.asarray(ids.cpu() if isinstance(ids, Tensor) else ids)
        row = row[np.flatnonzero(row == self.vocabulary.bos)[-1] + 1 :] if (row == self.vocabulary.bos).any() else row
        start, stop, _ = self.grammars[self.vocabulary.text].choice
        found: list[tuple[str, list[int]]] = []
        inside: str | None = None
        for token in row.tolist():
            if token == self.vocabulary.eos:
                break
            if token in self._names:
                inside = self._names[token]
                found.append((inside, []))
            elif inside is not None and token == self.grammars[inside].end:
                inside = None
            elif inside is not None:
                found[-1][1].append(token - self.grammars[inside].choice.start)
            elif start <= token < stop:
                if not found or found[-1][0] != self.vocabulary.text:
                    found.append((self.vocabulary.text, []))
                found[-1][1].append(token - start)
        whole = found[:-1] if inside is not None else found
        return [
            Part(name, self.modalities[name].decode(np.array(content)))
            for name, content in whole
            if not self.grammars[name].holds_places
        ]

    def batch_parts(self, ids: Tensor | np.ndarray) -> list[list[Part]]:
        """`parts` of every row of ids (B, T)."""
        return [self.parts(row) for row in ids]

    def decode(self, token_ids: Any, **options: Any) -> str:
        """The text of a row of ids; an item stands there as its modality's name in brackets."""
        text = self.vocabulary.text
        return "".join(part.item if part.modality == text else f"[{part.modality}]" for part in self.parts(token_ids))

    def batch_decode(self, sequences: Any, **options: Any) -> list[str]:
        return [self.decode(row) for row in sequences]

    # ------------------------------------------------------------------------------------------------------- folders

    def save_pretrained(self, save_directory: str | Path, push_to_hub: bool = False, **kwargs: Any) -> list[str]:
        """Write the modalities, with their tokenizers and codebooks, and a tokenizer of the stream's ids if one can be
        made of that of text."""
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        keep_modalities(folder, self.modalities)
        sections = {}
        for name, modality in self.modalities.items():
            sections[name] = modality.config.beside(Path(FOLDER) / name).model_dump(mode="json")
        about = {"processor_class": type(self).__name__, "modalities": sections}
        atomic_write(folder / PROCESSOR, json.dumps(about, indent=1) + "\n")
        tokenizer = stream_tokenizer(self.modalities)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        return [str(folder / PROCESSOR)]

    @classmethod
    def from_pretrained(  # pyrefly: ignore[bad-override]  # its options are those of `local_folder`
        cls, pretrained_model_name_or_path: Any, **kwargs: Any
    ) -> ZooProcessor:
        """Open what `save_pretrained` wrote.

        Raises:
            UserError: it is none, a file of it is damaged, or ids mean something else than when the run was trained.
        """
        folder = local_folder(pretrained_model_name_or_path, kwargs)
        path = folder / PROCESSOR
        try:
            about = json.loads(path.read_text(encoding="utf-8"))
            if "auto_map" in about:
                raise ValueError("auto_map: names code that came with the folder")
            sections = parse_modalities(about["modalities"])
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            why = "; ".join(str(error).splitlines()) if isinstance(error, ConfigError) else error
            raise UserError(f"{path}: cannot be read ({why}); export the run anew") from None
        return cls(open_modalities(folder, sections), folder)

    def __repr__(self) -> str:
        return f"ZooProcessor({', '.join(self.modalities)})"
