"""A GGUF file as a source to convert."""

from __future__ import annotations

from pathlib import Path

import torch

from marlin_gen.checkpoints.gguf_llama import open_model
from marlin_gen.convert.source import Source, Unit


def open_gguf(path: Path) -> Source:
    """The model in ``path``, by transformers' names: see ``marlin_gen.checkpoints.gguf_llama.open_model``."""
    config, tensors = open_model(path)
    units = tuple(
        Unit(one.name.removesuffix(".weight") if one.is_quantised else one.name, one.nbytes, one.is_quantised, one.read)
        for one in tensors
    )
    return Source(path, units, config, {"quant_method": "gguf"}, torch.float16, (path,), ())


def write_tokenizer(path: Path, folder: Path) -> str | None:
    """The file's tokenizer and chat template, for transformers; a sentence if that is not possible here."""
    try:
        from marlin_gen.hf.tokenizer import tokenizer_from_gguf
    except ImportError as error:
        return f"no tokenizer was written: {error}"
    try:
        tokenizer_from_gguf(path).save_pretrained(folder)
    except Exception as error:  # transformers' own readers fail in many ways; the weights are whole all the same
        return f"no tokenizer was written: {type(error).__name__}: {' '.join(str(error).split())[:200]}"
    return None
