"""Run a rendered kernel on the CPU: emulator/ stands for CUDA and the PTX headers, one fiber for each thread."""

from __future__ import annotations

import ctypes
import hashlib
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from marlin_gen import env
from marlin_gen.config import KernelConfig, KernelSpec, Plan
from marlin_gen.families import FAMILIES
from marlin_gen.formats import DEFAULT_FORMAT, FORMATS
from marlin_gen.layout import PackedWeight, pack
from marlin_gen.operands import random_weight
from marlin_gen.problem import Problem
from marlin_gen.reference import dequantize
from marlin_gen.render import render

needs_gxx = pytest.mark.skipif(shutil.which("g++") is None, reason="the emulator is compiled by g++")

EMULATOR = Path(__file__).parent / "emulator"
COPIES = ("late", "early", "anytime")  # when asynchronous copies happen, of the times that the kernel allows

_SHARED = "extern __shared__ __align__(1024) u8 {name}[];"
_EMULATED_SHARED = "u8* {name} = emulator::my_block().smem.data();"
_ENTRY = """
extern "C" char const* emulate(emulator::Request const* request) {{
  return emulator::run(*request, [=](emulator::Operands const& operands) {{ {symbol}({arguments}); }});
}}
"""
_GUARD = 4096  # fp16 elements before and after C
_UNWRITTEN = 0x7E5A  # a NaN


class _Span(ctypes.Structure):
    _fields_ = (("data", ctypes.c_void_p), ("bytes", ctypes.c_longlong))

    @classmethod
    def of(cls, tensor: torch.Tensor | None) -> _Span:
        return cls() if tensor is None else cls(tensor.data_ptr(), tensor.nbytes)


class _Request(ctypes.Structure):
    """emulator::Request, field by field."""

    _fields_ = (
        *((name, ctypes.c_int) for name in ("grid", "threads", "cluster", "resident", "smem_bytes", "registers")),
        ("seed", ctypes.c_uint),
        ("copies", ctypes.c_int),
        ("dependent", ctypes.c_int),
        ("fault", ctypes.c_int),
        ("a_box", ctypes.c_int * 2),
        ("c_box", ctypes.c_int * 2),
        ("a_tail_rows", ctypes.c_int),
        ("scalars", ctypes.c_int * 12),
        *((name, _Span) for name in ("a", "c", "weight", "scales", "bias", "partials", "locks")),
    )


