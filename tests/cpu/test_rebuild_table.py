"""tools/rebuild_table.py: kernels compiled anew, or only missing defaults; rows and their times stay."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import tables
from load_tool import load_tool
from tables import A100, mma, row

from marlin_gen.families.defaults import default_specs
from marlin_gen.table import DispatchTable

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
    assert {path.name for path in (found.folder / "kernels").iterdir()} == {
        Path(kernel.file).name for kernel in found.kernels.values()
    }
    named = {spec.key for r in made.rows for spec in r.specs(A100)}
    assert set(found.kernels) == named | {spec.key for spec in default_specs(A100.arch, [KIND])}
    return found


def is_elf(cubin: Path) -> bool:
    return cubin.read_bytes()[:4] == b"\x7fELF"


def test_all_kernels_are_compiled_anew(made, monkeypatch, capsys):
    found = rebuilt(made, monkeypatch)
    assert all(is_elf(found.cubin(key)) for key in found.kernels)
    assert f"{len(found.kernels)} of {len(found.kernels)} kernels compiled, 2 rows" in capsys.readouterr().out


def test_only_missing_defaults_are_compiled(made, monkeypatch, capsys):
    before = {key: made.cubin(key).read_bytes() for key in made.kernels}
    found = rebuilt(made, monkeypatch, "--defaults")
    kept = found.kernels.keys() & before.keys()
    assert kept and all(found.cubin(key).read_bytes() == before[key] for key in kept)
    assert all(is_elf(found.cubin(key)) for key in found.kernels.keys() - kept)
    rebuilt(made, monkeypatch, "--defaults")
    assert f"0 of {len(found.kernels)} kernels compiled" in capsys.readouterr().out.splitlines()[-1]
