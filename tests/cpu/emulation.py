"""Run a rendered mma kernel on the CPU: emulator/emulator.h stands for the PTX headers, one fiber for each thread."""

from __future__ import annotations

import ctypes
import hashlib
import subprocess
from collections.abc import Callable
from pathlib import Path

import torch

from marlin_gen import env
from marlin_gen.config import KernelConfig, KernelSpec, Plan
from marlin_gen.families.mma import MMA
from marlin_gen.layout import PackedWeight
from marlin_gen.problem import Problem
from marlin_gen.render import render

EMULATOR = Path(__file__).parent / "emulator"

_SHARED = "extern __shared__ __align__(1024) u8 smem_bytes[];"
_EMULATED_SHARED = "u8* smem_bytes = emulator::blocks[emulator::self->rank].smem.data();"
_ENTRY = """
Dim threadIdx, blockIdx;
extern "C" char const* emulate(int grid, int threads, int cluster, int smem, unsigned seed, int early,
                               u16 const* a, long a_bytes, u16* c, u8 const* weight, long weight_bytes,
                               u8 const* scales, long scales_bytes, int m, int n, int k, int rows) {
  auto const* a_begin = reinterpret_cast<u8 const*>(a);
  emulator::readable = {{a_begin, a_begin + a_bytes}, {weight, weight + weight_bytes}, {scales, scales + scales_bytes}};
  emulator::launch(grid, threads, cluster, smem, seed, early, [=] { KERNEL(a, c, weight, scales, m, n, k, rows); });
  return emulator::error;
}
"""


class EmulatedKernel:
    """The kernel of one config, compiled by g++; ``edit`` changes its text first."""

    def __init__(self, config: KernelConfig, folder: Path, edit: Callable[[str], str] = lambda text: text) -> None:
        source = render(KernelSpec(config, "u4b8g128", "f16", "sm_90a"))
        assert source.text.count(_SHARED) == 1
        text = edit(source.text).replace(_SHARED, _EMULATED_SHARED)
        text = '#include "emulator.h"\n' + text + _ENTRY.replace("KERNEL", source.symbol)
        stem = folder / hashlib.sha256(text.encode()).hexdigest()[:16]
        stem.with_suffix(".cpp").write_text(text)
        includes = ["-I", EMULATOR, "-I", env.templates_dir() / "include"]
        command = ["g++", "-std=c++17", "-O1", "-w", "-fPIC", "-shared", *includes, "-o", f"{stem}.so", f"{stem}.cpp"]
        built = subprocess.run([str(part) for part in command], capture_output=True, text=True)
        assert built.returncode == 0, built.stderr[:4000]
        self.config = config
        self._emulate = ctypes.CDLL(f"{stem}.so").emulate
        self._emulate.restype = ctypes.c_char_p

    def __call__(
        self, a: torch.Tensor, packed: PackedWeight, max_clusters: int, *, seed: int, early: bool
    ) -> torch.Tensor:
        """C (m, n) of A (m, k); what the kernel does not write is NaN.

        ``early``: cp.async copies when it is issued, not when it is waited for. Raises RuntimeError when the kernel
        touches memory that is not its own.
        """
        problem = Problem(packed.n, packed.k, a.shape[0])
        c = torch.full((problem.m, problem.n), float("nan"), dtype=torch.float16)
        shape = MMA.launch_shape(Plan(self.config), problem, max_clusters, max_clusters)

        def bytes_of(tensor: torch.Tensor) -> tuple[ctypes.c_void_p, ctypes.c_long]:
            return ctypes.c_void_p(tensor.data_ptr()), ctypes.c_long(tensor.nbytes)

        fault = self._emulate(
            shape.grid, shape.threads, shape.cluster, shape.smem_bytes, seed, early,
            *bytes_of(a), bytes_of(c)[0], *bytes_of(packed.weight), *bytes_of(packed.scales), *shape.scalars,
        )  # fmt: skip
        if fault:
            raise RuntimeError(f"{self.config.key}: {fault.decode()}")
        return c
