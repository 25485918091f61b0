"""A GGUF file of the architecture ``llama`` as transformers names and orders it: config, tensor names, rotary rows."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch

from marlin_gen.checkpoints.fallback import dense
from marlin_gen.checkpoints.gguf import Stored, open_reader, read_metadata, stored_tensors
from marlin_gen.checkpoints.quantized import QuantizedWeight

ARCHITECTURE = "llama"
_WHOLE = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_BLOCK = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_ROTARY = re.compile(r"blk\.\d+\.attn_([qk])\.weight")
_MERGE = "merge it with llama-gguf-split --merge"


def open_model(path: str | os.PathLike[str]) -> tuple[dict[str, Any], list[Stored]]:
    """(config.json, tensors by transformers' names and in its row order) of a GGUF file; nothing is read yet.

    Linear layers of Q4_0, Q4_1 and Q8_0 are read as they are stored; an embedding of these types, which is looked up
    and not multiplied, in f16; other tensors unchanged. Raises ValueError for what is no plain llama model, or no
    whole one.
    """
    reader = open_reader(path)
    split = reader.get_field("split.count")  # before the metadata, which only the first part has
    if split and split.contents() > 1:
        raise ValueError(f"{path} is one of {split.contents()} parts: {_MERGE}")
    stored = stored_tensors(reader)
    metadata = read_metadata(reader)
    config = config_dict(metadata, tied=not any(one.name == "output.weight" for one in stored))
    blocks = (f"blk.{block}.{name}.weight" for block in range(metadata["layers"]) for name in _BLOCK)
    found = {one.name for one in stored}
    lost = [name for name in ("token_embd.weight", *blocks, "output_norm.weight") if name not in found]
    if lost:
        raise ValueError(f"{path} has no tensor {lost[0]!r}: it is cut, or a part of a split file: {_MERGE}")
    heads, kv_heads = metadata["heads"], metadata["kv_heads"]

    def read(one: Stored) -> QuantizedWeight | torch.Tensor:
        tensor = one.read()
        if isinstance(tensor, QuantizedWeight) and not is_linear(one.name):
            return dense(tensor, one.name)
        return undo_permutation(one.name, tensor, heads, kv_heads)

    tensors = [
        Stored(hf_name(one.name), one.nbytes, one.is_quantised and is_linear(one.name), partial(read, one))
        for one in stored
    ]
    return config, tensors


def hf_name(name: str) -> str:
    """``blk.3.attn_q.weight`` -> ``model.layers.3.self_attn.q_proj.weight``; a ValueError for an unknown tensor."""
    match = re.fullmatch(r"(?:blk\.(\d+)\.)?(\w+)\.weight", name)
    known = match and (_WHOLE if match[1] is None else _BLOCK).get(match[2])
    if not match or not known:
        raise ValueError(
            f"tensor {name!r} is not one of a plain {ARCHITECTURE} model; with biases, rope_freqs, experts and so on,"
            " start from the model's safetensors"
        )
    return f"{known}.weight" if match[1] is None else f"model.layers.{match[1]}.{known}.weight"


def is_linear(name: str) -> bool:
    """Whether this tensor, by its GGUF name, is the weight of a linear layer: neither embedding nor norm."""
    return bool(re.fullmatch(r"blk\.\d+\.(attn_(q|k|v|output)|ffn_(gate|up|down))\.weight|output\.weight", name))


def undo_permutation(
    name: str, tensor: QuantizedWeight | torch.Tensor, heads: int, kv_heads: int
) -> QuantizedWeight | torch.Tensor:
    """``tensor`` with its rows as transformers has them.

    Of every head of attn_q and attn_k the file has rotary pairs side by side, (0, d/2), (1, d/2 + 1), ...; transformers
    has them as two halves, and rotates i with i + d/2. Other tensors are returned as they are.
    """
    match = _ROTARY.fullmatch(name)
    if not match:
        return tensor
    count = heads if match[1] == "q" else kv_heads
    rows = tensor.n if isinstance(tensor, QuantizedWeight) else len(tensor)
    if rows % (2 * count):
        raise ValueError(f"tensor {name!r} has {rows} rows, which {count} heads of an even size do not make")
    order = torch.arange(rows, device="cpu").view(count, -1, 2).transpose(1, 2).flatten()
    return tensor[order] if isinstance(tensor, torch.Tensor) else tensor.rows(order)


def config_dict(metadata: Mapping[str, Any], tied: bool) -> dict[str, Any]:
    """The config.json of ``read_metadata``'s model; ``tied``: the file has no ``output.weight``.

    A ValueError names what a plain llama config does not say.
    """
    rope, tokenizer = metadata["rope"], metadata["tokenizer"]
    if metadata["architecture"] != ARCHITECTURE:
        raise ValueError(f"the GGUF file has architecture {metadata['architecture']!r}; read so far: {ARCHITECTURE!r}")
    for key in ("intermediate_size", "heads", "kv_heads"):
        if isinstance(metadata[key], list):  # which GGUF allows, and LlamaConfig does not
            raise ValueError(f"the GGUF file has {key} layer by layer, {metadata[key]}, which is not read")
    old = rope.get("scale_linear", 1.0)  # what llama.cpp reads where there is no scaling.factor
    if old != 1.0 or any(key.startswith("scaling.") and key != "scaling.finetuned" for key in rope):
        raise ValueError(f"the GGUF file scales its rotary frequencies ({rope}), which is not read: use safetensors")
    if rope.get("dimension_count", metadata["head_size"]) != metadata["head_size"]:
        raise ValueError(f"rope.dimension_count is {rope['dimension_count']}, heads have {metadata['head_size']}")
    for key in ("intermediate_size", "norm_eps", "vocabulary_size", "context_length"):
        if metadata[key] is None:
            raise ValueError(f"the GGUF file does not say its {key}: convert the model to GGUF again")
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": metadata["hidden_size"],
        "intermediate_size": metadata["intermediate_size"],
        "num_hidden_layers": metadata["layers"],
        "num_attention_heads": metadata["heads"],
        "num_key_value_heads": metadata["kv_heads"],
        "head_dim": metadata["head_size"],
        "hidden_act": "silu",
        "rms_norm_eps": metadata["norm_eps"],
        "rope_theta": rope.get("freq_base", 10000.0),
        "max_position_embeddings": metadata["context_length"],
        "vocab_size": metadata["vocabulary_size"],
        "tie_word_embeddings": tied,
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": tokenizer.get("bos_token_id"),
        "eos_token_id": tokenizer.get("eos_token_id"),
        "pad_token_id": tokenizer.get("padding_token_id"),
        "dtype": "float16",
    }
