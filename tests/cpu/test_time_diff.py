"""tools/time_diff.py without a GPU: two copies of the shipped table, one of which loses kernels or runs slower."""

from __future__ import annotations

import shutil
from contextlib import nullcontext
from pathlib import Path

import pytest
from load_tool import load_tool

from marlin_gen import csv_rows
from marlin_gen.cli import gpus
from marlin_gen.measurement import Measurement
from marlin_gen.record import Recording
from marlin_gen.replay import ReplayMeasurer
from marlin_gen.table import DispatchTable

SHIPPED = Path(__file__).resolve().parents[2] / "tuned" / "h100-132sm-3352gbs"

time_diff = load_tool("time_diff")


class Slower(ReplayMeasurer):
    """Kernels below a folder named "after" take 1.5 times as long; wgmma ones crash, where asked to."""

    def __init__(self, crash: bool = False):
        super().__init__(Recording(DispatchTable.load(SHIPPED).gpu))
        self.crash = crash

    def finals(self, problem, entries):
        def one(artifact, plan):
            after = "after" in artifact.cubin.parts
            if after and self.crash and plan.config.family == "wgmma":
                return Measurement(problem, plan, "crash", detail="illegal address")
            us = float(problem.m) * (1.5 if after else 1.0)
            return Measurement(problem, plan, "ok", us, us, us, 2e-4)

        assert len({artifact.cubin for artifact, _ in entries}) == len(entries) == 2, "the same file twice"
        return [one(artifact, plan) for artifact, plan in entries]


def run(monkeypatch, measurer, *words: str) -> int:
    monkeypatch.setattr(gpus, "measurer", lambda _: nullcontext(measurer))
    return time_diff.main([*words])


def test_every_plan_of_both_tables_is_compared(monkeypatch, tmp_path, capsys):
    path = tmp_path / "diff.csv"
    assert run(monkeypatch, Slower(), str(SHIPPED), str(SHIPPED), "--tokens", "16,512", "--csv", str(path)) == 0
    rows = csv_rows.read(path, time_diff.Change, "changes")
    wanted = [row for row in DispatchTable.load(SHIPPED).rows if row.problem.m in (16, 512)]
    assert [(r.n, r.k, r.m, r.config) for r in rows] == [
        (row.problem.n, row.problem.k, row.problem.m, row.plan.key) for row in wanted
    ]
    assert {r.ratio for r in rows} == {1.5} and all(r.before_us == r.m for r in rows)
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 2 and all("1.500 in the mean of " in line for line in printed)


@pytest.mark.filterwarnings("ignore::marlin_gen.table.TableWarning")
def test_kernels_that_one_table_lacks_are_left_out(monkeypatch, tmp_path):
    before = tmp_path / "before"
    shutil.copytree(SHIPPED, before)
    for cubin in (before / "kernels").glob("wgmma-*.cubin"):
        cubin.unlink()
    path = tmp_path / "diff.csv"
    assert run(monkeypatch, Slower(), str(before), str(SHIPPED), "--tokens", "1,64", "--csv", str(path)) == 0
    assert {r.config.split("-")[0] for r in csv_rows.read(path, time_diff.Change, "changes")} == {"mma"}


def test_a_kernel_that_fails_is_told_by_the_exit_status(monkeypatch, capsys):
    assert run(monkeypatch, Slower(crash=True), str(SHIPPED), str(SHIPPED), "--tokens", "1,64") == 1
    printed = capsys.readouterr()
    assert "decode" in printed.out and "small batch" not in printed.out and "crash after" in printed.err


def test_what_cannot_be_compared_is_said(monkeypatch, tmp_path, capsys):
    for words, said in (
        ((str(tmp_path), str(SHIPPED)), str(tmp_path)),
        ((str(SHIPPED), str(SHIPPED), "--tokens", "7"), "--tokens 7"),
    ):
        with pytest.raises(SystemExit) as ended:
            run(monkeypatch, Slower(), *words)
        assert ended.value.code == 2 and said in capsys.readouterr().err
