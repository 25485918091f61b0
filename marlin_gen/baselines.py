"""The yardsticks of a problem on a CUDA device: a plain read of the packed weight, and cuBLAS with the dense one."""

from __future__ import annotations

import ctypes
import math
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

from marlin_gen import driver, env
from marlin_gen.config import Plan
from marlin_gen.launch import Kernel
from marlin_gen.measurement import Baseline, Measurement
from marlin_gen.operands import ROTATE_L2S, Shape
from marlin_gen.problem import Problem
from marlin_gen.reference import dequantize
from marlin_gen.timing import Bench, Graph, calls_of
from marlin_gen.toolchain import find_toolchain

READ_THREADS = 512  # __launch_bounds__ of templates/read_floor.cu
READ_GRIDS = (1, 2, 4)  # blocks per SM; the floor is the best of them


class Baselines:
    """Times both with the bench's operands and stream."""

    def __init__(self, bench: Bench) -> None:
        self._bench = bench
        self._gpu = bench.launcher.gpu
        self._read_floor = load_plain_kernel("read_floor", self._gpu.arch.name)
        self._never = torch.zeros(1, dtype=torch.int32, device=bench.device)
        self._floors: dict[tuple[int, int, str], float] = {}  # us, by n, k and weight format

    def compare(
        self, problem: Problem, entries: Sequence[tuple[Kernel, Plan]] = ()
    ) -> tuple[list[Measurement], Baseline]:
        """The entries, also in chains of dependent launches where the GPU can, and both yardsticks, interleaved.

        Without entries, as a tune asks for every token count of a shape, its weight is read for the first of them only.
        """
        weight = problem.n, problem.k, problem.weight_format
        floor_us = None if entries else self._floors.get(weight)
        reads = self._read_graphs(self._bench.shape(problem), calls_of(problem)) if floor_us is None else []
        found, [cublas, *floors] = self._bench.finals(
            problem, entries, [self.cublas_graph(problem), *reads], chained=self._gpu.arch.has_tma
        )
        if floor_us is None:
            floor_us = self._floors[weight] = min(spread.us for spread in floors)
        return found, Baseline(problem, floor_us, cublas.us)

    def _read_graphs(self, shape: Shape, calls: int) -> list[Graph]:
        blobs = [
            torch.cat([p.weight.view(torch.uint8).view(-1), p.scales.view(torch.uint8).view(-1)]) for p in shape.packed
        ]

        def graph(blocks: int) -> Graph:
            return Graph(lambda i: self._read(blobs[i % len(blobs)], blocks), calls, self._bench.stream)

        return [graph(self._gpu.num_sms * per_sm) for per_sm in READ_GRIDS]

    def _read(self, blob: torch.Tensor, blocks: int) -> None:
        config = driver.launch_config(blocks, READ_THREADS, 0, 1)
        arguments = [
            ctypes.c_uint64(blob.data_ptr()),
            ctypes.c_int64(blob.numel() // 16),
            ctypes.c_uint64(self._never.data_ptr()),
        ]
        driver.launch(self._read_floor, config, arguments, torch.cuda.current_stream().cuda_stream)

    def cublas_graph(self, problem: Problem) -> Graph:
        """fp16 matmul with the dense weight, its copies rotated as the packed ones are."""
        shape = self._bench.shape(problem)
        a, _, _ = shape.cell(problem.m)
        dense = dequantize(shape.codes, shape.scales, shape.weight_format, shape.dtype)
        copies = [dense, *(dense.clone() for _ in range(math.ceil(ROTATE_L2S * shape.l2_bytes / dense.nbytes)))]
        out = torch.empty(problem.m, problem.n, device=self._bench.device, dtype=shape.dtype)

        def call(i: int) -> None:
            torch.matmul(a, copies[i % len(copies)].T, out=out)

        return Graph(call, calls_of(problem), self._bench.stream)


def load_plain_kernel(name: str, arch: str) -> driver.Function:
    """Compile and load ``templates/<name>.cu``, a kernel that no spec describes; its symbol is ``name``."""
    toolchain = find_toolchain()
    source = env.templates_dir() / f"{name}.cu"
    with tempfile.TemporaryDirectory(prefix="marlin_gen-") as folder:
        cubin = Path(folder) / f"{name}.cubin"
        command = toolchain.command(toolchain.flags(arch), env.templates_dir() / "include", str(source), str(cubin))
        done = subprocess.run(command, env=env.child_environment(), capture_output=True, text=True, errors="replace")
        if done.returncode:
            raise driver.LaunchError(f"{name}.cu does not compile: {(done.stderr or done.stdout).strip()[:300]}")
        return driver.load(cubin, name, 0)
