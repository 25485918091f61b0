"""AWQ checkpoints, as AutoAWQ writes them: ``quant_method`` "awq", version "gemm".

Tensors: qweight int32 [k, n / 8], codes packed along n, the fields of a word being those of the features 0, 2, 4, 6, 1,
3, 5, 7 of its eight; qzeros int32 [groups, n / 8] likewise; scales f16 [groups, n].

Proved against the packer of autoawq 0.2.9: tests/fixtures/awq-*.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from marlin_gen.checkpoints.layer import INTEGERS, Layer, unless_central, unpack
from marlin_gen.checkpoints.quantized import QuantizedWeight

BITS = 4
PLACES = (0, 2, 4, 6, 1, 3, 5, 7)  # the feature, of a word's eight, that each field from the low end holds


def read(tensors: Mapping[str, torch.Tensor], config: Mapping[str, Any], name: str) -> QuantizedWeight:
    """The weight of the layer called ``name``: see ``marlin_gen.checkpoints.read_layer``."""
    layer = Layer(name, tensors, config)
    layer.setting("bits", (BITS,))
    layer.setting("version", ("gemm", "GEMM"), default="gemm")
    qweight = layer.tensor("qweight", INTEGERS, (None, None))
    k, n = qweight.shape[0], qweight.shape[1] * len(PLACES)
    group_size = layer.group_size(k)
    groups = k // group_size
    scales = layer.scales("scales", (groups, n))
    qzeros = layer.tensor("qzeros", INTEGERS, (groups, n // len(PLACES)))
    return QuantizedWeight(
        codes=unpack(qweight.T, BITS, dim=0, size=n, places=PLACES),
        scales=scales.T.contiguous(),
        bits=BITS,
        group_size=group_size,
        zeros=unless_central(unpack(qzeros.T, BITS, dim=0, size=n, places=PLACES), BITS),
    )
