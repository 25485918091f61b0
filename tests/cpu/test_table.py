"""Tables on disk: equal bytes, damage is a miss with one warning, writes lose nothing."""

from __future__ import annotations

import json
import os
import warnings
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path

import pytest
import tables
from tables import H100, H200, edit, load, mma, row, wgmma

from marlin_gen import kernel_pack, whole_files
from marlin_gen.config import Plan
from marlin_gen.families.base import LAUNCH_VERSION
from marlin_gen.families.defaults import default_specs
from marlin_gen.measurement import Baseline, Measurement
from marlin_gen.problem import Problem
from marlin_gen.table import FILE_NAME, DispatchTable, TableWarning, parse
from marlin_gen.table_publish import publish
from marlin_gen.table_row import TableRow

ROWS = [
    row(4096, 4096, 16, wgmma(16, 256), us=6.5, default=mma(64, 16)),
    row(4096, 4096, 1, mma()),
    row(4096, 14336, 1, mma()),
]


@pytest.fixture
def written(tmp_path: Path) -> DispatchTable:
    return tables.table(tmp_path, ROWS)


def load_damaged(folder: Path, match: str) -> DispatchTable | None:
    with pytest.warns(TableWarning, match=match) as caught:
        found = DispatchTable.load(folder)
    assert len(caught) == 1
    return found


def test_round_trip(written):
    found = load(written.folder)
    assert found == written
    assert [r.problem for r in found.rows] == [Problem(4096, 4096, 1), Problem(4096, 4096, 16), Problem(4096, 14336, 1)]
    assert found.text() == written.text()
    for key in found.kernels:
        assert found.cubin(key) == key.encode()


def test_file_is_reviewable(written):
    lines = (written.folder / FILE_NAME).read_text().splitlines()
    rows = [json.loads(line.rstrip(",")) for line in lines if line.startswith('  {"n"')]
    assert len(rows) == len(ROWS), "one row per line"
    assert rows[1]["plan"] == {
        "family": "wgmma", "block_m": 16, "block_n": 64, "block_k": 256, "warps_n": 4, "warps_k": 1, "num_stages": 4,
        "blocks_per_sm": 1, "cluster_size": 1, "partition": "tiles", "dequant": "exact",
        "raster": 1,
    }  # fmt: skip
    assert str(written.folder) not in "\n".join(lines)


def test_loading_a_folder_without_a_table_is_silent(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert DispatchTable.load(tmp_path) is None


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"schema": 1}', "\x00\xff"])
def test_a_file_that_is_no_table_is_a_miss(written, text):
    (written.folder / FILE_NAME).write_text(text)
    assert load_damaged(written.folder, FILE_NAME) is None


HEADS = {
    "schema": (lambda d: d.update(schema=99), "schema=99 is not 4; it was written by another version"),
    "earlier schema": (lambda d: d.update(schema=3), "schema=3 is not 4"),
    "launch": (lambda d: d.update(launch_version=1), f"launch_version=1 is not {LAUNCH_VERSION}"),
    "layout": (lambda d: d.update(layout_version=1), "layout_version=1 is not 3"),
    "gpu field": (lambda d: d["gpu"].pop("num_sms"), "num_sms is missing"),
    "gpu of no SMs": (lambda d: d["gpu"].update(num_sms=0), "num_sms=0 is not positive"),
    "unknown gpu field": (lambda d: d["gpu"].update(colour="red"), "not used"),
    "old gpu": (lambda d: d["gpu"].update(capability=[7, 5]), "7.5 is too old"),
    "rows": (lambda d: d.update(rows={}), "rows={} is not a list"),
    "runs missing": (lambda d: d.pop("runs"), "runs is missing"),
}


@pytest.mark.parametrize("case", HEADS)
def test_a_head_at_fault_is_a_miss(written, case):
    change, message = HEADS[case]
    edit(written.folder, change)
    assert load_damaged(written.folder, message) is None


