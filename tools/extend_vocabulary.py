"""Give a LLaVA whose tokens are words those that new questions need.

    python -m tools.extend_vocabulary MODEL DATA OUT

MODEL is a folder of `tools.make_llava` (without `vocabulary`), trained or not; OUT gets it with one more token for each
word of DATA's training questions and answers that it lacks. Its weights stay what they are: only rows are added, near
the mean of the others, to its embeddings and its head.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
from tokenizers import models

from tools.make_llava import texts_of
from zoo.config import UserError


def missing_words(tokenizer: Any, texts: list[str]) -> list[str]:
    """Words of `texts`, as the tokenizer divides and writes them, that are none of its tokens; sorted.

    Raises:
        UserError: its tokens are no words.
    """
    if tokenizer.unk_token is None or type(tokenizer.backend_tokenizer.model).__name__ != "WordLevel":
        raise UserError("the model's tokenizer divides words it does not know; it needs no more of them")
    backend, known = tokenizer.backend_tokenizer, tokenizer.get_vocab()
    written = {backend.normalizer.normalize_str(text) for text in texts}
    words = {word for text in written for word, _ in backend.pre_tokenizer.pre_tokenize_str(text)}
    return sorted(words - known.keys())


def extend(model: Any, processor: Any, texts: list[str]) -> list[str]:
    """Add the words of `texts` that are missing, in place; returns them."""
    tokenizer = processor.tokenizer
    words = missing_words(tokenizer, texts)
    if words:
        known = tokenizer.get_vocab()
        added = {word: len(known) + number for number, word in enumerate(words)}
        # not `add_tokens`, whose "row" would be found in "row 2, column 3" before that is one word
        tokenizer.backend_tokenizer.model = models.WordLevel(known | added, unk_token=tokenizer.unk_token)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model.resize_token_embeddings(len(tokenizer))
    return words


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="folder of a model of `tools.make_llava`")
    parser.add_argument("data", type=Path, help="folder with train.jsonl")
    parser.add_argument("out", type=Path, help="folder to write")
    options = parser.parse_args(arguments)
    try:
        if (options.out / "config.json").exists():
            raise UserError(f"{options.out} holds a model already; give another folder")
        if not (options.model / "config.json").is_file():
            raise UserError(f"{options.model} holds no config.json; give a folder of a model")
        import transformers

        model = transformers.AutoModelForImageTextToText.from_pretrained(options.model)
        processor = transformers.AutoProcessor.from_pretrained(options.model)
        words = extend(model, processor, texts_of(options.data))
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    processor.save_pretrained(options.out)
    model.save_pretrained(options.out)
    print(f"{options.out}: {len(words)} words more: {', '.join(words) or 'none was missing'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
