"""The committed measurements of one GPU as values: its table, bench, recorded search and sustained run."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from marlin_gen import bench, sustained
from marlin_gen.bench import BenchRow
from marlin_gen.config import Plan
from marlin_gen.cost_model import attainable_tflops
from marlin_gen.record import Recording, load_recording
from marlin_gen.replay import FILE_NAME as RECORDING_FILE
from marlin_gen.sustained import SustainedRow
from marlin_gen.table import FILE_NAME as TABLE_FILE
from marlin_gen.table import DispatchTable

BENCH_FILE = "bench.csv"
MODELS_FILE = "models.csv"  # a bench of other models' layers: what look-ups give where nothing was tuned


@dataclass(frozen=True)
class Cell:
    """One problem of the bench, and what the untuned default would take beside it."""

    bench: BenchRow
    default_us: float | None  # the bench's time x (default / winner) as the tune timed those two, interleaved

    @property
    def plan(self) -> Plan:
        return Plan.from_key(self.bench.config)

    @property
    def default_speedup(self) -> float | None:
        """Of the default, over cuBLAS fp16."""
        return None if self.default_us is None else self.bench.cublas_us / self.default_us


@dataclass(frozen=True)
class GpuData:
    """What is committed for one GPU. Empty or None where the file is not there."""

    table: DispatchTable
    cells: tuple[Cell, ...]  # sorted by n, k, m
    models: tuple[BenchRow, ...]  # of MODELS_FILE
    recording: Recording | None
    sustained: tuple[SustainedRow, ...]  # run by run, in order of time
    sources: str  # the files that the pictures of the bench come from, with their hashes

    @property
    def tflops(self) -> float:
        """The attainable rate of multiplications that rooflines use."""
        return attainable_tflops(self.table.gpu)

    @property
    def benched(self) -> list[BenchRow]:
        """Every row of both benches; where they share a problem that of ``cells``, which was tuned."""
        return list({row.problem: row for row in (*self.models, *(cell.bench for cell in self.cells))}.values())

    @property
    def shapes(self) -> list[tuple[int, int]]:
        """(n, k) of the bench, smallest matrix first."""
        return sorted({(cell.bench.n, cell.bench.k) for cell in self.cells}, key=lambda s: (s[0] * s[1], s))

    def of_shape(self, n: int, k: int) -> list[Cell]:
        """The cells of one matrix, m ascending."""
        return [cell for cell in self.cells if (cell.bench.n, cell.bench.k) == (n, k)]


def load(tuned: Path) -> list[GpuData]:
    """Every GPU with a table in or below ``tuned``, in order of the folders' names; a ValueError when there is none."""
    found = [data for folder in (tuned, *sorted(tuned.glob("*/"))) if (data := load_gpu(folder))]
    if not found:
        raise ValueError(f"{tuned} has no <gpu>/{TABLE_FILE} to report on; marlin-gen tune --out {tuned} makes one")
    return found


def load_gpu(folder: Path) -> GpuData | None:
    """What lies in one folder; None without a usable table. A ValueError names a file that is there but damaged."""
    table = DispatchTable.load(folder)
    if table is None:
        return None
    files = [folder / name for name in (BENCH_FILE, MODELS_FILE, RECORDING_FILE, sustained.FILE_NAME)]
    bench_csv, models_csv, recording, sustained_csv = (path if path.exists() else None for path in files)
    return GpuData(
        table,
        _cells(table, bench.read_csv(bench_csv)) if bench_csv else (),
        tuple(bench.read_csv(models_csv)) if models_csv else (),
        load_recording(recording) if recording else None,
        tuple(sustained.read_csv(sustained_csv)) if sustained_csv else (),
        sources(folder),
    )


def _cells(table: DispatchTable, rows: list[BenchRow]) -> tuple[Cell, ...]:
    tuned = {row.problem: row for row in table.rows}
    cells = []
    for row in sorted(rows, key=lambda row: row.problem):
        known = tuned.get(row.problem)
        ratio = known.default_us / known.us if known and known.default_us else None
        cells.append(Cell(row, None if ratio is None else row.us * ratio))
    return tuple(cells)


def sources(folder: Path) -> str:
    """``bench.csv sha256:... table.json sha256:...``: kept in each picture, so that a stale one is noticed."""
    paths = [path for name in (BENCH_FILE, TABLE_FILE) if (path := folder / name).exists()]
    return " ".join(f"{path.name} sha256:{hashlib.sha256(path.read_bytes()).hexdigest()}" for path in paths)


def provenance(table: DispatchTable) -> str:
    """Date and versions of the newest tuning run that the table records, the date first."""
    tunes = [run for run in table.runs if "export" not in run]
    run = tunes[-1] if tunes else {}
    names = sorted(run, key=lambda name: (name != "date", name))
    return ", ".join(str(run[name]) if name == "date" else f"{name} {run[name]}" for name in names) or table.gpu.slug
