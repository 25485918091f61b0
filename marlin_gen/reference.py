"""Quantisation, and the results every kernel is held to."""

from __future__ import annotations

import math

import torch

from marlin_gen.formats import DEFAULT_FORMAT, WeightFormat
from marlin_gen.formats import weight_format as format_row
from marlin_gen.fp8_words import SCALE_LIMIT
from marlin_gen.layout import PackedWeight, check_scales, unpack
from marlin_gen.problem import check_shape

# A group's scale is absmax / divisor for the divisor with the least squared error. 7 (of 4 bits) clips nothing; 8 and
# above clip the few largest weights of a group and resolve all others better. Of 8 bits there is nothing to choose.
_DIVISORS = {4: (7.0, 7.4, 7.8, 8.2, 8.6, 9.0), 8: (127.0,)}
_FLOAT = torch.float8_e4m3fn
_LARGEST_FLOAT = 448.0
_CHUNK_WEIGHTS = 1 << 24  # weights quantised at once: bounds the fp32 temporaries to a few hundred MB
# The smallest positive f16: a group of tiny weights must not get the scale 0. Of floats, which are as fine under any
# scale that is not too large, the smallest that f16 has with all its bits.
_SMALLEST_SCALE, _SMALLEST_FLOAT_SCALE = 2.0**-24, 2.0**-14
_LARGEST_ZERO = 2048  # in scales: up to it f16 has whole numbers, beyond it steps of a code are lost in q - z


