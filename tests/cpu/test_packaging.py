"""What a wheel holds, what an install without extras says, and that README, CI and committed results agree."""

from __future__ import annotations

import ast
import importlib.metadata
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import fake_gpu
import pytest
from fake_gpu import needs_compiler
from load_tool import load_tool

import marlin_gen

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


def test_the_wheel_ships_templates_tuned_tables_and_ptx(wheel):
    names = set(wheel.namelist())
    for folder in ("templates", "tuned", "ptx"):
        expected = {f"marlin_gen/_{name}" for name in committed(folder)}
        assert expected and expected <= names


def test_the_wheel_ships_the_package_and_no_tests(wheel):
    names = set(wheel.namelist())
    assert {n for n in committed("marlin_gen")} <= names
    assert not [name for name in names if name.startswith(("tests/", "tools/"))]


def test_only_torch_is_needed_to_serve(wheel):
    (metadata,) = (name for name in wheel.namelist() if name.endswith("METADATA"))
    required = re.findall(r"^Requires-Dist: (.*)$", wheel.read(metadata).decode(), re.MULTILINE)
    assert [line for line in required if "extra ==" not in line] == ["torch>=2.10"]


def test_an_unpacked_wheel_finds_its_own_templates(wheel, tmp_path):
    wheel.extractall(tmp_path)
    code = "from marlin_gen import env; print(env.templates_dir(), env.tuned_dir(), env.ptx_dir())"
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}  # the wheel's own
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == [str(tmp_path / "marlin_gen" / name) for name in ("_templates", "_tuned", "_ptx")]


def test_an_unpacked_wheel_reads_its_ptx(wheel, tmp_path):
    wheel.extractall(tmp_path)
    code = "from marlin_gen.shipped_ptx import shipped_ptx as s; print(len(s().names()), len(s().kernels('u4b8g128')))"
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.stdout.split() == [str(len(committed("ptx"))), "12"], done.stderr


@needs_compiler
def test_the_wheel_brings_the_launcher_built_and_its_sources(wheel):
    names = set(wheel.namelist())
    assert {f"marlin_gen/csrc/{Path(name).name}" for name in committed("marlin_gen/csrc")} <= names
    assert "marlin_gen/csrc/libmarlin_gen.so" in names
    assert re.fullmatch(r".*-py3-none-linux_\w+\.whl", wheel.filename), "of every Python, of this platform"


def test_a_wheel_for_another_kind_of_machine_has_the_sources_alone(tmp_path):
    path = load_tool("collect_wheels").build_wheel(tmp_path, "some other machine")
    assert path.name.endswith("-py3-none-any.whl")
    names = zipfile.ZipFile(path).namelist()
    assert "marlin_gen/csrc/gemm.cpp" in names and not [name for name in names if name.endswith(".so")]


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
    assert done.stdout.strip() == str(tmp_path / "marlin_gen" / "csrc" / "libmarlin_gen.so")
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
    tuned = "(newest tune of the table: 2025-01-02, torch 2.13.0)"
    assert text.startswith(f"**NVIDIA H100 80GB HBM3** {tuned}. n x k = 4096x4096; m = 1 to 2.")
    assert "| decode, m 1-16 | 2 | 3.00x | 3.00x | 0.80 | 0.80 |" in text


