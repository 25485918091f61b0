"""What was measured, as values: one row of the shape x config matrix, and the yardsticks beside it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from marlin_gen.arch import Gpu
from marlin_gen.config import KernelSpec, Plan
from marlin_gen.problem import Problem

PROTOCOL = "graph-replay/rotated-weights-5xL2/hot-activations/median/v1"  # part of every result's identity


@dataclass(frozen=True)
class Measurement:
    """One plan on one problem. Times are medians in microseconds with a 95 % interval of the median.

    ``status`` is ok, or why there is no time: compile (refused by the compiler), resources (spills, or more registers
    or shared memory than stated), launch (refused by the driver), wrong (an error, of all or of the worst output, at or
    above DType.error_limit: ``reference.errors``; or unwritten output), timeout (the measuring process was killed),
    crash (it died). A failure is a row, not the end.
    """

    problem: Problem
    plan: Plan
    status: str
    us: float | None = None
    us_low: float | None = None
    us_high: float | None = None
    relative_error: float | None = None
    detail: str = ""  # what went wrong, one line
    chained_us: float | None = None  # the same with dependent launches, where that was timed too

    @property
    def ok(self) -> bool:
        return self.status == "ok"

    def to_json(self) -> dict[str, Any]:
        row: dict[str, Any] = {**vars(self.problem), "plan": self.plan.key, "status": self.status}
        for name in ("us", "us_low", "us_high", "chained_us", "relative_error"):
            if getattr(self, name) is not None:
                row[name] = getattr(self, name)
        if self.detail:
            row["detail"] = self.detail
        return row

    @classmethod
    def from_json(cls, row: dict[str, Any]) -> Measurement:
        problem = Problem(row["n"], row["k"], row["m"], row["weight_format"], row["act_dtype"])
        return cls(
            problem, Plan.from_key(row["plan"]), row["status"], row.get("us"), row.get("us_low"),
            row.get("us_high"), row.get("relative_error"), row.get("detail", ""), row.get("chained_us"),
        )  # fmt: skip


@dataclass(frozen=True)
class Baseline:
    """The yardsticks of one problem on one GPU, measured in the same run as its candidates."""

    problem: Problem
    read_floor_us: float  # a plain read kernel over the packed bytes, launch included
    cublas_us: float  # fp16 matmul with the dense weight


@dataclass(frozen=True)
class Stretch:
    """A few tenths of a second of a sustained run, and what the card said at its end (None: it does not tell)."""

    seconds: float  # since the start, at the end of the stretch
    tflops: float  # 2mnk over the stretch
    sm_clock_mhz: float | None
    power_w: float | None
    temperature_c: float | None


@dataclass(frozen=True)
class Artifact:
    """A compiled kernel: one directory that holds kernel.cu, kernel.cubin, ptxas.log, command.txt and spec.json."""

    spec: KernelSpec
    symbol: str  # the kernel's name in the cubin
    directory: Path
    registers: int  # per thread
    spill_bytes: int  # stores + loads
    static_smem_bytes: int

    @property
    def cubin(self) -> Path:
        return self.directory / "kernel.cubin"


@dataclass(frozen=True)
class Job:
    """Time these plans of one artifact on one problem. All plans share the artifact's config."""

    artifact: Artifact
    plans: tuple[Plan, ...]
    problem: Problem


class Measurer(Protocol):
    """Something that knows how long a kernel takes: a GPU, or a recording of one."""

    gpu: Gpu

    def screen(self, jobs: Sequence[Job]) -> Iterator[Measurement]:
        """Check and time each plan of each job, quickly; one measurement per (plan, problem), in order."""
        ...

    def finals(self, problem: Problem, entries: Sequence[tuple[Artifact, Plan]]) -> list[Measurement]:
        """Time these against each other, interleaved and with more replays."""
        ...

    def compare(
        self, problem: Problem, entries: Sequence[tuple[Artifact, Plan]]
    ) -> tuple[Baseline, list[Measurement]]:
        """``finals`` with the yardsticks in the same rounds."""
        ...

    def baselines(self, problems: Sequence[Problem]) -> Iterator[Baseline]:
        """The yardsticks of each problem, in order."""
        ...

    def sustain(
        self, problem: Problem, entry: tuple[Artifact, Plan] | None, seconds: float
    ) -> Iterator[Stretch]:
        """Run the entry (None: cuBLAS) without a pause; a stretch every few tenths of a second."""
        ...

    def close(self) -> None: ...
