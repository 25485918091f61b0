"""The tokenizer that a GGUF file carries."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from marlin_gen.checkpoints.gguf import open_reader, read_metadata

_CONTROL, _USER_DEFINED = 3, 4  # llama.cpp's token types that are never made of other tokens
_DIGITS = {"gpt-2": False, "smollm": True}  # by its name of how text is split: whether each digit stands alone


def tokenizer_from_gguf(path: str | os.PathLike[str]) -> Any:
    """The tokenizer in ``path`` with its special tokens and chat template.

    Byte-level BPE of the kinds gpt-2 and smollm is built here: releases of transformers differ in what they make of it
    (some put a bos token first that the file does not ask for). Others are left to transformers, which raises its own
    errors for what it does not read.
    """
    about = read_metadata(open_reader(path))
    fields = about["tokenizer"]
    if fields.get("model") != "gpt2" or fields.get("pre", "gpt-2") not in _DIGITS or fields.get("add_bos_token"):
        return AutoTokenizer.from_pretrained(Path(path).parent, gguf_file=Path(path).name)
    tokens = fields["tokens"]
    merges = [tuple(merge.split(" ", 1)) for merge in fields.get("merges") or ()]
    built = Tokenizer(models.BPE(vocab={token: number for number, token in enumerate(tokens)}, merges=merges))
    by_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alone = _DIGITS[fields.get("pre", "gpt-2")]
    digits = pre_tokenizers.Digits(individual_digits=True)
    built.pre_tokenizer = pre_tokenizers.Sequence([digits, by_bytes]) if alone else by_bytes
    built.decoder = decoders.ByteLevel()
    kinds = fields.get("token_type") or [1] * len(tokens)
    for kind, add in ((_CONTROL, built.add_special_tokens), (_USER_DEFINED, built.add_tokens)):
        special = kind == _CONTROL
        add([AddedToken(t, special=special, normalized=False) for t, k in zip(tokens, kinds, strict=True) if k == kind])
    named = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    numbers = {f"{ours}_token": fields.get(f"{theirs}_token_id") for ours, theirs in named.items()}
    return PreTrainedTokenizerFast(
        tokenizer_object=built,
        chat_template=fields["chat_template"],
        model_max_length=about["context_length"],
        clean_up_tokenization_spaces=False,
        **{name: tokens[number] for name, number in numbers.items() if number is not None},
    )
