"""Batches through the real compilers and the cache: keep-going, hits, damage, two processes, full disks."""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from marlin_gen import kernel_cache
from marlin_gen.compile import CompileFailure, Result, compile_all, identity_of, parse_ptxas, reject_artifact
from marlin_gen.config import KernelConfig, KernelSpec
from marlin_gen.measurement import Artifact
from marlin_gen.render import KernelSource, render
from marlin_gen.toolchain import Toolchain, ToolchainError, find_toolchain

BASE = KernelConfig.from_key("mma-m8n32k64-w1x16-s4-b1-c1-tiles-exact")
SPILLING = """extern "C" __global__ void __launch_bounds__(1024, 2) small(float* x, int n) {
  float kept[64];
#pragma unroll
  for (int i = 0; i < 64; ++i) kept[i] = x[i * n];
  __syncthreads();
#pragma unroll
  for (int i = 0; i < 64; ++i) x[i * n] = kept[i] * kept[63 - i] + kept[(i * 7) % 64];
}
"""


def small(index: int, body: str = "") -> KernelSource:
    """A kernel that compiles in no time, in the place of spec number ``index``."""
    body = body or f"out[0] = {index};"
    return as_source(index, f'extern "C" __global__ void small(int* out) {{ {body} }}\n')


def as_source(index: int, text: str) -> KernelSource:
    spec = KernelSpec(replace(BASE, num_stages=index + 1), "u4b8g128", "f16", "sm_90a")
    return KernelSource(spec, "small", text, hashlib.sha256(text.encode()).hexdigest())


def entries(cache: Path) -> list[Path]:
    return sorted((cache / "kernels").glob("*"))


@pytest.fixture(params=["nvcc", "nvrtc"])
def toolchain(request: pytest.FixtureRequest) -> Toolchain:
    try:
        return find_toolchain(request.param)
    except ToolchainError as missing:
        pytest.skip(str(missing))


def test_a_broken_kernel_does_not_stop_the_batch(tmp_cache: Path, toolchain: Toolchain) -> None:
    sources = [small(0), small(1, "undeclared = 1;"), small(2), small(3)]
    seen: list[Result] = []
    results = compile_all(sources, toolchain, jobs=1, on_done=seen.append)
    assert {result.spec for result in seen} == set(results) == {source.spec for source in sources}
    failure = results[sources[1].spec]
    assert isinstance(failure, CompileFailure)
    assert 'identifier "undeclared" is undefined' in failure.reason and failure.reason in failure.log
    for source in (sources[0], sources[2], sources[3]):
        artifact = results[source.spec]
        assert isinstance(artifact, Artifact) and reject_artifact(artifact) is None
        assert sorted(path.name for path in artifact.directory.iterdir()) == sorted(kernel_cache.FILES)
        assert artifact.cubin.read_bytes()[:4] == b"\x7fELF"
        assert b"small" in artifact.cubin.read_bytes()
        assert (artifact.directory / "kernel.cu").read_text() == source.text
    assert len(entries(tmp_cache)) == 3
    assert not list((tmp_cache / "tmp").iterdir())


def test_equal_sources_give_equal_cubins(tmp_path: Path, toolchain: Toolchain, monkeypatch: pytest.MonkeyPatch) -> None:
    cubins = []
    for name in ("one", "other"):
        monkeypatch.setenv("MARLIN_GEN_CACHE_DIR", str(tmp_path / name))
        artifact = compile_all([small(0)], toolchain)[small(0).spec]
        assert isinstance(artifact, Artifact)
        cubins.append(artifact.cubin.read_bytes())
    assert cubins[0] == cubins[1]


@pytest.mark.usefixtures("tmp_cache")
def test_registers_spills_and_shared_memory_are_read(toolchain: Toolchain) -> None:
    spilling = as_source(0, SPILLING)
    shared = small(1, "__shared__ int s[100]; s[threadIdx.x] = out[1]; __syncthreads(); out[0] = s[out[2]];")
    results = compile_all([spilling, shared], toolchain)
    artifact = results[spilling.spec]
    assert isinstance(artifact, Artifact)
    assert artifact.registers == 32 and artifact.spill_bytes > 0
    assert "spills" in (reject_artifact(artifact) or "")
    other = results[shared.spec]
    assert isinstance(other, Artifact)
    assert other.static_smem_bytes == 400 and other.spill_bytes == 0


