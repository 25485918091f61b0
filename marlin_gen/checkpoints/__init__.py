"""Quantised checkpoints of other libraries: each module reads one format's tensors into a ``QuantizedWeight``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from marlin_gen.checkpoints import awq, compressed_tensors, fp8, gptq, hqq
from marlin_gen.checkpoints.quantized import QuantizedWeight

Reader = Callable[[Mapping[str, torch.Tensor], Mapping[str, Any], str], QuantizedWeight]

# By the ``quant_method`` of a checkpoint's quantization_config. A new format is one module and one row.
READERS: dict[str, Reader] = {
    "awq": awq.read,
    "compressed-tensors": compressed_tensors.read,
    "fp8": fp8.read,
    "gptq": gptq.read,
    "hqq": hqq.read,
}


def read_layer(tensors: Mapping[str, torch.Tensor], config: Mapping[str, Any], name: str) -> QuantizedWeight:
    """The weight of the linear layer called ``name``, exactly as its checkpoint means it.

    ``tensors`` are the layer's own, by name without the layer's prefix ("qweight", not "model.layers.0...qweight"), on
    one device; ``config`` is the checkpoint's quantization_config. A ValueError names the layer and what is wrong.
    """
    method = config.get("quant_method")
    if method not in READERS:
        raise ValueError(f"{name}: quant_method is {method!r}; known: {', '.join(sorted(READERS))}")
    return READERS[method](tensors, config, name)
