"""Which tensors have been constant since an earlier launch, so that a dependent launch may read them early."""

from __future__ import annotations

import weakref
from functools import partial

import torch


class Settled:
    """Remembers tensors by identity and version; holds none of them alive.

    A dependent launch reads weights while kernels ahead of it on the stream still run. That is right unless one of
    those writes them: so a weight is read early from the second launch on, and again after an in-place change the
    second. A write that torch does not count (through ``tensor.data``) is not seen; synchronize after such a one.
    """

    def __init__(self) -> None:
        self._known: dict[int, tuple[weakref.ref[torch.Tensor], int]] = {}

    def __call__(self, *tensors: torch.Tensor) -> bool:
        """True when all were here before, unchanged. Remembers them as they are now."""
        settled = True
        for tensor in tensors:
            key = id(tensor)
            known = self._known.get(key)
            if known is not None and known[0]() is tensor and known[1] == tensor._version:
                continue
            settled = False
            if not tensor.is_inference():  # those have no version: they are never settled
                self._known[key] = weakref.ref(tensor, partial(self._forget, key)), tensor._version
        return settled

    def _forget(self, key: int, gone: weakref.ref[torch.Tensor]) -> None:
        if (known := self._known.get(key)) and known[0] is gone:
            del self._known[key]
