"""The one packed layout of a quantised weight, for every kernel, config, GPU and number of tokens.

A 64 x 64 tile (features x k) of 4-bit codes is 512 contiguous 32-bit words, ``[row block of 16][lane][k16 step]``;
tiles are ordered ``[n / 64][k / 64]``. One word holds the 8 codes a lane needs of one 16 x 16 block (g = lane / 4,
t = lane % 4, k counted inside the block):

    nibble   0    1     2     3      4     5     6     7
    row      g   g+8    g    g+8     g    g+8    g    g+8
    k        2t   2t   2t+8  2t+8   2t+1  2t+1  2t+9  2t+9

8-bit codes take two words, and a tile 1024, ``[row block][step / 2][lane][step % 2][word]``:

    byte     0    1     2     3   |  0     1     2     3
    row      g    g    g+8   g+8  |  g     g    g+8   g+8
    k        2t  2t+1   2t   2t+1 | 2t+8  2t+9  2t+8  2t+9

Codes that are fp8 numbers lie in these two words with their bits mixed, by ``fp8_words``.

This is the A fragment of ``mma.sync.m16n8k16`` and of register-A ``wgmma``. Scales are ``[n / 64][k / group][64]`` in
the type of the activations; in each 16 rows the order is 0, 8, 1, 9, ... so that a lane reads the scales of its rows g
and g + 8 as one word.

Formats about a constant zero point have ``[n / 64][k / group + 1][64]``: behind the scales of the groups, in the same
order, each row's lift, a power of two that brings its largest scale into [8, 16). A kernel multiplies its scales by it,
so that a code read as a subnormal number, times the scale, is a normal one (dequant.cuh), and divides the sums by it.
Groups of nothing but zero points have no say in that, and no scale above those of the row's others: it would cost them
their bits, and says nothing itself. In bf16 exact wgmma kernels activations count from 2^-54 on, for the same reason.

Formats with offsets z have ``[n / 64][k / group][128]``: after each such pair of scales, their offsets. Where zero
points are whole, that is what decoding subtracts or adds: in f16 1024 + z of row g and -(64 + z) of row g + 8, whose
codes come out as 1024 + q and 64 + q; in bf16 -(128 + z) of both. The type holds all of them. ``retyped`` changes it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from marlin_gen import fp8_words
from marlin_gen.formats import DEFAULT_FORMAT, DTYPES, LAYOUT_VERSION, WeightFormat, version_error
from marlin_gen.formats import weight_format as format_row
from marlin_gen.problem import SIZE_UNIT, check_shape

__all__ = ["LAYOUT_VERSION", "SCALE_DTYPES", "PackedWeight", "check_scales", "pack", "unpack"]

SCALE_DTYPES = tuple(getattr(torch, row.torch_name) for row in DTYPES.values())

# Where the 8 codes of a lane and block lie in its words, by bits: (row half, k half, k parity), that is code
# [8 * row + g, 8 * k_half + 2 * t + parity].
_PLACES = {
    4: [(i & 1, i >> 1 & 1, i >> 2) for i in range(8)],
    8: [(i >> 1 & 1, i >> 2, i & 1) for i in range(8)],
}


@dataclass(frozen=True, eq=False)
class PackedWeight:
    """A weight B (n, k) as kernels read it. Both tensors are contiguous and on one device."""

    weight: torch.Tensor  # int32 [n / 64, k / 64, 512 or, of 8 bits, 1024]
    # f16 or bf16, as activations: [n / 64, fmt.scale_rows(k), 64 or, with offsets, 128]. Whoever changes a scale must
    # change its row's lift.
    scales: torch.Tensor
    weight_format: str = DEFAULT_FORMAT
    layout_version: int = LAYOUT_VERSION
    # int64 [k], of a weight in act-order: which input feature each of its columns multiplies. None: their own.
    order: torch.Tensor | None = None

    @property
    def n(self) -> int:
        return self.weight.shape[0] * SIZE_UNIT

    @property
    def k(self) -> int:
        return self.weight.shape[1] * SIZE_UNIT

    @property
    def nbytes(self) -> int:
        return self.weight.nbytes + self.scales.nbytes

    @property
    def dtype(self) -> torch.dtype:
        """Of the scales, and of the activations that this weight is multiplied with."""
        return self.scales.dtype

    @property
    def device(self) -> torch.device:
        return self.weight.device

    def to(self, device: torch.device | str | int, non_blocking: bool = False) -> PackedWeight:
        tensors = {name: getattr(self, name) for name in ("weight", "scales", "order")}
        moved = {name: one.to(device, non_blocking=non_blocking) for name, one in tensors.items() if one is not None}
        return replace(self, **moved)


def pack(codes: torch.Tensor, scales: torch.Tensor, weight_format: str = DEFAULT_FORMAT) -> PackedWeight:
    """Codes (uint8 [n, k]) and scales (f16 or bf16 [n, k / group_size]) to the packed layout, on their own device.

    The scales' type is that of the activations. For a format with offsets, scales are [n, k / group_size, 2]: scale,
    and zero point (whole, from 0 to ``codes``, in the formats called u4z) or minimum.
    Scales of groups whose weights are all zero may be made less.
    Raises ValueError for a shape the layout cannot hold, a wrong dtype, or a code above the format's largest.
    Peak extra memory is about twice the packed weight.
    """
    fmt = format_row(weight_format)
    if codes.dtype != torch.uint8 or codes.ndim != 2:
        raise ValueError(
            f"codes are {codes.dtype} {list(codes.shape)}; pack needs torch.uint8 [n, k], as quantize returns"
        )
    n, k = codes.shape
    check_shape(n, k, fmt)
    check_scales(scales, n, k, fmt)
    if scales.device != codes.device:
        raise ValueError(f"codes are on {codes.device} and scales on {scales.device}; move both to one device")
    if (largest := int(codes.max())) >= fmt.codes:
        raise ValueError(f"code {largest} does not fit {fmt.name}; its codes are 0 .. {fmt.codes - 1}")
    if fmt.offset == "floats":
        fp8_words.check(codes, scales, fmt.name)

    blocks = codes.view(n // 64, 4, 2, 8, k // 64, 4, 2, 4, 2)  # n64, row block, half, g, k64, step, k half, t, parity
    words = torch.zeros(
        n // 64, k // 64, 4, 8, 4, 4, fmt.bits // 4, dtype=torch.int32, device=codes.device
    )  # n64, k64, row block, g, t, step, word
    per_word = 32 // fmt.bits
    for i, (row, half, parity) in enumerate(_PLACES[fmt.bits]):
        code = blocks[:, :, row, :, :, :, half, :, parity].permute(0, 3, 1, 2, 5, 4)
        words[..., i // per_word] |= code.to(torch.int32) << fmt.bits * (i % per_word)
    if fmt.offset == "floats":
        for some in torch.split(words, 8):  # for little memory
            some.copy_(fp8_words.to_words(some))
    if fmt.offset == "zeros":
        scales = torch.stack([scales[..., 0], _zero_terms(scales[..., 1], fmt)], -1)
    if fmt.has_lifts:
        scales = _capped(codes, scales, fmt)
        scales = torch.cat([scales, lifts(scales)[:, None]], 1)
    rows, each = fmt.scale_rows(k), fmt.scale_values
    pairs = scales.reshape(n // 64, 4, 2, 8, rows, each).permute(0, 4, 1, 3, 5, 2)
    return PackedWeight(
        _by_planes(words, fmt).reshape(n // 64, k // 64, -1),
        pairs.reshape(n // 64, rows, 64 * each).contiguous(),
        fmt.name,
    )


def _capped(codes: torch.Tensor, scales: torch.Tensor, fmt: WeightFormat) -> torch.Tensor:
    """Scales of groups that are all zero, whatever their scale, brought down to the largest of their row's others."""
    parts = torch.split(codes.view(len(codes), -1, fmt.group_size), 256)  # for little memory
    is_used = torch.cat([(part != fmt.zero_point).any(-1) for part in parts])
    largest = torch.where(is_used, scales.abs(), 0).amax(1, keepdim=True)
    return torch.where(is_used | (largest == 0), scales, scales.abs().minimum(largest))


