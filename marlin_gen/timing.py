"""The timing protocol on a CUDA device: correctness first, then graph replays over rotated weights.

Every time is that of one call inside a replayed CUDA graph of many, whose weights rotate over distinct copies of
several times the L2 cache, so that they come from DRAM as in a model; activations stay hot, as they do there.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import torch

from marlin_gen import driver
from marlin_gen.config import Plan
from marlin_gen.launch import Kernel, Launcher
from marlin_gen.measurement import Measurement
from marlin_gen.operands import Shape
from marlin_gen.problem import Problem
from marlin_gen.reference import errors

SCREEN_REPLAYS, FINAL_REPLAYS = 6, 13
RESTED_SCREEN_REPLAYS = 3  # with a rest after each: as long as six without, and steadier
MIN_CALLS = 3
# Most calls of a graph, and the length it aims at, in us. A graph that replays after another one pays for the switch,
# some microseconds: the finals, which interleave, make their graphs longer.
SCREEN_CALLS, SCREEN_GRAPH_US = 60, 1000.0
FINAL_CALLS, FINAL_GRAPH_US = 400, 2000.0
REST_SECONDS, STRETCH_SECONDS = 5.0, 0.25  # of a sustained run: to cool down before, and of one row
PAUSE_SECONDS = 0.1  # large products reach the power limit, and then what ran before decides the clock
# From here on they do within one problem's finals: 28672x8192 m=512 took 316 us alone and 354 in turn with six others.
# In a tune what was screened first, with no compiler to wait for between, was up to 17 % slower than what came later.
# Rivals that follow each other need rests at any m: 28672x8192 m=16 on an H200 took 32 us alone and 36 among four.
REST_FROM_M = 128
GIVE_UP_RATIO = 1.5  # a screened plan this much slower than the cell's best so far gets one replay


@dataclass(frozen=True)
class Spread:
    """Replay times: their median and a 95 % interval of it, of less than six the least and greatest; us a call."""

    us: float
    low: float
    high: float

    @classmethod
    def of(cls, times: Sequence[float]) -> Spread:
        """By order statistics: the ranks that hold the median with 95 %, from the binomial distribution."""
        ordered, count = sorted(times), len(times)
        margin = 0.98 * math.sqrt(count)
        low, high = max(math.floor(count / 2 - margin), 0), min(math.ceil(count / 2 + margin), count - 1)
        return cls(
            ordered[count // 2] if count % 2 else (ordered[count // 2 - 1] + ordered[count // 2]) / 2,
            ordered[low],
            ordered[high],
        )


def _event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]


class Graph:
    """A captured run of calls, and the time of one of them per replay."""

    def __init__(self, call: Callable[[int], object], calls: int, stream: torch.cuda.Stream) -> None:
        self.calls, self.stream = calls, stream
        self._call = call  # holds the tensors that the graph reads and writes
        call(0)  # first use: module load and handle creation stay out of the graph
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph, stream=stream):
            for i in range(calls):
                call(i)
        self._begin, self._end = _event(), _event()

    def enqueue(self) -> None:
        self._graph.replay()

    def replay(self) -> float:
        """Microseconds a call."""
        self._begin.record(self.stream)
        self._graph.replay()
        self._end.record(self.stream)
        self._end.synchronize()
        return float(self._begin.elapsed_time(self._end)) * 1e3 / self.calls


def calls_of(problem: Problem, most: int = FINAL_CALLS, graph_us: float = FINAL_GRAPH_US) -> int:
    """How many calls a graph holds."""
    # A rough time of the call: weights at 3 TB/s, multiplications at 700 TFLOP/s.
    guess_us = max(5.0, problem.weight_bytes / 3e6, problem.flops / 7e8)
    return max(MIN_CALLS, min(most, round(graph_us / guess_us)))


def interleaved(graphs: Sequence[Graph | None], replays: int, rest: bool = False) -> list[Spread | None]:
    """One replay of each graph in turn, so that drift meets all alike; None where there is no graph.

    ``rest`` as long after each replay as it took.
    """
    times: list[list[float]] = [[] for _ in graphs]
    for round_ in range(replays + 1):
        for graph, seen in zip(graphs, times, strict=True):
            us = replayed(graph, rest) if graph else 0.0
            if round_:  # the first round warms up
                seen.append(us)
    return [Spread.of(seen) if graph else None for graph, seen in zip(graphs, times, strict=True)]


def replayed(graph: Graph, rest: bool) -> float:
    """Microseconds a call of one replay; ``rest`` as long after it as it took."""
    us = graph.replay()
    if rest:
        time.sleep(us * graph.calls * 1e-6)
    return us


class Bench:
    """Checks and times kernels on one device. Holds one shape's operands per (n, k)."""

    def __init__(self, device_index: int) -> None:
        torch.backends.cuda.matmul.allow_tf32 = False
        torch.cuda.set_device(device_index)
        self.launcher = Launcher.for_device(device_index)
        self.device = torch.device("cuda", device_index)
        self.stream = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
        torch.cuda.set_stream(self.stream)
        self._shapes: dict[tuple[int, int, str, str], Shape] = {}
        self._best: dict[Problem, float] = {}

    def shape(self, problem: Problem) -> Shape:
        key = problem.n, problem.k, problem.weight_format, problem.act_dtype
        if key not in self._shapes:
            self._shapes[key] = Shape(*key, self.device, self.launcher.gpu.l2_bytes)
        return self._shapes[key]

    def screen(self, kernel: Kernel, plan: Plan, problem: Problem) -> Measurement:
        """Check the numbers, then a quick time. A kernel that fails either is a measurement with the status."""
        error, failure = self.check(kernel, plan, problem)
        if failure:
            return Measurement(
                problem, plan, failure, relative_error=error, detail="" if error is None else f"error {error:.2e}"
            )
        graph = self.graph(kernel, plan, problem, calls_of(problem, SCREEN_CALLS, SCREEN_GRAPH_US))
        rest = problem.m >= REST_FROM_M
        replayed(graph, rest)
        times = [replayed(graph, rest)]
        best = self._best.get(problem, math.inf)
        if times[0] < best * GIVE_UP_RATIO:
            replays = RESTED_SCREEN_REPLAYS if rest else SCREEN_REPLAYS
            times += [replayed(graph, rest) for _ in range(replays - 1)]
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
        error, worst = errors(out, reference, norm)
        if error < problem.error_limit and worst < problem.error_limit:  # also false for NaN
            return error, None
        error = max(error, worst)
        self.launcher.workspace = type(self.launcher.workspace)(self.device)  # its locks may be left in any state
        return (error if math.isfinite(error) else None), "wrong"

    def finals(
        self,
        problem: Problem,
        entries: Sequence[tuple[Kernel, Plan]],
        yardsticks: Sequence[Graph] = (),
        *,
        chained: bool = False,
    ) -> tuple[list[Measurement], list[Spread]]:
        """Time the entries, and the yardsticks beside them, against each other: one replay of each in turn.

        Drift then meets all alike. A pause before keeps one problem's heat from the next; without yardsticks, in whose
        turn the GPU cools down, it rests after every replay. ``chained`` times each entry with dependent launches too.
        """
        checked = [self.check(kernel, plan, problem) for kernel, plan in entries]
        graphs = [
            None if failure else self.graph(kernel, plan, problem)
            for (kernel, plan), (_, failure) in zip(entries, checked, strict=True)
        ]
        chains = [
            self.graph(kernel, plan, problem, dependent=True) if graph and chained else None
            for (kernel, plan), graph in zip(entries, graphs, strict=True)
        ]
        time.sleep(PAUSE_SECONDS)
        rest = problem.m >= REST_FROM_M or not yardsticks
        spreads = iter(interleaved([*graphs, *chains, *yardsticks], FINAL_REPLAYS, rest))
        alone, together = list(islice(spreads, len(entries))), list(islice(spreads, len(entries)))
        found = [
            Measurement(
                problem, plan, "ok", one.us, one.low, one.high, error, chained_us=chain.us if chain else None
            )
            if one
            else Measurement(problem, plan, failure or "wrong", relative_error=error)
            for (_, plan), (error, failure), one, chain in zip(entries, checked, alone, together, strict=True)
        ]
        return found, [spread for spread in spreads if spread]

    def sustain(self, graph: Graph, seconds: float) -> Iterator[tuple[float, float]]:
        """Replay without a pause, after a rest: (seconds since the start, microseconds a call) of each stretch."""
        time.sleep(REST_SECONDS)
        replays = max(round(STRETCH_SECONDS * 1e6 / (graph.replay() * graph.calls)), 1)
        marks = [_event()]
        marks[0].record(self.stream)
        elapsed = 0.0
        while elapsed < seconds:
            while len(marks) < 3:  # the next stretch is queued before this one ends: the card never waits
                for _ in range(replays):
                    graph.enqueue()
                marks.append(_event())
                marks[-1].record(self.stream)
            marks[1].synchronize()
            stretch = float(marks[0].elapsed_time(marks[1])) * 1e-3
            elapsed += stretch
            del marks[0]
            yield elapsed, stretch * 1e6 / (replays * graph.calls)
        self.stream.synchronize()

    def graph(
        self, kernel: Kernel, plan: Plan, problem: Problem, calls: int | None = None, dependent: bool = False
    ) -> Graph:
        """A graph of so many calls (default: as the finals), each started as ``Launcher.run_with`` says."""
        shape = self.shape(problem)
        a, _, _ = shape.cell(problem.m)
        out = torch.empty(problem.m, problem.n, device=self.device, dtype=shape.dtype)
        # One workspace for all calls, as a stream has: allocated here, so that the graph holds kernels only.
        launch_shape, _ = kernel.shape(plan, problem, self.launcher.gpu.num_sms)
        partials = torch.empty(max(launch_shape.partials_bytes, 1), dtype=torch.uint8, device=self.device)
        locks = torch.zeros(max(launch_shape.num_locks, 1), dtype=torch.int32, device=self.device)

        def call(i: int) -> None:
            packed = shape.packed[i % len(shape.packed)]
            self.launcher.run_with(
                kernel, plan, problem, a, packed.weight, packed.scales, out, partials, locks, dependent=dependent
            )

        return Graph(call, calls or calls_of(problem), self.stream)
