"""``export``, ``import``, ``merge``, ``diff`` and ``verify`` as a user meets them, on the shipped table and others."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import tables
from tables import A100, H100, mma, row

from marlin_gen import env, whole_files
from marlin_gen.cli import gpus
from marlin_gen.cli.root import main
from marlin_gen.dispatch import Dispatcher
from marlin_gen.installed import find_tables, tables_below
from marlin_gen.measurement import Baseline, Measurement
from marlin_gen.problem import Problem
from marlin_gen.record import MeasurementLog, pack
from marlin_gen.replay import FILE_NAME as RECORDING
from marlin_gen.replay import shipped_recordings
from marlin_gen.table import FILE_NAME, DispatchTable

PROBLEM = Problem(4096, 4096, 1)


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    """User folders of this test alone, and no shipped tables unless it asks for them."""
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    monkeypatch.delenv("MARLIN_GEN_TABLE", raising=False)
    return tmp_path


def said(capsys, *words: str, code: int = 0) -> dict:
    assert main([*words, "--json"]) == code
    return json.loads(capsys.readouterr().out)


@pytest.fixture
def shipped() -> DispatchTable:
    return DispatchTable.load(next(iter(shipped_recordings().values())).parent)


# export


def test_export_of_the_shipped_table_serves_it_all_from_fewer_kernels(shipped, home, capsys):
    told = said(capsys, "export", "--gpu", shipped.gpu.slug, "--out", str(home / "out"))
    made = DispatchTable.load(home / "out" / shipped.gpu.slug)
    assert {r.problem for r in made.rows} == {r.problem for r in shipped.rows}
    assert told["kernels"] == len(made.kernels) == told["least"] < len(shipped.kernels)
    assert told["worst_regret"] <= told["regret"] == 0.03
    assert told["bytes"] == sum(len(made.cubin(key)) for key in made.kernels) < 29_500_000
    assert told["packed_bytes"] == sum(path.stat().st_size for path in (made.folder / "kernels").iterdir()) < 2_600_000
    assert made.intact() == made
    # What a server asks for is served by the exported kernels, the rows' own plan first.
    dispatcher = Dispatcher(made.gpu, [made])
    for r in made.rows:
        first = next(dispatcher.choose(r.problem))
        assert (first.plan, first.origin) == (r.plan, "exact") and first.kernel
    # With the defaults kept, shapes far from every row are served without a compiler too.
    far = [choice for choice in dispatcher.choose(Problem(64, 128, 1)) if choice.origin == "default"]
    assert any(choice.kernel for choice in far)
    curve = told["curve"]
    assert [point["regret"] for point in curve] == sorted({0.0, 0.005, 0.01, 0.02, 0.03, 0.05, 0.1, 0.2})
    assert [p["kernels"] for p in curve] == sorted((p["kernels"] for p in curve), reverse=True)
    assert curve[0]["worst_regret"] == 0.0 and all(p["worst_regret"] <= p["regret"] for p in curve)
    assert made.runs[-1]["export"]["regret"] == 0.03

    assert main(["export", "--gpu", shipped.gpu.slug, "--out", str(home / "out")]) == 2
    assert "holds a table already" in capsys.readouterr().err
    less = said(capsys, "export", "--gpu", shipped.gpu.slug, "--out", str(home / "b"), "--no-defaults")
    assert less["kernels"] < told["kernels"] and less["defaults_kept"] == 0


def test_show_reads_a_folder_or_an_archive(shipped, home, capsys, monkeypatch):
    """Of a folder with one table, of whatever GPU, that one; of several, the one that --gpu names."""
    monkeypatch.setattr(gpus, "this_gpu", lambda device="cuda:0": tables.A100)
    archive = home / "t.zip"
    said(capsys, "export", "--gpu", shipped.gpu.slug, "--out", str(archive), "--format", "u4b8g128")
    for source in (archive, shipped.folder):
        found = said(capsys, "show", str(source), "--format", "u4b8g128", "--dtype", "f16")
        assert found["gpu"] == shipped.gpu.to_json() and found["folder"] == str(source)
        assert [row["m"] for row in found["rows"]] and found["summary"][-1]["cells"] == len(found["rows"])
    made = tables.table(home / "own", [row(64, 128, 1, mma())])
    replace(made, runs=(*made.runs, {"date": "2026-02-02", "export": {"regret": 0.03}})).write(made.folder)
    assert main(["show", str(home / "own")]) == 0 and "; tuned 2026-01-01; " in capsys.readouterr().err
    both = str(shipped.folder.parent)
    assert said(capsys, "show", both, "--gpu", shipped.gpu.slug)["gpu"] == shipped.gpu.to_json()
    assert main(["show", str(home / "nothing")]) == 2 and "no such file" in capsys.readouterr().err
    for command in (["show"], ["show", both], ["export", "--out", str(home / "e.zip")]):
        assert main(command) == 2 and "no table for this GPU" in capsys.readouterr().err


def test_export_of_some_formats_has_their_rows_and_kernels_only(shipped, home, capsys):
    only = "--format", "u4b8g128", "--dtype", "f16"
    told = said(capsys, "export", "--gpu", shipped.gpu.slug, "--out", str(home / "o"), *only)
    made = DispatchTable.load(home / "o" / shipped.gpu.slug)
    asked = [row for row in shipped.rows if (row.problem.weight_format, row.problem.act_dtype) == ("u4b8g128", "f16")]
    assert [row.problem for row in made.rows] == [row.problem for row in asked] and 0 < len(asked) < len(shipped.rows)
    assert all(key.endswith("-u4b8g128-f16-sm_90a") for key in made.kernels) and told["kernels"] == len(made.kernels)
    assert told["worst_regret"] <= 0.03 and told["defaults_kept"] > 0


def test_export_prints_the_curve(shipped, home, capsys):
    assert main(["export", "--gpu", shipped.gpu.slug, "--out", str(home / "t.zip"), "--regret", "7.5%"]) == 0
    shown = capsys.readouterr()
    assert "7.5%*" in shown.out and "20.0%" in shown.out and "at least" in shown.out
    assert f"written to {home / 't.zip'}" in shown.err


def test_compiling_recorded_kernels_needs_the_templates_they_were_timed_with(home, capsys, monkeypatch):
    made = tables.table(home / "t", [row(4096, 4096, 1, mma())])
    log = MeasurementLog(home / "log", H100, {"templates": "another", "compiler": "nvcc 1"})
    log.measurement(Measurement(PROBLEM, mma(64), "ok", 10.1, 10.0, 10.2, 2e-4))
    log.close()
    pack(home / "log", made.folder / RECORDING)
    monkeypatch.setenv("MARLIN_GEN_TABLE", str(home / "t"))
    assert main(["export", "--gpu", made.gpu.slug, "--out", str(home / "o"), "--compile"]) == 2
    assert "recorded with templates another" in capsys.readouterr().err


def test_a_recorded_kernel_is_compiled_for_the_export(home, capsys, monkeypatch, tmp_cache):
    """The real compiler: one kernel near two winners, which the table does not have, replaces both."""
    from marlin_gen.cli.study import templates_digest
    from marlin_gen.families import FAMILIES
    from marlin_gen.toolchain import find_toolchain

    compiler = find_toolchain()
    near = FAMILIES.rows["mma"].default(PROBLEM, H100)
    rows = [row(4096, 4096, 1, mma(32), us=10.0), row(4096, 4096, 16, mma(64), us=20.0)]
    made = tables.table(home / "t", rows)
    versions = {"templates": templates_digest(), "compiler": f"{compiler.name} {compiler.version}"}
    log = MeasurementLog(home / "log", H100, versions)
    for r in rows:
        for plan, us in ((r.plan, r.us), (near, r.us * 1.01)):
            log.measurement(Measurement(r.problem, plan, "ok", us, us * 0.99, us * 1.01, 2e-4))
    log.close()
    pack(home / "log", made.folder / RECORDING)
    other = MeasurementLog(home / "other", H100, {"templates": "another"})  # of a format that the table has no row of
    other.measurement(Measurement(replace(PROBLEM, weight_format="u4zg64"), near, "ok", 9.0, 8.9, 9.1, 2e-4))
    other.close()
    pack(home / "other", made.folder / "recording-u4zg64-f16.jsonl.gz")
    monkeypatch.setenv("MARLIN_GEN_TABLE", str(home / "t"))
    told = said(capsys, "export", "--gpu", made.gpu.slug, "--out", str(home / "o"), "--compile")
    found = DispatchTable.load(home / "o" / H100.slug)
    assert told["kernels"] == 1 and {r.plan for r in found.rows} == {near}
    (key,) = found.kernels
    assert found.cubin(key)[:4] == b"\x7fELF"


# import, merge, diff


def test_an_exported_archive_is_imported_and_used_before_the_shipped_table(shipped, home, capsys):
    archive = home / "tables.zip"
    told = said(capsys, "export", "--gpu", shipped.gpu.slug, "--out", str(archive))
    taken = said(capsys, "import", str(archive))
    (one,) = taken["tables"]
    assert one["rows_added"] == len(shipped.rows) and one["kernels"] == told["kernels"] and not one["rows_damaged"]
    first, *others = find_tables()
    assert first.folder == Path(one["table"]) == env.user_data_dir() / "tuned" / shipped.gpu.slug
    assert shipped.folder in [found.folder for found in others]
    again = said(capsys, "import", str(archive))
    assert again["tables"][0]["rows_replaced"] == len(shipped.rows)
    assert DispatchTable.load(first.folder) == first


def test_whose_row_stays_is_asked(home, capsys):
    mine, theirs = mma(32), mma(64)
    tables.table(home / "mine", [row(4096, 4096, 1, mine, us=10.0), row(64, 4096, 1, mine, us=5.0)])
    tables.table(home / "theirs", [row(4096, 4096, 1, theirs, us=9.0), row(64, 4096, 1, theirs, us=6.0)])
    chosen = {}
    for prefer in ("newer", "older", "faster"):
        target = home / prefer
        shutil.copytree(home / "mine", target)
        (one,) = said(capsys, "import", str(home / "theirs"), "--to", str(target), "--prefer", prefer)["tables"]
        found = DispatchTable.load(target / H100.slug)
        assert found.intact() == found
        chosen[prefer] = [r.plan for r in found.rows]
        assert one["rows_replaced"] + one["rows_kept"] == 2
    assert chosen == {"newer": [theirs, theirs], "older": [mine, mine], "faster": [mine, theirs]}
    assert main(["import", str(home / "theirs"), "--prefer", "best"]) == 2
    assert "--prefer 'best' is not one of newer, older, faster" in capsys.readouterr().err


def test_a_damaged_kernel_is_not_imported_over_a_good_one(home, capsys):
    mine, theirs = mma(32), mma(64)
    tables.table(home / "mine", [row(4096, 4096, 1, mine)])
    other = tables.table(home / "theirs", [row(4096, 4096, 1, theirs), row(64, 4096, 1, mma(16))])
    tables.damage(other, row(1 << 12, 1 << 12, 1, theirs).specs(H100)[0].key, b"half")
    (one,) = said(capsys, "import", str(home / "theirs"), "--to", str(home / "mine"), code=1)["tables"]
    assert (one["rows_damaged"], one["rows_added"]) == (1, 1)
    found = DispatchTable.load(home / "mine" / H100.slug)
    assert [r.plan for r in found.rows] == [mma(16), mine] and found.intact() == found


def test_tables_of_several_machines_merge_to_the_fastest(home, capsys):
    for i, us in enumerate((12.0, 9.0, 10.0)):
        own = row(64 * (i + 1), 128, 1, mma())
        tables.table(home / f"node{i}", [row(4096, 4096, 1, mma(16 * (i + 1)), us=us), own])
    tables.table(home / "node3", [row(4096, 4096, 1, mma())], gpu=A100)
    nodes = [str(home / f"node{i}") for i in range(4)]
    said(capsys, "merge", *nodes, "--out", str(home / "all"))
    found = DispatchTable.load(home / "all" / H100.slug)
    assert [(r.problem.n, r.us) for r in found.rows] == [(64, 10.0), (128, 10.0), (192, 10.0), (4096, 9.0)]
    assert found.intact() == found and (home / "all" / A100.slug / FILE_NAME).is_file()


def test_diff_names_what_differs_and_exits_with_one(home, capsys):
    tables.table(home / "a", [row(4096, 4096, 1, mma(32), us=10.0), row(64, 128, 1, mma(32)), row(128, 128, 1, mma())])
    tables.table(home / "b", [row(4096, 4096, 1, mma(64), us=8.0), row(64, 128, 1, mma(32)), row(256, 128, 1, mma())])
    a, b = str(home / "a"), str(home / "b")
    found = said(capsys, "diff", a, b, code=1)[H100.slug]
    (change,) = found["changed"]
    assert (change["n"], change["ratio"], change["clear"]) == (4096, 0.8, True)
    assert [r["n"] for r in found["added"]] == [256] and [r["n"] for r in found["removed"]] == [128]
    assert len(found["kernels_added"]) == 1 and not found["kernels_removed"] and not found["same"]
    assert main(["diff", a, b]) == 1
    assert "1 rows added, 1 removed, 1 changed" in capsys.readouterr().err
    assert main(["diff", a, a]) == 0
    tables.table(home / "c", [row(64, 128, 1, mma())], gpu=A100)
    assert main(["diff", a, str(home / "c")]) == 2
    assert "only one side has a table of" in capsys.readouterr().err


def test_tables_of_one_kind_of_gpu_under_two_names(home, capsys):
    """Each pair of them is compared; merged and imported they are one table, under the name that was there."""
    other = replace(H100, bandwidth_gbs=3400)
    tables.table(home / "a", [row(64, 128, 1, mma(32), us=9.0)])
    tables.table(home / "b", [row(64, 128, 1, mma(64), us=8.0)])
    tables.table(home / "b", [row(64, 128, 1, mma(32), us=9.0)], gpu=other)
    found = said(capsys, "diff", str(home / "a"), str(home / "b"), code=1)
    assert {name: one["same"] for name, one in found.items()} == {H100.slug: False, f"{H100.slug} {other.slug}": True}
    said(capsys, "merge", str(home / "b"), "--out", str(home / "a"))
    (made,) = tables_below(home / "a")
    assert (made.gpu.slug, made.folder.name, made.rows[0].us) == (H100.slug, H100.slug, 8.0)
    assert made.intact() == made
    shutil.copytree(made.folder, home / "b" / "again")
    assert main(["diff", str(home / "a"), str(home / "b")]) == 2
    assert f"there are several tables of {H100.slug};" in capsys.readouterr().err


# verify


def test_verify_of_the_shipped_table_on_its_own_recording_finds_no_drift(shipped, capsys):
    found = said(capsys, "verify", "--device", f"replay:{shipped.gpu.slug}", "--rows", "20")
    assert len(found["rows"]) == 20 and found["mean_ratio"] == pytest.approx(1, abs=1e-3)
    again = said(capsys, "verify", "--device", f"replay:{shipped.gpu.slug}", "--rows", "20")
    assert again == found
    other = said(capsys, "verify", "--device", f"replay:{shipped.gpu.slug}", "--rows", "20", "--seed", "1")
    assert other["rows"] != found["rows"]


def test_verify_reports_drift_and_damage(home, capsys):
    rows = [row(4096, 4096, m, mma(16 * m), us=10.0) for m in (1, 2, 3, 4, 5)]
    made = tables.table(home / "t", rows)
    log = MeasurementLog(home / "log", H100)
    for r, us, status in zip(rows, (10.0, 12.0, 8.0, None, 10.0), ("ok", "ok", "ok", "wrong", "ok"), strict=True):
        times = (us, us - 0.1, us + 0.1, 2e-4) if us else (None, None, None, None)
        log.final(Measurement(r.problem, r.plan, status, *times, detail="" if us else "[/x] of another's words"))
    log.close()
    pack(home / "log", home / "r.gz")
    tables.damage(made, rows[4].specs(H100)[0].key, None)
    found = said(capsys, "verify", str(home / "t"), "--device", f"replay:{home / 'r.gz'}", code=1)
    faults = [entry["fault"].split(":")[0].split(" [")[0] for entry in found["rows"]]
    assert faults == ["", "slower", "faster", "wrong", "not timed"]
    assert main(["verify", str(home / "t"), "--device", f"replay:{home / 'r.gz'}", "--tolerance", "30"]) == 1
    shown = capsys.readouterr()
    assert "5 rows timed again: 0.99x the table's time in the mean, cuBLAS -, 2 at fault" in shown.err
    assert shown.out.count("u4b8g128") == 5, "a table has rows of several formats"
    assert "[/x]" in shown.out, "not taken for the end of a style"


def test_verify_takes_a_slower_card_for_what_it_is(home, capsys):
    """A row 8 % slower beside a cuBLAS that is 6 % slower has not drifted; beside one as fast as ever it has."""
    rows = [row(4096, 4096, m, mma(16 * m), us=10.0) for m in (1, 2, 3, 4)]
    tables.table(home / "t", rows)
    log = MeasurementLog(home / "log", H100)
    for r, us, cublas_us in zip(rows, (10.8, 10.8, 10.0, 10.8), (21.2, 20.0, 24.0, 24.0), strict=True):
        log.final(Measurement(r.problem, r.plan, "ok", us, us - 0.1, us + 0.1, 2e-4))
        log.baseline(Baseline(r.problem, 4.0, cublas_us))
    log.close()
    pack(home / "log", home / "r.gz")
    verify = ("verify", str(home / "t"), "--device", f"replay:{home / 'r.gz'}")
    found = said(capsys, *verify, code=1)
    assert [entry["fault"] for entry in found["rows"]] == ["", "slower", "", ""]
    assert [entry["cublas_ratio"] for entry in found["rows"]] == [1.06, 1.0, 1.2, 1.2]
    assert found["cublas_mean_ratio"] == pytest.approx((1.06 * 1.2 * 1.2) ** 0.25)
    assert main([*verify, "--tolerance", "10"]) == 0
    assert "1.06x the table's time in the mean, cuBLAS 1.11x, 0 at fault" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["export", "--gpu", "h100", "--out", "x", "--regret", "much"], "--regret 'much' is not a percentage"),
        (["export", "--gpu", "h100", "--out", "x", "--format", "u4fg32"], "has no row for u4fg32; it has e4m3g128 "),
        (["import", "nowhere.zip"], "no such file: nowhere.zip"),
        (["verify", "--device", "replay:h100", "--rows", "0"], "--rows 0"),
        (["diff", "nowhere", "nowhere"], "no such file: nowhere"),
        (["import", str(env.tuned_dir()), "--to", str(env.tuned_dir())], "is the folder to write to"),
    ],
)
def test_errors_are_one_line_and_name_the_value(words, message, capsys):
    assert main(words) == 2
    assert message in capsys.readouterr().err.rstrip("\n").splitlines()[-1]


def test_a_folder_with_brackets_in_its_name_is_shown_as_it_is(shipped, home, capsys, monkeypatch):
    """Rich takes [v2] for a style, and [/v2] for the end of one that never began."""
    monkeypatch.chdir(home)  # a short path: long ones are folded
    for name in ("[v2]", "x[/v2]"):
        assert main(["merge", str(shipped.folder), "--out", name]) == 0
        assert name in capsys.readouterr().out
    made = tables.table(home / "t", [row(64, 128, 1, mma())], gpu=replace(H100, name="NVIDIA H100 [/v2]"))
    assert main(["show", str(made.folder)]) == 0 and "NVIDIA H100 [/v2]" in capsys.readouterr().out


def test_a_full_disk_is_said_with_the_file_that_did_not_fit(shipped, home, capsys, monkeypatch):
    def full(handle):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(whole_files.os, "fsync", full)
    assert main(["merge", str(shipped.folder), "--out", str(home / "out")]) == 2
    said = capsys.readouterr().err
    assert re.search(rf"error: {home}/out/\S+\.tar\.xz cannot be used \(No space left on device\)", said)
    assert not [path for path in (home / "out").rglob("*.xz*")]


def test_a_file_that_is_no_archive_is_refused(home, capsys):
    (home / "x.zip").write_bytes(b"PK\x03\x04 or so")
    (home / FILE_NAME).write_text("{}")
    for name, fix in (("x.zip", "copy it again"), (FILE_NAME, f"name its folder, {home}")):
        assert main(["import", str(home / name)]) == 2
        shown = capsys.readouterr().err
        assert "is not an intact archive" in shown and shown.endswith(f"; {fix}\n")