BAD_ROWS = {
    "missing field": lambda r: r.pop("us"),
    "text for a number": lambda r: r.update(m="16"),
    "boolean for a number": lambda r: r.update(m=True),
    "not finite": lambda r: r.update(us=float("nan")),
    "negative time": lambda r: r.update(us=-1.0),
    "default in no time": lambda r: r.update(default_us=0.0),
    "floor below nothing": lambda r: r.update(read_floor_us=-4.0),
    "wrong numbers": lambda r: r.update(relative_error=0.5),
    "unknown family": lambda r: r["plan"].update(family="simt"),
    "unhashable family": lambda r: r["plan"].update(family=[]),
    "unknown plan field": lambda r: r["plan"].update(warps_m=2),
    "missing plan field": lambda r: r["plan"].pop("block_k"),
    "plan is an index": lambda r: r.update(plan=17),
    "bad raster": lambda r: r["plan"].update(raster=0),
    "unknown format": lambda r: r.update(weight_format="u3"),
    "illegal shape": lambda r: r.update(n=100),
}


@pytest.mark.parametrize("case", BAD_ROWS)
def test_a_bad_row_is_left_out_and_the_rest_stays(written, case):
    edit(written.folder, lambda d: BAD_ROWS[case](d["rows"][1]))
    found = load_damaged(written.folder, "1 entries are not used, the first: row 1")
    assert [r.problem for r in found.rows] == [Problem(4096, 4096, 1), Problem(4096, 14336, 1)]


def test_many_faults_are_one_warning(written):
    def change(data):
        for entry in data["rows"]:
            entry["us"] = None
        data["kernels"]["not a key"] = {}

    edit(written.folder, change)
    found = load_damaged(written.folder, "4 entries")
    assert found.rows == () and set(found.kernels) == set(written.kernels)


@pytest.mark.parametrize("file", ["../../secret.tar.xz", "kernels/u4b8g64-f16-0123456789ab.tar.xz", "kernels/x", 1])
def test_a_file_of_kernels_cannot_point_elsewhere(written, file):
    edit(written.folder, lambda d: d["packs"].update({"u4b8g128-f16": file}))
    assert load_damaged(written.folder, "is not the file of a kind 'u4b8g128-f16'") is None


def test_publish_keeps_other_rows_and_prunes_unnamed_kernels(written, tmp_path):
    newer_plan = mma(block_n=48)
    artifacts = [tables.artifact(tmp_path / "new", newer_plan)]
    rows = [row(4096, 14336, 1, newer_plan, us=7.0), row(8192, 8192, 1, newer_plan)]
    publish(written.folder, DispatchTable.build(H100, rows, artifacts, {"date": "2026-02-02"}), artifacts)
    found = load(written.folder)
    assert {r.problem: r.plan for r in found.rows} == {
        Problem(4096, 4096, 1): mma(), Problem(4096, 4096, 16): wgmma(16, 256),
        Problem(4096, 14336, 1): newer_plan, Problem(8192, 8192, 1): newer_plan,
    }  # fmt: skip
    assert [run["date"] for run in found.runs] == ["2026-01-01", "2026-02-02"]
    assert all(found.cubin(key) for key in found.kernels)
    replaced = [row(4096, 4096, m, newer_plan) for m in (1, 16)]
    publish(written.folder, DispatchTable.build(H100, replaced, artifacts, {"date": "2026-03-03"}), artifacts)
    found = load(written.folder)
    assert set(found.kernels) == {artifacts[0].spec.key}
    assert [*(written.folder / "kernels").iterdir()] == [tables.pack_of(found, artifacts[0].spec.key)]


