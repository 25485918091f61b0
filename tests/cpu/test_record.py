"""The log keeps everything, survives a kill and a full disk, and belongs to one GPU, protocol and writer."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
import synthetic

from marlin_gen.config import KernelSpec, Plan
from marlin_gen.measurement import Artifact, Baseline, Measurement
from marlin_gen.problem import Problem
from marlin_gen.record import MeasurementLog, Proposal, load_recording, pack

PROBLEM = Problem(4096, 4096, 16)
CONFIG = Plan.from_key("wgmma-m16n64k256-w4x1-s6-b2-c1-tiles-exact-r1").config
OK = Measurement(PROBLEM, Plan(CONFIG), "ok", 6.5, 6.4, 6.6, 2.1e-4)
WRONG = Measurement(PROBLEM, Plan(CONFIG, 8), "wrong", relative_error=0.3, detail="relative error 0.3")


def filled(path: Path) -> Path:
    log = MeasurementLog(path, synthetic.H100, {"templates": "abc"})
    log.baseline(Baseline(PROBLEM, 4.15, 15.7))
    log.batch([Proposal(CONFIG, "sampler", PROBLEM)])
    log.artifact(Artifact(KernelSpec(CONFIG, "u4b8g128", "f16", "sm_90a"), "wgmma", Path("cache"), 168, 0, 0))
    log.measurement(OK)
    log.measurement(WRONG)
    log.final(OK)
    log.candidate(CONFIG, "wrong")
    log.close()
    return path


def test_reads_back_what_was_written(tmp_path: Path) -> None:
    found = load_recording(filled(tmp_path / "log"))
    assert found.gpu == synthetic.H100 and found.gpu.name == synthetic.H100.name
    assert found.measurements == [OK, WRONG] and found.finals == [OK]
    assert found.baselines == {PROBLEM: Baseline(PROBLEM, 4.15, 15.7)}
    assert found.batches == [[Proposal(CONFIG, "sampler", PROBLEM)]]
    assert found.done == {CONFIG: "wrong"}
    assert found.artifacts[f"{CONFIG.key}-u4b8g128-f16-sm_90a"]["registers"] == 168
    assert found.configs() == [CONFIG] and found.problems() == [PROBLEM]


def test_open_log_knows_what_is_in_it(tmp_path: Path) -> None:
    filled(tmp_path / "log")
    log = MeasurementLog(tmp_path / "log", synthetic.H100)
    other = dataclasses.replace(OK, us=7.0)
    log.measurement(other)
    assert log.recording.measurements == [OK, WRONG, other]
    log.close()
    assert load_recording(tmp_path / "log").measurements == [OK, WRONG, other]


@pytest.mark.parametrize("cut", [1, 2, 20, 60])
def test_torn_tail_is_dropped_and_written_over(tmp_path: Path, cut: int) -> None:
    path = filled(tmp_path / "log")
    path.write_bytes(path.read_bytes()[:-cut])
    assert load_recording(path).measurements == [OK, WRONG]
    log = MeasurementLog(path, synthetic.H100)
    assert CONFIG not in log.recording.done
    log.candidate(CONFIG, "wrong")
    log.close()
    assert load_recording(path).done == {CONFIG: "wrong"}


def test_damage_in_the_middle_names_the_line(tmp_path: Path) -> None:
    path = filled(tmp_path / "log")
    lines = path.read_bytes().splitlines()
    lines[3] = lines[3][:10]
    path.write_bytes(b"\n".join(lines) + b"\n")
    with pytest.raises(ValueError, match=r"log, line 4 is damaged .* remove that line"):
        load_recording(path)


def test_unknown_kinds_are_skipped(tmp_path: Path) -> None:
    path = filled(tmp_path / "log")
    with open(path, "a") as file:
        file.write(json.dumps({"kind": "from the future", "x": 1}) + "\n")
    assert load_recording(path).measurements == [OK, WRONG]


def test_refuses_another_gpu_version_or_file(tmp_path: Path) -> None:
    path = filled(tmp_path / "log")
    with pytest.raises(ValueError, match=r"was measured on h100.*this is h200"):
        MeasurementLog(path, dataclasses.replace(synthetic.H100, bandwidth_gbs=4800, name="NVIDIA H200"))
    with pytest.raises(ValueError, match=r"templates 'abc', this is 'def'.*remove the log"):
        MeasurementLog(path, synthetic.H100, {"templates": "def"})
    MeasurementLog(path, synthetic.H100, {"templates": "abc"}).close()
    (tmp_path / "other").write_text('{"hello": 1}\n')
    with pytest.raises(ValueError, match="not a measurement log"):
        load_recording(tmp_path / "other")


@pytest.mark.parametrize(("ours", "theirs"), [("u4b8g128", "u3b8g128"), ("-m", "-x")])
def test_what_another_version_wrote_is_told_with_the_file(tmp_path: Path, ours: str, theirs: str) -> None:
    path = filled(tmp_path / "log")
    path.write_text(path.read_text().replace(ours, theirs))
    with pytest.raises(ValueError, match=rf"{path} is damaged, or of another version \(.*{theirs}.*; remove it"):
        load_recording(path)


def test_one_writer_at_a_time(tmp_path: Path) -> None:
    log = MeasurementLog(tmp_path / "log", synthetic.H100)
    with pytest.raises(ValueError, match="written by another tune"):
        MeasurementLog(tmp_path / "log", synthetic.H100)
    log.close()
    MeasurementLog(tmp_path / "log", synthetic.H100).close()


def test_packs_to_equal_bytes(tmp_path: Path) -> None:
    path = filled(tmp_path / "log")
    pack(path, tmp_path / "a" / "recording.jsonl.gz")
    pack(path, tmp_path / "b" / "recording.jsonl.gz")
    first = (tmp_path / "a" / "recording.jsonl.gz").read_bytes()
    assert first == (tmp_path / "b" / "recording.jsonl.gz").read_bytes()
    assert load_recording(tmp_path / "a" / "recording.jsonl.gz") == load_recording(path)
    (tmp_path / "torn.gz").write_bytes(first[: len(first) // 2])
    with pytest.raises(ValueError, match=r"cannot read the recording .*torn\.gz"):
        load_recording(tmp_path / "torn.gz")


FILL = """
import resource, sys
from pathlib import Path
sys.path.insert(0, {tests!r})
import synthetic, test_record
from marlin_gen.record import MeasurementLog
log = MeasurementLog(Path({path!r}), synthetic.H100)
resource.setrlimit(resource.RLIMIT_FSIZE, (4000, resource.RLIM_INFINITY))
kept = 0
try:
    while True:
        log.measurement(test_record.OK)
        kept += 1
except OSError as error:
    print(kept, error.filename, error.strerror)
log.close()
"""


def test_full_disk_is_an_error_that_names_the_file_and_keeps_the_rest(tmp_path: Path) -> None:
    path = tmp_path / "log"
    script = FILL.format(tests=str(Path(__file__).parent), path=str(path))
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", script], cwd=root, capture_output=True, text=True, check=True)
    kept, name, said = done.stdout.split(maxsplit=2)
    assert name == str(path) and "free some space and run the same command again" in said
    log = MeasurementLog(path, synthetic.H100)
    assert len(log.recording.measurements) == int(kept) > 5
    log.measurement(OK)
    log.close()
    assert len(load_recording(path).measurements) == int(kept) + 1
