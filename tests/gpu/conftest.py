"""A watchdog over every GPU test: a kernel that hangs must not take the rest of the machine's time with it."""

from __future__ import annotations

import faulthandler
import os
import threading
from collections.abc import Iterator

import pytest

WATCHDOG_S = 90.0  # a test module may set its own; the first test to compile kernels takes longest


@pytest.fixture(scope="session")
def terminal(request: pytest.FixtureRequest) -> int:
    """A descriptor of the real stderr: what is captured would be lost with the process."""
    capture = request.config.pluginmanager.getplugin("capturemanager")
    with capture.global_and_fixture_disabled():
        return os.dup(2)


@pytest.fixture(autouse=True)
def watchdog(request: pytest.FixtureRequest, terminal: int) -> Iterator[None]:
    """End the process when a test takes too long. A blocked driver call cannot be interrupted, only abandoned."""
    seconds = getattr(request.module, "WATCHDOG_S", WATCHDOG_S)

    def abandon() -> None:
        os.write(terminal, f"\n{request.node.nodeid} hangs: no end after {seconds:.0f} s\n".encode())
        faulthandler.dump_traceback(terminal, all_threads=True)
        os._exit(124)

    timer = threading.Timer(seconds, abandon)
    timer.daemon = True
    timer.start()
    faulthandler.dump_traceback_later(seconds + 10, exit=True, file=terminal)  # where the blocked call holds the GIL
    yield
    timer.cancel()
    faulthandler.cancel_dump_traceback_later()
