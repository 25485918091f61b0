"""From a checkpoint's weight to the packed layout: exact, or a ValueError that says what cannot be held."""

from __future__ import annotations

import torch

from marlin_gen.checkpoints.quantized import QuantizedWeight
from marlin_gen.formats import FORMATS, WeightFormat
from marlin_gen.layout import PackedWeight, pack


def to_packed(weight: QuantizedWeight, name: str = "weight") -> PackedWeight:
    """``weight`` in the layout of the kernels, on its own device: the same numbers, bit for bit.

    Groups that no format has (256, or one scale a row) are packed in the largest that divides them, scales repeated.
    Raises ValueError, with ``name`` in it, for what no format holds.
    """
    if weight.bits != 4:
        raise ValueError(f"{name} has {weight.bits}-bit codes; the kernels read 4-bit ones")
    if weight.order is not None:
        raise ValueError(f"{name} is in act-order (desc_act); the kernels read input features in their own order")
    fmt = _format_of(weight, name)
    scales = _halves(weight.scales, name, "scales")
    if weight.zeros is not None:
        scales = torch.stack([scales, weight.zeros.half()], -1)
    if weight.minima is not None:
        scales = torch.stack([scales, _halves(weight.minima, name, "minima")], -1)
    scales = scales.repeat_interleave(weight.group_size // fmt.group_size, dim=1)
    return pack(weight.codes, scales, fmt.name)


def _halves(numbers: torch.Tensor, name: str, what: str) -> torch.Tensor:
    halves = numbers.half()
    if not torch.equal(halves.to(numbers.dtype), numbers):
        worst = float((halves.double() - numbers.double()).abs().max())
        raise ValueError(f"{name} has {numbers.dtype} {what} that f16 does not hold, off by up to {worst:.1e}")
    return halves


def _format_of(weight: QuantizedWeight, name: str) -> WeightFormat:
    """The 4-bit format, with zeros or minima as the weight has them, of the largest group that divides its own."""
    if weight.zeros is not None and weight.zeros.is_floating_point():
        raise ValueError(f"{name} has zero points in {weight.zeros.dtype}; the kernels read whole ones")
    kind = weight.bits, weight.zeros is not None, weight.minima is not None
    formats = [fmt for fmt in FORMATS.values() if (fmt.bits, fmt.has_zeros, fmt.has_minima) == kind]
    fitting = [fmt for fmt in formats if weight.group_size % fmt.group_size == 0]
    if not fitting:
        known = ", ".join(str(fmt.group_size) for fmt in formats)
        raise ValueError(f"{name} has group_size={weight.group_size}, which none of {known} divides")
    return max(fitting, key=lambda fmt: fmt.group_size)
