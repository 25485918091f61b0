"""tools/offgrid.py without a GPU: on the shipped table, with its recording or a made-up machine."""

from __future__ import annotations

import re
import shutil
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import synthetic
from load_tool import load_tool
from tables import A100, H100, H200

from marlin_gen import compile as compiling
from marlin_gen import csv_rows
from marlin_gen.bench import geomean
from marlin_gen.cli import gpus
from marlin_gen.compile import CompileFailure
from marlin_gen.config import KernelSpec
from marlin_gen.dispatch import Dispatcher
from marlin_gen.measurement import Measurement
from marlin_gen.models import model_shapes
from marlin_gen.problem import Problem
from marlin_gen.record import Recording
from marlin_gen.replay import ReplayMeasurer, find_recording
from marlin_gen.table import DispatchTable

ROOT = Path(__file__).resolve().parents[2]
SHIPPED = ROOT / "tuned" / "h100-132sm-3352gbs"
UNSEEN = (4096, 14336)


offgrid = load_tool("offgrid")


class MadeUp(ReplayMeasurer):
    """Answers every pair with the time of a made-up machine; tests may make some fail, and look at what was asked."""

    def __init__(self, gpu=synthetic.H100, failing=lambda problem, plan: False):
        super().__init__(Recording(gpu))
        self.failing, self.rounds, self.artifacts = failing, [], {}

    def time(self, problem, plan):
        if self.failing(problem, plan):
            return Measurement(problem, plan, "crash", detail="illegal address")
        us = float(synthetic.true_us([plan.config], [problem])[0, 0]) * (1 + 1e-4 * plan.raster)
        return Measurement(problem, plan, "ok", us, us, us, 2e-4)

    def screen(self, jobs):
        return (self.time(job.problem, plan) for job in jobs for plan in job.plans)

    def finals(self, problem, entries):
        self.rounds.append((problem, [plan for _, plan in entries]))
        for artifact, plan in entries:
            assert artifact.spec == KernelSpec(plan.config, "u4b8g128", "f16", "sm_90a")
            assert artifact.symbol in artifact.cubin.read_bytes().decode("latin-1")
        return [self.time(problem, plan) for _, plan in entries]


@pytest.fixture
def device(monkeypatch):
    """A function that puts a measurer in the place of whatever --device names."""

    def use(measurer):
        monkeypatch.setattr(gpus, "measurer", lambda name: nullcontext(measurer))
        return measurer

    return use


def part(folder, wanted, gpu=None):
    """The shipped table with the default formats' rows that ``wanted`` lets through, as if measured on ``gpu``."""
    shutil.copytree(SHIPPED, folder)
    table = DispatchTable.load(folder)
    rows = tuple(row for row in offgrid.rows_of(table) if wanted(row.problem))
    return replace(table, rows=rows, gpu=gpu or table.gpu).write(folder)


def is_unseen(problem):
    return (problem.n, problem.k) == UNSEEN


def run(capsys, *arguments):
    offgrid.main(list(map(str, arguments)))
    return capsys.readouterr().out.splitlines()


def fails(capsys, *arguments):
    with pytest.raises(SystemExit) as stopped:
        offgrid.main(list(map(str, arguments)))
    assert stopped.value.code == 2
    return capsys.readouterr().err


def test_cliffs_time_every_off_grid_m_beside_the_next_larger(device, tmp_path, capsys):
    measurer, path = device(MadeUp()), tmp_path / "cliffs.csv"
    said = run(capsys, "cliffs", "--table", SHIPPED, "--csv", path)
    rows = csv_rows.read(path, offgrid.Cliff, "cliffs")
    assert path.read_text().splitlines()[0] == "n,k,m,us,config,grid_m,grid_us,ratio"
    assert [r.m for r in rows] == list(offgrid.OFF_GRID) * 6
    assert [r.grid_m for r in rows[:13]] == [4, 8, 16, 32, 32, 48, 48, 80, 112, 224, 320, 1024, 4096]
    dispatcher = Dispatcher(synthetic.H100, [DispatchTable.load(SHIPPED)])
    for r, (off, on) in zip(rows, zip(measurer.rounds[::2], measurer.rounds[1::2], strict=True), strict=True):
        problem, grid = Problem(r.n, r.k, r.m), Problem(r.n, r.k, r.grid_m)
        assert off == (problem, [next(dispatcher.choose(problem)).plan]) and off[1][0].key == r.config
        assert on == (grid, [next(dispatcher.choose(grid)).plan])
        assert r.ratio == pytest.approx(r.us / r.grid_us, rel=1e-2)
    worst = max(rows, key=lambda r: r.ratio)
    summary = r"ratio: 78 of 78 cells, geomean (\S+), worst (\S+) at (\d+)x(\d+) m=(\d+), (\d+) above 1\.10"
    mean, largest, *cell, above = map(float, re.fullmatch(summary, said[0]).groups())
    assert (mean, largest) == pytest.approx((geomean(r.ratio for r in rows), worst.ratio), abs=2e-3)
    assert cell in [[r.n, r.k, r.m] for r in rows if r.ratio == worst.ratio]
    assert above == sum(r.ratio > 1.10 for r in rows)
    assert said[1].endswith("with compiling 0 kernels")


