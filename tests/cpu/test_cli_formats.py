"""``--format`` and ``--dtype``: one tune for several number formats, end to end on a recording that has two."""

from __future__ import annotations

import json
import random
from contextlib import nullcontext

import pytest

from marlin_gen.arch import Gpu
from marlin_gen.bench import read_csv
from marlin_gen.cli import arguments, gpus
from marlin_gen.cli.arguments import Kind
from marlin_gen.cli.root import main
from marlin_gen.config import Plan
from marlin_gen.cost_model import predict_us
from marlin_gen.families import FAMILIES
from marlin_gen.formats import DTYPES, FORMATS, weight_format
from marlin_gen.measurement import Baseline, Measurement
from marlin_gen.problem import Problem
from marlin_gen.record import MeasurementLog, pack
from marlin_gen.replay import FILE_NAME, ReplayMeasurer, find_recording, recording_name
from marlin_gen.space import ConfigSpace
from marlin_gen.table import DispatchTable

H100 = Gpu((9, 0), 132, 50 << 20, 228 << 10, 3352, "NVIDIA H100 80GB HBM3")
KINDS = [Kind("u4b8g128", "f16"), Kind("u4zg64", "f16")]


def record(folder, kinds, templates="of a day"):
    """One recording of a few configs of each kind; times are the cost model's."""
    log = MeasurementLog(folder / "log", H100, {"torch": "2.13.0", "templates": templates})
    for kind in kinds:
        problems = [Problem(4096, 4096, m, *kind) for m in (1, 16)]
        space = ConfigSpace(H100.arch, weight_format(kind.weight_format), FAMILIES).enumerate()
        defaults = [family.default(p, H100).config for family in FAMILIES.rows.values() for p in problems]
        configs = list(dict.fromkeys(defaults + random.Random(1).sample(space, 2)))
        us = predict_us(configs, problems, H100)
        for j, problem in enumerate(problems):
            log.baseline(Baseline(problem, 4.1, 15.0))
            for i, config in enumerate(configs):
                if not FAMILIES.of(config).reject_problem(config, problem):
                    t = float(us[i, j])
                    log.measurement(Measurement(problem, Plan(config), "ok", t, 0.99 * t, 1.01 * t, 2e-4))
    log.close()
    pack(folder / "log", folder / FILE_NAME)
    return folder / FILE_NAME


@pytest.fixture(scope="module")
def recording(tmp_path_factory):
    return record(tmp_path_factory.mktemp("recording"), KINDS)


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    monkeypatch.delenv("MARLIN_GEN_TABLE", raising=False)
    return tmp_path


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MARLIN_GEN_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
        yield


def test_every_row_of_the_registries_can_be_asked_for():
    work = arguments.work(None, "4096x4096", "1", "1", ",".join(FORMATS), ",".join(DTYPES))
    assert {Kind.of(problem) for problem in work.problems} == {Kind(f, d) for f in FORMATS for d in DTYPES}
    assert len(work.problems) == len(FORMATS) * len(DTYPES)


def test_the_default_is_one_kind_and_goes_unsaid():
    work = arguments.work("tiny", None, "1", "1")
    assert work.kinds == [Kind("u4b8g128", "f16")] and "u4b8g128" not in str(work)


def test_a_shape_is_judged_by_the_formats_asked_for():
    assert arguments.work(None, "4096x4160", "1", "1", "u4zg64").problems == [Problem(4096, 4160, 1, "u4zg64")]
    with pytest.raises(ValueError, match="group_size=128 does not divide k=4160"):
        arguments.work(None, "4096x4160", "1", "1", "u4zg64,u4b8g128")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--format", "u3g7"], "--format 'u3g7': unknown weight format 'u3g7'; known: e4m3g128"),
        (["--format", ","], "--format ',' names nothing; known: u4b8g128"),
        (["--dtype", "f8"], "--dtype 'f8': unsupported activation dtype 'f8'; known: "),
    ],
)
@pytest.mark.parametrize("command", [["tune", "--model", "tiny"], ["bench", "--model", "tiny"], ["show"]])
def test_unknown_names_are_quoted_with_those_there_are(command, words, said, capsys):
    where = ["--gpu", "h100"] if command == ["show"] else []
    assert main([*command, *words, *where]) == 2
    assert said in capsys.readouterr().err