def lifts(scales: torch.Tensor) -> torch.Tensor:
    """Of scales [n, groups] each row's power of two [n], in their type, that brings its largest into [8, 16).

    From 2^-12 to 2^15, which both types hold, so that a layer may be converted from one to the other. That is enough
    for every scale of f16; in bf16 weights are exact for scales from 2^-48 to 2^100. 1 for rows without a finite scale.
    """
    largest = scales.abs().amax(1).float()
    exponent = (4 - torch.frexp(largest).exponent).clamp(-12, 15)
    exponent = torch.where((largest > 0) & largest.isfinite(), exponent, 0)
    return torch.ldexp(torch.ones_like(largest), exponent).to(scales.dtype)


def retyped(scales: torch.Tensor, weight_format: str, dtype: torch.dtype) -> torch.Tensor:
    """Packed ``scales`` in ``dtype``: rounded, but that zero points become what decoding in ``dtype`` needs.

    In a type of no kernel, as float32, zero points stay as they are, and can be told from there as well.
    """
    found = scales.to(dtype)
    if format_row(weight_format).offset == "zeros" and dtype in SCALE_DTYPES and dtype != scales.dtype:
        terms, new = (each.view(*each.shape[:2], -1, 2, 2)[..., 1, :] for each in (scales, found))  # [.., row half]
        new.copy_(_terms(_zeros(terms).to(dtype), torch.arange(2, device=terms.device) == 1))
    return found


