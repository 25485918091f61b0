"""Sustained runs: the file, the share kept, and the order of a run. The card itself is tested by running it."""

from __future__ import annotations

import pytest

from marlin_gen.cli.root import main
from marlin_gen.config import Plan
from marlin_gen.measurement import Stretch
from marlin_gen.problem import Problem
from marlin_gen.sustained import COLUMNS, CUBLAS, SustainedRow, kept_share, measure, read_csv, write_csv

PLAN = Plan.from_key("wgmma-m256n128k64-w8x1-s4-b1-c1-tiles-exact-r8")
PROBLEM = Problem(28672, 4096, 4096)


def row(seconds: float, tflops: float, kernel: str = CUBLAS, clock: float | None = 1400.0) -> SustainedRow:
    return SustainedRow(28672, 4096, 4096, kernel, seconds, tflops, clock, 699.5, None)


def test_the_share_compares_the_last_second_with_the_first():
    rows = [row(t / 4, 800 if t <= 4 else 700 if t <= 8 else 600) for t in range(1, 41)]
    assert kept_share(rows) == pytest.approx(0.75)
    assert kept_share([row(0.25, 500)]) == 1.0


def test_a_file_reads_back_as_it_was(tmp_path):
    rows = [row(0.25, 712.5, PLAN.key), row(0.5, 650.25, clock=None)]
    write_csv(tmp_path / "sustained.csv", rows)
    assert read_csv(tmp_path / "sustained.csv") == rows


def test_a_damaged_file_names_the_line(tmp_path):
    path = tmp_path / "sustained.csv"
    path.write_text(",".join(COLUMNS) + "\n1,2,3,cublas,later,1,,,\n")
    with pytest.raises(ValueError, match=r"line 2"):
        read_csv(path)
    path.write_bytes(",".join(COLUMNS).encode() + b"\n1,2,\xb3,cublas,1,1,,,\n")
    with pytest.raises(ValueError, match=r"sustained\.csv, line 2"):
        read_csv(path)
    path.write_text("a,b\n")
    with pytest.raises(ValueError, match="columns"):
        read_csv(path)


def test_ours_runs_first_then_cublas_as_long():
    asked = []

    class Recorded:
        def sustain(self, problem, entry, seconds):
            asked.append((entry is not None, seconds))
            yield Stretch(0.25, 700.0, 1500, 650.0, 60)

    rows = list(measure(Recorded(), PROBLEM, None, PLAN, 60.0))
    assert asked == [(True, 60.0), (False, 60.0)]
    assert [r.kernel for r in rows] == [PLAN.key, CUBLAS]


def test_more_than_one_cell_is_refused_with_the_fix(capsys):
    assert main(["bench", "--model", "tiny", "--sustained", "60"]) == 2
    assert "--sustained runs one cell, not 26" in capsys.readouterr().err
