"""``verify``: time a sample of a table's rows again and report the drift."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from marlin_gen import drift
from marlin_gen.bench import geomean
from marlin_gen.cli import arguments, gpus
from marlin_gen.cli.console import note, out, print_json, table, times, us
from marlin_gen.cli.progress import cells_progress
from marlin_gen.drift import Drift
from marlin_gen.installed import find_tables
from marlin_gen.measurement import Measurer
from marlin_gen.table import DispatchTable
from marlin_gen.table_archive import opened


def verify(
    source: Annotated[Path | None, typer.Argument(help="A table's folder or archive; default: the one in use.")] = None,
    rows: Annotated[int, typer.Option(help="How many rows to time.")] = 12,
    seed: Annotated[int, typer.Option(help="Of the choice of rows.")] = 0,
    tolerance: Annotated[str, typer.Option(help="Drift that is no fault.")] = "5%",
    device: Annotated[str, typer.Option(help="auto, cuda:0, or replay:h100 (no GPU needed).")] = "auto",
    json: Annotated[bool, typer.Option("--json", help="Print JSON for machines.")] = False,
) -> None:
    """Time a sample of a table's rows again, with its own kernels; exits with 1 if one drifted or failed.

    Where cuBLAS beside it moved as far a row has not drifted: cards of one kind differ, and so do hot and cool ones.
    """
    allowed = arguments.percent("--tolerance", tolerance)
    if rows < 1:
        raise ValueError(f"--rows {rows} is not a positive number of rows")
    with gpus.measurer(device) as measurer:
        if source is None:
            slug, found = _verified(find_tables(), measurer, rows, seed)
        else:
            with opened(source) as tables:
                slug, found = _verified(tables, measurer, rows, seed)
    faults = [one for one in found if one.fault(allowed)]
    mean, cublas = _mean([one.ratio for one in found]), _mean([one.cublas_ratio for one in found])
    if json:
        rows_json = [_as_json(one, allowed) for one in found]
        print_json({"table": slug, "mean_ratio": mean, "cublas_mean_ratio": cublas, "rows": rows_json})
    else:
        columns = ("problem", "plan", ">table us", ">now us", ">ratio", ">cuBLAS", "fault")
        out.print(table(slug, columns, (_line(one, allowed) for one in found)))
        means = f"{times(mean)} the table's time in the mean, cuBLAS {times(cublas)}"
        note(f"{len(found)} rows timed again: {means}, {len(faults)} at fault")
    if faults:
        raise typer.Exit(1)


def _verified(tables: list[DispatchTable], measurer: Measurer, count: int, seed: int) -> tuple[str, list[Drift]]:
    matching = [found for found in tables if measurer.gpu.same_class(found.gpu)]
    if not matching:
        known = ", ".join(found.gpu.slug for found in tables) or "none"
        raise ValueError(f"there is no table of {measurer.gpu.slug} to verify; found: {known}")
    chosen = matching[0]
    picked = drift.sample(chosen.rows, count, seed)
    found: list[Drift] = []
    scratch_folder = tempfile.TemporaryDirectory(prefix="marlin_gen-verify-")
    with scratch_folder as scratch, cells_progress(len(picked), "verify") as go:
        for one in drift.measure(measurer, chosen, picked, Path(scratch)):
            found.append(one)
            go(f"{one.row.problem.n}x{one.row.problem.k} m={one.row.problem.m}: {times(one.ratio)}")
    return chosen.gpu.slug, found


def _mean(ratios: list[float | None]) -> float | None:
    known = [ratio for ratio in ratios if ratio is not None]
    return geomean(known) if known else None


def _line(one: Drift, allowed: float) -> tuple[str, ...]:
    p = one.row.problem
    now = one.now.us if one.now else None
    ratios = ["-" if ratio is None else f"{ratio:.3f}" for ratio in (one.ratio, one.cublas_ratio)]
    fault = f"[red]{escape(found)}[/]" if (found := one.fault(allowed)) else ""
    problem = f"{p.n}x{p.k} m={p.m} {p.weight_format} {p.act_dtype}"
    return problem, one.row.plan.key, us(one.row.us), us(now), *ratios, fault


def _as_json(one: Drift, allowed: float) -> dict[str, object]:
    return {
        **vars(one.row.problem), "plan": one.row.plan.key, "table_us": one.row.us,
        "now_us": one.now.us if one.now else None, "ratio": one.ratio,
        "cublas_ratio": one.cublas_ratio, "fault": one.fault(allowed),
    }  # fmt: skip
