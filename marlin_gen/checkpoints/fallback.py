"""A checkpoint's layer as tensors of ours: packed, or, where no kernel format holds it, dequantised with the reason."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from marlin_gen.checkpoints.packing import to_packed
from marlin_gen.checkpoints.quantized import QuantizedWeight
from marlin_gen.layout import PackedWeight

_CHUNK_WEIGHTS = 1 << 20  # dequantised at once: float64 temporaries of some 8 MB each, however large the weight


@dataclass(frozen=True, eq=False)
class Unheld:
    """A weight that no kernel format holds."""

    weight: torch.Tensor  # [n, k], in the type of activations
    reason: str


def packed_or_dense(
    weight: QuantizedWeight, name: str, dtype: torch.dtype = torch.float16, exact: bool = True
) -> PackedWeight | Unheld:
    """``weight`` in the packed layout for activations of ``dtype``; dense in ``dtype`` where no format holds it.

    ``exact``: scales that ``dtype`` does not hold are such a reason; else they are rounded to it. Raises ValueError,
    with ``name`` in it, for a weight beyond the range of ``dtype``.
    """
    try:
        if not exact:
            return to_packed(weight, name, dtype)
        packed = to_packed(weight, name)
        if packed.dtype == dtype:
            return packed
        reason = f"has scales in {packed.dtype}, the model's activations are {dtype}"
    except ValueError as error:
        reason = str(error).removeprefix(name).lstrip(": ")
    return Unheld(dense(weight, name, dtype), reason)


def dense(weight: QuantizedWeight, name: str, dtype: torch.dtype = torch.float16) -> torch.Tensor:
    """``dtype`` [n, k], rounded once from the exact weight; a ValueError with ``name`` where ``dtype`` overflows."""
    whole = torch.empty(weight.n, weight.k, dtype=dtype, device=weight.codes.device)
    step = max(_CHUNK_WEIGHTS // weight.k, 1)
    for start in range(0, weight.n, step):
        chosen = slice(start, start + step)
        rounded = whole[chosen].copy_(weight.rows(chosen).dequantize())
        if not bool(rounded.isfinite().all()):
            raise ValueError(f"{name} has weights beyond the range of {dtype}: damaged, or made for another type")
    return whole
