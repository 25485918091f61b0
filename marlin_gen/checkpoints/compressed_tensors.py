"""Checkpoints of compressed-tensors (llm-compressor) in its formats "pack-quantized" and, of fp8, "float-quantized".

Tensors of the first: weight_packed int32 [n, k * bits / 32], codes packed along k, low bits first; weight_scale
floating [n, groups]; weight_zero_point int32 [n * bits / 32, groups], packed along n, if the scheme is asymmetric;
weight_shape [2], n and k; weight_g_idx int32 [k], the group of each input feature, if actorder is "group" (all -1: as
without it). Codes and zero points are stored with 2 ** (bits - 1) added. Words that n or k does not fill are padded.

Of the second: weight float8_e4m3fn [n, k]; weight_scale, one number, [n, 1], [n, groups] or one a block_structure.

Proved against the packer of compressed-tensors 0.20.0, and of 0.12.2 for weight_g_idx, which 0.20.0 no longer reads:
tests/fixtures/compressed-tensors-*.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch

from marlin_gen.checkpoints.fp8 import floats
from marlin_gen.checkpoints.layer import INDICES, INTEGERS, Layer, unless_central, unpack, words
from marlin_gen.checkpoints.quantized import QuantizedWeight


def read(tensors: Mapping[str, torch.Tensor], config: Mapping[str, Any], name: str) -> QuantizedWeight:
    """The weight of the layer called ``name``: see ``marlin_gen.checkpoints.read_layer``."""
    scheme = _scheme(config, name)
    layer = Layer(name, tensors, {"format": scheme.get("format") or config.get("format"), **scheme["weights"]})
    if places := _transformed(config):
        raise layer.error(
            f"transform_config transforms activations at run time ({', '.join(places)}), which kernels do not; quantise"
            " without it, or with transforms that are fused into weights"
        )
    if layer.settings.get("type") == "float":
        return _floats(layer)
    layer.setting("format", ("pack-quantized",))
    layer.setting("type", ("int",), default="int")
    bits: int = layer.setting("num_bits", (4, 8))
    symmetric = layer.setting("symmetric", (True, False), default=True)
    per_channel = layer.setting("strategy", ("group", "channel")) == "channel"

    n, k = (int(size) for size in layer.tensor("weight_shape", (torch.int64, torch.int32), (2,)))
    packed = layer.tensor("weight_packed", INTEGERS, (n, words(k, bits)))
    group_size = k if per_channel else layer.group_size(k)
    groups = k // group_size
    scales = layer.scales("weight_scale", (n, groups))
    zeros = None
    if not symmetric:
        packed_zeros = layer.tensor("weight_zero_point", INTEGERS, (words(n, bits), groups))
        zeros = unless_central(unpack(packed_zeros, bits, dim=0, size=n), bits)
    elif "weight_zero_point" in tensors:
        raise layer.error("weight_zero_point is there, but the scheme is symmetric; set symmetric to false, or drop it")
    order = None
    actorder = layer.setting("actorder", (False, "weight", "static", True, "group", "dynamic"), default=False)
    if actorder in (True, "group", "dynamic") or "weight_g_idx" in tensors:
        grouping = layer.tensor("weight_g_idx", INDICES, (k,))
        order = None if bool((grouping == -1).all()) else layer.order("weight_g_idx", group_size, k)

    codes = unpack(packed, bits, dim=1, size=k)
    return QuantizedWeight(
        codes=codes if order is None else codes[:, order],
        scales=scales,
        bits=bits,
        group_size=group_size,
        zeros=zeros,
        order=order,
    )


def _floats(layer: Layer) -> QuantizedWeight:
    layer.setting("format", ("float-quantized", "naive-quantized"))
    layer.setting("num_bits", (8,))
    layer.setting("symmetric", (True,), default=True)
    layer.setting("actorder", (False, "weight", "static"), default=False)
    strategy = layer.setting("strategy", ("tensor", "channel", "group", "block"))
    block = layer.settings.get("block_structure") if strategy == "block" else None
    if strategy == "group":
        block = 1, layer.group_size(layer.tensor("weight", (torch.float8_e4m3fn,), (None, None)).shape[1])
    return floats(layer, "weight_scale", block)


def _transformed(config: Mapping[str, Any]) -> list[str]:
    """Where transform_config changes anything but stored weights: without that, they are not the layer's."""
    groups = ((config.get("transform_config") or {}).get("config_groups") or {}).values()
    places = {one["location"] for group in groups for one in group["apply"]}
    return sorted(places - {"weight_input", "weight_output"})


def _scheme(config: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """The one of config_groups whose targets fit best: the layer's name, then a pattern, then the class Linear."""

    def distance(group: Mapping[str, Any]) -> int:
        targets = group["targets"]
        if name in targets:
            return 0
        if any(target.startswith("re:") and re.match(target[3:], name) for target in targets):
            return 1
        return 2 if "Linear" in targets else 3

    groups = [group for group in config.get("config_groups", {}).values() if group.get("weights")]
    best: Mapping[str, Any] | None = min(groups, key=distance, default=None)
    if best is None or distance(best) == 3:
        raise ValueError(f"{name}: none of the config_groups with weights has it, or Linear, among its targets")
    return best
