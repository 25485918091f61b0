"""What the importers share: tensors and settings of one layer, checked with errors that name them; unpacking."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

INTEGERS = (torch.int32,)
INDICES = (torch.int32, torch.int64)
SCALES = (torch.float16, torch.bfloat16, torch.float32)


@dataclass(frozen=True)
class Layer:
    """One linear layer of a checkpoint: its name, its tensors, and the settings that it was quantised with."""

    name: str
    tensors: Mapping[str, torch.Tensor]
    settings: Mapping[str, Any]

    def error(self, problem: str) -> ValueError:
        return ValueError(f"{self.name}: {problem}")

    def setting(self, key: str, known: Sequence[Any], default: Any = None) -> Any:
        """The setting called ``key``, one of ``known``; ``default`` where it is absent or null."""
        value = self.settings.get(key)
        value = default if value is None else value
        if value not in known:
            listed = ", ".join(repr(one) for one in known)
            raise self.error(f"{key} is {value!r} in the quantization_config; supported: {listed}")
        return value

    def tensor(self, name: str, dtypes: Sequence[torch.dtype], shape: Sequence[int | None]) -> torch.Tensor:
        """The tensor called ``name``, of one of ``dtypes`` and of ``shape``, where None is any size."""
        if name not in self.tensors:
            raise self.error(f"{name} is missing; the layer has {', '.join(sorted(self.tensors)) or 'no tensors'}")
        tensor = self.tensors[name]
        fits = tensor.ndim == len(shape) and all(
            want in (None, size) for want, size in zip(shape, tensor.shape, strict=True)
        )
        if tensor.dtype not in dtypes or not fits:
            sizes = ", ".join("any" if size is None else str(size) for size in shape)
            kinds = " or ".join(str(dtype) for dtype in dtypes)
            raise self.error(
                f"{name} is {tensor.dtype} {list(tensor.shape)}, not {kinds} [{sizes}]; check bits, group_size and"
                " format in the quantization_config, or copy the checkpoint anew"
            )
        return tensor

    def scales(self, name: str, shape: Sequence[int]) -> torch.Tensor:
        """The scales called ``name``: floating, finite."""
        scales = self.tensor(name, SCALES, shape)
        if not bool(scales.isfinite().all()):
            value = scales[~scales.isfinite()][0].item()
            raise self.error(f"{name} holds {value}; the checkpoint is damaged: copy it anew or quantise again")
        return scales

    def group_size(self, k: int) -> int:
        """The setting group_size, a divisor of k; k where it is -1."""
        size = self.settings.get("group_size")
        if size == -1:
            return k
        if not isinstance(size, int) or size <= 0 or k % size:
            raise self.error(
                f"group_size is {size!r}, which does not divide k={k}; groups must be of one size: quantise with a"
                " divisor of k, or -1 for one group"
            )
        return size

    def order(self, name: str, group_size: int, k: int) -> torch.Tensor | None:
        """int64 [k]: columns sorted stably by the group that ``name`` ([k]) gives each; None if they are so."""
        groups = self.tensor(name, INDICES, (k,))
        counts = Counter(groups.tolist())
        known = range(k // group_size)
        wrong = [group for group in sorted(counts) if counts[group] != group_size or group not in known]
        if wrong:
            raise self.error(
                f"{name} has {counts[wrong[0]]} columns in group {wrong[0]}; it must have {group_size} in each of the"
                f" groups 0 .. {k // group_size - 1}: check group_size={group_size} in the quantization_config"
            )
        order = groups.argsort(stable=True)
        features = torch.arange(k, device=groups.device)
        return None if torch.equal(order, features) else order


def words(fields: int, bits: int) -> int:
    """How many int32 words hold so many fields; the last may be partly filled."""
    return -(-fields * bits // 32)


def unpack(packed: torch.Tensor, bits: int, dim: int, size: int, places: Sequence[int] | None = None) -> torch.Tensor:
    """int32 [.., words, ..] to uint8 [.., size, ..]: the fields of ``bits`` bits of the words along ``dim``.

    ``places[i]`` is where among its word's fields the i-th from the low end belongs; None: they are in order. ``bits``
    divides 32. Needs, beyond the result, about the memory of ``packed``.
    """
    per_word = 32 // bits
    shape = list(packed.shape)
    shape[dim] *= per_word
    fields = torch.empty(shape, dtype=torch.uint8, device=packed.device)
    by_word = fields.view(*packed.shape[: dim + 1], per_word, *packed.shape[dim + 1 :])
    for field, place in enumerate(places or range(per_word)):
        by_word.select(dim + 1, place).copy_((packed >> (field * bits)).bitwise_and_((1 << bits) - 1))
    return fields.narrow(dim, 0, size).contiguous()


def unless_central(zeros: torch.Tensor, bits: int) -> torch.Tensor | None:
    """The zeros, or None when all are 2 ** (bits - 1)."""
    return None if bool((zeros == 1 << (bits - 1)).all()) else zeros
