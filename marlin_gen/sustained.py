"""Throughput of one cell over time, without a pause: what the power limit and the heat leave of the first second."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from marlin_gen import csv_rows
from marlin_gen.config import Plan
from marlin_gen.measurement import Artifact, Measurer
from marlin_gen.problem import Problem

CUBLAS = "cublas"  # in the kernel column: fp16 matmul with the dense weight
FILE_NAME = "sustained.csv"


@dataclass(frozen=True)
class SustainedRow:
    """A ``measurement.Stretch`` and what ran; the fields are the columns of sustained.csv, in order."""

    n: int
    k: int
    m: int
    kernel: str  # Plan.key, or CUBLAS
    seconds: float
    tflops: float
    sm_clock_mhz: float | None
    power_w: float | None
    temperature_c: float | None


COLUMNS = csv_rows.columns_of(SustainedRow)


def kept_share(rows: Sequence[SustainedRow]) -> float:
    """The last second's throughput over the first second's, of one kernel's rows in order of time."""
    end = rows[-1].seconds
    first = [row.tflops for row in rows if row.seconds <= 1.0] or [rows[0].tflops]
    last = [row.tflops for row in rows if row.seconds > end - 1.0]
    return (sum(last) / len(last)) / (sum(first) / len(first))


def measure(
    measurer: Measurer, problem: Problem, artifact: Artifact, plan: Plan, seconds: float
) -> Iterator[SustainedRow]:
    """The plan for ``seconds``, then cuBLAS as long, after a rest that lets the card cool down."""
    for chosen in ((artifact, plan), None):
        name = plan.key if chosen else CUBLAS
        for row in measurer.sustain(problem, chosen, seconds):
            yield SustainedRow(problem.n, problem.k, problem.m, name, **asdict(row))


def write_csv(path: Path, rows: Iterable[SustainedRow]) -> None:
    """The file appears whole or not at all."""
    csv_rows.write(path, SustainedRow, rows, digits=5)


def read_csv(path: Path) -> list[SustainedRow]:
    """The rows of a sustained.csv; a ValueError that names the file and line when it is not one."""
    return csv_rows.read(path, SustainedRow, "a sustained run")
