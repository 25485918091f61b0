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
    """The file's tokenizer and chat template as transformers reads them; a sentence if that is not possible here."""
    try:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    except (ImportError, KeyError, ValueError) as error:  # older releases want protobuf too; not every kind is known
        reason = " ".join(str(error).split())[:200]
        return f"no tokenizer was written, for transformers (pip install 'marlin_gen[hf]') could not read it: {reason}"
    tokenizer.save_pretrained(folder)
    return None
