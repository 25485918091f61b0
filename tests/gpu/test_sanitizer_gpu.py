"""compute-sanitizer finds nothing in any shipped kernel. The tools run side by side; see tools/sanitize.py."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

pytestmark = pytest.mark.gpu

WATCHDOG_S = 300.0  # above the time after which a tool is killed

_TOOL = Path(__file__).resolve().parents[2] / "tools" / "sanitize.py"
_SPEC = importlib.util.spec_from_file_location("sanitize", _TOOL)
sanitize = importlib.util.module_from_spec(_SPEC)
sys.modules["sanitize"] = sanitize  # its dataclasses look their module up
_SPEC.loader.exec_module(sanitize)


@pytest.fixture(scope="module")
def runs() -> Iterator[dict[str, sanitize.Run]]:
    """All tools, begun at once."""
    path = sanitize.find_sanitizer()
    if path is None:
        pytest.skip("no compute-sanitizer on PATH or in /usr/local/cuda; pip install nvidia-cuda-sanitizer-api")
    started = {tool: sanitize.Run(path, tool, []) for tool in sanitize.TOOLS}
    yield started
    for run in started.values():
        run.stop()


@pytest.mark.parametrize("tool", sanitize.TOOLS)
def test_no_shipped_kernel_is_at_fault(runs, tool):
    report = runs[tool].report()
    if not report.clean:
        version = sanitize.version_of(sanitize.find_sanitizer())
        hint = "" if version >= sanitize.TRUSTED else f"; before judging wgmma races read {_TOOL.name}'s first lines"
        pytest.fail(f"{report.summary()}\n(compute-sanitizer {version}{hint})\n{report.text[-3000:]}", pytrace=False)
