"""``QuantLinear``: ``torch.nn.Linear`` with a packed weight of 4 or 8 bits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn

from marlin_gen.formats import DEFAULT_FORMAT, LAYOUT_VERSION, version_error
from marlin_gen.formats import weight_format as format_row
from marlin_gen.layout import SCALE_DTYPES, PackedWeight, pack, retyped
from marlin_gen.op import gemm
from marlin_gen.problem import SIZE_UNIT, check_shape, words_per_tile
from marlin_gen.reference import quantize

if TYPE_CHECKING:
    from marlin_gen.checkpoints.quantized import QuantizedWeight


_AUTOCAST = (torch.float32, torch.float16, torch.bfloat16)  # what it casts; wider floats and whole numbers it leaves


class QuantLinear(nn.Module):
    """``y [..., out_features] = x [..., in_features] @ weight^T + bias``, for inference and for grads of x.

    A new module holds zeros: fill it with ``load_state_dict``, or make one with ``from_float``, ``from_quantized`` or
    ``from_packed``.
    ``dtype``, of x, scales, bias and y, is float16 or bfloat16; under autocast x may be of another.
    Buffers: ``weight``, ``scales`` (see ``marlin_gen.layout``), and ``layout_version``, which a checkpoint carries and
    loading checks, as the format in a state dict's metadata; with act-order ``order``, which a state dict brings along.
    """

    weight: torch.Tensor
    scales: torch.Tensor
    layout_version: torch.Tensor
    bias: nn.Parameter | None
    order: torch.Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = False,
        weight_format: str = DEFAULT_FORMAT,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float16,
        has_order: bool = False,
    ) -> None:
        super().__init__()
        fmt = format_row(weight_format)
        check_shape(out_features, in_features, fmt)
        if dtype not in SCALE_DTYPES:
            raise ValueError(f"dtype={dtype} is not one of {', '.join(map(str, SCALE_DTYPES))}")
        self.in_features, self.out_features, self.weight_format = in_features, out_features, weight_format
        tiles_n, tiles_k, scale_rows = out_features // SIZE_UNIT, in_features // SIZE_UNIT, fmt.scale_rows(in_features)
        weight = torch.zeros(tiles_n, tiles_k, words_per_tile(fmt), dtype=torch.int32, device=device)
        self.register_buffer("weight", weight)
        scales = torch.zeros(tiles_n, scale_rows, SIZE_UNIT * fmt.scale_values, dtype=dtype, device=device)
        scales[:, in_features // fmt.group_size :] = 1  # lifts
        self.register_buffer("scales", scales)
        self.register_buffer("layout_version", torch.tensor(LAYOUT_VERSION, dtype=torch.int32, device=device))
        zeros = torch.zeros(out_features, dtype=dtype, device=device)
        self.bias = nn.Parameter(zeros, requires_grad=False) if bias else None
        self.register_buffer("order", torch.arange(in_features, device=device) if has_order else None)

    @classmethod
    def from_packed(cls, packed: PackedWeight, bias: torch.Tensor | None = None) -> QuantLinear:
        """A layer around ``packed``, which is not copied."""
        has_order = packed.order is not None
        layer = cls(packed.k, packed.n, bias is not None, packed.weight_format, "meta", packed.dtype, has_order)
        if packed.layout_version != LAYOUT_VERSION:
            raise ValueError(version_error(packed.layout_version))
        layer.weight, layer.scales, layer.order = packed.weight, packed.scales, packed.order
        layer.layout_version = torch.tensor(LAYOUT_VERSION, dtype=torch.int32, device=packed.device)
        if bias is not None:
            if tuple(bias.shape) != (packed.n,):
                raise ValueError(f"bias has shape {list(bias.shape)}; out_features={packed.n} needs [{packed.n}]")
            layer.bias = nn.Parameter(bias.detach().to(packed.device, packed.dtype), requires_grad=False)
        return layer

    @classmethod
    def from_quantized(
        cls, weight: QuantizedWeight, bias: torch.Tensor | None = None, dtype: torch.dtype | None = None
    ) -> QuantLinear:
        """A layer of a checkpoint's weight: see ``to_packed``; ValueError for a weight that no format holds."""
        from marlin_gen.checkpoints.packing import to_packed  # brings the readers, which serving does without

        return cls.from_packed(to_packed(weight, dtype=dtype), bias)

    @classmethod
    def from_float(cls, linear: nn.Linear, weight_format: str = DEFAULT_FORMAT) -> QuantLinear:
        """Quantise a float layer, on its own device; for bfloat16 activations if it is bfloat16, else for float16."""
        codes, scales = quantize(linear.weight.detach(), weight_format)
        return cls.from_packed(pack(codes, scales, weight_format), linear.bias)

    def shard(self, rank: int, world: int, dim: Literal["rows", "columns"]) -> QuantLinear:
        """This rank's part of a tensor-parallel layer, its tensors copied, on the same device.

        "rows" cuts out_features: parts of y are concatenated, and each part has its slice of the bias. "columns" cuts
        in_features: each part takes its slice of x, parts of y are added, and rank 0 alone has the bias. Every part
        holds whole tiles and whole groups: a ValueError says what does not divide.
        """
        if not 0 <= rank < world:
            raise ValueError(f"rank={rank} is not one of 0 .. {world - 1}, the ranks of world={world}")
        if dim not in ("rows", "columns"):
            raise ValueError(f"dim is {dim!r}; known: 'rows' (out_features), 'columns' (in_features)")
        fmt = format_row(self.weight_format)
        if dim == "rows":
            _check_divides(world, "out_features", self.out_features, SIZE_UNIT, "the layout's tile")
            weight, scales = (tensor.chunk(world, 0)[rank] for tensor in (self.weight, self.scales))
            bias = None if self.bias is None else self.bias.chunk(world)[rank]
        else:
            if self.order is not None:
                raise ValueError("a layer in act-order takes features from anywhere: shard it by rows, not by columns")
            _check_divides(world, "in_features", self.in_features, SIZE_UNIT, "the layout's tile")
            _check_divides(world, "in_features", self.in_features, fmt.group_size, "the group_size")
            weight = self.weight.chunk(world, 1)[rank]
            groups = self.in_features // fmt.group_size
            lifts = self.scales[:, groups:]  # of whole rows, which do for any part of them
            scales = torch.cat([self.scales[:, :groups].chunk(world, 1)[rank], lifts], 1)
            bias = self.bias if rank == 0 else None
        weight, scales = (tensor.clone(memory_format=torch.contiguous_format) for tensor in (weight, scales))
        packed = replace(self.packed, weight=weight, scales=scales)
        return self.from_packed(packed, None if bias is None else bias.clone())

    @property
    def packed(self) -> PackedWeight:
        return PackedWeight(self.weight, self.scales, self.weight_format, order=self.order)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        packed = self.packed
        is_other = x.dtype != packed.scales.dtype and x.dtype in _AUTOCAST and not x.is_meta
        if is_other and torch.is_autocast_enabled(x.device.type):
            x = x.to(packed.scales.dtype)
        return gemm(x, packed, self.bias)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None},"
            f" weight_format={self.weight_format}, dtype={str(self.scales.dtype).removeprefix('torch.')}"
        )

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> QuantLinear:
        before = self.scales
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.scales.dtype != before.dtype:  # fn casts numbers; zero points are not the same in another type
            self.scales = retyped(before, self.weight_format, self.scales.dtype).to(self.scales.device)
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if hasattr(destination, "_metadata"):  # no tensor: older state dicts are loaded, and older releases load these
            destination._metadata[prefix[:-1]]["weight_format"] = self.weight_format

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: Any, strict: bool, missing_keys: list[str],
        unexpected_keys: list[str], error_msgs: list[str],
    ) -> None:  # fmt: skip
        version = state_dict.get(f"{prefix}layout_version")
        if version is not None and not version.is_meta and int(version) != LAYOUT_VERSION:
            error_msgs.append(f"{prefix}weight: {version_error(int(version))}")
            return
        if (saved := local_metadata.get("weight_format", self.weight_format)) != self.weight_format:
            error_msgs.append(f"{prefix}weight is {saved}, not {self.weight_format}: make the layer with {saved!r}")
            return
        if f"{prefix}order" in state_dict and self.order is None:
            self.order = torch.arange(self.in_features, device=self.weight.device)
        scales = state_dict.get(f"{prefix}scales")
        is_copied = not local_metadata.get("assign_to_params_buffers")  # else the layer takes their type
        if is_copied and scales is not None and scales.shape == self.scales.shape:
            scales = retyped(scales, self.weight_format, self.scales.dtype)
            state_dict = {**state_dict, f"{prefix}scales": scales}
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )


def _check_divides(world: int, name: str, size: int, unit: int, of_what: str) -> None:
    if size % (world * unit):
        fitting = [count for count in range(1, size // unit + 1) if size % (count * unit) == 0]
        raise ValueError(
            f"{name}={size} is {size // unit} times {unit}, {of_what}, which world={world} ranks cannot share evenly;"
            f" numbers of ranks that can: {', '.join(map(str, fitting))}"
        )
