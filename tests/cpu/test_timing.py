"""First timings, finals, yardsticks: how often a graph is replayed, and when the card rests. The graphs are made up."""

from __future__ import annotations

import math

import pytest
import torch
from tables import H100, mma

from marlin_gen import timing
from marlin_gen.baselines import Baselines
from marlin_gen.formats import DTYPES
from marlin_gen.measurement import Baseline
from marlin_gen.problem import Problem
from marlin_gen.reference import errors
from marlin_gen.timing import (
    FINAL_REPLAYS,
    REST_FROM_M,
    RESTED_SCREEN_REPLAYS,
    SCREEN_REPLAYS,
    Bench,
    interleaved,
)  # fmt: skip


class Played:
    """A graph of ten calls that always takes as long."""

    calls = 10

    def __init__(self, us: float) -> None:
        self.us, self.replays = us, 0

    def replay(self) -> float:
        self.replays += 1
        return self.us


@pytest.fixture
def slept(monkeypatch) -> list[float]:
    seconds: list[float] = []
    monkeypatch.setattr(timing.time, "sleep", seconds.append)
    return seconds


def bench_of(graph: Played) -> Bench:
    bench = object.__new__(Bench)  # no device
    bench._best = {}
    bench.check = lambda *_: (2e-4, None)
    bench.graph = lambda *_, **__: graph
    return bench


def test_a_first_timing_rests_as_long_as_large_products_ran(slept):
    large, small = (Problem(4096, 4096, m) for m in (REST_FROM_M, REST_FROM_M - 1))
    graph = Played(30.0)
    found = bench_of(graph).screen(None, mma(), large)
    assert (found.us, found.us_low, found.us_high) == (30.0, 30.0, 30.0)
    assert graph.replays == 1 + RESTED_SCREEN_REPLAYS == len(slept) < 1 + SCREEN_REPLAYS
    assert sum(slept) == pytest.approx(graph.replays * 30e-6 * Played.calls)
    slept.clear()
    bench_of(Played(30.0)).screen(None, mma(), small)
    assert not slept


def test_rivals_rest_between_each_other_and_where_a_yardstick_takes_its_turn_only_if_large(slept):
    small, large, entries = Problem(4096, 4096, 1), Problem(4096, 4096, REST_FROM_M), [(None, mma()), (None, mma())]
    for problem, yardsticks, rests in ((small, [], True), (small, [Played(5.0)], False), (large, [Played(5.0)], True)):
        slept.clear()
        graph = Played(30.0)
        rows, _ = bench_of(graph).finals(problem, entries, yardsticks)
        assert [row.us for row in rows] == [30.0, 30.0] and graph.replays == 2 * (1 + FINAL_REPLAYS)
        pauses = 1 + rests * (2 + len(yardsticks)) * (1 + FINAL_REPLAYS)
        assert len(slept) == pauses


def test_a_plan_far_behind_gets_one_timed_replay(slept):
    problem, bench = Problem(4096, 4096, 1), bench_of(Played(10.0))
    bench.screen(None, mma(), problem)
    slow = Played(16.0)
    bench.graph = lambda *_: slow
    assert bench.screen(None, mma(), problem).us == 16.0 and slow.replays == 2


def test_interleaved_replays_warm_up_and_leave_failures_out(slept):
    graphs = [Played(5.0), None, Played(7.0)]
    found = interleaved(graphs, 3, rest=True)
    assert [spread and spread.us for spread in found] == [5.0, None, 7.0]
    assert [graph.replays for graph in graphs if graph] == [4, 4] and len(slept) == 8


def test_a_weight_is_read_once_where_only_yardsticks_are_asked_for(slept):
    """Its time does not depend on the tokens. Beside kernels it is read again, in the same rounds as they."""
    baselines = object.__new__(Baselines)  # no device
    baselines._bench, baselines._gpu, baselines._floors = bench_of(Played(10.0)), H100, {}
    baselines._bench.shape = lambda problem: problem
    baselines.cublas_graph = lambda problem: Played(50.0 + problem.m)
    reads = []

    def read_graphs(problem, calls):
        reads.append(problem)
        return [Played(us + len(reads)) for us in (5.0, 4.0, 6.0)]

    baselines._read_graphs = read_graphs
    one, two, other = Problem(4096, 4096, 1), Problem(4096, 4096, 2), Problem(8192, 4096, 1)
    found = [baselines.compare(problem)[1] for problem in (one, two, other)]
    assert found == [Baseline(one, 5.0, 51.0), Baseline(two, 5.0, 52.0), Baseline(other, 6.0, 51.0)]
    rows, beside = baselines.compare(two, [(None, mma())])
    assert beside == Baseline(two, 7.0, 52.0) and [row.us for row in rows] == [10.0] and reads == [one, other, two]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_few_wrong_outputs_among_millions_are_seen(dtype):
    limit = next(row.error_limit for row in DTYPES.values() if row.torch_name == str(dtype).removeprefix("torch."))
    reference = torch.randn(4096, 2048, generator=torch.Generator().manual_seed(1)) * 3
    out, norm = reference.to(dtype), float(reference.norm())
    rounded = errors(out, reference, norm)
    assert max(rounded) < limit / 2
    out[7, 8:12] = out[100, 8:12]  # of another row
    found, worst = errors(out, reference, norm)
    assert found < limit < worst
    out[0, 0] = math.nan
    assert not all(error < limit for error in errors(out, reference, norm))
