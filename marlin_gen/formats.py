"""Number formats, as rows: activation types and quantised weight formats.

Adding a weight format is one row here and one specialisation of ``Decoder`` in
``templates/include/marlin_gen/dequant.cuh`` or beside it; tests and registries iterate the rows.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class DType:
    """A 16-bit type of activations, scales and outputs: our name, its torch attribute, its size."""

    name: str  # the token in keys and file names
    torch_name: str  # getattr(torch, torch_name)
    bytes: int
    # Of a result, relative, in the Frobenius norm, against the fp32 product of unrounded weights: twice what rounding
    # to the type loses at most. cuBLAS has a quarter of it.
    error_limit: float


@dataclass(frozen=True)
class WeightFormat:
    """How a weight is stored: codes, and for each row and k // group_size a scale and perhaps an offset.

    What the offset is, and how a weight is decoded from code q and scale s, each step rounded to the scale's type:

    =========  ====================  ========================================================================
    constant   (q - zero_point) * s  the subtraction is exact, the product rounds once
    zeros      (q - z) * s           z is whole, 0 .. codes: as above
    fractions  (q - z) * s           z is any number: both round
    minima     q * s + z             rounds once
    floats     e4m3(q) * s           none; codes are the bits of float8_e4m3fn, not its NaN. Rounds once
    =========  ====================  ========================================================================
    """

    name: str  # the token in keys, tables and file names
    bits: int
    offset: str  # a row of the table above
    group_size: int  # weights along k that share a scale
    zero_point: int = 0  # of "constant"

    @property
    def codes(self) -> int:
        """How many different codes there are; codes are 0 .. codes - 1."""
        return 1 << self.bits

    @property
    def has_offsets(self) -> bool:
        """Whether each group has an offset of its own beside its scale."""
        return self.offset not in ("constant", "floats")

    @property
    def has_lifts(self) -> bool:
        """Whether each row has, behind its scales, the power of two that kernels decode it with (``layout.lifts``)."""
        return self.offset == "constant"

    @property
    def scale_values(self) -> int:
        """Numbers of one row and group: the scale, and the offset if there is one, in the type of activations."""
        return 2 if self.has_offsets else 1

    @property
    def scale_bytes(self) -> int:
        """Of one row and group."""
        return 2 * self.scale_values

    def scale_rows(self, k: int) -> int:
        """How many rows of scales 64 features have: one for each group, and one of lifts if there are any."""
        return k // self.group_size + int(self.has_lifts)

    def packed_bytes(self, n: int, k: int) -> int:
        """Bytes of the packed weight and its scales: what a kernel must at least read."""
        return n * k * self.bits // 8 + n * self.scale_rows(k) * self.scale_bytes


DTYPES = {d.name: d for d in (DType("f16", "float16", 2, 1e-3), DType("bf16", "bfloat16", 2, 8e-3))}

# "u4b8g128": unsigned 4-bit codes about 8 in groups of 128. "u4z": about a whole zero point of each group (AWQ, GPTQ),
# "u4f": about any number (HQQ), "u4m": up from a minimum (GGUF's Q4_1). "e4m3": fp8. Larger groups, and one scale a
# row, are packed as the largest of these that divides them, their scales repeated: the same weight, bit for bit.
_KINDS = (
    ("u4b8", 4, "constant", 8),
    ("u4z", 4, "zeros", 0),
    ("u4f", 4, "fractions", 0),
    ("u4m", 4, "minima", 0),
    ("u8b128", 8, "constant", 128),
    ("e4m3", 8, "floats", 0),
)
FORMATS = {
    f.name: f
    for f in (
        WeightFormat(f"{codes}g{size}", bits, offset, size, zero_point)
        for codes, bits, offset, zero_point in _KINDS
        for size in (128, 64, 32)
    )
}

FORMAT_CODES = {name: code for code, name in enumerate(FORMATS)}  # of this process: what the native launcher is told

# The order that ``layout.pack`` writes and every kernel reads; tables and checkpoints record it. A new order is a new
# number. 2: lifts behind the scales. 3: fp8 by ``fp8_words``.
LAYOUT_VERSION = 3

DEFAULT_FORMAT = "u4b8g128"
DEFAULT_DTYPE = "f16"


def kind_suffix(weight_format: str, act_dtype: str) -> str:
    """What a file's name has of its kind of numbers: nothing for the default kind, else such as "-u4zg64-bf16"."""
    is_default = (weight_format, act_dtype) == (DEFAULT_FORMAT, DEFAULT_DTYPE)
    return "" if is_default else f"-{weight_format}-{act_dtype}"


def is_layout(version: int, fmt: WeightFormat) -> bool:
    """Whether weights of this format in the layout of ``version`` are as kernels read them."""
    return version == LAYOUT_VERSION or (version == 2 and fmt.offset != "floats")


def version_error(version: int) -> str:
    """What is wrong with a weight in the layout of another ``version``."""
    return f"layout_version={version} is not {LAYOUT_VERSION}; pack the original weight again with this marlin_gen"


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
