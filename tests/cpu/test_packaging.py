"""What a wheel holds, what an install without extras says, and that README, CI and committed results agree."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import fake_gpu
import pytest
from fake_gpu import needs_compiler

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", str(folder), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (path,) = folder.glob("*.whl")
    return zipfile.ZipFile(path)


def committed(folder: str) -> set[str]:
    listed = subprocess.run(["git", "ls-files", folder], cwd=ROOT, capture_output=True, text=True, check=True)
    return set(listed.stdout.split())


def test_the_wheel_ships_templates_and_tuned_tables(wheel):
    names = set(wheel.namelist())
    for folder in ("templates", "tuned"):
        expected = {f"marlin_gen/_{name}" for name in committed(folder)}
        assert expected and expected <= names


def test_the_wheel_ships_the_package_and_no_tests(wheel):
    names = set(wheel.namelist())
    assert {n for n in committed("marlin_gen")} <= names
    assert not [name for name in names if name.startswith(("tests/", "tools/"))]


def test_only_torch_is_needed_to_serve(wheel):
    (metadata,) = (name for name in wheel.namelist() if name.endswith("METADATA"))
    required = re.findall(r"^Requires-Dist: (.*)$", wheel.read(metadata).decode(), re.MULTILINE)
    assert [line for line in required if "extra ==" not in line] == ["torch>=2.9"]


def test_an_unpacked_wheel_finds_its_own_templates(wheel, tmp_path):
    wheel.extractall(tmp_path)
    code = "from marlin_gen import env; print(env.templates_dir()); print(env.tuned_dir())"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.split() == [str(tmp_path / "marlin_gen" / name) for name in ("_templates", "_tuned")]


@needs_compiler
def test_the_wheel_brings_the_launcher_built_and_its_sources(wheel):
    names = set(wheel.namelist())
    assert {f"marlin_gen/_native/{Path(name).name}" for name in committed("native")} <= names
    assert "marlin_gen/_native/libmarlin_gen.so" in names
    assert re.fullmatch(r".*-py3-none-linux_\w+\.whl", wheel.filename), "of every Python, of this platform"


@needs_compiler
def test_an_unpacked_wheel_launches_natively_without_a_compiler(wheel, tmp_path):
    """On a driver that only records: the library is the wheel's, and nothing is built."""
    wheel.extractall(tmp_path)
    fake_gpu.build(tmp_path)
    code = "import torch; from marlin_gen import native; print(native.library().path)"
    cache = tmp_path / "cache"
    environment = {"PATH": str(tmp_path), "LD_LIBRARY_PATH": str(tmp_path), "MARLIN_GEN_CACHE_DIR": str(cache)}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == str(tmp_path / "marlin_gen" / "_native" / "libmarlin_gen.so")
    assert not cache.exists()


def test_without_the_tune_extra_the_command_says_how_to_get_it():
    code = "import sys; sys.modules['typer'] = None\nfrom marlin_gen.cli import app; app()"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr == "marlin-gen needs typer, which is not installed: pip install 'marlin_gen[tune]'\n"


def test_ci_runs_the_test_command_of_the_readme(tmp_path):
    """The script, run with a python3 that only echoes, asks for exactly the README's line."""
    readme = (ROOT / "README.md").read_text()
    (command,) = re.findall(r"<!-- command:test -->\n```sh\n(.*)\n```", readme)
    assert command.startswith("python3 -m venv .venv && ")
    (tmp_path / "python3").write_text("#!/bin/sh\nexit 7\n")
    (tmp_path / "python3").chmod(0o755)
    path = f"{tmp_path}:/usr/bin:/bin"
    done = subprocess.run(["bash", ".ci/run"], cwd=ROOT, env={"PATH": path}, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (7, command + "\n")


def test_the_main_command_installs_what_tune_needs():
    (command,) = re.findall(r"<!-- command:main -->\n```sh\n(.*)\n```", (ROOT / "README.md").read_text())
    assert "'.[tune,nvcc]'" in command and command.endswith("marlin-gen tune --model tiny")


def load_tool(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "tools" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_results_section_is_that_of_the_committed_benches():
    tool = load_tool("results_table")
    readme = (ROOT / "README.md").read_text()
    assert tool.inserted(readme, tool.results(ROOT / "tuned")) == readme, "run python tools/results_table.py"


def test_results_replace_what_stands_between_the_markers():
    tool = load_tool("results_table")
    page = f"a\n{tool.BEGIN}\nold\n{tool.END}\nb\n"
    assert tool.inserted(page, "new") == f"a\n{tool.BEGIN}\nnew\n{tool.END}\nb\n"
    with pytest.raises(ValueError, match="once each"):
        tool.inserted("no markers", "new")


def test_results_of_a_bench_name_gpu_date_and_figures(tmp_path):
    from marlin_gen.arch import Gpu
    from marlin_gen.bench import BenchRow, write_csv
    from marlin_gen.table import DispatchTable

    tool = load_tool("results_table")
    gpu = Gpu((9, 0), 132, 50 << 20, 228 << 10, 3352, "NVIDIA H100 80GB HBM3")
    folder = tmp_path / gpu.slug
    DispatchTable(gpu, (), {}, ({"date": "2025-01-02", "torch": "2.13.0"},)).write(folder)
    plan = "mma-m8n32k64-w1x16-s4-b1-c1-tiles-deferred-r1"
    write_csv(folder / "bench.csv", [
        BenchRow(4096, 4096, m, "u4b8g128", "f16", 5.0, 4.9, 5.1, plan, 4.0, 15.0, 2.2e-4, 4.5) for m in (1, 2)
    ])  # fmt: skip
    text = tool.results(tmp_path)
    assert text.startswith("**NVIDIA H100 80GB HBM3** (2025-01-02, torch 2.13.0). n x k = 4096x4096; m = 1 to 2.")
    assert "| decode, m 1-16 | 2 | 3.00x | 3.00x | 0.80 | 0.80 |" in text


@pytest.mark.parametrize("command", [["ruff", "check", "."], ["mypy"]])
def test_lint_and_types(command):
    done = subprocess.run([sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]


def test_files_stay_within_their_line_budgets():
    done = subprocess.run([sys.executable, "tools/size.py"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