def test_publish_keeps_kernels_that_only_a_lookup_names(written, tmp_path):
    """A tune ships its defaults for shapes that no row has; a later one, of other numbers, must not drop them."""
    default = Plan(default_specs(H100.arch, [("u4b8g128", "f16")])[0].config)
    ours, later = tables.artifact(tmp_path / "ours", default), tables.artifact(tmp_path / "later", mma())
    publish(written.folder, DispatchTable.build(H100, [], [ours], {}), [ours])
    publish(written.folder, DispatchTable.build(H100, [row(4096, 4096, 1, mma())], [later], {}), [later])
    assert load(written.folder).cubin(ours.spec.key)


def test_publish_replaces_a_recompiled_kernel_for_all_its_rows(written, tmp_path):
    artifacts = [tables.artifact(tmp_path / "new", mma(), content=b"compiled again")]
    publish(written.folder, DispatchTable.build(H100, [row(4096, 4096, 1, mma())], artifacts, {}), artifacts)
    found = load(written.folder)
    assert found.cubin(artifacts[0].spec.key) == b"compiled again"
    assert len(found.rows) == 3


OLD_BUILD = {1: (mma(32), 10.0), 2: (mma(32), 10.0), 3: (mma(32), 10.0)}  # m -> plan and time; m = 3 only here


@pytest.mark.parametrize(
    ("newer", "prefer", "times", "stays"),
    [
        # Two of the old build's rows win: the new build's time at m = 1 is not that of the kernel that stays.
        ({1: (mma(32), 9.0), 2: (mma(32), 11.0), 4: (mma(32), 9.0), 5: (mma(64), 9.0)}, "faster",
         {1: 10.0, 2: 10.0, 3: 10.0, 5: 9.0}, b"old"),
        ({1: (mma(32), 9.0), 2: (mma(32), 9.0), 4: (mma(32), 9.0)}, "faster", {1: 9.0, 2: 9.0, 4: 9.0}, b"new"),
        ({1: (mma(32), 9.0), 2: (mma(32), 9.0), 4: (mma(32), 9.0)}, "older", {1: 10.0, 2: 10.0, 3: 10.0}, b"old"),
        ({m: (mma(64), 9.0) for m in (1, 2, 3)} | {4: (mma(32), 9.0)}, "faster", dict.fromkeys((1, 2, 3, 4), 9.0),
         b"new"),
    ],
)  # fmt: skip
def test_no_time_is_stated_for_a_build_that_did_not_take_it(tmp_path, newer, prefer, times, stays):
    made = []
    for content, cells in ((b"old", OLD_BUILD), (b"new", newer)):
        artifacts = [tables.artifact(tmp_path / content.decode(), plan, content) for plan in (mma(32), mma(64))]
        rows = [row(4096, 4096, m, plan, us, default=mma(32)) for m, (plan, us) in cells.items()]
        built = DispatchTable.build(H100, rows, artifacts, {"date": content.decode()})
        made.append(built.write(tmp_path / f"{content.decode()}-table", artifacts))
    found = publish(made[0].folder, made[1], prefer=prefer)
    assert {r.problem.m: r.us for r in found.rows} == times and found.intact() == found
    for r in found.rows:
        own, default = (found.cubin(spec.key) for spec in r.specs(H100))
        timed = b"old" if r.us == 10.0 else b"new"
        assert (own, default) == (timed, stays) and (r.default_us is not None) == (timed == stays)


@pytest.mark.parametrize("prefer", ["faster", "older", "newer"])
def test_a_merge_repairs_a_kernel_that_was_lost(prefer, tmp_path):
    artifacts = [tables.artifact(tmp_path / "built", mma(32))]
    made = [
        DispatchTable.build(H100, [row(4096, 4096, m, mma(32)) for m in tokens], artifacts, {}).write(folder, artifacts)
        for tokens, folder in (((1, 2, 3), tmp_path / "old"), ((4,), tmp_path / "new"))
    ]
    for file in (made[0].folder / "kernels").iterdir():
        file.unlink()
    found = publish(made[0].folder, made[1], prefer=prefer)
    assert [r.problem.m for r in found.rows] == [1, 2, 3, 4] and found.intact() == found


