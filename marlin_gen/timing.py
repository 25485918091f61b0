"""The timing protocol on a CUDA device: correctness first, then graph replays over rotated weights.

Every time is that of one call inside a replayed CUDA graph of many, whose weights rotate over distinct copies of at least
``ROTATE_L2S`` times the L2 cache, so that they come from DRAM as in a model; activations stay hot, as they do there.
"""

from __future__ import annotations

import math
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from marlin_gen import driver, env
from marlin_gen.config import Plan
from marlin_gen.formats import dtype as dtype_row
from marlin_gen.launch import Kernel, Launcher
from marlin_gen.layout import pack
from marlin_gen.measurement import ERROR_LIMIT, Baseline, Measurement
from marlin_gen.problem import Problem
from marlin_gen.reference import dequantize, gemm_reference
from marlin_gen.toolchain import find_toolchain

ROTATE_L2S = 5
GRAPH_US = 1000.0  # aim of one graph's length: long against its launch
MIN_CALLS, MAX_CALLS = 3, 60
SCREEN_REPLAYS, FINAL_REPLAYS = 6, 15
GIVE_UP_RATIO = 1.5  # a screened plan this much slower than the cell's best so far gets one replay


@dataclass(frozen=True)
class Spread:
    """Replay times: their median and a 95 % interval of it, microseconds a call."""

    us: float
    low: float
    high: float

    @classmethod
    def of(cls, times: Sequence[float]) -> Spread:
        """By order statistics: the ranks that hold the median with 95 %, from the binomial distribution."""
        ordered, count = sorted(times), len(times)
        margin = 0.98 * math.sqrt(count)
        low, high = max(math.floor(count / 2 - margin), 0), min(math.ceil(count / 2 + margin), count - 1)
        return cls(ordered[count // 2] if count % 2 else (ordered[count // 2 - 1] + ordered[count // 2]) / 2, ordered[low], ordered[high])


class Graph:
    """A captured run of calls, and the time of one of them per replay."""

    def __init__(self, call: Callable[[int], None], calls: int, stream: torch.cuda.Stream) -> None:
        self.calls, self.stream = calls, stream
        call(0)  # first use: module load and handle creation stay out of the graph
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph, stream=stream):
            for i in range(calls):
                call(i)
        self._begin, self._end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)

    def replay(self) -> float:
        """Microseconds a call."""
        self._begin.record(self.stream)
        self._graph.replay()
        self._end.record(self.stream)
        self._end.synchronize()
        return float(self._begin.elapsed_time(self._end)) * 1e3 / self.calls


