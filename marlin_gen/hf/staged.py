"""A layer of a foreign checkpoint while transformers loads it: its tensors, as they are stored, and then ours."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from marlin_gen.checkpoints import read_layer
from marlin_gen.checkpoints.fallback import Unheld, packed_or_dense
from marlin_gen.convert.shard import DTYPES, read_header
from marlin_gen.nn import QuantLinear

_DTYPES = {name: kind for kind, name in DTYPES.items()}

Entries = dict[str, tuple[torch.dtype, list[int]]]


class Staged(nn.Module):
    """Holds the tensors of one quantised layer as buffers of the checkpoint's own names, types and shapes."""

    def __init__(self, name: str, entries: Entries, linear: nn.Linear, dtype: torch.dtype) -> None:
        super().__init__()
        self.name, self.names, self.dtype = name, tuple(entries), dtype
        self.in_features, self.out_features = linear.in_features, linear.out_features
        for key, (kind, shape) in entries.items():
            self.register_buffer(key, torch.empty(shape, dtype=kind, device="meta"))
        bias = None if linear.bias is None else torch.empty(linear.out_features, dtype=dtype, device="meta")
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    def finished(self, config: Mapping[str, Any]) -> tuple[nn.Module, str]:
        """(a QuantLinear, "") or, where no kernel format holds the weight, (a dequantised nn.Linear, why).

        A ValueError names a damaged layer, or one of other sizes than the model's.
        """
        if offloaded := [key for key, tensor in self.state_dict().items() if tensor.is_meta]:
            raise ValueError(
                f"{self.name}: device_map offloads its {offloaded[0]}; run marlin-gen convert and load what it writes"
            )
        weight = read_layer({key: self.get_buffer(key) for key in self.names}, config, self.name)
        if (weight.n, weight.k) != (self.out_features, self.in_features):
            raise ValueError(
                f"{self.name} is {weight.n} x {weight.k} in the checkpoint, {self.out_features} x {self.in_features} in"
                " the model: config.json is of another model"
            )
        held = packed_or_dense(weight, self.name, self.dtype, exact=False)
        if not isinstance(held, Unheld):
            return QuantLinear.from_packed(held, self.bias), ""
        linear = nn.Linear(weight.k, weight.n, bias=False, device="meta")
        linear.weight = nn.Parameter(held.weight, requires_grad=False)
        linear.bias = self.bias
        return linear, held.reason


def header_entries(files: Sequence[str]) -> Entries:
    """(type, shape) of every tensor of the safetensors ``files``, by name; a ValueError names what is not one."""
    entries: Entries = {}
    for file in files:
        if not str(file).endswith(".safetensors"):
            raise ValueError(f"{file} is not a safetensors file; save the model again with safe_serialization=True")
        for name, entry in read_header(Path(file))[0].items():
            if entry["dtype"] in _DTYPES:
                entries[name] = _DTYPES[entry["dtype"]], entry["shape"]
    return entries
