"""Checkpoints whose weights are fp8 numbers, by the ``quant_method`` "fp8"; other methods' go by ``floats`` too.

Tensors: weight float8_e4m3fn [n, k]; weight_scale_inv floating [n / rows, k / columns], rounded up, for blocks of
weight_block_size ([rows, columns]); without that setting, weight_scale or weight_scale_inv, one number or one a row.
Despite its name weight_scale_inv multiplies. Scales of activations are not read: activations stay in 16 bits here.

Proved against ``dequantize`` of transformers 5.24.0: tests/cpu/test_checkpoints.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from math import gcd
from typing import Any

import torch

from marlin_gen.checkpoints.layer import Layer
from marlin_gen.checkpoints.quantized import QuantizedWeight
from marlin_gen.fp8_words import is_nan


def read(tensors: Mapping[str, torch.Tensor], config: Mapping[str, Any], name: str) -> QuantizedWeight:
    """The weight of the layer called ``name``: see ``marlin_gen.checkpoints.read_layer``."""
    layer = Layer(name, tensors, config)
    layer.setting("fmt", ("e4m3",), default="e4m3")
    block = config.get("weight_block_size")
    inverse = "weight_scale_inv" in tensors
    return floats(layer, "weight_scale_inv" if block or inverse else "weight_scale", block)


def floats(layer: Layer, scale_name: str, block: tuple[int, int] | list[int] | None) -> QuantizedWeight:
    """The weight of ``layer``'s tensor "weight", scaled in blocks of (rows, columns); None: as a whole, or by row."""
    codes = layer.tensor("weight", (torch.float8_e4m3fn,), (None, None)).view(torch.uint8)
    n, k = codes.shape
    if bool(is_nan(codes).any()):
        raise layer.error("weight has NaN (0x7f, 0xff); the checkpoint is damaged: copy it anew or quantise again")
    scales = layer.tensors.get(scale_name)
    if block is None and scales is not None and tuple(scales.shape) in ((), (1,), (1, 1), (n,), (n, 1)):
        layer = replace(layer, tensors={scale_name: scales.reshape(-1, 1)})
        block = (n // scales.numel(), k)
    sizes = block if isinstance(block, list | tuple) else ()
    if block is not None and not (len(sizes) == 2 and all(type(size) is int and size > 0 for size in sizes)):
        raise layer.error(f"its weight is scaled in blocks of {block!r}, which is not [rows, columns]")
    rows, columns = block or (1, k)
    scales = layer.scales(scale_name, (-(-n // rows), -(-k // columns)))
    group_size = gcd(columns, k)  # the last block of a row may be narrower
    scales = scales.repeat_interleave(columns // group_size, 1)[:, : k // group_size].repeat_interleave(rows, 0)[:n]
    return QuantizedWeight(codes, scales.contiguous(), bits=8, group_size=group_size, is_float=True)
