"""Compiling ahead: while one batch of candidates is timed, the next is rendered and compiled in a thread."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor

from marlin_gen.compile import CompileFailure, compile_all, reject_artifact
from marlin_gen.config import KernelConfig, KernelSpec
from marlin_gen.measurement import Artifact
from marlin_gen.render import render

Result = Artifact | CompileFailure
Build = Callable[[Sequence[KernelSpec], Callable[[Result], None]], None]  # calls back once per spec


def build_with_ninja(jobs: int | None = None) -> Build:
    """The real thing: render each spec and compile all with ninja, ``jobs`` at a time (None: every core)."""

    def build(specs: Sequence[KernelSpec], on_done: Callable[[Result], None]) -> None:
        compile_all([render(spec) for spec in specs], jobs=jobs, on_done=on_done)

    return build


class CompileAhead:
    """Batches in, one result per config out. Batches are compiled in the order given, one at a time."""

    def __init__(self, spec_of: Callable[[KernelConfig], KernelSpec], build: Build) -> None:
        self.spec_of = spec_of
        self._build = build
        self._results: dict[KernelSpec, Future[Result]] = {}
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="compile")
        self._stop = threading.Event()

    def submit(self, configs: Sequence[KernelConfig]) -> None:
        """Compile these in the background; those submitted before are not compiled again."""
        specs = [spec for spec in map(self.spec_of, configs) if spec not in self._results]
        self._results.update({spec: Future() for spec in specs})
        if specs:
            self._thread.submit(self._run, specs)

    def result(self, config: KernelConfig) -> Result:
        """Wait for one config. Raises what broke the compiler itself (a full disk, no toolchain)."""
        self.submit([config])
        return self._results[self.spec_of(config)].result()

    def usable(self, config: KernelConfig) -> tuple[Artifact | None, str, str]:
        """(artifact, "ok", "") or (None, status, reason): a kernel that failed or is not worth launching."""
        result = self.result(config)
        if isinstance(result, CompileFailure):
            return None, "compile", result.reason
        reason = reject_artifact(result)
        return (None, "resources", reason) if reason else (result, "ok", "")

    def close(self) -> None:
        """Give up what is still compiling: the compiler is stopped after the kernel at hand."""
        self._stop.set()
        self._thread.shutdown(wait=True, cancel_futures=True)

    def _run(self, specs: Sequence[KernelSpec]) -> None:
        def on_done(result: Result) -> None:
            if self._stop.is_set():
                raise CancelledError
            if not self._results[result.spec].done():
                self._results[result.spec].set_result(result)

        try:
            self._build(specs, on_done)
            error: BaseException = RuntimeError("the build ended without this kernel")
        except BaseException as raised:  # handed to whoever waits; a thread has nobody to raise to
            error = raised
        for spec in specs:
            if not self._results[spec].done():
                self._results[spec].set_exception(error)