def test_publish_refuses_the_table_of_another_gpu(written, tmp_path):
    artifacts = [tables.artifact(tmp_path / "new", mma())]
    other = DispatchTable.build(H200, [row(4096, 4096, 1, mma())], artifacts, {})
    with pytest.raises(ValueError, match=r"holds the table of h100-132sm-3352gbs; write that of h200"):
        publish(written.folder, other, artifacts)
    assert load(written.folder) == written


def test_publish_sets_a_table_it_cannot_use_aside(written, tmp_path):
    (written.folder / FILE_NAME).write_text("damaged by hand")
    artifacts = [tables.artifact(tmp_path / "new", mma())]
    with pytest.warns(TableWarning):
        publish(written.folder, DispatchTable.build(H100, [row(4096, 4096, 1, mma())], artifacts, {}), artifacts)
    assert (written.folder / f"{FILE_NAME}.unused").read_text() == "damaged by hand"
    assert len(load(written.folder).rows) == 1


def test_publish_leaves_alone_a_table_that_cannot_be_read_now(written, tmp_path, monkeypatch):
    """Too many open files, a network file system that hiccups: its rows are not lost for that."""
    artifacts = [tables.artifact(tmp_path / "new", mma(48))]
    newer = DispatchTable.build(H100, [row(8192, 8192, 1, mma(48))], artifacts, {})
    before, real = (written.folder / FILE_NAME).read_bytes(), whole_files.read

    def short_of_files(path, limit):
        if path.name == FILE_NAME:
            raise OSError(24, "Too many open files")
        return real(path, limit)

    monkeypatch.setattr(whole_files, "read", short_of_files)
    with pytest.raises(OSError, match="Too many open files"):
        publish(written.folder, newer, artifacts)
    with pytest.warns(TableWarning, match="is not used: .*Too many open files"):
        assert DispatchTable.load(written.folder) is None
    monkeypatch.undo()
    assert (written.folder / FILE_NAME).read_bytes() == before and load(written.folder) == written


def test_rows_of_two_protocols_are_not_taken_for_one(written):
    newer = replace(written, protocol="v9", rows=written.rows[:1])
    merged = written.merged(newer)
    assert merged.protocol == f"{written.protocol}; v9" and len(merged.rows) == len(written.rows)
    assert merged.merged(newer).protocol == merged.protocol
    for other in (written, newer):
        with pytest.raises(ValueError, match="the times of these tables cannot be compared"):
            merged.merged(other, "faster")


def test_a_full_disk_leaves_the_old_table(written, tmp_path, monkeypatch):
    def full(handle):
        raise OSError(28, "No space left on device")

    artifacts = [tables.artifact(tmp_path / "new", mma(48))]
    newer = DispatchTable.build(H100, [row(8192, 8192, 1, mma(48))], artifacts, {})
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        publish(written.folder, newer, artifacts)
    monkeypatch.undo()
    found = load(written.folder)
    assert found == written and all(found.cubin(key) for key in found.kernels)
    assert not [path for path in written.folder.rglob(".*") if path.name != ".lock"], "no temporary file stays"


def test_a_kill_between_rebuilt_kernels_and_the_table_costs_nothing(written, tmp_path, monkeypatch):
    artifacts = [tables.artifact(tmp_path / "new", mma(), content=b"compiled again")]
    newer = DispatchTable.build(H100, [row(4096, 4096, 1, mma())], artifacts, {})
    write = whole_files.write

    def killed(path, content):
        if path.name == FILE_NAME:
            raise KeyboardInterrupt
        write(path, content)

    monkeypatch.setattr(whole_files, "write", killed)
    with pytest.raises(KeyboardInterrupt):
        publish(written.folder, newer, artifacts)
    monkeypatch.undo()
    found, rebuilt = load(written.folder), artifacts[0].spec.key
    assert found == written and found.intact() == found and found.cubin(rebuilt) == rebuilt.encode()
    assert len(kernel_pack.files(written.folder)) == 2, "what the killed one wrote lies there, named by nobody"
    publish(written.folder, newer, artifacts)
    found = load(written.folder)
    assert found.cubin(rebuilt) == b"compiled again" and kernel_pack.files(found.folder) == {
        tables.pack_of(found, rebuilt)
    }


