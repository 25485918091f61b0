"""A process with a CUDA driver that only records: CPU tensors go through the launchers, and nothing is computed.

``fake_cuda/cases.py`` runs inside it; ``start`` and ``environment`` are for the process outside.
"""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

SOURCE = Path(__file__).parent / "fake_cuda" / "fake_cuda.c"
STREAM = 0x77
MAX_BYTES = 2048

needs_compiler = pytest.mark.skipif(not (shutil.which("gcc") and shutil.which("g++")), reason="no C++ compiler")


class Launch(ctypes.Structure):
    """``struct Launch`` in fake_cuda.c."""

    _fields_ = (
        ("grid", ctypes.c_uint32 * 3), ("block", ctypes.c_uint32 * 3), ("smem_bytes", ctypes.c_uint32),
        ("num_attributes", ctypes.c_uint32), ("stream", ctypes.c_uint64), ("attribute_ids", ctypes.c_int32 * 4),
        ("clusters", (ctypes.c_uint32 * 3) * 4), ("num_bytes", ctypes.c_int32), ("bytes", ctypes.c_ubyte * MAX_BYTES),
    )  # fmt: skip


def build(folder: Path) -> Path:
    """Compile the fake driver to ``folder``/libcuda.so.1."""
    output = folder / "libcuda.so.1"
    command = ["gcc", "-shared", "-fPIC", "-O1", "-Wl,-soname,libcuda.so.1", "-o", str(output), str(SOURCE), "-ldl"]
    subprocess.run(command, check=True)
    return output


class FakeGpu:
    """The recorder, in the process that it is loaded into."""

    def __init__(self, path: Path) -> None:
        self._functions: dict[tuple[int, ...], int] = {}
        self.library = ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)  # found from now on as libcuda.so.1
        self.library.fake_function.restype = ctypes.c_void_p
        self.library.fake_context.restype = ctypes.c_void_p
        self.library.fake_set_context.argtypes = (ctypes.c_void_p,)
        self.library.fake_launch.restype = ctypes.POINTER(Launch)

    def function(self, *sizes: int) -> int:
        """A kernel whose arguments have these sizes."""
        if sizes not in self._functions:
            self._functions[sizes] = self.library.fake_function(len(sizes), (ctypes.c_int * len(sizes))(*sizes))
        return self._functions[sizes]

    def announce(self, family: str, sizes: list[int]) -> None:
        """The argument sizes of the kernels that are loaded from now on."""
        index = ("mma", "wgmma", "gather").index(family)
        self.library.fake_announce(index, len(sizes), (ctypes.c_int * len(sizes))(*sizes))

    @property
    def launches(self) -> int:
        return self.library.fake_num_launches()

    def latest(self) -> Launch:
        return self.launch(self.launches - 1)

    def launch(self, index: int) -> Launch:
        copy = Launch()
        ctypes.memmove(ctypes.byref(copy), self.library.fake_launch(index), ctypes.sizeof(Launch))
        return copy

    def pretend(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """What torch.cuda answers in a CPU build, as the launchers ask it."""
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: SimpleNamespace(cuda_stream=STREAM))
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        monkeypatch.setattr(torch.cuda, "synchronize", lambda device=None: None)
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)


def argument_sizes(shape) -> list[int]:
    """Of a kernel's arguments in order: maps, pointers, scalars, and whether the launch is dependent."""
    return [128 if name.endswith("_map") else 8 for name in shape.operands] + [4] * (len(shape.scalars) + 1)


def split(launch: Launch, shape) -> dict[str, bytes]:
    """The recorded arguments by name."""
    sizes = argument_sizes(shape)
    assert launch.num_bytes == sum(sizes)
    names = [*shape.operands, *(f"scalar{i}" for i in range(len(shape.scalars))), "dependent"]
    raw, found = bytes(launch.bytes), {}
    for name, size in zip(names, sizes, strict=True):
        found[name], raw = raw[:size], raw[size:]
    return found
