"""The native launcher: what it hands to the driver, in a process of its own with a driver that records."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import fake_gpu

HERE = Path(__file__).parent


@fake_gpu.needs_compiler
def test_cases_on_a_driver_that_records(tmp_path):
    """fake_cuda/cases.py, each of its tests by name in the output when one fails."""
    fake_gpu.build(tmp_path)
    shutil.copy(HERE / "fake_cuda" / "cases.py", tmp_path / "test_cases.py")
    path = f"{HERE}:{os.environ.get('PYTHONPATH', '')}"
    environment = os.environ | {"MARLIN_GEN_LAUNCHER": "native", "PYTHONPATH": path}
    environment.pop("MARLIN_GEN_DEPENDENT", None)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir", ".", "test_cases.py"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
