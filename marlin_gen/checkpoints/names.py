"""Which tensors of a checkpoint are quantised layers, told by their names."""

from __future__ import annotations

from collections.abc import Container, Iterable
from typing import Any

# Last parts of the names that only a quantised layer has, by ``quant_method``.
MARKS: dict[str, frozenset[str]] = {
    "awq": frozenset({"qweight", "qzeros", "scales"}),
    "compressed-tensors": frozenset({"weight_packed", "weight_shape", "weight_scale", "weight_zero_point"}),
    "fp8": frozenset({"weight_scale", "weight_scale_inv"}),
    "gptq": frozenset({"qweight", "qzeros", "scales", "g_idx"}),
    "hqq": frozenset({"W_q", "packing", "nbits"}),
}


def quantised_layers(names: Iterable[str], method: Any, floats: Container[str] = ()) -> dict[str, list[str]]:
    """{layer: the last parts of its tensors' names, its bias left out}, in the order of ``names``.

    A layer counts as quantised when it has any tensor that only such layers have, so that one whose codes are missing
    is read, and refused by name, and not taken for plain tensors; so with any of ``floats``, the tensors in fp8, which
    are no weight without a scale. ValueError for an unknown ``quant_method``.
    """
    if method not in MARKS:
        raise ValueError(f"quant_method is {method!r}; known: {', '.join(sorted(MARKS))}")
    parts: dict[str, list[str]] = {}
    for name in names:
        layer, _, last = name.rpartition(".")
        parts.setdefault(layer, []).append(last)
    return {
        layer: [last for last in lasts if last != "bias"]
        for layer, lasts in parts.items()
        if layer and (MARKS[method].intersection(lasts) or any(f"{layer}.{last}" in floats for last in lasts))
    }
