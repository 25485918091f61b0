"""GPTQ checkpoints, as AutoGPTQ and GPTQModel write them: ``quant_method`` "gptq".

Tensors: qweight int32 [k * bits / 32, n], codes packed along k, low bits first; qzeros int32 [groups, n * bits / 32];
scales f16 [groups, n]; g_idx int32 [k], the group of each input feature, which may be absent without desc_act.

Format "gptq" (v1) stores zero points minus one, "gptq_v2" as they are. The zero point 0 has no v1 value, and libraries
disagree about it. GPTQModel subtracts 1 from all fields of a word with one subtraction, which borrows from the
neighbour, and adds them back likewise: exact, so its checkpoints (``meta`` names it) are read so. AutoGPTQ's packer
overwrites neighbours, and a stored 2 ** bits - 1 is then 0 to one of its kernels and 2 ** bits to another: refused.

Proved against the packers of auto-gptq 0.7.1 and gptqmodel 7.7.0: tests/fixtures/gptq-*.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch

from marlin_gen.checkpoints.layer import INDICES, INTEGERS, Layer, unless_central, unpack, words
from marlin_gen.checkpoints.quantized import QuantizedWeight

_ONE_IN_EACH_FIELD = {4: 0x11111111, 8: 0x01010101}


def read(tensors: Mapping[str, torch.Tensor], config: Mapping[str, Any], name: str) -> QuantizedWeight:
    """The weight of the layer called ``name``: see ``marlin_gen.checkpoints.read_layer``."""
    for pattern, rule in (config.get("dynamic") or {}).items():  # GPTQModel's mixed precision; the first that matches
        if re.match(re.sub(r"^[+-]:", "", pattern), name):  # "-:" has no settings: it is for layers that stay float
            config = {**config, **rule}
            break
    layer = Layer(name, tensors, config)
    bits: int = layer.setting("bits", (4, 8))
    format_key = "format" if config.get("checkpoint_format") is None else "checkpoint_format"
    version = layer.setting(format_key, ("gptq", "gptq_v2"), default="gptq")

    packed_rows, n = layer.tensor("qweight", INTEGERS, (None, None)).shape
    grouped = "g_idx" in tensors or bool(config.get("desc_act"))  # with desc_act, g_idx must be there
    k = len(layer.tensor("g_idx", INDICES, (None,))) if grouped else packed_rows * 32 // bits
    qweight = layer.tensor("qweight", INTEGERS, (words(k, bits), n))
    group_size = layer.group_size(k)
    groups = k // group_size
    scales = layer.scales("scales", (groups, n))
    qzeros = layer.tensor("qzeros", INTEGERS, (groups, words(n, bits)))
    if version == "gptq":
        if "gptqmodel" not in str(config.get("meta")).lower():
            _refuse_all_ones(layer, unpack(qzeros, bits, dim=1, size=n), bits)
        qzeros = qzeros + _ONE_IN_EACH_FIELD[bits]
    zeros = unless_central(unpack(qzeros, bits, dim=1, size=n), bits)
    order = layer.order("g_idx", group_size, k) if grouped else None

    codes = unpack(qweight.T, bits, dim=1, size=k)
    return QuantizedWeight(
        codes=codes if order is None else codes[:, order],
        scales=scales.T.contiguous(),
        bits=bits,
        group_size=group_size,
        zeros=None if zeros is None else zeros.T.contiguous(),
        order=order,
    )


def _refuse_all_ones(layer: Layer, stored: torch.Tensor, bits: int) -> None:
    largest = (1 << bits) - 1
    if bool((stored == largest).any()):
        raise layer.error(
            f"qzeros hold {largest}, which in format 'gptq' is the zero point {largest + 1} to some libraries and 0 to"
            " others; quantise again with checkpoint_format 'gptq_v2', or, if GPTQModel wrote it, keep its 'meta' in"
            " the quantization_config"
        )
