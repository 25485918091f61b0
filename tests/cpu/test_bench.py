"""The bench CSV and its summary, and the measuring loop over a recorded stand-in."""

from __future__ import annotations

import math

import pytest

from marlin_gen.bench import COLUMNS, BenchRow, geomean, measure, read_csv, summarise, write_csv
from marlin_gen.config import Plan
from marlin_gen.measurement import Baseline, Measurement
from marlin_gen.problem import Problem

PLAN = "wgmma-m64n64k256-w4x1-s5-b1-c1-tiles-exact-r1"


def row(m: int, us: float, cublas_us: float = 20.0, floor_us: float = 4.0) -> BenchRow:
    around = (us * 0.99, us * 1.01)
    return BenchRow(4096, 4096, m, "u4b8g128", "f16", us, *around, PLAN, floor_us, cublas_us, 2.5e-4, us * 0.8)


def test_the_columns_are_the_agreed_ones():
    assert ",".join(COLUMNS) == (
        "n,k,m,weight_format,act_dtype,us,us_low,us_high,config,read_floor_us,cublas_us,relative_error,chained_us"
    )


def test_a_written_bench_is_read_back_sorted(tmp_path):
    path = tmp_path / "gpu" / "bench.csv"
    write_csv(path, [row(16, 8.125), row(1, 5.0)])
    assert read_csv(path) == [row(1, 5.0), BenchRow(**{**vars(row(16, 8.125)), "us_low": 8.044, "us_high": 8.206})]
    assert [p.name for p in path.parent.iterdir()] == ["bench.csv"]


def test_large_times_keep_a_tenth_of_a_microsecond(tmp_path):
    write_csv(tmp_path / "bench.csv", [row(4096, 12345.67)])
    assert read_csv(tmp_path / "bench.csv")[0].us == 12345.7


def test_a_file_that_is_no_bench_names_its_columns(tmp_path):
    path = tmp_path / "bench.csv"
    path.write_text("n,k\n1,2\n")
    with pytest.raises(ValueError, match=r"bench\.csv is not a bench: its columns are \['n', 'k'\]"):
        read_csv(path)


def test_a_damaged_line_is_named(tmp_path):
    path = tmp_path / "bench.csv"
    write_csv(path, [row(1, 5.0), row(2, 5.0)])
    path.write_text(path.read_text().replace("4096,4096,2,", "4096,4096,two,"))
    with pytest.raises(ValueError, match=r"bench\.csv, line 3: .*'two'"):
        read_csv(path)


def test_the_summary_is_a_geometric_mean_by_regime():
    rows = [row(1, 5.0), row(16, 8.0), row(64, 10.0)]
    decode, small, everything = summarise(rows, tflops=775)
    assert (decode.cells, small.cells, everything.cells) == (2, 1, 3)
    assert decode.speedup == pytest.approx(math.sqrt(4.0 * 2.5))
    assert decode.worst_speedup == pytest.approx(2.5)
    assert decode.roofline == pytest.approx(math.sqrt(0.8 * 0.5))
    assert everything.speedup == pytest.approx((4.0 * 2.5 * 2.0) ** (1 / 3))


def test_the_roofline_of_prefill_is_the_arithmetic():
    problem = Problem(4096, 4096, 4096)
    at_the_roof = problem.flops / 775e6
    assert row(4096, at_the_roof).roofline_fraction(775) == pytest.approx(1.0)


def test_one_regime_alone_has_no_second_line_of_all():
    for m, name in ((1, "decode, m 1-16"), (24, "small batch, m 17-256"), (300, "prefill, m from 257")):
        assert [s.regime for s in summarise([row(m, 5.0)], 775)] == [name]


def test_geomean_of_nothing_is_an_error():
    with pytest.raises(ValueError, match="no values"):
        geomean([])


class Recorded:
    """A measurer whose answers are written down; odd m fail."""

    def compare(self, problem, entries):
        ((_, plan),) = entries
        found = Measurement(problem, plan, "ok", 5.0, 4.9, 5.2, 2.1e-4, chained_us=4.5)
        if problem.m % 2:
            found = Measurement(problem, plan, "crash", detail="illegal address")
        return Baseline(problem, 4.0, 20.0), [found]


def test_measure_yields_rows_and_failures_in_order():
    plan = Plan.from_key(PLAN)
    found = list(measure(Recorded(), [(Problem(4096, 4096, m), None, plan) for m in (2, 3)]))
    assert found[0] == BenchRow(4096, 4096, 2, "u4b8g128", "f16", 5.0, 4.9, 5.2, PLAN, 4.0, 20.0, 2.1e-4, 4.5)
    assert isinstance(found[1], Measurement) and found[1].status == "crash"
