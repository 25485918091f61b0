"""Number formats, as rows: activation types and quantised weight formats.

Adding a weight format is one row here and one ``decode`` overload in
``templates/include/marlin_gen/dequant.cuh``; tests and registries iterate the rows.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class DType:
    """A 16-bit activation/output type: our name, its torch attribute, its size."""

    name: str  # the token in keys and file names
    torch_name: str  # getattr(torch, torch_name)
    bytes: int


@dataclass(frozen=True)
class WeightFormat:
    """How a weight is stored: ``weight = (code - zero point) * scale``, of the row and of k // group_size.

    With minima: ``weight = code * scale + minimum``.
    """

    name: str  # the token in keys, tables and file names
    bits: int
    zero_point: int | None  # one number for all groups: the format is symmetric about it; None: each group has its own
    group_size: int  # weights along k that share a scale
    scale_dtype: str
    has_minima: bool = False  # each group has a minimum beside its scale, and no zero point

    @property
    def codes(self) -> int:
        """How many different codes there are; codes are 0 .. codes - 1."""
        return 1 << self.bits

    @property
    def has_zeros(self) -> bool:
        """Whether each group has a whole zero point of its own, 0 .. codes, beside its scale."""
        return self.zero_point is None and not self.has_minima

    @property
    def scale_values(self) -> int:
        """Numbers of one row and group: the scale, and the zero point or minimum if it has one, in the scale's type."""
        return 2 if self.has_zeros or self.has_minima else 1

    @property
    def scale_bytes(self) -> int:
        """Of one row and group."""
        return DTYPES[self.scale_dtype].bytes * self.scale_values

    def packed_bytes(self, n: int, k: int) -> int:
        """Bytes of the packed weight and its scales: what a kernel must at least read."""
        return n * k * self.bits // 8 + n * (k // self.group_size) * self.scale_bytes


DTYPES = {d.name: d for d in (DType("f16", "float16", 2),)}

# "u4b8g128": unsigned 4-bit codes about 8 in groups of 128; "u4zg128": about a zero point of each group; "u4mg32":
# with a minimum of each group. Larger groups,
# and one scale a row, are packed as 128 or the largest of these that divides them, their scales repeated: the same
# weight, bit for bit.
FORMATS = {
    f.name: f
    for f in (
        WeightFormat(f"{codes}g{size}", 4, zero_point, size, scale_dtype="f16", has_minima=codes == "u4m")
        for codes, zero_point in (("u4b8", 8), ("u4z", None), ("u4m", None))
        for size in (128, 64, 32)
    )
}

# The order that ``layout.pack`` writes and every kernel reads; tables and checkpoints record it. A new order is a new
# number.
LAYOUT_VERSION = 1

DEFAULT_FORMAT = "u4b8g128"
DEFAULT_DTYPE = "f16"


def weight_format(name: str) -> WeightFormat:
    """The row called ``name``; a ValueError that lists the rows when there is none."""
    if name not in FORMATS:
        raise ValueError(f"unknown weight format {name!r}; known: {', '.join(sorted(FORMATS))}")
    return FORMATS[name]


def dtype(name: str) -> DType:
    """The row called ``name``; a ValueError that lists the rows when there is none."""
    if name not in DTYPES:
        raise ValueError(f"unsupported activation dtype {name!r}; known: {', '.join(sorted(DTYPES))}")
    return DTYPES[name]