def quantize(
    weight: torch.Tensor, weight_format: str = DEFAULT_FORMAT, dtype: torch.dtype | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """A float weight [n, k] to codes (uint8 [n, k]) and scales ([n, k / group_size]), rounding to nearest.

    ``dtype``, of the scales and so of the activations, is float16 or bfloat16; by default bfloat16 for such a weight.
    With offsets, scales are [n, k / group_size, 2]: scale, and zero point or minimum, of the group's least and largest.
    Raises ValueError for a shape the packed layout cannot hold and for weights that are not finite or exceed the
    range of f16 scales.
    """
    fmt = format_row(weight_format)
    if weight.ndim != 2 or not weight.is_floating_point():
        raise ValueError(
            f"weight is {weight.dtype} {list(weight.shape)}; quantize needs a floating-point [n, k] tensor"
        )
    n, k = weight.shape
    check_shape(n, k, fmt)
    dtype = dtype or (torch.bfloat16 if weight.dtype == torch.bfloat16 else torch.float16)
    codes = torch.empty(n, k, dtype=torch.uint8, device=weight.device)
    each = (2,) if fmt.has_offsets else ()
    scales = torch.empty(n, k // fmt.group_size, *each, dtype=dtype, device=weight.device)
    check_scales(scales, n, k, fmt)
    rows = max(_CHUNK_WEIGHTS // k, 1)
    with torch.no_grad():
        for start in range(0, n, rows):
            stop = min(start + rows, n)
            groups = weight[start:stop].float().view(stop - start, -1, fmt.group_size)
            encode = _quantize_from_least if fmt.has_offsets else _quantize_groups
            chunk_codes, chunk_scales = encode(groups, fmt, dtype)
            codes[start:stop] = chunk_codes.view(stop - start, k)
            scales[start:stop] = chunk_scales
    return codes, scales


def _quantize_groups(
    groups: torch.Tensor, fmt: WeightFormat, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """fp32 [rows, groups, group_size] to codes of the same shape and scales [rows, groups]."""
    absmax = _checked_absmax(groups, fmt)
    if fmt.offset == "floats":
        scale = (absmax / _LARGEST_FLOAT).clamp(_SMALLEST_FLOAT_SCALE, SCALE_LIMIT).to(dtype)
        floats = (groups / scale.float()[..., None]).clamp_(-_LARGEST_FLOAT, _LARGEST_FLOAT).to(_FLOAT)
        return floats.view(torch.uint8), scale
    best_error = torch.full_like(absmax, float("inf"))
    best_scale = torch.ones_like(absmax, dtype=dtype)
    for divisor in _DIVISORS[fmt.bits]:
        scale = (absmax / divisor).clamp_min(_SMALLEST_SCALE).to(dtype)
        decoded = _encode(groups, scale, fmt).sub_(fmt.zero_point).mul_(scale.float()[..., None])
        error = decoded.sub_(groups).square_().sum(-1)
        better = error < best_error
        best_error = torch.where(better, error, best_error)
        best_scale = torch.where(better, scale, best_scale)
    return _encode(groups, best_scale, fmt).to(torch.uint8), best_scale


def _quantize_from_least(
    groups: torch.Tensor, fmt: WeightFormat, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """fp32 [rows, groups, group_size] to codes of the same shape and [rows, groups, 2]: scales and offsets."""
    absmax = _checked_absmax(groups, fmt)
    low, high = groups.amin(-1), groups.amax(-1)
    if fmt.offset == "zeros":  # zero has a code of its own
        low, high = low.clamp_max(0), high.clamp_min(0)
    scale = ((high - low) / (fmt.codes - 1)).clamp_min(_SMALLEST_SCALE)
    if fmt.offset == "fractions":  # a group far from zero for its width, above all a constant one, has no finite zero
        scale = scale.maximum(absmax / _LARGEST_ZERO)
    scale = scale.to(dtype)
    if fmt.offset == "minima":
        offset = low.to(dtype)
        codes = (groups - offset.float()[..., None]) / scale.float()[..., None]
    else:
        zero = -low / scale.float()
        offset = (zero.round_().clamp_(0, fmt.codes - 1) if fmt.offset == "zeros" else zero).to(dtype)
        codes = groups / scale.float()[..., None] + offset.float()[..., None]
    return codes.round_().clamp_(0, fmt.codes - 1).to(torch.uint8), torch.stack([scale, offset], -1)


def _checked_absmax(groups: torch.Tensor, fmt: WeightFormat) -> torch.Tensor:
    absmax = groups.abs().amax(dim=-1)
    # A minimum is a weight itself, kept as f16; the scale of floats may be too large before it is infinite.
    steps = 1.0 if fmt.offset in ("minima", "floats") else _DIVISORS[fmt.bits][0]
    limit = torch.finfo(torch.float16).max * steps
    if not bool((absmax <= limit).all()):  # also false for NaN
        raise ValueError(
            f"the largest weight is {absmax.max().item()}, but {fmt.name} holds finite weights up to {limit:.0f};"
            " check the checkpoint"
        )
    return absmax


def _encode(groups: torch.Tensor, scale: torch.Tensor, fmt: WeightFormat) -> torch.Tensor:
    """The nearest codes under ``scale``, as fp32."""
    return (groups / scale.float()[..., None]).round_().add_(fmt.zero_point).clamp_(0, fmt.codes - 1)


def dequantize(
    codes: torch.Tensor,
    scales: torch.Tensor,
    weight_format: str = DEFAULT_FORMAT,
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """The weight [n, k] as the kernels see it, rounded in the scales' type as WeightFormat says; then to ``dtype``."""
    fmt = format_row(weight_format)
    check_scales(scales, codes.shape[0], codes.shape[1], fmt)
    if fmt.offset == "minima":  # the type of the sums: the fused multiply-add rounds once
        weight = _decoded(codes, scales.float(), fmt).to(scales.dtype)
    else:
        weight = _decoded(codes, scales, fmt)
    return weight.to(dtype or scales.dtype)


def gemm_reference(
    a: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    weight_format: str = DEFAULT_FORMAT,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """``a [..., k] @ B^T + bias`` in fp32 [..., n] with unrounded weights: what kernels are compared with."""
    fmt = format_row(weight_format)
    check_scales(scales, codes.shape[0], codes.shape[1], fmt)
    c = a.float() @ _decoded(codes, scales.float(), fmt).T
    return c if bias is None else c + bias.float()


def dequantized_matmul(
    a: torch.Tensor, packed: PackedWeight, bias: torch.Tensor | None, out: torch.Tensor
) -> None:
    """``out [m, n] = a [m, k] @ B^T + bias [n]`` with the whole weight decoded first, on any device."""
    codes, scales = unpack(packed)
    weight = dequantize(codes, scales, packed.weight_format, a.dtype).T
    if bias is None:
        torch.matmul(a, weight, out=out)
    else:
        torch.addmm(bias, a, weight, out=out)


def _decoded(codes: torch.Tensor, scales: torch.Tensor, fmt: WeightFormat) -> torch.Tensor:
    """The weight [n, k] in the type of ``scales``, which each step rounds to."""
    numbers = codes.view(_FLOAT) if fmt.offset == "floats" else codes
    grouped = numbers.to(scales.dtype, copy=True).view(codes.shape[0], -1, fmt.group_size)
    if fmt.offset == "minima":
        return grouped.mul_(scales[..., :1]).add_(scales[..., 1:]).view(codes.shape)
    grouped.sub_(scales[..., 1:] if fmt.has_offsets else fmt.zero_point)
    return grouped.mul_((scales[..., 0] if fmt.has_offsets else scales)[..., None]).view(codes.shape)


def errors(out: torch.Tensor, reference: torch.Tensor, norm: float) -> tuple[float, float]:
    """How far a product is from its fp32 ``reference`` of this Frobenius norm.

    The relative Frobenius error, and the worst element's in units of their root mean square, over 32: a few that are
    wrong altogether do not show in the norm of millions. Rounding is a fifteenth of ``DType.error_limit`` there.
    """
    off = out.float().sub_(reference)
    return float(off.norm()) / norm, float(off.abs_().max()) * math.sqrt(off.numel()) / norm / 32
