"""The speedup table: what a dispatch table's rows gain, cell by cell and by regime."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.table import Table

from marlin_gen import bench
from marlin_gen.arch import Gpu
from marlin_gen.bench import BenchRow
from marlin_gen.cli.console import fraction, table, times, us
from marlin_gen.cost_model import attainable_tflops
from marlin_gen.table_row import TableRow

COLUMNS = ("n x k", ">m", ">us", ">default", ">cuBLAS", ">floor", ">gain", ">vs cuBLAS", ">roofline")


def roofline(row: TableRow, gpu: Gpu) -> float | None:
    """Fraction of the roofline that a row's plan reaches; None where the read floor was not measured."""
    if row.read_floor_us is None:
        return None
    return row.problem.roofline_us(row.read_floor_us, attainable_tflops(gpu)) / row.us


def speedup_table(rows: Sequence[TableRow], gpu: Gpu, title: str = "") -> Table:
    """One line a cell, a gap between shapes."""
    made = table(title, COLUMNS, [])
    before = None
    for row in rows:
        p = row.problem
        shape = f"{p.n}x{p.k}"
        if before not in (None, shape):
            made.add_section()
        made.add_row(
            shape if shape != before else "", str(p.m), f"[bold]{us(row.us)}[/]", us(row.default_us), us(row.cublas_us),
            us(row.read_floor_us), times(_ratio(row.default_us, row.us)), times(_ratio(row.cublas_us, row.us)),
            fraction(roofline(row, gpu)),
        )  # fmt: skip
        before = shape
    return made


def summary_table(rows: Sequence[TableRow], gpu: Gpu) -> Table:
    """Geometric means by regime over the rows whose yardsticks were measured."""
    lines = [
        (
            s.regime, str(s.cells), times(s.speedup), times(s.worst_speedup),
            fraction(s.roofline), fraction(s.worst_roofline),
        )
        for s in bench.summarise(bench_rows(rows), attainable_tflops(gpu))
    ]  # fmt: skip
    columns = ("regime (geometric means)", ">cells", ">vs cuBLAS", ">worst cell", ">roofline", ">worst cell")
    return table("", columns, lines)


def bench_rows(rows: Sequence[TableRow]) -> list[BenchRow]:
    """The rows that have both yardsticks, as rows of a bench."""
    return [
        BenchRow(
            r.problem.n, r.problem.k, r.problem.m, r.problem.weight_format, r.problem.act_dtype,
            r.us, r.us_low, r.us_high, r.plan.key, r.read_floor_us, r.cublas_us, r.relative_error, r.us,
        )
        for r in rows
        if r.read_floor_us is not None and r.cublas_us is not None
    ]  # fmt: skip


def as_json(row: TableRow, gpu: Gpu) -> dict[str, Any]:
    """A row for machines: the table's fields, the plan as its key, and the roofline fraction."""
    part = roofline(row, gpu)
    return {
        **row.to_json(),
        "plan": row.plan.key,
        "default_plan": row.default_plan.key if row.default_plan else None,
        "roofline_fraction": None if part is None else round(part, 3),
    }


def _ratio(slow: float | None, fast: float) -> float | None:
    return None if slow is None else slow / fast