def test_a_failing_plan_costs_its_cells_and_is_said(device, tmp_path, capsys):
    device(MadeUp(failing=lambda problem, plan: problem.m == 40))
    offgrid.main(["cliffs", "--table", str(SHIPPED), "--csv", str(tmp_path / "cliffs.csv")])
    said = capsys.readouterr()
    assert "72 of 78 cells" in said.out and said.err.count("crash illegal address") == 6
    device(MadeUp(failing=lambda problem, plan: True))
    assert "none of the 78 cells could be timed" in fails(capsys, "cliffs", "--table", SHIPPED, "--csv", "x.csv")


def test_an_interrupted_run_leaves_what_it_has(device, tmp_path):
    def interrupt(problem, plan):
        if (problem.n, problem.m) == (4096, 100):
            raise KeyboardInterrupt

    device(MadeUp(failing=interrupt))
    with pytest.raises(KeyboardInterrupt):
        offgrid.main(["cliffs", "--table", str(SHIPPED), "--csv", str(tmp_path / "cliffs.csv")])
    rows = csv_rows.read(tmp_path / "cliffs.csv", offgrid.Cliff, "cliffs")
    assert [r.m for r in rows] == [3, 5, 12, 17, 24, 33, 40, 65]


def test_what_the_table_does_not_hold_is_compiled(device, tmp_path, capsys, monkeypatch):
    table = part(tmp_path / "table", lambda p: True)
    lost = table.rows[5].specs(table.gpu)[0]
    replace(table, kernels={k: v for k, v in table.kernels.items() if k != lost.key}).write(tmp_path / "table")
    asked = []

    def compile_all(sources):
        asked.extend(source.spec for source in sources)
        return {spec: CompileFailure(spec, "made up", "") for spec in asked}

    device(MadeUp())
    monkeypatch.setattr(compiling, "compile_all", compile_all)
    said = fails(capsys, "cliffs", "--table", tmp_path / "table", "--csv", tmp_path / "cliffs.csv")
    assert asked == [lost] and f"{lost.key} does not compile: made up" in said


def test_regret_compares_the_look_up_with_the_tune_at_unseen_shapes_only(device, tmp_path, capsys):
    measurer, path = device(MadeUp()), tmp_path / "regret.csv"
    table = part(tmp_path / "table", lambda p: not is_unseen(p))
    said = run(capsys, "regret", "--table", tmp_path / "table", "--tuned", SHIPPED, "--csv", path)
    rows = csv_rows.read(path, offgrid.Regret, "regret")
    assert path.read_text().splitlines()[0] == "n,k,m,us,config,tuned_us,tuned_config,tried,regret"
    tuned = {row.problem: row.plan for row in offgrid.rows_of(DispatchTable.load(SHIPPED)) if is_unseen(row.problem)}
    assert [Problem(r.n, r.k, r.m) for r in rows] == list(tuned)
    dispatcher = Dispatcher(synthetic.H100, [table])
    for r, (problem, plans) in zip(rows, measurer.rounds, strict=True):
        chosen = next(dispatcher.choose(problem)).plan
        assert plans == list(dict.fromkeys([chosen, tuned[problem]]))
        assert (r.config, r.tuned_config) == (chosen.key, tuned[problem].key)
        assert r.regret == pytest.approx(r.us / r.tuned_us, rel=1e-2)
    assert any(r.config != r.tuned_config for r in rows)
    timed = {(m.problem, m.plan.config) for m in find_recording("h100").measurements}
    assert [r.tried for r in rows] == [sum(problem == at for problem, _ in timed) for at in tuned]
    fewest, most = min(r.tried for r in rows), max(r.tried for r in rows)
    assert said[0].startswith("regret: 26 of 26 cells, geomean") and fewest > 10
    assert said[0].endswith(f"above 1.15, beside the best of {fewest} to {most} kernels")


def test_regret_replays_the_shipped_recording(device, tmp_path, capsys):
    """First timings: what the look-up takes from other shapes was not all re-timed."""
    recording = replace(find_recording("h100"), finals=[])
    device(ReplayMeasurer(recording))
    part(tmp_path / "table", lambda p: not is_unseen(p))
    said = run(capsys, "regret", "--table", tmp_path / "table", "--tuned", SHIPPED, "--csv", tmp_path / "regret.csv")
    times = {(m.problem, m.plan.key): m.us for m in recording.measurements if m.ok}
    rows = csv_rows.read(tmp_path / "regret.csv", offgrid.Regret, "regret")
    assert 0 < len(rows) <= 26 and f"{len(rows)} of 26 cells" in said[0]
    for r in rows:
        problem = Problem(r.n, r.k, r.m)
        assert r.us == pytest.approx(times[problem, r.config], rel=1e-3)
        assert r.tuned_us == pytest.approx(times[problem, r.tuned_config], rel=1e-3)


