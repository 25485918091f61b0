"""Whether a table still tells the truth: a sample of its rows, timed again beside cuBLAS.

Cards of one kind differ by some per cent where power decides, and cuBLAS with them: what the two share is the card's.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from marlin_gen.driver import LaunchError
from marlin_gen.measurement import Artifact, Baseline, Measurement, Measurer
from marlin_gen.table import DispatchTable
from marlin_gen.table_row import TableRow


@dataclass(frozen=True)
class Drift:
    """One row timed again. ``now`` is None when its kernel is missing or damaged, or was never recorded."""

    row: TableRow
    now: Measurement | None
    yardsticks: Baseline | None = None  # timed beside it

    @property
    def ratio(self) -> float | None:
        """Time now over the table's; None where nothing was timed."""
        return self.now.us / self.row.us if self.now and self.now.ok and self.now.us else None

    @property
    def cublas_ratio(self) -> float | None:
        """cuBLAS' time now over what the table says of it; None where either is unknown."""
        return self.yardsticks.cublas_us / self.row.cublas_us if self.yardsticks and self.row.cublas_us else None

    def fault(self, tolerance: float) -> str:
        """What is wrong, in words. Empty while the intervals overlap, and where the row moved by no more than
        ``tolerance`` (0.05: 5 %), be it by itself or beside cuBLAS.
        """
        if self.now is None:
            return "not timed: the kernel is missing or damaged, or not in the recording"
        if self.ratio is None:
            return f"{self.now.status} {self.now.detail}".rstrip()
        low, high = self.now.us_low or self.now.us or 0.0, self.now.us_high or self.now.us or 0.0
        beside = self.ratio / (self.cublas_ratio or 1)
        if high < self.row.us_low and max(self.ratio, beside) < 1 - tolerance:
            return "faster"
        return "slower" if low > self.row.us_high and min(self.ratio, beside) > 1 + tolerance else ""


def sample(rows: Sequence[TableRow], count: int, seed: int) -> list[TableRow]:
    """``count`` of the rows (all, if there are not more), sorted; equal arguments choose equal rows."""
    ordered = sorted(rows, key=lambda row: row.problem)
    picked = random.Random(seed).sample(range(len(ordered)), min(count, len(ordered)))
    return [ordered[i] for i in sorted(picked)]


def measure(measurer: Measurer, table: DispatchTable, rows: Sequence[TableRow], scratch: Path) -> Iterator[Drift]:
    """Time each row's plan with the table's own kernel, as finals are timed. ``scratch``: an empty folder.

    A ValueError when the table is of another kind of GPU than the measurer.
    """
    if not measurer.gpu.same_class(table.gpu):
        raise ValueError(f"the table is of {table.gpu.slug}, what measures is {measurer.gpu.slug}; verify it there")
    for row in rows:
        spec = row.specs(table.gpu)[0]
        found = table.find(spec.key)
        yield _timed(measurer, row, found[0].artifact(spec, found[1], scratch)) if found else Drift(row, None)


def _timed(measurer: Measurer, row: TableRow, artifact: Artifact) -> Drift:
    entries = [(artifact, row.plan)]
    try:
        yardsticks, measured = measurer.compare(row.problem, entries)
    except (LaunchError, ValueError):  # the kernel crashes, or a recording that has no yardsticks
        yardsticks, measured = None, measurer.finals(row.problem, entries)
    return Drift(row, measured[0], yardsticks) if measured else Drift(row, None)
