"""Measure on a real GPU, in a child process: an illegal access, a hang or a failed launch costs one candidate."""

from __future__ import annotations

import contextlib
import json
import queue
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

from marlin_gen import env
from marlin_gen.arch import Gpu
from marlin_gen.config import Plan
from marlin_gen.driver import LaunchError
from marlin_gen.measurement import Artifact, Baseline, Job, Measurement, Stretch
from marlin_gen.problem import Problem

START_SECONDS = 120.0  # import torch, create a context
ANSWER_SECONDS = 30.0  # one answer; the first on a shape also makes its operands and reference
WORKER = (sys.executable, "-m", "marlin_gen.measure_worker")  # its argument is the device index
_LAST_WORDS = 2000  # characters of the child's stderr that are kept


class WorkerLost(RuntimeError):
    """The child died or did not answer; ``status`` is the measurement status that its candidate gets."""

    def __init__(self, status: str, detail: str) -> None:
        super().__init__(detail)
        self.status = status


class _Child:
    """One worker process and its answers."""

    def __init__(self, device_index: int) -> None:
        self._process = subprocess.Popen(
            [*WORKER, str(device_index)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env=env.child_environment(),
        )  # fmt: skip
        self._answers: queue.Queue[str | None] = queue.Queue()
        self._requests = 0
        self._stderr = ""
        threading.Thread(target=self._read_answers, daemon=True).start()
        self._stderr_reader = threading.Thread(target=self._read_stderr, daemon=True)
        self._stderr_reader.start()
        try:
            self.gpu = Gpu.from_json(self._answer(START_SECONDS)["gpu"])
        except BaseException:
            self.kill()
            raise

    def ask(self, request: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """Send a request and yield its answers as they come; WorkerLost when there will be no more."""
        assert self._process.stdin
        self._requests += 1
        number = self._requests
        with contextlib.suppress(OSError):  # it has died: the missing answer says so below
            self._process.stdin.write(json.dumps({**request, "request": number}) + "\n")
            self._process.stdin.flush()
        while True:
            answer = self._answer(ANSWER_SECONDS)
            if answer.pop("request") != number:
                continue  # to a request whose asker did not wait for all answers
            if answer.get("done"):
                return
            yield answer

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()

    def _answer(self, seconds: float) -> dict[str, Any]:
        try:
            line = self._answers.get(timeout=seconds)
        except queue.Empty:
            raise WorkerLost("timeout", f"no answer in {seconds:.0f} s") from None
        if line is None:
            code = self._process.wait()
            self._stderr_reader.join(timeout=5)
            words = [w for w in self._stderr.strip().splitlines() if w]
            raise WorkerLost("crash", f"exit code {code}: {words[-1] if words else 'no message'}")
        return dict(json.loads(line))

    def _read_answers(self) -> None:
        assert self._process.stdout
        for line in self._process.stdout:
            self._answers.put(line)
        self._answers.put(None)

    def _read_stderr(self) -> None:
        assert self._process.stderr
        for line in self._process.stderr:
            self._stderr = (self._stderr + line)[-_LAST_WORDS:]


class GpuMeasurer:
    """A ``measurement.Measurer`` on CUDA device ``device_index``."""

    def __init__(self, device_index: int = 0) -> None:
        self._device_index = device_index
        self._child: _Child | None = None
        self.gpu: Gpu = self._worker().gpu

    def screen(self, jobs: Sequence[Job]) -> Iterator[Measurement]:
        for job in jobs:
            waiting = list(job.plans)
            while waiting:
                request = {
                    "do": "screen",
                    "kernel": _kernel(job.artifact),
                    "problem": asdict(job.problem),
                    "plans": [p.key for p in waiting],
                }
                try:
                    for answer in self._worker().ask(request):
                        waiting.pop(0)
                        yield Measurement.from_json(answer)
                except WorkerLost as lost:
                    self.close()
                    if waiting:
                        yield Measurement(job.problem, waiting.pop(0), lost.status, detail=str(lost))

    def finals(self, problem: Problem, entries: Sequence[tuple[Artifact, Plan]]) -> list[Measurement]:
        try:
            return [Measurement.from_json(answer) for answer in self._ask_finals(problem, entries, yardsticks=False)]
        except WorkerLost as lost:
            self.close()
            if len(entries) == 1:
                return [Measurement(problem, entries[0][1], lost.status, detail=str(lost))]
            return [row for entry in entries for row in self.finals(problem, [entry])]  # each alone: one of them is bad

    def compare(
        self, problem: Problem, entries: Sequence[tuple[Artifact, Plan]]
    ) -> tuple[Baseline, list[Measurement]]:
        """``finals`` with the yardsticks in the same interleaved rounds; a LaunchError where the GPU fails on them."""
        try:
            yardsticks, *rows = self._ask_finals(problem, entries, yardsticks=True)
        except WorkerLost as lost:
            self.close()
            raise LaunchError(f"cannot time {problem}: {lost}") from lost
        baseline = Baseline(problem, yardsticks["read_floor_us"], yardsticks["cublas_us"])
        return baseline, [Measurement.from_json(row) for row in rows]

    def baselines(self, problems: Sequence[Problem]) -> Iterator[Baseline]:
        for problem in problems:
            yield self.compare(problem, [])[0]

    def _ask_finals(
        self, problem: Problem, entries: Sequence[tuple[Artifact, Plan]], yardsticks: bool
    ) -> list[dict[str, Any]]:
        kernels = [{**_kernel(artifact), "plan": plan.key} for artifact, plan in entries]
        request = {"do": "finals", "problem": asdict(problem), "entries": kernels, "yardsticks": yardsticks}
        return list(self._worker().ask(request))

    def sustain(
        self, problem: Problem, entry: tuple[Artifact, Plan] | None, seconds: float
    ) -> Iterator[Stretch]:
        kernel = {**_kernel(entry[0]), "plan": entry[1].key} if entry else None
        request = {"do": "sustain", "problem": asdict(problem), "entry": kernel, "seconds": seconds}
        try:
            for answer in self._worker().ask(request):
                yield Stretch(**answer)
        except WorkerLost as lost:
            self.close()
            raise LaunchError(f"cannot sustain {problem}: {lost}") from lost

    def close(self) -> None:
        if self._child:
            self._child.kill()
            self._child = None

    def _worker(self) -> _Child:
        """The child, started if there is none; a LaunchError, which is no candidate's fault, where none starts."""
        if not self._child:
            try:
                self._child = _Child(self._device_index)
            except WorkerLost as lost:
                raise LaunchError(f"cannot use CUDA device {self._device_index}: {lost}") from lost
        return self._child


def _kernel(artifact: Artifact) -> dict[str, str]:
    return {"cubin": str(artifact.cubin), "symbol": artifact.symbol, "spec": artifact.spec.key}