@pytest.mark.parametrize("command", [["ruff", "check", "."], ["mypy"]])
def test_lint_and_types(command):
    done = subprocess.run([sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]


def test_files_stay_within_their_line_budgets():
    done = subprocess.run([sys.executable, "tools/size.py"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# What an install costs and needs.


def distributions(name: str, found: dict) -> dict:
    """An installed distribution and everything that it requires here, by name."""
    from packaging.requirements import Requirement

    key = re.sub(r"[-_.]+", "-", name).lower()
    if key not in found:
        found[key] = importlib.metadata.distribution(name)
        for line in found[key].requires or ():
            requirement = Requirement(line)
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                distributions(requirement.name, found)
    return found


@pytest.fixture(scope="module")
def fresh(wheel, tmp_path_factory):
    """A new environment with the wheel, and of all else only torch and what torch requires. Its Python."""
    folder = tmp_path_factory.mktemp("fresh")
    venv.create(folder, with_pip=False, symlinks=True)
    python = folder / "bin" / "python"
    command = [sys.executable, "-m", "pip", "--python", str(python), "install", "-q", "--no-deps", "--no-index"]
    subprocess.run([*command, str(wheel.filename)], check=True)
    (site,) = folder.glob("lib/python*/site-packages")
    for distribution in distributions("torch", {}).values():
        for top in {path.parts[0] for path in distribution.files or () if path.parts[0] not in ("..", "__pycache__")}:
            target = Path(distribution.locate_file(top)).resolve()
            if target.exists() and not (site / top).exists():
                (site / top).symlink_to(target)
    return python


SERVE = """
import sys, torch, marlin_gen
before = set(sys.modules)
import marlin_gen.nn, marlin_gen.serve, marlin_gen.driver
from marlin_gen import dispatch, env, installed
from marlin_gen.problem import Problem

tables = installed.find_tables()
assert tables and all(table.cubin(key) for table in tables for key in table.kernels)
for table in tables:
    for row in table.rows:
        assert next(dispatch.Dispatcher(table.gpu, tables).choose(row.problem)).kernel
assert len(marlin_gen.check_ranks()) == 64
linear = torch.nn.Linear(256, 64, bias=False)
codes, scales = marlin_gen.quantize(linear.weight.detach())
c = marlin_gen.gemm(torch.ones(2, 256).half(), marlin_gen.pack(codes, scales))
assert c.shape == (2, 64) and (c.float() - linear(torch.ones(2, 256))).abs().max() < 1
assert "/marlin_gen/_tuned" in str(env.tuned_dir())
tops = {name.partition(".")[0] for name in set(sys.modules) - before}
print(sorted(tops - set(sys.stdlib_module_names) - {"marlin_gen", "torch"}))
"""


def test_a_fresh_install_serves_with_torch_alone(fresh, tmp_path):
    """No compiler on PATH, no other package: tables resolve, and the op computes."""
    for absent in ("optuna", "typer", "rich", "ninja", "pynvml", "gguf", "matplotlib"):
        done = subprocess.run([fresh, "-c", f"import {absent}"], cwd=tmp_path, capture_output=True)
        assert done.returncode, f"{absent} is in the environment that is to do without it"
    environment = {"PATH": str(fresh.parent), "HOME": str(tmp_path)}
    done = subprocess.run([fresh, "-c", SERVE], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    # What of torch's own requirements torch imports later is torch's affair; nothing else may come.
    assert set(ast.literal_eval(done.stdout)) <= {name.replace("-", "_") for name in distributions("torch", {})}
    command = [fresh.with_name("marlin-gen")]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 1 and "pip install 'marlin_gen[tune]'" in done.stderr
    assert [p.name for p in tmp_path.iterdir()] == [], "serving writes nothing"


IMPORTS = """
import sys, time, torch
old, start = set(sys.modules), time.perf_counter()
import marlin_gen
first, loaded = time.perf_counter() - start, sorted(set(sys.modules) - old)
import marlin_gen.nn, marlin_gen.serve, marlin_gen.ranks
print((first, time.perf_counter() - start, loaded))
"""


def test_importing_the_package_takes_a_fifth_of_a_second_at_most():
    """Beyond torch, as the best of three runs; with all that serving imports later, too. 0.01 and 0.05 s when quiet."""
    command = [sys.executable, "-c", IMPORTS]
    runs = [ast.literal_eval(subprocess.check_output(command, cwd=ROOT, text=True)) for _ in range(3)]
    assert min(first for first, _, _ in runs) < 0.2 and min(whole for _, whole, _ in runs) < 0.2, runs
    # A count does not depend on how busy the machine is.
    loaded = runs[0][2]
    assert len(loaded) <= 8 and all(name.startswith("marlin_gen") for name in loaded), loaded


# Wheels for a machine without a network.


def tiny_wheel(folder: Path, name: str, version: str, tag: str = "py3-none-any") -> Path:
    """A wheel of nothing, to stand for one of a registry's."""
    path = folder / f"{name}-{version}-{tag}.whl"
    info = f"{name}-{version}.dist-info"
    with zipfile.ZipFile(path, "w") as archive:
        # As of a release that has left older Pythons behind.
        python = "Requires-Python: >=3.12\n" if "cp312" in tag else ""
        archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n{python}")
        archive.writestr(f"{info}/WHEEL", f"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: {tag}\n")
        archive.writestr(f"{info}/RECORD", "")
    return path


def test_wheels_are_collected_for_another_machine(wheel, tmp_path, monkeypatch, capfd):
    tool = load_tool("collect_wheels")
    index, out = tmp_path / "index", tmp_path / "wheels"
    index.mkdir()
    for name, version, tag in (
        ("torch", "2.8.0", "cp312-cp312-manylinux_2_28_aarch64"),  # too old
        ("torch", "2.9.0", "cp312-cp312-manylinux_2_28_x86_64"),  # for another machine
        ("torch", "2.10.0", "cp312-cp312-manylinux_2_28_aarch64"),
        ("torch", "2.11.0", "cp312-cp312-manylinux_2_36_aarch64"),  # needs a newer C library
        ("accelerate", "1.10.0", "py3-none-any"),
        ("gguf", "0.19.0", "py3-none-any"),
        ("transformers", "5.0.0", "py3-none-any"),
        ("safetensors", "0.6.0", "cp38-abi3-manylinux_2_17_aarch64"),
    ):
        tiny_wheel(index, name, version, tag)

    def copied(folder: Path, machine: str) -> Path:
        """As if built without the launcher, whose tag is this machine's."""
        return Path(shutil.copy(wheel.filename, folder / "marlin_gen-0.1.0-py3-none-any.whl"))

    monkeypatch.setattr(tool, "build_wheel", copied)
    words = ["--out", str(out), "--python", "3.12", "--platform", "aarch64", "--extras", "hf"]
    assert tool.main([*words, "--pip=--no-index", f"--pip=--find-links={index}"]) == 0
    names = {"-".join(path.name.split("-")[:2]) for path in out.glob("*.whl")}
    others = {"accelerate-1.10.0", "gguf-0.19.0", "safetensors-0.6.0", "torch-2.10.0", "transformers-5.0.0"}
    assert names - {f"marlin_gen-{marlin_gen.__version__}"} == others
    said = capfd.readouterr().out
    assert "6 wheels" in said and "pip install --no-index --find-links . 'marlin_gen[hf]'" in said
    assert subprocess.run(["sha256sum", "-c", "SHA256SUMS"], cwd=out, capture_output=True).returncode == 0
    with pytest.raises(SystemExit):  # nothing there for x86_64 and 3.10: pip's own words say what is missing
        tool.main(["--out", str(tmp_path / "b"), "--python", "3.10", "--platform", "x86_64",
                   "--pip=--no-index", f"--pip=--find-links={index}"])  # fmt: skip


def test_extras_are_resolved_from_the_wheel(wheel, tmp_path):
    tool = load_tool("collect_wheels")
    path = Path(wheel.filename)
    assert tool.requirements(path, []) == ["torch>=2.10"]
    dev = tool.requirements(path, ["dev"])
    assert {"torch>=2.10", "gguf>=0.19", "ninja>=1.11"} <= set(dev) and not [line for line in dev if "marlin" in line]
    with pytest.raises(SystemExit, match=r"unknown; known: .*tune"):
        tool.requirements(path, ["gpu"])