def unpack(packed: PackedWeight) -> tuple[torch.Tensor, torch.Tensor]:
    """The inverse of ``pack``: codes (uint8 [n, k]) and scales ([n, k / group_size], or [.., 2] with offsets).

    Columns are as they were packed: those of a weight in act-order are its ``order``'s.
    """
    fmt = format_row(packed.weight_format)
    if packed.layout_version != LAYOUT_VERSION:
        raise ValueError(version_error(packed.layout_version))
    n, k = packed.n, packed.k
    words = packed.weight.view(n // 64, k // 64, 4, fmt.bits // 4, 8, 4, 16 // fmt.bits, fmt.bits // 4)
    words = words.permute(0, 1, 2, 4, 5, 3, 6, 7).reshape(n // 64, k // 64, 4, 8, 4, 4, fmt.bits // 4)
    if fmt.offset == "floats":
        words = fp8_words.from_words(words)
    codes = torch.empty(n // 64, 4, 2, 8, k // 64, 4, 2, 4, 2, dtype=torch.uint8, device=words.device)
    per_word = 32 // fmt.bits
    for i, (row, half, parity) in enumerate(_PLACES[fmt.bits]):
        code = (words[..., i // per_word] >> fmt.bits * (i % per_word) & fmt.codes - 1).to(torch.uint8)
        codes[:, :, row, :, :, :, half, :, parity] = code.permute(0, 2, 3, 1, 5, 4)
    groups, each = k // fmt.group_size, fmt.scale_values
    scales = packed.scales.view(n // 64, -1, 4, 8, each, 2)[:, :groups].permute(0, 2, 5, 3, 1, 4)
    scales = scales.reshape(n, groups, each)
    if not fmt.has_offsets:
        return codes.view(n, k), scales[..., 0]
    if fmt.offset == "zeros":
        scales = torch.stack([scales[..., 0], _zeros(scales[..., 1])], -1)
    return codes.view(n, k), scales


def _by_planes(words: torch.Tensor, fmt: WeightFormat) -> torch.Tensor:
    """[.., row block, g, t, step, word] to the order of the layout: 16 bytes a lane, then the next plane of 16."""
    n64, k64 = words.shape[:2]
    planes = fmt.bits // 4
    return words.view(n64, k64, 4, 8, 4, planes, 4 // planes, planes).permute(0, 1, 2, 5, 3, 4, 6, 7)


def _zero_terms(zeros: torch.Tensor, fmt: WeightFormat) -> torch.Tensor:
    """What decoding subtracts or adds for zero points [n, groups]; ValueError unless they are whole, 0 .. codes."""
    if not bool(((zeros >= 0) & (zeros <= fmt.codes) & (zeros == zeros.round())).all()):
        raise ValueError(f"zero points of {fmt.name} must be whole numbers from 0 to {fmt.codes}")
    return _terms(zeros, torch.arange(zeros.shape[0], device=zeros.device)[:, None] // 8 % 2 == 1)


def _terms(zeros: torch.Tensor, is_high: torch.Tensor) -> torch.Tensor:
    """Of zero points in the type of activations; ``is_high``: of rows g + 8."""
    if zeros.dtype == torch.bfloat16:
        return -(128 + zeros)
    return torch.where(is_high, -(64 + zeros), 1024 + zeros)


def _zeros(terms: torch.Tensor) -> torch.Tensor:
    """The inverse of ``_terms``, in any type that they were cast to: their size tells what was added."""
    size = terms.abs()
    return size - torch.where(size >= 1024, 1024, torch.where(size >= 128, 128, 64))


def check_scales(scales: torch.Tensor, n: int, k: int, fmt: WeightFormat) -> None:
    """Raise a ValueError unless ``scales`` are f16 or bf16 [n, k / group_size], or [.., 2] with offsets."""
    expected = (n, k // fmt.group_size, *((2,) if fmt.has_offsets else ()))
    if scales.dtype not in SCALE_DTYPES or tuple(scales.shape) != expected:
        raise ValueError(
            f"scales are {scales.dtype} {list(scales.shape)};"
            f" {fmt.name} with n={n}, k={k} needs {' or '.join(map(str, SCALE_DTYPES))} {list(expected)}"
        )
