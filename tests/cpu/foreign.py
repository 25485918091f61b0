"""Small llama checkpoints as other libraries store them, packed here; the importers' own tests are of theirs."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

from marlin_gen.checkpoints.quantized import QuantizedWeight

AWQ_PLACES = (0, 2, 4, 6, 1, 3, 5, 7)
METHODS = ("awq", "compressed-tensors", "fp8", "gptq", "hqq")
GROUP = 64
# k_proj and v_proj have 128 rows; with two heads of 16 they have 32, which the packed layout cannot hold.
SIZES = {
    "vocab_size": 96, "hidden_size": 256, "intermediate_size": 384, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 64, "max_position_embeddings": 64, "tie_word_embeddings": False,
}  # fmt: skip


def small_config(**changes) -> LlamaConfig:
    return LlamaConfig(**{**SIZES, **changes}, dtype=torch.float16)


def words(fields: torch.Tensor, bits: int = 4, places=None) -> torch.Tensor:
    """[.., size] to int32 [.., size * bits / 32]; ``places[i]``: which of a word's is the i-th from the low end."""
    per_word = 32 // bits
    split = fields.long().unflatten(-1, (-1, per_word))[..., list(places or range(per_word))]
    total = (split << (bits * torch.arange(per_word))).sum(-1)
    return torch.where(total >= 1 << 31, total - (1 << 32), total).int()


def stored(weight: QuantizedWeight, method: str) -> dict[str, torch.Tensor]:
    """The tensors of one layer, by the last parts of their names."""
    n, k = weight.n, weight.k
    if method == "fp8":
        return {"weight": weight.codes.view(torch.float8_e4m3fn), "weight_scale_inv": weight.scales[::128]}
    zeros = torch.full_like(weight.scales, 8).to(torch.uint8) if weight.zeros is None else weight.zeros
    if method == "gptq":
        codes, g_idx = weight.codes, torch.arange(k) // weight.group_size
        if weight.order is not None:
            codes = torch.empty_like(codes).index_copy_(1, weight.order, codes)
            g_idx = torch.empty_like(g_idx).index_copy_(0, weight.order, g_idx)
        qweight = words(codes, weight.bits).T.contiguous()
        qzeros = words(zeros.T, weight.bits)
        return {"qweight": qweight, "qzeros": qzeros, "scales": weight.scales.T.contiguous(), "g_idx": g_idx.int()}
    if method == "awq":
        qweight, qzeros = words(weight.codes.T, 4, AWQ_PLACES), words(zeros.T, 4, AWQ_PLACES)
        return {"qweight": qweight, "qzeros": qzeros, "scales": weight.scales.T.contiguous()}
    if method == "compressed-tensors":
        zero_point = words(zeros.T).T.contiguous()
        shape = torch.tensor([n, k])
        return {"weight_packed": words(weight.codes), "weight_scale": weight.scales, "weight_zero_point": zero_point,
                "weight_shape": shape}  # fmt: skip
    groups = weight.codes.view(-1, weight.group_size)
    half = len(groups) // 2
    return {
        "W_q": groups[:half] << 4 | groups[half:], "scale": weight.scales.reshape(-1, 1),
        "zero": zeros.half().reshape(-1, 1), "shape": torch.tensor([n, k]), "nbits": torch.tensor(4),
        "axis": torch.tensor(1), "group_size": torch.tensor(weight.group_size),
        "packing": torch.tensor([ord(one) for one in "4bit_u8"], dtype=torch.uint8),
    }  # fmt: skip


def quantization_config(method: str) -> dict:
    if method == "compressed-tensors":
        weights = {"num_bits": 4, "group_size": GROUP, "symmetric": False, "strategy": "group", "type": "int"}
        groups = {"group_0": {"targets": ["Linear"], "weights": weights}}
        return {"quant_method": method, "format": "pack-quantized", "config_groups": groups, "ignore": ["lm_head"]}
    if method == "gptq":
        return {"quant_method": method, "bits": 4, "group_size": GROUP, "checkpoint_format": "gptq_v2"}
    if method == "fp8":
        return {"quant_method": method, "activation_scheme": "dynamic", "fmt": "e4m3", "weight_block_size": [128, 128]}
    if method == "awq":
        return {"quant_method": method, "bits": 4, "group_size": GROUP, "zero_point": True, "version": "gemm"}
    return {"quant_method": method, "quant_config": {}, "skip_modules": ["lm_head"]}


def random_weight(n: int, k: int, method: str, generator: torch.Generator) -> QuantizedWeight:
    if method == "fp8":
        floats = torch.randn(n, k, generator=generator).mul_(100).to(torch.float8_e4m3fn)
        scales = ((torch.rand(n // 128, k // 128, generator=generator) + 0.5) * 4e-4).half().repeat_interleave(128, 0)
        return QuantizedWeight(floats.view(torch.uint8), scales, bits=8, group_size=128, is_float=True)
    codes = torch.randint(0, 16, (n, k), generator=generator, dtype=torch.uint8)
    scales = ((torch.rand(n, k // GROUP, generator=generator) + 0.5) * 0.01).half()
    zeros = torch.randint(5, 12, scales.shape, generator=generator, dtype=torch.uint8)
    return QuantizedWeight(codes, scales, bits=4, group_size=GROUP, zeros=zeros)


def write_checkpoint(folder: Path, method: str, shards: int = 1, change=None, **sizes):
    """A checkpoint in ``folder``; ({layer: QuantizedWeight}, the model with the dequantised weights in f16).

    ``change(layer, tensors)`` may alter a layer's tensors before they are written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    config = small_config(**sizes)
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).half().eval()
    generator = torch.Generator().manual_seed(1)
    layers, tensors = {}, {}
    for name, parameter in model.named_parameters():
        layer = name.removesuffix(".weight")
        if "_proj" in name and name.endswith(".weight"):
            layers[layer] = random_weight(*parameter.shape, method, generator)
            parameter.data = layers[layer].dequantize().half()
            parts = stored(layers[layer], method)
            if change:
                changed = change(layer, parts)
                parts = changed if isinstance(changed, dict) else parts
            tensors.update({f"{layer}.{last}": part.contiguous() for last, part in parts.items()})
        else:
            if name.endswith(".bias"):
                parameter.data = torch.randn(parameter.shape, generator=generator).half() / 8
            tensors[name] = parameter.data.clone()
    names = sorted(tensors)
    pieces = [names[i::shards] for i in range(shards)]  # a layer's tensors lie in different files
    where = {}
    for index, piece in enumerate(pieces, 1):
        file = "model.safetensors" if shards == 1 else f"model-{index:05}-of-{shards:05}.safetensors"
        save_file({name: tensors[name] for name in piece}, folder / file, metadata={"format": "pt"})
        where.update(dict.fromkeys(piece, file))
    if shards > 1:
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    about = {**config.to_dict(), "architectures": ["LlamaForCausalLM"]}
    (folder / "config.json").write_text(json.dumps({**about, "quantization_config": quantization_config(method)}))
    (folder / "tokenizer.json").write_text('{"not": "read here"}')
    return layers, model
