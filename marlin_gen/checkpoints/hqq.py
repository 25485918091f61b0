"""HQQ layers (half-quadratic quantisation, the hqq package): ``weight = (W_q - zero) * scale``, zero no whole number.

After hqq/core/quantize.py (Quantizer.quantize, HQQLinear.state_dict) and bitpack.py of hqq 0.2.8. With axis 1 the
weight [n, k] is cut into groups of ``group_size`` neighbours along k, one a row of a matrix [n * k / group_size,
group_size]; a word of ``W_q`` holds ``count`` codes of one column of it, rows / count apart, the first in the highest
bits. hqq itself computes in the type of scales and zeros, so its weight is ours with two roundings more.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from marlin_gen.checkpoints.quantized import QuantizedWeight

# Packing -> codes of a word, bits between two of them, type of the word.
PACKINGS = {
    "8bit_u8": (1, 8, torch.uint8),
    "4bit_u8": (2, 4, torch.uint8),
    "3bit_32": (10, 3, torch.int32),
    "2bit_u8": (4, 2, torch.uint8),
    "1bit_u8": (8, 1, torch.uint8),
}


def read(tensors: Mapping[str, Any], config: Mapping[str, Any], name: str) -> QuantizedWeight:
    """The weight of the layer called ``name``; ``tensors`` by the names of ``HQQLinear.state_dict()``.

    They say everything: nothing is taken from ``config``. Entries are either the tensors that hqq stores in safetensors
    (packing as ASCII codes, numbers as tensors) or the plain values of its ``meta``: ``{"W_q": W_q, **meta}``. Scales
    and zeros keep their floating type.
    """
    quantised = [key for key in ("scale", "zero") if _plain(tensors.get(f"quant_{key}"))]
    if quantised:
        raise ValueError(
            f"layer {name!r}: its {' and '.join(quantised)} are themselves quantised, which hqq has given up:"
            " quantise it again with quant_scale=False, quant_zero=False"
        )
    missing = [key for key in ("W_q", "scale", "zero", "shape", "nbits", "axis", "packing") if key not in tensors]
    if missing:
        raise ValueError(
            f"layer {name!r} has no {', '.join(missing)}: pass HQQLinear.state_dict(), made with offload_meta=False"
        )
    axis = _plain(tensors["axis"])
    if axis != 1:
        raise ValueError(
            f"layer {name!r}: axis={axis} shares a scale among output features, so every weight of a row has its own;"
            " kernels need one scale for group_size neighbours along k: quantise it again with axis=1"
        )
    n, k = (int(size) for size in tensors["shape"])
    group_size = _plain(tensors.get("group_size")) or k
    if k % group_size:
        raise ValueError(
            f"layer {name!r}: k={k} is no multiple of group_size={group_size}, so groups cross rows: quantise it again"
            " with a group_size that divides k"
        )
    bits = math.ceil(_plain(tensors["nbits"]))  # 1.58 has three codes in two bits
    codes = _codes(name, tensors["W_q"], _text(tensors["packing"]), bits, n * k // group_size, group_size).view(n, k)
    scales, zeros = (_grouped(name, key, tensors[key], n, k // group_size) for key in ("scale", "zero"))
    return QuantizedWeight(codes, scales, bits=bits, group_size=group_size, zeros=zeros)


def _codes(name: str, words: torch.Tensor, packing: str, bits: int, groups: int, group_size: int) -> torch.Tensor:
    """uint8 [groups, group_size]."""
    if packing not in PACKINGS:
        raise ValueError(
            f"layer {name!r}: unknown packing {packing!r}; known: {', '.join(PACKINGS)} (quantise with bitpack=True)"
        )
    count, step, dtype = PACKINGS[packing]
    if words.is_floating_point():  # view_as_float: the same bytes under another type
        words = words.view(dtype)
    rows = math.ceil(groups / count)  # only 3bit_32 fills up with rows of zeros
    whole = packing == "3bit_32" or groups % count == 0
    if words.dtype != dtype or tuple(words.shape) != (rows, group_size) or not whole or bits > step:
        raise ValueError(
            f"layer {name!r}: W_q is {words.dtype} {list(words.shape)}; {groups} groups of {group_size} codes of {bits}"
            f" bits in packing {packing} need {dtype} [{groups} / {count}, {group_size}]"
        )
    mask = (1 << step) - 1
    fields = [(words >> (step * (count - 1 - i))) & mask for i in range(count)]
    codes = torch.cat(fields)[:groups].to(torch.uint8)
    if int(codes.max()) >= 1 << bits:
        raise ValueError(f"layer {name!r}: W_q has a code of {int(codes.max())}, too large for {bits} bits: damaged")
    return codes


def _grouped(name: str, key: str, tensor: torch.Tensor, n: int, groups: int) -> torch.Tensor:
    """scale or zero, floating [n * groups, 1] -> [n, groups]."""
    if not tensor.is_floating_point() or tensor.numel() != n * groups:
        raise ValueError(
            f"layer {name!r}: {key} is {tensor.dtype} {list(tensor.shape)}; n={n} rows of {groups} groups need a"
            f" floating [{n * groups}, 1] (quantise with channel_wise=True)"
        )
    if not tensor.isfinite().all():
        group = int((~tensor.isfinite()).flatten().nonzero()[0])
        value = tensor.flatten()[group].item()
        raise ValueError(f"layer {name!r}: {key} of group {group} is {value}, no number: damaged, quantise it again")
    return tensor.detach().reshape(n, groups)


def _plain(value: Any) -> Any:
    """A number, also where safetensors made a tensor of it."""
    return value.item() if isinstance(value, torch.Tensor) else value


def _text(value: Any) -> str:
    """A string, also where safetensors made a tensor of its characters."""
    return "".join(chr(code) for code in value.tolist()) if isinstance(value, torch.Tensor) else str(value)
