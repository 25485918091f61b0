"""What a measuring process that dies, hangs or is not listened to costs: its candidate, and nothing else.

The child is a real process that speaks the protocol; only the GPU is missing from it.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from marlin_gen import measure
from marlin_gen.config import KernelConfig, KernelSpec, Plan
from marlin_gen.driver import LaunchError
from marlin_gen.measure import GpuMeasurer
from marlin_gen.measurement import Artifact, Job
from marlin_gen.problem import Problem

# A config's stages say what its kernel does: 3 dies, 4 hangs, else it takes as many us as there are stages.
CHILD = """
import json, sys, time
gpu = {"capability": [9, 0], "num_sms": 132, "l2_bytes": 1, "smem_per_sm": 1, "bandwidth_gbs": 3352, "name": "H100"}
print(json.dumps({"gpu": gpu}), flush=True)
for line in sys.stdin:
    request = json.loads(line)
    plans = request.get("plans") or [entry["plan"] for entry in request["entries"]]
    if request.get("yardsticks"):
        print(json.dumps({"read_floor_us": 4.0, "cublas_us": 20.0, "request": request["request"]}), flush=True)
    for plan in plans:
        stages = int(plan.split("-s")[1].split("-")[0])
        if stages == 3:
            print("an illegal memory access was encountered", file=sys.stderr, flush=True)
            sys.exit(17)
        if stages == 4:
            time.sleep(60)
        row = {**request["problem"], "plan": plan, "status": "ok", "us": float(stages), "request": request["request"]}
        print(json.dumps(row), flush=True)
    print(json.dumps({"done": True, "request": request["request"]}), flush=True)
"""
PROBLEM = Problem(192, 512, 8)


@pytest.fixture
def measurer(monkeypatch):
    monkeypatch.setattr(measure, "WORKER", (sys.executable, "-c", CHILD))
    monkeypatch.setattr(measure, "ANSWER_SECONDS", 3.0)
    opened = GpuMeasurer(0)
    yield opened
    opened.close()


def artifact(stages: int) -> Artifact:
    config = KernelConfig.from_key(f"wgmma-m64n64k64-w4x1-s{stages}-b1-c1-tiles-exact")
    return Artifact(KernelSpec(config, "u4b8g128", "f16", "sm_90a"), "symbol", Path("folder"), 128, 0, 0)


def job(stages: int, rasters: tuple[int, ...] = (1,)) -> Job:
    made = artifact(stages)
    return Job(made, tuple(Plan(made.spec.config, raster) for raster in rasters), PROBLEM)


def test_the_gpu_is_what_the_child_found(measurer):
    assert measurer.gpu.slug == "h100-132sm-3352gbs"


@pytest.mark.parametrize(
    ("stages", "status", "said"), [(3, "crash", "illegal memory access"), (4, "timeout", "no answer")]
)
def test_a_bad_kernel_costs_itself(measurer, stages, status, said):
    rows = list(measurer.screen([job(2, (1, 8)), job(stages, (1, 8)), job(5)]))
    assert [row.status for row in rows] == ["ok", "ok", status, status, "ok"]
    assert [row.plan.raster for row in rows] == [1, 8, 1, 8, 1]
    assert said in rows[2].detail and rows[2].us is None
    assert [row.us for row in rows if row.ok] == [2.0, 2.0, 5.0]


def test_a_bad_finalist_does_not_take_the_others_along(measurer):
    entries = [(artifact(stages), Plan(artifact(stages).spec.config)) for stages in (5, 3, 6)]
    rows = measurer.finals(PROBLEM, entries)
    assert [(row.status, row.us) for row in rows] == [("ok", 5.0), ("crash", None), ("ok", 6.0)]


def test_answers_that_nobody_waited_for_are_not_taken_for_others(measurer):
    first = next(iter(measurer.screen([job(2, (1, 2, 4, 8))])))
    assert first.us == 2.0
    assert [row.us for row in measurer.screen([job(5), job(6)])] == [5.0, 6.0]


def test_compare_gives_the_yardsticks_of_the_same_rounds(measurer):
    baseline, (row,) = measurer.compare(PROBLEM, [(artifact(5), Plan(artifact(5).spec.config))])
    assert (baseline.read_floor_us, baseline.cublas_us, row.us) == (4.0, 20.0, 5.0)


def test_a_gpu_that_does_not_start_is_an_error_that_says_why(monkeypatch):
    monkeypatch.setattr(measure, "WORKER", (sys.executable, "-c", "raise SystemExit('CUDA driver not found')"))
    with pytest.raises(LaunchError, match=r"CUDA device 0.*CUDA driver not found"):
        GpuMeasurer(0)


def test_a_gpu_that_is_lost_is_no_candidates_fault(measurer, monkeypatch):
    """Else every candidate after it would be written down as crashed, for good."""
    found = []
    with pytest.raises(LaunchError, match=r"CUDA device 0.*no CUDA-capable device"):
        for row in measurer.screen([job(2), job(3), job(5), job(6)]):
            found.append((row.plan.config.num_stages, row.status))
            if row.status == "crash":
                gone = "raise SystemExit('no CUDA-capable device is detected')"
                monkeypatch.setattr(measure, "WORKER", (sys.executable, "-c", gone))
    assert found == [(2, "ok"), (3, "crash")]


def test_a_child_that_does_not_start_in_time_is_killed(monkeypatch, tmp_path):
    started = tmp_path / "pid"
    code = f"import os, time; open({str(started)!r}, 'w').write(str(os.getpid())); time.sleep(60)"
    monkeypatch.setattr(measure, "WORKER", (sys.executable, "-c", code))
    monkeypatch.setattr(measure, "START_SECONDS", 2.0)
    with pytest.raises(LaunchError, match="no answer in 2 s"):
        GpuMeasurer(0)
    with pytest.raises(ProcessLookupError):
        os.kill(int(started.read_text()), 0)
