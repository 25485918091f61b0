"""The doctor finds what is broken, says how to mend it, and fails only for what the purpose needs."""

from __future__ import annotations

import sys

import pytest

import marlin_gen
from marlin_gen import doctor, shipped_ptx
from marlin_gen.arch import Gpu
from marlin_gen.cli.root import main
from marlin_gen.doctor import Finding, broken, examine
from marlin_gen.table import DispatchTable

H100 = Gpu((9, 0), 132, 50 << 20, 228 << 10, 3352, "NVIDIA H100 80GB HBM3")


def by_name(findings):
    return {finding.name: finding for finding in findings}


def test_only_what_the_purpose_needs_is_broken():
    findings = [Finding("a", False, "", "", ("tune",)), Finding("b", False, ""), Finding("c", True, "", "", ("tune",))]
    assert [finding.name for finding in broken("tune", findings)] == ["a"]
    assert broken("serve", findings) == []


def test_an_unknown_purpose_lists_the_known():
    with pytest.raises(ValueError, match="serve, tune, replay"):
        examine("fly")


def test_everything_not_ok_says_how_to_mend_it():
    _, findings = examine()
    assert [finding.name for finding in findings if not finding.ok and not finding.fix] == []


def test_without_a_gpu_the_purpose_is_replay(monkeypatch):
    monkeypatch.setattr(doctor, "_gpu", lambda: (None, []))
    assert examine()[0] == "replay"
    monkeypatch.setattr(doctor, "_gpu", lambda: (H100, []))
    assert examine()[0] == "tune"


def test_a_missing_compiler_breaks_tuning_and_not_serving(monkeypatch):
    monkeypatch.setenv("MARLIN_GEN_NVCC", "/nowhere/nvcc")
    _, findings = examine("tune")
    compiler = by_name(findings)["compiler in use"]
    assert not compiler.ok and "/nowhere/nvcc" in compiler.found and "pip install" in compiler.fix
    assert compiler in broken("replay", findings) and compiler not in broken("serve", findings)


def test_a_table_is_reported_with_its_damaged_kernels(tmp_path, monkeypatch):
    DispatchTable(H100, (), {}).write(tmp_path / H100.slug)
    monkeypatch.setenv("MARLIN_GEN_TABLE", str(tmp_path))
    found = [f.found for f in examine()[1] if f.name == "table"]
    assert any(said.startswith(f"{H100.slug}: 0 rows, 0 kernels") for said in found)
    assert by_name(examine()[1])["table hash"].found.startswith(marlin_gen.table_hash("cpu")[:12])
    (tmp_path / H100.slug / "table.json").write_text("{")
    assert any("table.json" in f.found and not f.ok for f in examine()[1] if f.name == "table")


def test_a_cache_that_cannot_be_written_is_found(tmp_path, monkeypatch):
    monkeypatch.setenv("MARLIN_GEN_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(doctor.os, "access", lambda path, mode: False)
    cache = by_name(examine()[1])["cache folder"]
    assert not cache.ok and "MARLIN_GEN_CACHE_DIR" in cache.fix
    monkeypatch.setenv("MARLIN_GEN_CACHE_DIR", "/" + "x" * 300)  # cannot even be looked at, as in another user's home
    assert not by_name(examine()[1])["cache folder"].ok


def test_the_launcher_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("MARLIN_GEN_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(doctor.env, "native_dir", lambda: tmp_path)
    monkeypatch.setattr(doctor.env, "which", lambda name: tmp_path / name if name == "g++" else None)
    assert by_name(examine()[1])["launcher"].found == f"native, to be built by {tmp_path / 'g++'} on the first call"
    monkeypatch.setattr(doctor.env, "which", lambda name: None)
    launcher = by_name(examine("serve")[1])["launcher"]
    assert not launcher.ok and "C++ compiler" in launcher.fix and launcher not in broken("serve", examine("serve")[1])
    (tmp_path / "libmarlin_gen.so").touch()
    assert by_name(examine()[1])["launcher"].found == f"native, {tmp_path / 'libmarlin_gen.so'}"
    monkeypatch.setenv("MARLIN_GEN_LAUNCHER", "python")
    assert by_name(examine()[1])["launcher"].found.startswith("Python, as MARLIN_GEN_LAUNCHER")


def test_set_variables_are_listed(monkeypatch):
    monkeypatch.setenv("MARLIN_GEN_LINEINFO", "1")
    assert by_name(examine()[1])["MARLIN_GEN_LINEINFO"].found == "1"


@pytest.mark.parametrize("name", ["COMPILER", "CONFIG", "DEPENDENT", "LAUNCHER", "LINEINFO", "LOG"])
def test_a_misspelt_variable_is_a_finding_like_all_others(name, monkeypatch, capsys):
    monkeypatch.setenv(f"MARLIN_GEN_{name}", "gcc")
    _, findings = examine("serve")
    found = by_name(findings)[f"MARLIN_GEN_{name}"]
    assert not found.ok and "'gcc'" in found.found and found.fix == f"correct or unset MARLIN_GEN_{name}"
    assert (found in broken("serve", findings)) is (name != "LOG")
    assert {"launcher", "compiler in use", "PTX", "cache folder"} <= by_name(findings).keys()
    if name == "COMPILER":
        assert by_name(findings)["compiler in use"].fix == "correct MARLIN_GEN_COMPILER"
    main(["doctor", "--for", "serve"])
    assert found.fix in capsys.readouterr().out


def test_every_variable_that_is_not_free_text_has_its_reader(monkeypatch):
    choices = [name for name, variable in doctor.env.VARIABLES.items() if variable.kind not in ("file", "folder")]
    for name in choices:
        monkeypatch.setenv(name, "gcc")
    assert [f.name for f in doctor._variables() if not f.ok] == choices


def test_shipped_ptx_is_counted_and_damage_named(tmp_path, monkeypatch):
    assert by_name(examine()[1])["PTX"].ok and " kernels" in by_name(examine()[1])["PTX"].found
    (tmp_path / "u4b8g128.json.xz").write_bytes(b"damaged")
    monkeypatch.setattr(shipped_ptx, "shipped_ptx", lambda: shipped_ptx.ShippedPtx(tmp_path))
    found = by_name(examine("serve")[1])["PTX"]
    assert not found.ok and "u4b8g128.json.xz is not used" in found.found
    assert found not in broken("serve", examine("serve")[1])


def test_a_python_without_lzma_cannot_serve(monkeypatch):
    monkeypatch.setitem(sys.modules, "lzma", None)
    found = by_name(examine("serve")[1])["lzma"]
    assert not found.ok and "built without lzma" in found.found and broken("serve", [found])
