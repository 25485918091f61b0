"""compute-sanitizer finds nothing in any shipped kernel. The tools run side by side; see tools/sanitize.py."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from load_tool import load_tool

pytestmark = pytest.mark.gpu

WATCHDOG_S = 300.0  # above the time after which a tool is killed

sanitize = load_tool("sanitize")


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
        hint = "" if version >= sanitize.TRUSTED else "; before judging wgmma races read sanitize.py's first lines"
        pytest.fail(f"{report.summary()}\n(compute-sanitizer {version}{hint})\n{report.text[-3000:]}", pytrace=False)