@pytest.mark.usefixtures("tmp_cache")
def test_either_compiler_takes_every_way_to_decode(toolchain: Toolchain) -> None:
    """nvcc is the stricter one: device code calls nothing that is not marked for it."""
    mma, wgmma = "mma-m16n32k128-w1x4-s3-b1-c1-tiles", "wgmma-m32n64k128-w4x1-s6-b1-c1-tiles"
    keys = [
        f"{config}-{dequant}-{fmt}-{dtype}-sm_90a"
        for config in (mma, wgmma)
        for dequant, fmt, dtype in (
            ("exact", "u4b8g128", "f16"), ("deferred", "u4b8g128", "bf16"), ("deferred", "u4zg128", "f16"),
            ("exact", "u4fg128", "bf16"), ("exact", "u4mg32", "f16"), ("exact", "u8b128g128", "f16"),
            ("exact", "e4m3g128", "f16"), ("deferred", "e4m3g128", "bf16"),
        )
    ]  # fmt: skip
    results = compile_all([render(KernelSpec.from_key(key)) for key in keys], toolchain)
    assert [str(found)[:300] for found in results.values() if not isinstance(found, Artifact)] == []
    assert len(results) == len(keys)


@pytest.mark.usefixtures("tmp_cache")
def test_too_many_registers_are_rejected() -> None:
    artifact = Artifact(small(0).spec, "small", Path(), registers=255, spill_bytes=0, static_smem_bytes=0)
    assert "255 registers" in (reject_artifact(artifact) or "")


@pytest.mark.usefixtures("tmp_cache")
def test_a_hit_runs_no_compiler() -> None:
    good = find_toolchain()
    first = compile_all([small(0)], good)
    # The same identity, but nothing to run.
    second = compile_all([small(0)], replace(good, path=Path("/nonexistent")))
    assert first == second
    with pytest.raises(ToolchainError, match="is broken"):
        compile_all([small(1)], replace(good, path=Path("/nonexistent")))


def test_what_changes_the_binary_changes_the_identity(monkeypatch: pytest.MonkeyPatch) -> None:
    toolchain = find_toolchain()
    base = identity_of(small(0), toolchain)
    assert base != identity_of(small(0, "out[0] = 2;"), toolchain)
    assert base != identity_of(small(0), replace(toolchain, version="13.9.1"))
    assert base == identity_of(small(0), replace(toolchain, path=Path("/elsewhere")))
    monkeypatch.setenv("MARLIN_GEN_LINEINFO", "1")
    assert base != identity_of(small(0), toolchain)


@pytest.mark.usefixtures("tmp_cache")
@pytest.mark.parametrize("damage", ["cubin", "missing", "json", "spec"])
def test_a_damaged_entry_is_compiled_again(damage: str, caplog: pytest.LogCaptureFixture) -> None:
    source = small(0)
    artifact = compile_all([source])[source.spec]
    assert isinstance(artifact, Artifact)
    whole = artifact.cubin.read_bytes()
    description = artifact.directory / "spec.json"
    if damage == "cubin":
        artifact.cubin.write_bytes(whole[:-1])
    elif damage == "missing":
        (artifact.directory / "ptxas.log").unlink()
    elif damage == "json":
        description.write_text("{")
    else:
        description.write_text(json.dumps(json.loads(description.read_text()) | {"spec": "another"}))
    with caplog.at_level(logging.WARNING, "marlin_gen"):
        assert compile_all([source])[source.spec] == artifact
    assert artifact.cubin.read_bytes() == whole
    assert len([r for r in caplog.records if "is damaged" in r.message]) == 1


def test_two_processes_compile_at_once(tmp_cache: Path) -> None:
    """Both get every kernel, each of which exists once."""
    code = (
        "from tests.cpu.test_compile import *\n"
        "results = compile_all([small(i) for i in range(6)], jobs=2)\n"
        "assert all(isinstance(r, Artifact) and r.cubin.is_file() for r in results.values()), results\n"
    )
    root = Path(__file__).resolve().parents[2]
    running = [subprocess.Popen([sys.executable, "-c", code], cwd=root, stderr=subprocess.PIPE) for _ in range(2)]
    errors = [process.communicate(timeout=120)[1].decode() for process in running]
    assert [process.returncode for process in running] == [0, 0], errors
    assert len(entries(tmp_cache)) == 6
    assert not list((tmp_cache / "tmp").iterdir())


