"""A checkpoint's layer as tensors of ours: packed, or, if no kernel format holds it, dequantised with the reason."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from marlin_gen.checkpoints.packing import to_packed
from marlin_gen.checkpoints.quantized import QuantizedWeight
from marlin_gen.layout import PackedWeight


@dataclass(frozen=True, eq=False)
class Unheld:
    """A weight that no kernel format holds."""

    weight: torch.Tensor  # f16 [n, k]
    reason: str


def packed_or_dense(weight: QuantizedWeight, name: str) -> PackedWeight | Unheld:
    """``weight`` in the packed layout; in f16, rounded once, where no format holds it.

    Raises ValueError, with ``name`` in it, for a weight that f16 does not hold either.
    """
    try:
        return to_packed(weight, name)
    except ValueError as error:
        reason = str(error).removeprefix(name).lstrip(": ")
    dense = dense_halves(weight, name)
    return Unheld(dense, reason)


def dense_halves(weight: QuantizedWeight, name: str) -> torch.Tensor:
    """f16 [n, k], rounded once from the exact weight; a ValueError with ``name`` where f16 overflows."""
    dense = weight.dequantize().half()
    if not bool(dense.isfinite().all()):
        raise ValueError(f"{name} has weights beyond the range of f16: damaged, or made for bf16; copy it anew")
    return dense