class Shape:
    """Random operands of one (n, k): packed copies that rotate, and what results are held to."""

    def __init__(self, n: int, k: int, weight_format: str, act_dtype: str, device: torch.device, l2_bytes: int) -> None:
        from marlin_gen.formats import weight_format as format_row

        fmt = format_row(weight_format)
        self.n, self.k, self.device, self.l2_bytes = n, k, device, l2_bytes
        self.dtype = getattr(torch, dtype_row(act_dtype).torch_name)
        self.weight_format = weight_format
        self.codes = torch.randint(0, fmt.codes, (n, k), device=device, dtype=torch.uint8)
        self.scales = (torch.rand(n, k // fmt.group_size, device=device) * 0.02 + 0.005).half()
        first = pack(self.codes, self.scales, weight_format)
        copies = 1 + math.ceil(ROTATE_L2S * l2_bytes / first.nbytes)
        self.packed = [first, *(type(first)(first.weight.clone(), first.scales.clone(), weight_format, first.layout_version) for _ in range(copies - 1))]
        self._cells: dict[int, tuple[torch.Tensor, torch.Tensor, float]] = {}

    def cell(self, m: int) -> tuple[torch.Tensor, torch.Tensor, float]:
        """Activations [m, k], their fp32 reference [m, n], and its norm."""
        if m not in self._cells:
            a = torch.randn(m, self.k, device=self.device, dtype=self.dtype)
            reference = gemm_reference(a, self.codes, self.scales, self.weight_format)
            self._cells[m] = a, reference, float(reference.norm())
        return self._cells[m]


class Bench:
    """Checks and times kernels on one device. Holds one shape's operands per (n, k)."""

    def __init__(self, device_index: int) -> None:
        torch.backends.cuda.matmul.allow_tf32 = False
        torch.cuda.set_device(device_index)
        self.launcher = Launcher.for_device(device_index)
        self.device = torch.device("cuda", device_index)
        self.stream = torch.cuda.Stream(self.device)
        torch.cuda.set_stream(self.stream)
        self._shapes: dict[tuple[int, int, str, str], Shape] = {}
        self._best: dict[Problem, float] = {}
        self._read_floor: driver.Function | None = None

    def shape(self, problem: Problem) -> Shape:
        key = problem.n, problem.k, problem.weight_format, problem.act_dtype
        if key not in self._shapes:
            self._shapes[key] = Shape(*key, self.device, self.launcher.gpu.l2_bytes)
        return self._shapes[key]

    def screen(self, kernel: Kernel, plan: Plan, problem: Problem) -> Measurement:
        """Check the numbers, then a quick time. A kernel that fails either is a measurement with the status."""
        error, failure = self.check(kernel, plan, problem)
        if failure:
            return Measurement(problem, plan, failure, relative_error=error, detail="" if error is None else f"error {error:.2e}")
        graph = self._graph(kernel, plan, problem)
        graph.replay()
        times = [graph.replay()]
        best = self._best.get(problem, math.inf)
        if times[0] < best * GIVE_UP_RATIO:
            times += [graph.replay() for _ in range(SCREEN_REPLAYS - 1)]
        spread = Spread.of(times)
        self._best[problem] = min(best, spread.us)
        return Measurement(problem, plan, "ok", spread.us, spread.low, spread.high, error)

    def check(self, kernel: Kernel, plan: Plan, problem: Problem) -> tuple[float | None, str | None]:
        """Relative Frobenius error against fp32 into a poisoned output, and the failing status or None."""
        shape = self.shape(problem)
        a, reference, norm = shape.cell(problem.m)
        out = torch.full((problem.m, problem.n), math.nan, device=self.device, dtype=shape.dtype)
        try:
            self.launcher.run(kernel, plan, problem, a, shape.packed[0].weight, shape.packed[0].scales, out)
        except driver.LaunchError:
            return None, "launch"
        error = float(out.float().sub_(reference).norm()) / norm
        if error < ERROR_LIMIT:  # also false for NaN
            return error, None
        self.launcher.workspace = type(self.launcher.workspace)(self.device)  # its locks may be left in any state
        return (error if math.isfinite(error) else None), "wrong"

    def finals(self, problem: Problem, entries: Sequence[tuple[Kernel, Plan]], replays: int = FINAL_REPLAYS) -> list[Measurement]:
        """Time the entries against each other: one replay of each in turn, so that drift meets all alike."""
        checked = [self.check(kernel, plan, problem) for kernel, plan in entries]
        graphs = [None if failure else self._graph(kernel, plan, problem) for (kernel, plan), (_, failure) in zip(entries, checked, strict=True)]
        spreads = self._interleaved(graphs, replays)
        return [
            Measurement(problem, plan, failure or "ok", spread.us if spread else None, spread.low if spread else None, spread.high if spread else None, error)
            for (_, plan), (error, failure), spread in zip(entries, checked, spreads, strict=True)
        ]  # fmt: skip

    def baseline(self, problem: Problem, replays: int = FINAL_REPLAYS) -> Baseline:
        """The read floor of the packed weight, the best of a few grids, and cuBLAS with the dense weight."""
        shape = self.shape(problem)
        calls = self._calls(problem)
        blobs = [torch.cat([p.weight.view(torch.uint8).view(-1), p.scales.view(torch.uint8).view(-1)]) for p in shape.packed]
        floors = [Graph(lambda i, grid=grid: self._read(blobs[i % len(blobs)], grid), calls, self.stream) for grid in (1, 2, 4)]
        floor = min(s.us for s in self._interleaved(floors, replays) if s)
        del floors, blobs
        a, _, _ = shape.cell(problem.m)
        dense = dequantize(shape.codes, shape.scales, shape.weight_format, shape.dtype)
        copies = [dense, *(dense.clone() for _ in range(math.ceil(ROTATE_L2S * shape.l2_bytes / dense.nbytes)))]
        out = torch.empty(problem.m, problem.n, device=self.device, dtype=shape.dtype)
        cublas = Graph(lambda i: torch.matmul(a, copies[i % len(copies)].T, out=out), calls, self.stream)
        [spread] = self._interleaved([cublas], replays)
        assert spread
        return Baseline(problem, floor, spread.us)

    def _graph(self, kernel: Kernel, plan: Plan, problem: Problem) -> Graph:
        shape = self.shape(problem)
        a, _, _ = shape.cell(problem.m)
        out = torch.empty(problem.m, problem.n, device=self.device, dtype=shape.dtype)
        # One workspace for all calls, as a stream has: allocated here, so that the graph holds kernels only.
        launch_shape, _ = kernel.shape(plan, problem, self.launcher.gpu.num_sms)
        partials = torch.empty(max(launch_shape.partials_bytes, 1), dtype=torch.uint8, device=self.device)
        locks = torch.zeros(max(launch_shape.num_locks, 1), dtype=torch.int32, device=self.device)

        def call(i: int) -> None:
            packed = shape.packed[i % len(shape.packed)]
            self.launcher.run_with(kernel, plan, problem, a, packed.weight, packed.scales, out, partials, locks)

        return Graph(call, self._calls(problem), self.stream)

    def _interleaved(self, graphs: Sequence[Graph | None], replays: int) -> list[Spread | None]:
        times: list[list[float]] = [[] for _ in graphs]
        for round_ in range(replays + 1):
            for graph, seen in zip(graphs, times, strict=True):
                us = graph.replay() if graph else 0.0
                if round_:  # the first round warms up
                    seen.append(us)
        return [Spread.of(seen) if graph else None for graph, seen in zip(graphs, times, strict=True)]

    def _calls(self, problem: Problem) -> int:
        # A rough time of the call: weights at 3 TB/s, multiplications at 700 TFLOP/s.
        guess_us = max(5.0, problem.weight_bytes / 3e6, problem.flops / 7e8)
        return max(MIN_CALLS, min(MAX_CALLS, round(GRAPH_US / guess_us)))

    def _read(self, blob: torch.Tensor, blocks_per_sm: int) -> None:
        import ctypes

        if self._read_floor is None:
            self._read_floor = load_plain_kernel("read_floor", self.launcher.gpu.arch.name)
            self._never = torch.zeros(1, dtype=torch.int32, device=self.device)
        config = driver.launch_config(self.launcher.gpu.num_sms * blocks_per_sm, 512, 0, 1)
        arguments = [ctypes.c_uint64(blob.data_ptr()), ctypes.c_int64(blob.numel() // 16), ctypes.c_uint64(self._never.data_ptr())]
        driver.launch(self._read_floor, config, arguments, torch.cuda.current_stream().cuda_stream)


def load_plain_kernel(name: str, arch: str) -> driver.Function:
    """Compile and load ``templates/<name>.cu``, a kernel that no spec describes; its symbol is ``name``."""
    toolchain = find_toolchain()
    source = env.templates_dir() / f"{name}.cu"
    with tempfile.TemporaryDirectory(prefix="marlin_gen-") as folder:
        cubin = Path(folder) / f"{name}.cubin"
        command = toolchain.command(toolchain.flags(arch), env.templates_dir() / "include", str(source), str(cubin))
        done = subprocess.run(command, env=env.child_environment(), capture_output=True, text=True, errors="replace")
        if done.returncode:
            raise driver.LaunchError(f"{name}.cu does not compile: {done.stderr.strip()[:300]}")
        return driver.load(cubin, name, 0)
