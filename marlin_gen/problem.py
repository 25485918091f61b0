"""What is asked: one matrix product of a linear layer."""

from __future__ import annotations

from dataclasses import dataclass

from marlin_gen.formats import DEFAULT_DTYPE, DEFAULT_FORMAT, WeightFormat, dtype, weight_format

SIZE_UNIT = 64  # n and k are multiples of it: the packed layout's tile


@dataclass(frozen=True, order=True)
class Problem:
    """``C[m, n] = A[m, k] @ dequantize(B)[n, k]^T``; m is the number of tokens."""

    n: int
    k: int
    m: int
    weight_format: str = DEFAULT_FORMAT
    act_dtype: str = DEFAULT_DTYPE

    def __post_init__(self) -> None:
        check_shape(self.n, self.k, weight_format(self.weight_format))
        if self.m < 0:
            raise ValueError(f"m={self.m} is negative; m is a number of tokens")
        dtype(self.act_dtype)

    @property
    def kind(self) -> tuple[str, str]:
        """The number formats, weight and activations: what kernels are compiled for besides their config."""
        return self.weight_format, self.act_dtype

    @property
    def flops(self) -> float:
        return 2.0 * self.m * self.n * self.k

    @property
    def error_limit(self) -> float:
        """A relative error from which a result is wrong: see DType."""
        return dtype(self.act_dtype).error_limit

    @property
    def weight_bytes(self) -> int:
        """Packed weight and scales."""
        return weight_format(self.weight_format).packed_bytes(self.n, self.k)

    @property
    def activation_bytes(self) -> int:
        """A read once and C written once."""
        return self.m * (self.n + self.k) * dtype(self.act_dtype).bytes

    def roofline_us(self, read_floor_us: float, tflops: float) -> float:
        """The longer of a plain read of the packed bytes and of the multiplications at the rate ``tflops``."""
        return max(read_floor_us, self.flops / (tflops * 1e6))


def words_per_tile(fmt: WeightFormat) -> int:
    """32-bit words of the packed codes of one tile, ``SIZE_UNIT`` by ``SIZE_UNIT``."""
    return SIZE_UNIT * SIZE_UNIT * fmt.bits // 32


def check_shape(n: int, k: int, fmt: WeightFormat) -> None:
    """Raise a ValueError that names the value and the fix unless the layout can hold n x k."""
    for name, value in (("n", n), ("k", k)):
        if value <= 0 or value % SIZE_UNIT:
            padded = max(-(-value // SIZE_UNIT), 1) * SIZE_UNIT
            raise ValueError(
                f"{name}={value} is not a positive multiple of {SIZE_UNIT}; pad the weight with zeros to"
                f" {name}={padded} before packing"
            )
    if k % fmt.group_size:
        divisors = [g for g in (32, 64, 128) if k % g == 0]
        raise ValueError(
            f"group_size={fmt.group_size} does not divide k={k}; quantise with a group_size in {divisors}, or pad k"
            f" to {-(-k // fmt.group_size) * fmt.group_size}"
        )
