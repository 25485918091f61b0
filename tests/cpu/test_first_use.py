"""A kernel compiled while a call waits: by one process of several, announced, and given up in time."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from marlin_gen import first_use
from marlin_gen.config import KernelConfig, KernelSpec
from marlin_gen.first_use import compile_now
from marlin_gen.measurement import Artifact

SPEC = KernelSpec(KernelConfig.from_key("mma-m8n32k64-w1x4-s4-b1-c1-tiles-exact"), "u4b8g128", "f16", "sm_80")


@pytest.fixture
def endless(tmp_path, monkeypatch) -> Path:
    """A compiler that never ends; the file it writes its process id to."""
    script, started = tmp_path / "nvcc", tmp_path / "started"
    script.write_text(
        "#!/bin/sh\n"
        'if [ "$1" = --version ]; then echo "release 13.0, V13.0.88"; exit; fi\n'
        f"echo $$ >> {started}\nexec sleep 1000\n"
    )
    script.chmod(0o755)
    monkeypatch.setenv("MARLIN_GEN_NVCC", str(script))
    monkeypatch.setenv("MARLIN_GEN_COMPILER", "nvcc")
    return started


def ended(pid: int) -> bool:
    for _ in range(200):
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.05)
    return False


def test_it_is_announced_once_and_then_comes_from_the_cache(tmp_cache, caplog):
    first, second = compile_now(SPEC), compile_now(SPEC)
    assert isinstance(first, Artifact) and first == second and first.directory.is_relative_to(tmp_cache)
    (said,) = [record.message for record in caplog.records if record.levelno >= logging.WARNING]
    assert said.startswith(f"no prebuilt kernel {SPEC.key}; compiling it with ") and said.endswith(", once")


def test_a_compiler_that_never_ends_is_ended(tmp_cache, endless):
    started = time.monotonic()
    with pytest.raises(TimeoutError, match=f"nvcc has not compiled {SPEC.key} in 2 s"):
        compile_now(SPEC, seconds=2)
    assert time.monotonic() - started < 30
    assert ended(int(endless.read_text())), "the compiler is gone too"
    assert not list((tmp_cache / "tmp").iterdir()), "and nothing half-made is left"


def test_processes_at_once_compile_it_once(tmp_cache):
    code = f"""
import logging, sys
logging.basicConfig(stream=sys.stdout, level=logging.WARNING, format="%(message)s")
from marlin_gen.config import KernelSpec
from marlin_gen.first_use import compile_now
print(compile_now(KernelSpec.from_key({SPEC.key!r})).cubin)
"""
    running = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) for _ in range(4)]
    said = [process.communicate(timeout=120)[0] for process in running]
    assert [process.returncode for process in running] == [0] * 4
    assert sum("compiling it with" in text for text in said) == 1
    assert len({text.splitlines()[-1] for text in said}) == 1


def test_waiting_for_another_process_ends_in_time(tmp_cache, endless, caplog):
    code = f"""
from marlin_gen.config import KernelSpec
from marlin_gen.first_use import compile_now
compile_now(KernelSpec.from_key({SPEC.key!r}), seconds=6)
"""
    other = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL)
    try:
        ends = time.monotonic() + 60
        while not endless.exists() and time.monotonic() < ends:
            time.sleep(0.02)
        with pytest.raises(TimeoutError, match="has been held by another process"):
            compile_now(SPEC, seconds=1)
    finally:
        assert other.wait(60) == 1
    assert [r.message for r in caplog.records if "another process compiles it" in r.message]
    assert len(endless.read_text().split()) == 1, "this process started no compiler"


def test_the_limit_leaves_a_busy_machine_time():
    assert first_use.SECONDS >= 60