def _publish_one(folder: Path, tmp_path: Path, n: int) -> None:
    plan = mma()
    artifacts = [tables.artifact(tmp_path / str(n), plan, content=b"same bytes")]
    publish(folder, DispatchTable.build(H100, [row(n, 4096, 1, plan)], artifacts, {"n": n}), artifacts)


def test_two_processes_may_publish_at_once(tmp_path):
    sizes = [64 * i for i in range(1, 7)]
    context = get_context("fork")
    writers = [context.Process(target=_publish_one, args=(tmp_path / "out", tmp_path, n)) for n in sizes]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert [r.problem.n for r in load(tmp_path / "out").rows] == sizes


def test_build_needs_an_artifact_for_every_row(tmp_path):
    with pytest.raises(ValueError, match=r"no artifact for 1 kernels that rows name, the first is wgmma"):
        DispatchTable.build(H100, ROWS, [tables.artifact(tmp_path, mma())], {})


def test_write_refuses_a_cubin_that_changed_since(tmp_path):
    made = tables.artifact(tmp_path, mma())
    built = DispatchTable.build(H100, [row(4096, 4096, 1, mma())], [made], {})
    made.cubin.write_bytes(b"changed")
    with pytest.raises(ValueError, match="is not the kernel that the table names"):
        built.write(tmp_path / "out", [made])
    assert not (tmp_path / "out" / FILE_NAME).exists()


def test_row_of_measurements():
    problem = Problem(4096, 4096, 8)
    winner = Measurement(problem, mma(), "ok", 4.9, 4.8, 5.0, 2.1e-4)
    default = Measurement(problem, mma(64), "timeout")
    made = TableRow.of(winner, default, Baseline(problem, 4.1, 8.7))
    assert (made.us, made.default_us, made.cublas_us, made.read_floor_us) == (4.9, None, 8.7, 4.1)
    assert made.default_plan == mma(64)
    assert TableRow.from_json(json.loads(json.dumps(made.to_json()))) == made
    with pytest.raises(ValueError, match="status 'wrong' and cannot be a row"):
        TableRow.of(replace(winner, status="wrong"), None, None)


def test_a_field_of_earlier_rows_is_passed_over():
    made = row(4096, 4096, 1, mma())
    assert TableRow.from_json(made.to_json() | {"transferred_from": "h100-132sm-3352gbs"}) == made


def test_shipped_tables_are_whole():
    """Every table that ships parses without a fault; the kernels that it names are there, and no others."""
    from marlin_gen import env

    for path in sorted(env.tuned_dir().glob(f"*/{FILE_NAME}")):
        found, faults = parse(json.loads(path.read_text()), path.parent)
        assert found is not None and not faults, (path, faults[:3])
        assert found.gpu.slug == path.parent.name
        assert path.read_text() == found.text(), f"{path} was edited by hand; write it with DispatchTable.write"
        broken = [key for key in found.kernels if found.cubin(key) is None]
        assert not broken, (path, broken[:3])
        packs = [kernel_pack.unpacked(file.read_bytes()) for file in path.parent.glob("kernels/*")]
        assert sorted(key for pack in packs for key in pack) == sorted(found.kernels)
        assert {path.parent / file for file in found.packs.values()} == {*path.parent.glob("kernels/*")}
        unbuilt = {r.specs(found.gpu)[0].key for r in found.rows} - found.kernels.keys()
        assert not unbuilt, (path, sorted(unbuilt)[:3])
