"""From a checkpoint's weight to the packed layout: exact, or a ValueError that says what cannot be held."""

from __future__ import annotations

from dataclasses import replace

import torch

from marlin_gen.checkpoints.quantized import QuantizedWeight
from marlin_gen.formats import FORMATS, WeightFormat
from marlin_gen.layout import SCALE_DTYPES, PackedWeight, pack


def to_packed(weight: QuantizedWeight, name: str = "weight", dtype: torch.dtype | None = None) -> PackedWeight:
    """``weight`` in the layout of the kernels, on its own device, for activations of ``dtype`` (float16, bfloat16).

    Without ``dtype``, of the type of its scales (float16 for float32 scales), and then the same numbers, bit for bit: a
    ValueError where the type does not hold them. With ``dtype``, scales and offsets are rounded to it, as they are when
    a model is loaded in that type. Groups that no format has (256, or one scale a row) are packed in the largest that
    divides them, scales repeated. Columns stay in the order of the codes (act-order): activations follow them at each
    call. Raises ValueError, with ``name`` in it, for what no format holds.
    """
    fmt = _format_of(weight, name)
    target = dtype or (weight.scales.dtype if weight.scales.dtype in SCALE_DTYPES else torch.float16)
    values = {"scales": weight.scales}
    if weight.minima is not None:
        values["minima"] = weight.minima
    elif weight.zeros is not None:
        values["zeros"] = weight.zeros
    rounded = {key: value.to(target) for key, value in values.items()}
    for key, value in values.items() if dtype is None else ():
        if not torch.equal(rounded[key].to(value.dtype), value):
            worst = float((rounded[key].double() - value.double()).abs().max())
            raise ValueError(
                f"{name} has {key} in {value.dtype} that {target} does not hold, off by up to {worst:.1e};"
                f" give dtype={target} to round them, or that of the model (convert: --dtype)"
            )
    scales = torch.stack([*rounded.values()], -1) if fmt.has_offsets else rounded["scales"]
    scales = scales.repeat_interleave(weight.group_size // fmt.group_size, dim=1)
    try:
        return replace(pack(weight.codes, scales, fmt.name), order=weight.order)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error


def _format_of(weight: QuantizedWeight, name: str) -> WeightFormat:
    """The format of these codes and offsets with the largest group that divides the weight's."""
    if weight.minima is not None:
        offset = "minima"
    elif weight.zeros is None:
        offset = "floats" if weight.is_float else "constant"
    else:
        offset = "fractions" if weight.zeros.is_floating_point() else "zeros"
    formats = [fmt for fmt in FORMATS.values() if (fmt.bits, fmt.offset) == (weight.bits, offset)]
    if not formats:
        known = ", ".join(sorted({f"{fmt.bits} bits with {fmt.offset}" for fmt in FORMATS.values()}))
        raise ValueError(f"{name} has {weight.bits}-bit codes with {offset}; the kernels read {known}")
    fitting = [fmt for fmt in formats if weight.group_size % fmt.group_size == 0]
    if not fitting:
        known = ", ".join(str(fmt.group_size) for fmt in formats)
        raise ValueError(f"{name} has group_size={weight.group_size}, which none of {known} divides")
    return max(fitting, key=lambda fmt: fmt.group_size)
