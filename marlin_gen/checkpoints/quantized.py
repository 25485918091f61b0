"""A quantised weight as a checkpoint means it, whatever its packing: what importers return and layouts start from."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch


@dataclass(frozen=True, eq=False)
class QuantizedWeight:
    """``weight[row, order[column]] = (codes[row, column] - zero) * scale [+ minimum]``, exactly as the checkpoint says.

    Zero, scale and minimum are those of the row and of the column's group of ``group_size`` neighbours; of ``is_float``
    codes the weight is ``e4m3(code) * scale``. All tensors are on one device.
    """

    codes: torch.Tensor  # uint8 [n, k], 0 .. 2 ** bits - 1
    scales: torch.Tensor  # floating [n, k / group_size]
    bits: int
    group_size: int
    # In units of a code: uint8 where the checkpoint has whole numbers, floating where it has not; [n, k / group_size].
    # None: 2 ** (bits - 1) everywhere, and with ``is_float`` nothing.
    zeros: torch.Tensor | None = None
    minima: torch.Tensor | None = None  # floating [n, k / group_size], in units of the weight; then there are no zeros
    order: torch.Tensor | None = None  # int64 [k]: which input feature each column of codes is; None: its own number
    is_float: bool = False  # codes are the bits of float8_e4m3fn, and stand for those numbers; no zeros, no minima

    def __post_init__(self) -> None:
        n, k = self.codes.shape
        if self.codes.dtype != torch.uint8 or k % self.group_size:
            raise ValueError(
                f"codes are {self.codes.dtype} [{n}, {k}]; a weight in groups of {self.group_size} needs torch.uint8"
                f" [n, k] with k a multiple of {self.group_size}"
            )
        for name in ("scales", "zeros", "minima"):
            tensor = getattr(self, name)
            if tensor is not None and tuple(tensor.shape) != (n, k // self.group_size):
                raise ValueError(
                    f"{name} have shape {list(tensor.shape)}; n={n}, k={k} in groups of {self.group_size} need"
                    f" [{n}, {k // self.group_size}]"
                )
        if (self.zeros is not None) + (self.minima is not None) + self.is_float > 1:
            raise ValueError("a weight has zeros, minima or codes that are fp8 numbers, not two of these")
        features = torch.arange(k, device=self.codes.device)
        if self.order is not None and not torch.equal(self.order.sort().values, features):
            raise ValueError(f"order is not a permutation of the {k} input features")

    @property
    def n(self) -> int:
        return self.codes.shape[0]

    @property
    def k(self) -> int:
        return self.codes.shape[1]

    def rows(self, chosen: slice | torch.Tensor) -> QuantizedWeight:
        """The weight of these rows alone."""
        zeros, minima = (None if part is None else part[chosen] for part in (self.zeros, self.minima))
        return replace(self, codes=self.codes[chosen], scales=self.scales[chosen], zeros=zeros, minima=minima)

    def dequantize(self) -> torch.Tensor:
        """The weight [n, k] in float64, input features in their own order: nothing is rounded."""
        numbers = self.codes.view(torch.float8_e4m3fn) if self.is_float else self.codes
        codes = numbers.double().view(self.n, -1, self.group_size)
        scales = self.scales.double()[..., None]
        if self.minima is not None:
            grouped = codes * scales + self.minima.double()[..., None]
        elif self.zeros is not None:
            grouped = (codes - self.zeros.double()[..., None]) * scales
        else:
            grouped = (codes if self.is_float else codes - 2 ** (self.bits - 1)) * scales
        weight = grouped.view(self.n, self.k)
        if self.order is None:
            return weight
        return torch.empty_like(weight).index_copy_(1, self.order, weight)
