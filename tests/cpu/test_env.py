"""Environment variables and resource folders."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from marlin_gen import doctor, env, native_build

SOURCE = Path(env.__file__)


def test_every_variable_is_documented() -> None:
    read = set(re.findall(r'_(?:text|folder|choice|flag)\("(MARLIN_GEN_\w+)"', SOURCE.read_text()))
    assert read == set(env.VARIABLES)


def test_cache_and_data_folders(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("MARLIN_GEN_CACHE_DIR", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("XDG_DATA_HOME", "relative/is/ignored")
    assert env.cache_dir() == tmp_path / ".cache" / "marlin_gen"
    assert env.user_data_dir() == tmp_path / ".local/share/marlin_gen"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert env.cache_dir() == tmp_path / "xdg" / "marlin_gen"
    monkeypatch.setenv("MARLIN_GEN_CACHE_DIR", "~/here")
    assert env.cache_dir() == tmp_path / "here"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MARLIN_GEN_CACHE_DIR", "cache")  # a table opened before a chdir, a compiler elsewhere
    assert env.cache_dir() == tmp_path / "cache" and env.cache_dir().is_absolute()


def test_a_user_without_a_home_is_told_what_to_set(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HOME", "XDG_DATA_HOME", "XDG_CACHE_HOME", "MARLIN_GEN_CACHE_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("pwd.getpwuid", {}.__getitem__)
    for folder, variable in ((env.cache_dir, "XDG_CACHE_HOME"), (env.user_data_dir, "XDG_DATA_HOME")):
        with pytest.raises(FileNotFoundError, match=f"no home folder; set HOME, or {variable} to an absolute path"):
            folder()
    assert all(path.is_file() for path in native_build.candidates())  # serving looks for it at every first call
    finding = next(one for one in doctor.examine()[1] if one.name == "cache folder")
    assert not finding.ok and "no home folder" in finding.found and "MARLIN_GEN_CACHE_DIR" in finding.fix


def test_choices_are_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MARLIN_GEN_LINEINFO", "yes")
    monkeypatch.setenv("MARLIN_GEN_LOG", "DEBUG")
    assert env.lineinfo() is True and env.log_level() == "debug"
    monkeypatch.setenv("MARLIN_GEN_LINEINFO", "maybe")
    with pytest.raises(ValueError, match="MARLIN_GEN_LINEINFO='maybe' is not one of"):
        env.lineinfo()
    monkeypatch.setenv("MARLIN_GEN_LINEINFO", "")
    assert env.lineinfo() is False


def test_the_compiler_does_not_see_hidden_flags(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NVCC_APPEND_FLAGS", "-G")
    child = env.child_environment(TMPDIR="there")
    assert "NVCC_APPEND_FLAGS" not in child and child["TMPDIR"] == "there" and "PATH" in child


@pytest.mark.parametrize("layout", ["checkout", "wheel"])
def test_resources_are_found_in_both_layouts(layout: str, tmp_path: Path) -> None:
    (tmp_path / "marlin_gen").mkdir()
    (tmp_path / "marlin_gen" / "__init__.py").touch()
    shutil.copy(SOURCE, tmp_path / "marlin_gen" / "env.py")
    expected = tmp_path / ("templates" if layout == "checkout" else "marlin_gen/_templates")
    code = "from marlin_gen import env; print(env.templates_dir())"
    command = [sys.executable, "-c", code]
    missing = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert "templates folder is neither in" in missing.stderr
    expected.mkdir()
    found = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert found.stdout.strip() == str(expected.resolve())
