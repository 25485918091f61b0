"""The bench: what the table's choices cost beside cuBLAS and the read floor: rows of a CSV, a summary by regime."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from marlin_gen import csv_rows
from marlin_gen.config import Plan
from marlin_gen.formats import kind_suffix
from marlin_gen.measurement import Artifact, Measurement, Measurer
from marlin_gen.problem import Problem


@dataclass(frozen=True)
class BenchRow:
    """One cell of bench.csv; the fields are the columns, in order. Times are medians in microseconds."""

    n: int
    k: int
    m: int
    weight_format: str
    act_dtype: str
    us: float  # of launches one after the other
    us_low: float  # 95 % interval of the median
    us_high: float
    config: str  # Plan.key
    read_floor_us: float  # a plain read of the packed bytes, launch included
    cublas_us: float  # fp16 matmul with the dense weight
    relative_error: float  # Frobenius, against the fp32 reference
    chained_us: float  # of dependent launches, where the GPU can: each starts while the one before it ends

    @property
    def problem(self) -> Problem:
        return Problem(self.n, self.k, self.m, self.weight_format, self.act_dtype)

    @property
    def speedup(self) -> float:
        """Over cuBLAS fp16."""
        return self.cublas_us / self.us

    def roofline_fraction(self, tflops: float) -> float:
        """1.0 = as fast as the bytes can be read, or the multiplications done at ``tflops``."""
        return self.problem.roofline_us(self.read_floor_us, tflops) / self.us

    def chained_fraction(self, tflops: float) -> float:
        """The same of dependent launches; above 1.0 where they hide what the roofline holds of launching."""
        return self.problem.roofline_us(self.read_floor_us, tflops) / self.chained_us


COLUMNS = csv_rows.columns_of(BenchRow)


def file_name(weight_format: str, act_dtype: str) -> str:
    """The bench beside a table: bench.csv is of the default formats alone, so that reports compare like with like."""
    return f"bench{kind_suffix(weight_format, act_dtype)}.csv"


@dataclass(frozen=True)
class Regime:
    """A range of token counts with one bottleneck."""

    name: str
    m_low: int
    m_high: int

    def holds(self, m: int) -> bool:
        return self.m_low <= m <= self.m_high


REGIMES = (
    Regime("decode, m 1-16", 1, 16),
    Regime("small batch, m 17-256", 17, 256),
    Regime("prefill, m from 257", 257, 1 << 30),
)


@dataclass(frozen=True)
class Summary:
    """One regime of a bench: geometric means over its cells, and the worst cell."""

    regime: str
    cells: int
    speedup: float  # over cuBLAS
    worst_speedup: float
    roofline: float
    worst_roofline: float
    chained: float  # as roofline, of dependent launches
    worst_chained: float


def summarise(rows: Sequence[BenchRow], tflops: float) -> list[Summary]:
    """One ``Summary`` per regime that has rows, and one over all of them when there are several."""
    groups = [(regime.name, [row for row in rows if regime.holds(row.m)]) for regime in REGIMES]
    groups = [(name, group) for name, group in groups if group]
    if len(groups) > 1:
        groups.append(("all", list(rows)))
    return [_summary(name, group, tflops) for name, group in groups]


def _summary(name: str, rows: Sequence[BenchRow], tflops: float) -> Summary:
    speedups = [row.speedup for row in rows]
    fractions = [row.roofline_fraction(tflops) for row in rows]
    chained = [row.chained_fraction(tflops) for row in rows]
    means_and_worst = [value for of in (speedups, fractions, chained) for value in (geomean(of), min(of))]
    return Summary(name, len(rows), *means_and_worst)


def geomean(values: Iterable[float]) -> float:
    """The geometric mean; a ValueError when there is nothing to average."""
    logs = [math.log(value) for value in values]
    if not logs:
        raise ValueError("the geometric mean of no values is undefined")
    return math.exp(sum(logs) / len(logs))


def measure(measurer: Measurer, choices: Sequence[tuple[Problem, Artifact, Plan]]) -> Iterator[BenchRow | Measurement]:
    """Time each choice beside cuBLAS and the read floor, interleaved; one that fails is yielded as it was measured."""
    for problem, artifact, plan in choices:
        baseline, (found,) = measurer.compare(problem, [(artifact, plan)])
        if not found.ok or found.us is None or found.relative_error is None:
            yield found
            continue
        yield BenchRow(
            problem.n, problem.k, problem.m, problem.weight_format, problem.act_dtype,
            found.us, found.us_low or found.us, found.us_high or found.us, plan.key,
            baseline.read_floor_us, baseline.cublas_us, found.relative_error, found.chained_us or found.us,
        )  # fmt: skip


def write_csv(path: Path, rows: Iterable[BenchRow]) -> None:
    """Write the rows sorted by shape, m and formats; the file appears whole or not at all."""
    # Four significant digits are below the spread of any of these times, and keep the diff of two runs readable.
    csv_rows.write(path, BenchRow, sorted(rows, key=lambda r: r.problem), digits=4)


def read_csv(path: Path) -> list[BenchRow]:
    """The rows of a bench.csv; a ValueError that names the file and line when it is not one."""
    return csv_rows.read(path, BenchRow, "a bench")