def test_what_a_killed_process_left_is_swept(tmp_cache: Path) -> None:
    for name, age in (("old", kernel_cache.ABANDONED_SECONDS + 60), ("running", 60)):
        folder = tmp_cache / "tmp" / name
        folder.mkdir(parents=True)
        os.utime(folder, times=(time.time() - age,) * 2)
    compile_all([small(0)])
    assert [path.name for path in (tmp_cache / "tmp").iterdir()] == ["running"]


def test_an_unusable_cache_names_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setenv("MARLIN_GEN_CACHE_DIR", str(tmp_path / "file" / "cache"))
    with pytest.raises(OSError, match=r"file/cache.*MARLIN_GEN_CACHE_DIR"):
        compile_all([small(0)])


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_a_full_disk_is_no_compile_failure(tmp_cache: Path, tmp_path: Path) -> None:
    """The compiler's write fails with ENOSPC: the batch ends with the fix, and nothing half-written stays."""
    full = tmp_path / "nvcc"
    full.write_text("#!/bin/sh\ncat /proc/version > /dev/full\n")
    full.chmod(0o755)
    with pytest.raises(OSError, match="MARLIN_GEN_CACHE_DIR") as raised:
        compile_all([small(0)], Toolchain("nvcc", "13.0.1", full, "a test"))
    assert raised.value.errno == errno.ENOSPC
    assert not entries(tmp_cache) and not list((tmp_cache / "tmp").iterdir())


def test_a_killed_ninja_is_not_taken_for_a_full_disk(
    tmp_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "ninja").write_text("#!/bin/sh\nkill -9 $$\n")
    (tmp_path / "ninja").chmod(0o755)
    monkeypatch.setattr("ninja.BIN_DIR", str(tmp_path))
    with pytest.raises(ChildProcessError, match="ninja was killed by signal 9 before 1 kernels were compiled"):
        compile_all([small(0)])
    assert not entries(tmp_cache) and not list((tmp_cache / "tmp").iterdir())


def test_an_error_in_on_done_stops_the_batch(tmp_cache: Path) -> None:
    """It reaches the caller as it is, no compiler is left running, and what was finished is kept."""

    def fail(_: Result) -> None:
        raise OSError(errno.EIO, "the study's journal")

    with pytest.raises(OSError, match="the study's journal"):
        compile_all([small(i) for i in range(4)], jobs=1, on_done=fail)
    assert not list((tmp_cache / "tmp").iterdir())
    assert len(entries(tmp_cache)) >= 1
    with pytest.raises(ChildProcessError):
        os.waitpid(-1, os.WNOHANG)


@pytest.mark.usefixtures("tmp_cache")
def test_dump_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MARLIN_GEN_DUMP_DIR", str(tmp_path / "dump"))
    artifact = compile_all([small(0)])[small(0).spec]
    assert isinstance(artifact, Artifact)
    dumped = tmp_path / "dump" / artifact.directory.name
    assert (dumped / "kernel.cubin").read_bytes() == artifact.cubin.read_bytes()


def test_parse_ptxas() -> None:
    report = parse_ptxas(
        "ptxas info    : Compiling entry function 'other' for 'sm_90a'\n"
        "ptxas info    : Used 9 registers\n"
        "ptxas info    : Compiling entry function 'small' for 'sm_90a'\n"
        "ptxas info    : Function properties for small\n"
        "ptxas         .     80 bytes stack frame, 12 bytes spill stores, 16 bytes spill loads\n"
        "ptxas info    : Used 168 registers, used 1 barriers, 80 bytes cumulative stack size, 1024 bytes smem\n",
        "small",
    )
    assert (report.registers, report.spill_bytes, report.static_smem_bytes) == (168, 28, 1024)
    with pytest.raises(ValueError, match="no ptxas report on absent"):
        parse_ptxas("ptxas info    : Used 9 registers", "absent")