def test_one_tune_of_two_formats_fills_one_table(recording, home, capsys, monkeypatch):
    out = home / "out"
    words = ["tune", "--shapes", "4096x4096", "--tokens", "1,16", "--format", "u4b8g128,u4zg64", "--record"]
    assert main([*words, "--device", f"replay:{recording}", "--out", str(out), "--json"]) == 0
    shown = capsys.readouterr()
    assert "u4b8g128 f16 (1 of 2)" in shown.err and "u4zg64 f16 (2 of 2)" in shown.err
    told = json.loads(shown.out)
    assert [row["weight_format"] for row in told["rows"]] == ["u4b8g128"] * 2 + ["u4zg64"] * 2
    folder = out / H100.slug
    table = DispatchTable.load(folder)
    assert {Kind.of(row.problem) for row in table.rows} == set(KINDS) and len(table.rows) == 4
    assert all(table.cubin(row.specs(H100)[0].key) for row in table.rows)

    # Each kind's trials have a file of their own; by the GPU's name they are read as one.
    assert {path.name for path in folder.glob("recording*")} == {FILE_NAME, "recording-u4zg64-f16.jsonl.gz"}
    assert recording_name("u4zg64", "f16") == "recording-u4zg64-f16.jsonl.gz"
    monkeypatch.setattr("marlin_gen.env.tuned_dir", lambda: out)
    merged = find_recording("h100")
    assert {Kind.of(m.problem) for m in merged.measurements} == set(KINDS)
    assert len(merged.baselines) == 4 and len(merged.configs()) >= len(merged.configs(KINDS[1])) > 0

    monkeypatch.setenv("MARLIN_GEN_TABLE", str(out))
    assert main(["show", "--gpu", "h100", "--format", "u4zg64", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [row["weight_format"] for row in found["rows"]] == ["u4zg64"] * 2
    assert main(["show", "--gpu", "h100"]) == 0
    assert "HBM3, u4zg64 f16" in capsys.readouterr().out
    assert main(["show", "--gpu", "h100", "--format", "u4b8g32"]) == 2
    assert "no row for u4b8g32; it has u4b8g128 f16, u4zg64 f16" in capsys.readouterr().err


def test_a_replayed_table_says_of_each_kind_what_that_was_recorded_with(home, monkeypatch):
    folder = home / "tuned" / H100.slug
    folder.mkdir(parents=True)
    for kind in KINDS:
        record(home / kind.weight_format, [kind], f"of {kind}").rename(folder / recording_name(*kind))
    monkeypatch.setattr("marlin_gen.env.tuned_dir", lambda: home / "tuned")
    words = ["tune", "--shapes", "4096x4096", "--tokens", "1,16", "--format", "u4b8g128,u4zg64", "--trials", "1"]
    assert main([*words, "--device", "replay:h100", "--out", str(home / "out")]) == 0
    assert [run["templates"] for run in DispatchTable.load(home / "out" / H100.slug).runs] == [
        f"of {kind}" for kind in KINDS
    ]


def test_a_recording_without_the_format_says_what_it_has(recording, capsys):
    words = ["tune", "--shapes", "4096x4096", "--tokens", "1", "--format", "u4b8g32"]
    assert main([*words, "--device", f"replay:{recording}"]) == 2
    assert "nothing of u4b8g32 f16; it has u4b8g128 f16, u4zg64 f16" in capsys.readouterr().err


def test_a_bench_of_two_formats_is_a_file_for_each(recording, home, capsys, monkeypatch):
    """Reports read bench.csv, which holds the default formats alone."""
    words = ["--shapes", "4096x4096", "--tokens", "1,16", "--format", "u4b8g128,u4zg64"]
    assert main(["tune", *words, "--device", f"replay:{recording}", "--out", str(home / "out")]) == 0
    monkeypatch.setenv("MARLIN_GEN_TABLE", str(home / "out"))
    monkeypatch.setattr(gpus, "require_gpu", lambda device, why: H100)
    monkeypatch.setattr(gpus, "measurer", lambda device: nullcontext(ReplayMeasurer(find_recording(str(recording)))))
    assert main(["bench", *words]) == 0
    shown = capsys.readouterr()
    folder = home / "out" / H100.slug
    for kind, name in zip(KINDS, ("bench.csv", "bench-u4zg64-f16.csv"), strict=True):
        assert {Kind.of(r.problem) for r in read_csv(folder / name)} == {kind} and name in shown.err
    assert "HBM3, u4zg64 f16" in shown.out
    assert main(["bench", *words, "--csv", str(home / "all.csv")]) == 0
    assert [r.weight_format for r in read_csv(home / "all.csv")] == ["u4b8g128", "u4zg64"] * 2
