"""Quantisation, and the results every kernel is held to."""

from __future__ import annotations

from collections.abc import Callable

import torch

from marlin_gen.formats import DEFAULT_FORMAT, WeightFormat
from marlin_gen.formats import weight_format as format_row
from marlin_gen.layout import check_scales
from marlin_gen.problem import check_shape

# A group's scale is absmax / divisor for the divisor with the least squared error. 7 clips nothing; 8 and above
# clip the few largest weights of a group and resolve all others better.
_DIVISORS = (7.0, 7.4, 7.8, 8.2, 8.6, 9.0)
_CHUNK_WEIGHTS = 1 << 24  # weights quantised at once: bounds the fp32 temporaries to a few hundred MB
_SMALLEST_SCALE = 2.0**-24  # the smallest positive f16: a group of tiny weights must not get the scale 0


def quantize(weight: torch.Tensor, weight_format: str = DEFAULT_FORMAT) -> tuple[torch.Tensor, torch.Tensor]:
    """A float weight [n, k] to codes (uint8 [n, k]) and scales (f16 [n, k / group_size]), rounding to nearest.

    With zero points, scales are f16 [n, k / group_size, 2]: scale and zero point, from the group's least and largest;
    with minima, scale and minimum.
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
    codes = torch.empty(n, k, dtype=torch.uint8, device=weight.device)
    each = (fmt.scale_values,) if fmt.scale_values > 1 else ()
    scales = torch.empty(n, k // fmt.group_size, *each, dtype=torch.float16, device=weight.device)
    rows = max(_CHUNK_WEIGHTS // k, 1)
    with torch.no_grad():
        for start in range(0, n, rows):
            stop = min(start + rows, n)
            groups = weight[start:stop].float().view(stop - start, -1, fmt.group_size)
            chunk_codes, chunk_scales = _quantizer(fmt)(groups, fmt)
            codes[start:stop] = chunk_codes.view(stop - start, k)
            scales[start:stop] = chunk_scales
    return codes, scales


def _quantizer(fmt: WeightFormat) -> Callable[[torch.Tensor, WeightFormat], tuple[torch.Tensor, torch.Tensor]]:
    if fmt.has_minima:
        return _quantize_from_minima
    return _quantize_about_zeros if fmt.has_zeros else _quantize_groups


def _quantize_groups(groups: torch.Tensor, fmt: WeightFormat) -> tuple[torch.Tensor, torch.Tensor]:
    """fp32 [rows, groups, group_size] to codes of the same shape and f16 scales [rows, groups]."""
    assert fmt.zero_point is not None
    absmax = _checked_absmax(groups, fmt)
    best_error = torch.full_like(absmax, float("inf"))
    best_scale = torch.ones_like(absmax, dtype=torch.float16)
    for divisor in _DIVISORS:
        scale = (absmax / divisor).clamp_min(_SMALLEST_SCALE).half()
        decoded = _encode(groups, scale, fmt).sub_(fmt.zero_point).mul_(scale.float()[..., None])
        error = decoded.sub_(groups).square_().sum(-1)
        better = error < best_error
        best_error = torch.where(better, error, best_error)
        best_scale = torch.where(better, scale, best_scale)
    best_scale = torch.where(absmax == 0, 1.0, best_scale)  # an all-zero group decodes to zeros under any scale
    return _encode(groups, best_scale, fmt).to(torch.uint8), best_scale


def _quantize_about_zeros(groups: torch.Tensor, fmt: WeightFormat) -> tuple[torch.Tensor, torch.Tensor]:
    """fp32 [rows, groups, group_size] to codes of the same shape and f16 [rows, groups, 2]: scales and zero points."""
    _checked_absmax(groups, fmt)
    low, high = groups.amin(-1).clamp_max(0), groups.amax(-1).clamp_min(0)  # zero has a code of its own
    scale = ((high - low) / (fmt.codes - 1)).clamp_min(_SMALLEST_SCALE).half()
    zero = (-low / scale.float()).round_().clamp_(0, fmt.codes - 1)
    codes = (groups / scale.float()[..., None]).round_().add_(zero[..., None]).clamp_(0, fmt.codes - 1)
    return codes.to(torch.uint8), torch.stack([scale, zero.half()], -1)


def _quantize_from_minima(groups: torch.Tensor, fmt: WeightFormat) -> tuple[torch.Tensor, torch.Tensor]:
    """fp32 [rows, groups, group_size] to codes of the same shape and f16 [rows, groups, 2]: scales and minima."""
    _checked_absmax(groups, fmt)
    low, high = groups.amin(-1).clamp_min(-torch.finfo(torch.float16).max).half(), groups.amax(-1)
    scale = ((high - low.float()) / (fmt.codes - 1)).clamp_min(_SMALLEST_SCALE).half()
    codes = ((groups - low.float()[..., None]) / scale.float()[..., None]).round_().clamp_(0, fmt.codes - 1)
    return codes.to(torch.uint8), torch.stack([scale, low], -1)


def _checked_absmax(groups: torch.Tensor, fmt: WeightFormat) -> torch.Tensor:
    absmax = groups.abs().amax(dim=-1)
    limit = torch.finfo(torch.float16).max * _DIVISORS[0]
    if not bool((absmax <= limit).all()):  # also false for NaN
        raise ValueError(
            f"the largest weight is {absmax.max().item()}, but {fmt.name} holds finite weights up to {limit:.0f};"
            " check the checkpoint"
        )
    return absmax


def _encode(groups: torch.Tensor, scale: torch.Tensor, fmt: WeightFormat) -> torch.Tensor:
    """The nearest codes under ``scale``, as fp32."""
    assert fmt.zero_point is not None
    return (groups / scale.float()[..., None]).round_().add_(fmt.zero_point).clamp_(0, fmt.codes - 1)


def dequantize(
    codes: torch.Tensor,
    scales: torch.Tensor,
    weight_format: str = DEFAULT_FORMAT,
    dtype: torch.dtype = torch.float16,
) -> torch.Tensor:
    """The weight [n, k] as the kernels see it, rounded to f16 once: code - zero point is exact, as is code * scale."""
    fmt = format_row(weight_format)
    check_scales(scales, codes.shape[0], codes.shape[1], fmt)
    if fmt.has_minima:  # f64 holds the sum
        return _decoded(codes.double(), scales.double(), fmt).half().to(dtype)
    return _decoded(codes.to(torch.float16), scales, fmt).to(dtype)


def gemm_reference(
    a: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor, weight_format: str = DEFAULT_FORMAT
) -> torch.Tensor:
    """``a [..., k] @ B^T`` in fp32 [..., n] with unrounded weights: what kernels are compared with."""
    fmt = format_row(weight_format)
    check_scales(scales, codes.shape[0], codes.shape[1], fmt)
    return a.float() @ _decoded(codes.float(), scales.float(), fmt).T


def _decoded(codes: torch.Tensor, scales: torch.Tensor, fmt: WeightFormat) -> torch.Tensor:
    """The weight [n, k] in the floating type of both, see ``WeightFormat``; ``codes`` is overwritten."""
    grouped = codes.view(codes.shape[0], -1, fmt.group_size)
    if fmt.has_minima:
        return grouped.mul_(scales[..., :1]).add_(scales[..., 1:]).view(codes.shape)
    if fmt.has_zeros:
        grouped.sub_(scales[..., 1:])
        scales = scales[..., 0]
    elif fmt.zero_point is not None:
        grouped.sub_(fmt.zero_point)
    return grouped.mul_(scales[..., None]).view(codes.shape)