class EmulatedKernel:
    """The kernel of one config and weight format, compiled by g++; ``edit`` changes its text first."""

    def __init__(
        self, config: KernelConfig, folder: Path, edit: Callable[[str], str] = lambda text: text,
        weight_format: str = DEFAULT_FORMAT, act_dtype: str = "f16",
    ) -> None:  # fmt: skip
        self.config = config
        self.spec = KernelSpec(config, weight_format, act_dtype, "sm_90a")
        self._family = FAMILIES.of(config)
        source = render(self.spec)
        text = self._with_emulated_shared_memory(edit(source.text)) + self._entry(source.symbol)
        stem = folder / hashlib.sha256(text.encode()).hexdigest()[:16]
        stem.with_suffix(".cpp").write_text(text)
        includes = ["-I", EMULATOR, "-I", env.templates_dir() / "include"]
        flags = ["-std=c++17", "-Og", "-fno-exceptions", "-w", "-fPIC", "-shared"]  # -Og compiles fastest
        command = ["g++", *flags, *includes, "-o", f"{stem}.so", f"{stem}.cpp"]
        built = subprocess.run([str(part) for part in command], capture_output=True, text=True)
        assert built.returncode == 0, built.stderr[:4000]
        self._emulate = ctypes.CDLL(f"{stem}.so").emulate
        self._emulate.restype = ctypes.c_char_p

    @staticmethod
    def _with_emulated_shared_memory(text: str) -> str:
        name = "smem_bytes" if _SHARED.format(name="smem_bytes") in text else "shared"
        assert text.count(_SHARED.format(name=name)) == 1
        return '#include "emulator.h"\n' + text.replace(_SHARED.format(name=name), _EMULATED_SHARED.format(name=name))

    def _entry(self, symbol: str) -> str:
        shape = self._family.launch_shape(Plan(self.config), Problem(256, 1024, 1), 1, 1)
        arguments = [f"operands.{name}" for name in shape.operands]
        arguments += [f"request->scalars[{i}]" for i in range(len(shape.scalars))] + ["request->dependent"]
        return _ENTRY.format(symbol=symbol, arguments=", ".join(arguments))

    def __call__(
        self, a: torch.Tensor, packed: PackedWeight, max_clusters: int, *,
        seed: int, copies: str, resident: int | None = None, raster: int = 1, dependent: bool | None = None,
        fault: int = 0, bias: torch.Tensor | None = None,
    ) -> torch.Tensor:  # fmt: skip
        """C (m, n) of A (m, k); what the kernel does not write is NaN.

        ``max_clusters`` is what the host believes to fit at once, ``resident`` what does; ``dependent`` is as of
        ``Launcher.run_with``, by default at every second seed; ``fault`` is what the kernel reads as
        emulator::request.fault. Raises RuntimeError for what hardware would not forgive (deadlocks, races with
        copies, memory that is not the kernel's) or would not tell (writes around C, locks left behind).
        """
        assert packed.weight_format == self.spec.weight_format and a.dtype == packed.dtype
        config, problem = self.config, Problem(packed.n, packed.k, a.shape[0], packed.weight_format)
        shape = self._family.launch_shape(Plan(config, raster), problem, max_clusters, max_clusters)
        guarded = torch.full((problem.m * problem.n + 2 * _GUARD,), _UNWRITTEN, dtype=torch.int16)
        c = guarded[_GUARD:-_GUARD]
        partials = torch.full((shape.partials_bytes // 4,), float("nan"))
        locks = torch.zeros(shape.num_locks, dtype=torch.int32)
        request = _Request(
            shape.grid, shape.threads, shape.cluster, resident or max_clusters, shape.smem_bytes,
            self._family.max_registers(config, self.spec.arch_row) // 8 * 8, seed, COPIES.index(copies),
            seed % 2 if dependent is None else dependent, fault,
            shape.a_box, shape.c_box, shape.a_tail_rows, shape.scalars,
            *map(_Span.of, (a, c, packed.weight, packed.scales, bias, partials, locks)),
        )  # fmt: skip
        fault = self._emulate(ctypes.byref(request))
        if fault:
            raise RuntimeError(f"{config.key}: {fault.decode()}")
        if bool((guarded[:_GUARD] != _UNWRITTEN).any()) or bool((guarded[-_GUARD:] != _UNWRITTEN).any()):
            raise RuntimeError(f"{config.key}: wrote around C")
        if bool(locks.any()):
            raise RuntimeError(f"{config.key}: locks are not zero after the launch: {locks.tolist()}")
        return c.view(a.dtype).view(problem.m, problem.n)


def random_problem(
    m: int, n: int, k: int, weight_format: str = DEFAULT_FORMAT, dtype: torch.dtype = torch.float16
) -> tuple[torch.Tensor, PackedWeight, torch.Tensor]:
    """A (m, k), a packed random weight, and that weight dense in fp32 (n, k)."""
    generator = torch.Generator().manual_seed(m * n + k)
    codes, scales = random_weight(n, k, FORMATS[weight_format], dtype, generator=generator)
    a = torch.randn(m, k, generator=generator).to(dtype)
    return a, pack(codes, scales, weight_format), dequantize(codes, scales, weight_format, torch.float32)


def relative_error(c: torch.Tensor, reference: torch.Tensor) -> float:
    """|C - reference| / |reference|; NaN if an element was not written."""
    return ((c.float() - reference).norm() / reference.norm()).item()
