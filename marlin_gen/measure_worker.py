"""The child process that touches the GPU for ``measure``: requests on stdin, answers on stdout, one JSON object a line.

It may die by an illegal address or hang in a kernel; the parent sees that, starts another and goes on.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from marlin_gen import driver
from marlin_gen.baselines import Baselines
from marlin_gen.config import KernelSpec, Plan
from marlin_gen.launch import Kernel
from marlin_gen.measurement import Measurement, Stretch
from marlin_gen.nvml import Card
from marlin_gen.problem import Problem
from marlin_gen.timing import Bench


class Worker:
    def __init__(self, device_index: int) -> None:
        self.bench = Bench(device_index)
        self._card = Card(device_index)
        self._baselines: Baselines | None = None
        self._kernels: dict[str, Kernel | str] = {}  # by cubin path; a string says why it does not load

    def baselines(self) -> Baselines:
        if not self._baselines:
            self._baselines = Baselines(self.bench)
        return self._baselines

    def kernel(self, entry: dict[str, Any]) -> Kernel | str:
        if entry["cubin"] not in self._kernels:
            try:
                loaded: Kernel | str = self.bench.launcher.load(
                    Path(entry["cubin"]), entry["symbol"], KernelSpec.from_key(entry["spec"])
                )
            except driver.LaunchError as error:
                loaded = str(error)
            self._kernels[entry["cubin"]] = loaded
        return self._kernels[entry["cubin"]]

    def screen(self, request: dict[str, Any]) -> Iterator[dict[str, Any]]:
        problem, kernel = Problem(**request["problem"]), self.kernel(request["kernel"])
        for key in request["plans"]:
            plan = Plan.from_key(key)
            if isinstance(kernel, str):
                yield Measurement(problem, plan, "launch", detail=kernel).to_json()
            else:
                yield self.bench.screen(kernel, plan, problem).to_json()

    def finals(self, request: dict[str, Any]) -> Iterator[dict[str, Any]]:
        problem = Problem(**request["problem"])
        entries = [(self.kernel(entry), Plan.from_key(entry["plan"])) for entry in request["entries"]]
        good = [(kernel, plan) for kernel, plan in entries if not isinstance(kernel, str)]
        if request["yardsticks"]:
            found, baseline = self.baselines().compare(problem, good)
            yield {"read_floor_us": baseline.read_floor_us, "cublas_us": baseline.cublas_us}
        else:
            found, _ = self.bench.finals(problem, good)
        timed = iter(found)
        for kernel, plan in entries:
            row = Measurement(problem, plan, "launch", detail=kernel) if isinstance(kernel, str) else next(timed)
            yield row.to_json()

    def sustain(self, request: dict[str, Any]) -> Iterator[dict[str, Any]]:
        problem, entry = Problem(**request["problem"]), request["entry"]
        if entry is None:
            graph = self.baselines().cublas_graph(problem)
        else:
            kernel = self.kernel(entry)
            if isinstance(kernel, str):
                raise driver.LaunchError(kernel)
            graph = self.bench.graph(kernel, Plan.from_key(entry["plan"]), problem)
        for elapsed, us in self.bench.sustain(graph, request["seconds"]):
            yield asdict(Stretch(elapsed, problem.flops / us / 1e6, **asdict(self._card.sample())))


def main() -> None:
    # Answers keep the real stdout; whatever else prints goes to stderr.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def emit(answer: dict[str, Any]) -> None:
        answers.write(json.dumps(answer) + "\n")
        answers.flush()

    worker = Worker(int(sys.argv[1]))
    emit({"gpu": worker.bench.launcher.gpu.to_json()})
    for line in sys.stdin:
        request = json.loads(line)
        for found in getattr(worker, request["do"])(request):
            emit({**found, "request": request["request"]})
        emit({"done": True, "request": request["request"]})


if __name__ == "__main__":
    main()
