"""``--device``: a GPU of this machine, or a recording of one."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

from marlin_gen.arch import Gpu
from marlin_gen.cli.console import note
from marlin_gen.measurement import Measurer
from marlin_gen.replay import ReplayMeasurer, find_recording

FALLBACK = "h100"  # the recording that stands in where there is no GPU


def this_gpu(device: str = "cuda:0") -> Gpu | None:
    """The identity of a GPU of this machine; None where torch sees none at all.

    Raises a ValueError for a device that is none, or that is not there.
    """
    import torch

    index = _index(device)
    if not torch.cuda.is_available():
        return None
    if index >= torch.cuda.device_count():
        raise ValueError(f"--device {device}: there are {torch.cuda.device_count()} GPUs here, cuda:0 is the first")
    from marlin_gen.driver import identify

    return identify(index)


def require_gpu(device: str, why: str) -> Gpu:
    """``this_gpu``, or a ValueError that says what is needed: a recording will not do."""
    if device.partition(":")[0] == "replay":
        raise ValueError(f"{why} on a GPU, which --device {device} is not; name one: --device cuda:0")
    gpu = this_gpu(device)
    if gpu is None:
        raise ValueError(
            f"{why} and needs an NVIDIA GPU of compute capability 8.0 or newer, its driver and a CUDA build of torch;"
            " not found here (marlin-gen doctor says more)"
        )
    return gpu


@contextmanager
def measurer(device: str) -> Iterator[Measurer]:
    """What ``--device`` names: ``auto``, ``cuda:0`` or ``replay:h100``. Closed at the end, however it ends."""
    opened = _open(device)
    try:
        yield opened
    finally:
        opened.close()


def _open(device: str) -> Measurer:
    kind, _, name = device.partition(":")
    if kind == "replay":
        return ReplayMeasurer(find_recording(name or FALLBACK))
    if device == "auto" and this_gpu() is None:
        note(f"no NVIDIA GPU here: replaying the recorded measurements of the {FALLBACK.upper()} instead")
        return ReplayMeasurer(find_recording(FALLBACK))
    require_gpu(device, f"--device {device} measures kernels")
    from marlin_gen.measure import GpuMeasurer

    return GpuMeasurer(_index(device))


def _index(device: str) -> int:
    found = re.fullmatch(r"auto|cuda(?::(\d+))?", device)
    if not found:
        raise ValueError(f"--device {device!r} is not auto, cuda:<number> or replay:<gpu>; example: replay:h100")
    return int(found[1] or 0)
