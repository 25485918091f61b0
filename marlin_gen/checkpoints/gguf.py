"""GGUF files (llama.cpp): tensors one by one, and what their metadata say of the model.

Blocks of 32 weights along k, after ggml-common.h (block_q4_0, block_q4_1, block_q8_0); d, m are little-endian float16:

    Q4_0  d, 16 bytes      w = (q - 8) * d
    Q4_1  d, m, 16 bytes   w = q * d + m
    Q8_0  d, 32 bytes      w = q * d, q signed

Byte i of a 4-bit block holds weight i in its low half and weight i + 16 in its high half.

Rows are those of the file. For the architecture ``llama``, llama.cpp's converter has reordered the rows of every head
of ``attn_q`` and ``attn_k`` so that rotary pairs are neighbours (2 i, 2 i + 1), not halves (i, i + d / 2).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from marlin_gen.checkpoints.quantized import QuantizedWeight

if TYPE_CHECKING:
    from gguf import GGUFReader, ReaderTensor

GROUP_SIZE = 32  # weights of a block
FLOATS = {"F16": torch.float16, "F32": torch.float32, "BF16": torch.bfloat16}
QUANTIZED = {"Q4_0": 18, "Q4_1": 20, "Q8_0": 34}  # bytes of a block


@dataclass(frozen=True)
class Stored:
    """A tensor of a file."""

    name: str
    nbytes: int
    is_quantised: bool  # ``read`` returns a QuantizedWeight, else a tensor
    read: Callable[[], QuantizedWeight | torch.Tensor]


def open_reader(path: str | os.PathLike[str]) -> GGUFReader:
    """The file, memory-mapped: its header and metadata are read, its tensors are not."""
    try:
        from gguf import GGUFReader
    except ImportError as error:
        raise ImportError("reading GGUF files needs the gguf package: pip install 'marlin_gen[hf]'") from error
    try:
        reader = GGUFReader(path)
    except (ValueError, KeyError, IndexError, OverflowError) as error:  # what it raises where a file is cut or damaged
        raise ValueError(f"{path} is not a whole GGUF file ({error}); copy or convert it again") from error
    if reader.byte_order != "I":
        raise ValueError(f"{path} has the other byte order than this machine: convert it with gguf-convert-endian")
    return reader


def read_tensors(reader: GGUFReader) -> Iterator[tuple[str, QuantizedWeight | torch.Tensor]]:
    """(name, tensor) in the order of the file, each read and unpacked when it is asked for; none is kept here.

    Q4_0, Q4_1, Q8_0 [n, k] become a ``QuantizedWeight``, F16, F32 and BF16 of any shape a tensor of that type. Others
    are refused before the first tensor is read.
    """
    return ((tensor.name, tensor.read()) for tensor in stored_tensors(reader))


def stored_tensors(reader: GGUFReader) -> list[Stored]:
    """The same tensors, each to be read when wanted, in any order."""
    for tensor in reader.tensors:
        _check(tensor)
    return [
        Stored(tensor.name, int(tensor.n_bytes), tensor.tensor_type.name in QUANTIZED, partial(_read, tensor))
        for tensor in reader.tensors
    ]


def read_metadata(reader: GGUFReader) -> dict[str, Any]:
    """What a model is built from, as plain numbers, strings and lists; None where the file says nothing.

    ``rope`` holds all keys below ``<architecture>.rope.``, ``tokenizer`` those below ``tokenizer.ggml.`` and the chat
    template, each by its own GGUF name: ``freq_base``, ``scaling.type``, ``tokens``, ``merges``, ``eos_token_id``.
    """
    fields = {key: field.contents() for key, field in reader.fields.items()}

    def required(key: str) -> Any:
        if fields.get(key) is None:
            raise ValueError(f"the GGUF file has no {key!r} in its metadata: is it a language model, wholly converted?")
        return fields[key]

    def below(prefix: str) -> dict[str, Any]:
        return {key.removeprefix(prefix): value for key, value in fields.items() if key.startswith(prefix)}

    architecture = required("general.architecture")
    model = below(f"{architecture}.")
    heads, hidden = required(f"{architecture}.attention.head_count"), required(f"{architecture}.embedding_length")
    tokenizer = below("tokenizer.ggml.") | {"chat_template": fields.get("tokenizer.chat_template")}
    tokens = tokenizer.get("tokens")
    return {
        "architecture": architecture,
        "name": fields.get("general.name"),
        "layers": required(f"{architecture}.block_count"),
        "hidden_size": hidden,
        "intermediate_size": model.get("feed_forward_length"),
        "heads": heads,
        "kv_heads": model.get("attention.head_count_kv", heads),
        "head_size": model.get("attention.key_length", hidden // heads if isinstance(heads, int) else None),
        "context_length": model.get("context_length"),
        "norm_eps": model.get("attention.layer_norm_rms_epsilon", model.get("attention.layer_norm_epsilon")),
        "vocabulary_size": model.get("vocab_size", len(tokens) if tokens else None),
        "rope": below(f"{architecture}.rope."),
        "tokenizer": tokenizer,
    }


def _check(tensor: ReaderTensor) -> None:
    kind = tensor.tensor_type.name
    if kind not in FLOATS and kind not in QUANTIZED:
        raise ValueError(
            f"tensor {tensor.name!r} has type {kind}, which is not read: make the file again with one of"
            f" {', '.join([*QUANTIZED, *FLOATS])} (llama-quantize --pure, from the F16 file)"
        )
    if kind in QUANTIZED and len(tensor.shape) != 2:
        shape = tensor.shape[::-1].tolist()
        raise ValueError(f"tensor {tensor.name!r} is {kind} of shape {shape}; quantised tensors must be 2-d [n, k]")


def _read(tensor: ReaderTensor) -> QuantizedWeight | torch.Tensor:
    kind = tensor.tensor_type.name
    shape = tensor.shape[::-1].tolist()  # ggml counts dimensions from the fastest
    data = torch.from_numpy(tensor.data.copy())  # off the map, which is not writable
    if kind in FLOATS:
        return data.view(FLOATS[kind]).view(shape)
    n, k = shape
    blocks = data.view(n, k // GROUP_SIZE, QUANTIZED[kind])
    scales = _halves(tensor.name, blocks[..., :2])
    if kind == "Q8_0":
        return QuantizedWeight((blocks[..., 2:] ^ 128).view(n, k), scales, bits=8, group_size=GROUP_SIZE)  # q + 128
    minima = _halves(tensor.name, blocks[..., 2:4]) if kind == "Q4_1" else None
    pairs = blocks[..., -16:]
    codes = torch.cat([pairs & 15, pairs >> 4], dim=-1).view(n, k)
    return QuantizedWeight(codes, scales, bits=4, group_size=GROUP_SIZE, minima=minima)


def _halves(name: str, pairs: torch.Tensor) -> torch.Tensor:
    """uint8 [n, blocks, 2] -> float16 [n, blocks]."""
    halves = pairs.contiguous().view(torch.float16)[..., 0]
    if not halves.isfinite().all():
        row, block = (~halves.isfinite()).nonzero()[0].tolist()
        raise ValueError(
            f"tensor {name!r}: block {block} of row {row} has scale or minimum {halves[row, block].item()}, no number:"
            " the file is damaged, copy or convert it again"
        )
    return halves
