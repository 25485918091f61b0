"""tools/rebuild_table.py: kernels compiled anew, or only missing defaults; rows and their times stay."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import tables
from load_tool import load_tool
from tables import A100, mma, row

from marlin_gen.families.base import LAUNCH_VERSION
from marlin_gen.families.defaults import default_specs
from marlin_gen.measurement import Artifact
from marlin_gen.table import FILE_NAME, DispatchTable
from marlin_gen.table_file import seal

KIND = ("u4b8g128", "f16")
ROWS = [row(4096, 4096, 1, mma(32), default=mma(48)), row(4096, 4096, 16, mma(32, 16))]


rebuild_table = load_tool("rebuild_table")


@pytest.fixture
def made(tmp_path) -> DispatchTable:
    """Two rows with made-up cubins, and a kernel that neither a row nor a look-up names."""
    plans = {plan.config: plan for r in ROWS for plan in (r.plan, r.default_plan) if plan}
    artifacts = [tables.artifact(tmp_path / "cache", plan, arch="sm_80") for plan in [*plans.values(), mma(96)]]
    return DispatchTable.build(A100, ROWS, artifacts, {"date": "2026-01-01"}).write(tmp_path / A100.slug, artifacts)


def rebuilt(made: DispatchTable, monkeypatch, *words: str) -> DispatchTable:
    monkeypatch.setattr(sys, "argv", ["rebuild_table.py", str(made.folder), *words])
    rebuild_table.main()
    found = DispatchTable.load(made.folder)
    assert found.intact() == found and found.rows == made.rows and found.runs == made.runs
    assert {*(found.folder / "kernels").iterdir()} == {found.folder / file for file in found.packs.values()}
    named = {spec.key for r in made.rows for spec in r.specs(A100)}
    assert set(found.kernels) == named | {spec.key for spec in default_specs(A100.arch, [KIND])}
    return found


def is_elf(cubin: bytes) -> bool:
    return cubin[:4] == b"\x7fELF"


def test_all_kernels_are_compiled_anew(made, monkeypatch, capsys):
    found = rebuilt(made, monkeypatch)
    assert all(is_elf(found.cubin(key)) for key in found.kernels)
    assert f"{len(found.kernels)} of {len(found.kernels)} kernels compiled, 2 rows" in capsys.readouterr().out


def test_only_missing_defaults_are_compiled(made, monkeypatch, capsys):
    before = {key: made.cubin(key) for key in made.kernels}
    found = rebuilt(made, monkeypatch, "--defaults")
    kept = found.kernels.keys() & before.keys()
    assert kept and all(found.cubin(key) == before[key] for key in kept)
    assert all(is_elf(found.cubin(key)) for key in found.kernels.keys() - kept)
    rebuilt(made, monkeypatch, "--defaults")
    assert f"0 of {len(found.kernels)} kernels compiled" in capsys.readouterr().out.splitlines()[-1]


def stopped(made: DispatchTable, monkeypatch, *words: str) -> str:
    """Why the tool left the table as it is."""
    before = (made.folder / FILE_NAME).read_bytes()
    monkeypatch.setattr(sys, "argv", ["rebuild_table.py", str(made.folder), *words])
    with pytest.raises(SystemExit) as why:
        rebuild_table.main()
    assert (made.folder / FILE_NAME).read_bytes() == before
    return str(why.value)


def test_kernels_of_an_earlier_version_are_not_taken_for_todays(made, monkeypatch):
    path, now = made.folder / FILE_NAME, f'"launch_version": {LAUNCH_VERSION}'
    path.write_text(seal(path.read_text().split("\n", 2)[2].replace(now, '"launch_version": 1')))
    assert "launch_version=1 is not" in stopped(made, monkeypatch, "--defaults")
    rebuilt(made, monkeypatch)  # all of them are compiled anew


def test_an_edited_table_is_not_sealed_anew(made, monkeypatch):
    path = made.folder / FILE_NAME
    path.write_text(path.read_text().replace('"us": 10.0', '"us": 1.0'))
    for words in ((), ("--defaults",)):
        assert "its sha256 is not that of its content" in stopped(made, monkeypatch, *words)


def test_what_another_process_wrote_meanwhile_stays(made, monkeypatch):
    def meanwhile(specs):
        replace(made, runs=({"date": "2026-02-02"},)).write(made.folder)
        return []

    monkeypatch.setattr(rebuild_table, "compiled", meanwhile)
    monkeypatch.setattr(sys, "argv", ["rebuild_table.py", str(made.folder), "--defaults"])
    with pytest.raises(SystemExit, match="written by another process meanwhile; run this again"):
        rebuild_table.main()
    assert DispatchTable.load(made.folder).runs == ({"date": "2026-02-02"},)


def test_a_kernel_that_spills_is_not_shipped(made, monkeypatch):
    def spilling(sources):
        return {s.spec: Artifact(s.spec, s.symbol, Path(), 64, spill_bytes=8, static_smem_bytes=0) for s in sources}

    monkeypatch.setattr(rebuild_table, "compile_all", spilling)
    assert "spills 8 bytes of registers to local memory" in stopped(made, monkeypatch)
