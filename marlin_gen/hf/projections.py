"""Projections of one input as one product: q, k and v, gate and up. Fewer, larger kernels, as in serving engines."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn

from marlin_gen.layout import PackedWeight
from marlin_gen.nn import QuantLinear

GROUPS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


class _Results(threading.local):
    """What the calling thread's last product left to be asked for: none gets another's. Copies are empty."""

    def __init__(self) -> None:
        self.parts: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}  # with what it is of

    def __reduce__(self) -> tuple[type[_Results], tuple[()]]:
        return _Results, ()


class FusedProjection(nn.Module):
    """The first of the projections: it computes all of them, and keeps the others' results until they are asked for."""

    def __init__(self, linear: nn.Module, sizes: Sequence[int]) -> None:
        super().__init__()
        self.linear, self.sizes = linear, list(sizes)
        self.results = _Results()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        parts: list[torch.Tensor] = list(self.linear(x).split(self.sizes, dim=-1))
        self.results.parts = {index: (x, part) for index, part in enumerate(parts[1:], start=1)}
        return parts[0]


class LaterProjection(nn.Module):
    """One of the others: its part of the result, once for each call of the first. It owns no weight."""

    def __init__(self, fused: FusedProjection, index: int, name: str) -> None:
        super().__init__()
        self._fused = [fused]  # in a list, so that it is no submodule here
        self.index, self.name = index, name

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        of, found = self._fused[0].results.parts.pop(self.index, (None, None))
        if found is None or of is not x:  # as in cross-attention
            before = "the projection before it, which was not called with this input"
            raise RuntimeError(f"{self.name} is fused with {before}")
        return found


def fuse(model: nn.Module, groups: Iterable[Sequence[str]] = GROUPS) -> list[str]:
    """Fuse each group of neighbouring projections below ``model`` in place; the names of what was fused.

    A group is fused where its layers are all ``QuantLinear`` of one format and type, none in act-order, or all
    ``nn.Linear``, take the same number of features, all have a bias or none, have no hooks and are not offloaded. The
    model must call them in the group's order, with the same input, as transformers' llama-like models do. For
    inference: afterwards the state dict has other names.
    """
    fused = []
    for name, module in list(model.named_modules()):
        for group in groups:
            layers = [getattr(module, part, None) for part in group]
            if (linear := _joined(layers)) is None:
                continue
            first = FusedProjection(linear, [layer.out_features for layer in layers if layer is not None])
            setattr(module, group[0], first)
            for index, part in enumerate(group[1:], start=1):
                setattr(module, part, LaterProjection(first, index, part))
            fused.append(f"{name}.{'+'.join(group)}".lstrip("."))
    return fused


def _joined(layers: Sequence[Any]) -> nn.Module | None:
    """One layer that computes all; None where they cannot be joined."""
    first = layers[0]
    if any(not isinstance(one, nn.Module) or one._forward_hooks or one._forward_pre_hooks for one in layers):
        return None
    if any(tensor.is_meta for one in layers for tensor in one.state_dict().values()):  # offloaded
        return None
    biases = [getattr(layer, "bias", None) for layer in layers]
    if any(bias is None for bias in biases) != all(bias is None for bias in biases):
        return None
    bias = None if biases[0] is None else torch.cat([bias.detach() for bias in biases if bias is not None])
    if all(type(layer) is QuantLinear for layer in layers):
        kinds = {(layer.in_features, layer.weight_format, layer.scales.dtype) for layer in layers}
        if len(kinds) > 1 or any(layer.order is not None for layer in layers):
            return None
        weight, scales = (torch.cat([getattr(layer, name) for layer in layers]) for name in ("weight", "scales"))
        return QuantLinear.from_packed(PackedWeight(weight, scales, first.weight_format), bias)
    if all(type(layer) is nn.Linear for layer in layers):
        if len({(layer.in_features, layer.weight.dtype) for layer in layers}) > 1:
            return None
        weight = torch.cat([layer.weight.detach() for layer in layers])
        joined = nn.Linear(first.in_features, len(weight), bias is not None, device="meta")
        joined.weight = nn.Parameter(weight, requires_grad=False)
        joined.register_parameter("bias", None if bias is None else nn.Parameter(bias, requires_grad=False))
        return joined
    return None
