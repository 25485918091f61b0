"""Launches every shipped kernel on a small problem, through the driver alone, for compute-sanitizer.

torch works on the host only: on the GPU it would allocate from one pool, in which an overrun hits the neighbour unseen;
here each operand is an allocation of its exact size. Run by tools/sanitize.py; alone, it checks every kernel's numbers.
"""

from __future__ import annotations

import argparse
import ctypes
import math
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from marlin_gen import driver  # noqa: E402
from marlin_gen.config import KernelConfig, KernelSpec, Plan  # noqa: E402
from marlin_gen.driver import call  # noqa: E402
from marlin_gen.families import FAMILIES  # noqa: E402
from marlin_gen.formats import dtype as dtype_row  # noqa: E402
from marlin_gen.formats import weight_format  # noqa: E402
from marlin_gen.installed import find_tables  # noqa: E402
from marlin_gen.layout import PackedWeight, pack  # noqa: E402
from marlin_gen.operands import random_weight  # noqa: E402
from marlin_gen.problem import Problem  # noqa: E402
from marlin_gen.reference import gemm_reference  # noqa: E402
from marlin_gen.table import DispatchTable  # noqa: E402

NAN = 0x7FFF  # in both types
MMA_RANGES = 3  # clusters along the features of a mma case


class Case(NamedTuple):
    """One launch: small, yet its ring wraps, some block does several tiles, and the last token tile is partial."""

    plan: Plan
    problem: Problem
    max_clusters: int  # as if no more were resident: a small grid still has blocks with several tiles

    @classmethod
    def of(cls, spec: KernelSpec) -> Case:
        config = spec.config
        n, min_k = _mma_sizes(config) if config.family == "mma" else _wgmma_sizes(config)
        unit = math.lcm(spec.format_row.group_size, config.block_k)
        problem = Problem(n, -(-min_k // unit) * unit, config.block_m + 9, spec.weight_format, spec.act_dtype)
        raster = FAMILIES.of(config).rasters(config, problem)[-1]
        return cls(Plan(config, raster), problem, _max_clusters(config, problem))


def _wgmma_sizes(config: KernelConfig) -> tuple[int, int]:
    """n and k for two feature tiles, the second half empty where it can be, and a ring that wraps for every block."""
    shares = 2.3 if config.partition == "striped" else config.cluster_size
    return config.block_n + 64, math.ceil(shares * (config.num_stages + 1)) * config.block_k


def _mma_sizes(config: KernelConfig) -> tuple[int, int]:
    """n and k so that a cluster does two passes or more over its rows, the last one partial where it can be."""
    blocks = config.block_n // 16

    def fits(n: int) -> bool:
        rows = -(-n // 16 // MMA_RANGES)
        return rows > blocks and (blocks == 1 or rows % blocks != 0)

    n = next(n for n in range(64, 1 << 14, 64) if fits(n))
    return n, config.block_k * config.warps_k * config.cluster_size * (config.num_stages + 1)


def _max_clusters(config: KernelConfig, problem: Problem) -> int:
    """mma: so few that rows are shared out by MMA_RANGES; wgmma: two, or stripes that cut some tile into three."""
    token_tiles = -(-problem.m // config.block_m)
    if config.family == "mma":
        return MMA_RANGES * token_tiles
    if config.partition != "striped":
        return 2
    work = token_tiles * -(-problem.n // config.block_n) * (problem.k // config.block_k)
    return min(-(-work // (config.num_stages + 1)), (work - 1) // config.num_stages)  # more each than a ring


class Operands(NamedTuple):
    a: torch.Tensor  # [m, k]
    packed: PackedWeight
    bias: torch.Tensor  # [n]
    reference: torch.Tensor  # fp32 [m, n]


def operands(problem: Problem) -> Operands:
    """Random ones on the host, the same on every call."""
    generator = torch.Generator().manual_seed(problem.n * 65536 + problem.k)
    dtype = getattr(torch, dtype_row(problem.act_dtype).torch_name)
    fmt = weight_format(problem.weight_format)
    codes, scales = random_weight(problem.n, problem.k, fmt, dtype, generator=generator)
    a = torch.randn(problem.m, problem.k, generator=generator).to(dtype)
    bias = torch.randn(problem.n, generator=generator).to(dtype)
    return Operands(a, pack(codes, scales, fmt.name), bias, gemm_reference(a, codes, scales, fmt.name, bias))


def as_bytes(tensor: torch.Tensor) -> np.ndarray:
    return tensor.contiguous().view(torch.uint8).numpy()


class Buffer:
    """Device memory of exactly ``array``'s size, filled with it."""

    def __init__(self, array: np.ndarray) -> None:
        self.host = np.ascontiguousarray(array)
        self.handle = call("cuMemAlloc", self.host.nbytes)
        call("cuMemcpyHtoD", self.handle, self.host.ctypes.data, self.host.nbytes)

    def read(self) -> np.ndarray:
        call("cuMemcpyDtoH", self.host.ctypes.data, self.handle, self.host.nbytes)
        return self.host

    def free(self) -> None:
        with suppress(driver.LaunchError):  # after a fault nothing can be freed, and the fault is what counts
            call("cuMemFree", self.handle)


def run(spec: KernelSpec, cubin: bytes, symbol: str, num_sms: int) -> float:
    """Load and launch a kernel on its case: the relative error. LaunchError when the driver refuses."""
    case = Case.of(spec)
    config, p = spec.config, case.problem
    family = FAMILIES.of(config)
    threads, smem = family.threads(config), family.smem_bytes(config, spec.format_row)
    function = driver.load_image(cubin, symbol, smem)
    resident = driver.resident_clusters(function, threads, smem, config.cluster_size, num_sms)
    shape = family.launch_shape(case.plan, p, num_sms, min(resident, case.max_clusters))
    print(f"case {spec.key} symbol={symbol} n={p.n} k={p.k} m={p.m} grid={shape.grid}", flush=True)

    given = operands(p)
    arrays = {
        "a": as_bytes(given.a),
        "c": np.full((p.m, p.n), NAN, np.uint16),
        "weight": as_bytes(given.packed.weight),
        "scales": as_bytes(given.packed.scales),
        "bias": as_bytes(given.bias),
        "partials": np.full(max(shape.partials_bytes // 4, 1), np.nan, np.float32),
        "locks": np.zeros(max(shape.num_locks, 1), np.int32),
    }
    buffers = {name: Buffer(array) for name, array in arrays.items()}
    try:
        arguments: list[Any] = []
        for name in shape.operands:
            if mapped := shape.map_of(name):
                columns = p.k if mapped[0] == "a" else p.n
                arguments.append(driver.tensor_map(int(buffers[mapped[0]].handle), p.m, columns, mapped[1]))
            else:
                arguments.append(ctypes.c_uint64(int(buffers[name].handle)))
        size = shape.grid, shape.threads, shape.smem_bytes, shape.cluster
        for dependent in (False, True) if spec.arch_row.has_tma else (False,):  # both ways through the kernel
            print(f"  dependent={dependent}", flush=True)
            all_arguments = [*arguments, *map(ctypes.c_int32, (*shape.scalars, dependent))]
            driver.launch(function, driver.launch_config(*size, dependent), all_arguments, 0)
            call("cuCtxSynchronize")
        c = torch.from_numpy(buffers["c"].read().view(np.int16)).view(given.a.dtype).float()
        if (locks := buffers["locks"].read()).any():
            raise driver.LaunchError(f"locks are not zero afterwards: {locks.tolist()}")
    finally:
        for buffer in buffers.values():
            buffer.free()
    return float((c - given.reference).norm() / given.reference.norm())


def shipped(tables: list[DispatchTable], capability: tuple[int, int]) -> dict[str, tuple[bytes, str]]:
    """Cubin and symbol by spec key of every intact kernel in tables for GPUs of this compute capability."""
    found: dict[str, tuple[bytes, str]] = {}
    for table in tables:
        for key, kernel in table.kernels.items():
            if table.gpu.capability == capability and key not in found and (cubin := table.cubin(key)):
                found[key] = cubin, kernel.symbol
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--table", type=Path, help="a table's folder (default: every table for this GPU)")
    parser.add_argument("--specs", nargs="*", default=[], metavar="KEY", help="only these kernels")
    options = parser.parse_args()
    gpu = driver.identify(0)
    call("cuCtxSetCurrent", call("cuDevicePrimaryCtxRetain", call("cuDeviceGet", 0)))
    tables = [DispatchTable.load(options.table)] if options.table else find_tables()
    kernels = shipped([table for table in tables if table], gpu.capability)
    if missing := [key for key in options.specs if key not in kernels]:
        parser.error(f"no table for this GPU ships {missing[0]}")
    failed = 0
    for key in options.specs or sorted(kernels):
        began = time.monotonic()
        try:
            error = run(KernelSpec.from_key(key), *kernels[key], gpu.num_sms)
        except driver.LaunchError as refused:
            failed += 1
            print(f"failed {key}: {refused}", flush=True)
            continue
        wrong = not error < dtype_row(KernelSpec.from_key(key).act_dtype).error_limit  # also for NaN
        failed += wrong
        took = f"seconds={time.monotonic() - began:.1f}"
        found = f"failed {key}: wrong," if wrong else f"done {key}"
        print(f"{found} error={error:.2e} {took}", flush=True)
    print(f"{len(options.specs or kernels)} kernels, {failed} failed", flush=True)
    return 1 if failed or not kernels else 0


if __name__ == "__main__":
    sys.exit(main())
