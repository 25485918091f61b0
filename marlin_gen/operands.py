"""Random operands of one weight shape on a CUDA device, and the reference that results are held to."""

from __future__ import annotations

import math
from typing import Any

import torch

from marlin_gen.formats import WeightFormat
from marlin_gen.formats import dtype as dtype_row
from marlin_gen.formats import weight_format as format_row
from marlin_gen.fp8_words import is_nan
from marlin_gen.layout import pack
from marlin_gen.reference import gemm_reference

ROTATE_L2S = 5  # the distinct copies of a weight are this many times the L2 cache


def random_weight(
    n: int, k: int, fmt: WeightFormat, dtype: torch.dtype, device: torch.device | str = "cpu",
    generator: torch.Generator | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Codes (uint8 [n, k]) and scales ([n, k / group_size], or [.., 2] with offsets) as ``pack`` takes them.

    Weights are about 0.06 in size whatever the bits, and centred, but that zero points reach both ends. Rows that have
    lifts differ, so that those do.
    """
    made: dict[str, Any] = {"device": device, "generator": generator}
    codes = torch.randint(0, fmt.codes, (n, k), dtype=torch.uint8, **made)
    if fmt.offset == "floats":
        codes[is_nan(codes)] = 0
    scales = (torch.rand(n, k // fmt.group_size, **made) * 0.02 + 0.005) * 16 / fmt.codes
    if fmt.has_lifts:
        scales *= 2.0 ** torch.randint(-1, 2, (n, 1), **made)
    if fmt.offset == "zeros":
        offsets = torch.randint(0, fmt.codes + 1, scales.shape, **made).float()
    elif fmt.offset == "fractions":
        offsets = torch.rand(scales.shape, **made) * fmt.codes
    else:
        offsets = scales * fmt.codes / -2 * (1 + torch.rand(scales.shape, **made) / 8)
    return codes, (torch.stack([scales, offsets], -1) if fmt.has_offsets else scales).to(dtype)


class Shape:
    """Random operands of one (n, k): packed copies that rotate, and what results are held to."""

    def __init__(self, n: int, k: int, weight_format: str, act_dtype: str, device: torch.device, l2_bytes: int) -> None:
        fmt = format_row(weight_format)
        self.n, self.k, self.device, self.l2_bytes = n, k, device, l2_bytes
        self.dtype = getattr(torch, dtype_row(act_dtype).torch_name)
        self.weight_format = weight_format
        self.codes, self.scales = random_weight(n, k, fmt, self.dtype, device)
        first = pack(self.codes, self.scales, weight_format)
        copies = 1 + math.ceil(ROTATE_L2S * l2_bytes / first.nbytes)
        self.packed = [
            first,
            *(
                type(first)(first.weight.clone(), first.scales.clone(), weight_format, first.layout_version)
                for _ in range(copies - 1)
            ),
        ]
        self._cells: dict[int, tuple[torch.Tensor, torch.Tensor, float]] = {}

    def cell(self, m: int) -> tuple[torch.Tensor, torch.Tensor, float]:
        """Activations [m, k], their fp32 reference [m, n], and its norm."""
        if m not in self._cells:
            a = torch.randn(m, self.k, device=self.device, dtype=self.dtype)
            reference = gemm_reference(a, self.codes, self.scales, self.weight_format)
            self._cells[m] = a, reference, float(reference.norm())
        return self._cells[m]