def test_transfer_takes_the_best_of_another_gpus_plans(device, tmp_path, capsys):
    """Tables of the H100 and, in name, of the H200: those of one shape's rows are tried at another shape."""
    measurer, path = device(MadeUp(H200)), tmp_path / "transfer.csv"
    theirs = part(tmp_path / "theirs", lambda p: not is_unseen(p))
    part(tmp_path / "tuned", is_unseen, H200)
    said = run(capsys, "transfer", "--from", tmp_path / "theirs", "--tuned", tmp_path / "tuned", "--csv", path)
    rows = csv_rows.read(path, offgrid.Transfer, "transfer")
    assert path.read_text().splitlines()[0] == "n,k,m,us,config,tuned_us,tuned_config,loss"
    assert len(rows) == 26 and "loss: 26 of 26 cells" in said[0]
    plans = {row.plan for row in theirs.rows}
    for r, (problem, finalists) in zip(rows, measurer.rounds, strict=True):
        assert len(finalists) in (3, 4) and finalists[0].key == r.config
        times = {plan: measurer.time(problem, plan).us for plan in plans if not rejected(plan, problem)}
        assert finalists[:3] == sorted(times, key=times.__getitem__)[:3]
    assert re.fullmatch(r"0\.\d\d minutes, 0\.\d\d with compiling 0 kernels", said[1])


def rejected(plan, problem):
    return offgrid.FAMILIES.of(plan.config).reject_problem(plan.config, problem)


def test_transfer_on_the_recording_finds_the_tables_own_rows(tmp_path, capsys):
    both = ("--from", SHIPPED, "--tuned", SHIPPED, "--device", "replay:h100")
    said = run(capsys, "transfer", *both, "--csv", tmp_path / "transfer.csv")
    rows = csv_rows.read(tmp_path / "transfer.csv", offgrid.Transfer, "transfer")
    assert len(rows) >= 45 and max(r.loss for r in rows) < 1.05, said


def test_tables_of_other_gpus_are_refused(device, tmp_path, capsys):
    device(MadeUp(A100))
    csv = ("--csv", tmp_path / "x.csv")
    for command in (["cliffs", "--table"], ["transfer", "--tuned", SHIPPED, "--from"]):
        assert "cannot serve a100-108sm" in fails(capsys, *command, SHIPPED, *csv)
    device(MadeUp(replace(H100, num_sms=78)))  # whose look-ups take kernels of it, but no row
    assert "cannot serve h100-78sm" in fails(capsys, "cliffs", "--table", SHIPPED, *csv)
    both = ("regret", "--table", SHIPPED, "--tuned", SHIPPED)
    device(MadeUp(H200))  # the look-up takes an H100's plans, but they are no tune of this GPU
    assert "another GPU than this, h200-132sm" in fails(capsys, *both, *csv)
    device(MadeUp())
    assert "covers all that is asked" in fails(capsys, *both, *csv)
    assert f"no usable table.json in one of {tmp_path}" in fails(capsys, "cliffs", "--table", tmp_path, *csv)
    assert not csv[1].exists()


def test_the_unseen_shapes_are_of_models_and_unseen(capsys):
    of = {}
    for name, tps in (("llama-3.1-70b", (8,)), *((n, (1,)) for n in MODELS)):
        of |= {(layer.n, layer.k): name for layer in model_shapes(name, tps)}
    by_itself = (8 * 128, 8192)  # 8 kv heads of 128, not fused
    assert set(offgrid.UNSEEN_SHAPES) <= {*of, by_itself} and len(set(offgrid.UNSEEN_SHAPES)) == 10
    seen = {(layer.n, layer.k) for layer in model_shapes("llama-3.1-8b")} | {(8192, 8192), (28672, 8192)}
    assert not seen & set(offgrid.UNSEEN_SHAPES)
    for n, k in offgrid.UNSEEN_SHAPES:
        assert n % 64 == 0 and k % 128 == 0
    with pytest.raises(SystemExit) as stopped:
        offgrid.main(["regret", "--shapes"])
    assert stopped.value.code == 0
    words = capsys.readouterr().out.split()
    assert words[0] == "--shapes" and len(words) == 2 and words[1].count(",") == 9


MODELS = ("llama-3.2-1b", "qwen2.5-7b", "qwen2.5-14b", "mistral-small-24b", "gemma-3-27b", "phi-3-mini")
