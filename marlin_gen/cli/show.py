"""``show``: a dispatch table, as people read it."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from marlin_gen import bench
from marlin_gen.cli import gpus, speedups
from marlin_gen.cli.arguments import ONLY_DTYPES_HELP, ONLY_FORMATS_HELP, Kind, only_kinds
from marlin_gen.cli.console import note, out, print_json, table
from marlin_gen.cost_model import attainable_tflops
from marlin_gen.formats import FORMATS
from marlin_gen.installed import find_tables
from marlin_gen.models import parse_shape
from marlin_gen.table import DispatchTable
from marlin_gen.table_archive import opened
from marlin_gen.table_row import TableRow


def show(
    source: Annotated[Path | None, typer.Argument(help="A table's folder or archive; default: the one in use.")] = None,
    gpu: Annotated[str | None, typer.Option(help="The start of a table's name, as h100; default: this GPU's.")] = None,
    shapes: Annotated[str | None, typer.Option(help="Only these, as 4096x4096,...")] = None,
    formats: Annotated[str | None, typer.Option("--format", help=ONLY_FORMATS_HELP)] = None,
    dtypes: Annotated[str | None, typer.Option("--dtype", help=ONLY_DTYPES_HELP)] = None,
    plans: Annotated[bool, typer.Option("--plans", help="Show which kernel each cell runs.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print JSON for machines.")] = False,
) -> None:
    """Show a dispatch table: times, speedup over cuBLAS, fraction of the roofline."""
    with opened(source) if source else nullcontext(find_tables()) as tables:
        found = tables[0] if source and not gpu and len(tables) == 1 else choose_table(gpu, tables)
    loosest = min(FORMATS, key=lambda name: FORMATS[name].group_size)  # a table may hold what its smaller groups allow
    sizes = {parse_shape(word, loosest) for word in shapes.split(",") if word.strip()} if shapes else None
    is_wanted = only_kinds(formats, dtypes)
    of_kind = [row for row in found.rows if is_wanted(Kind.of(row.problem))]
    rows = [row for row in of_kind if sizes is None or (row.problem.n, row.problem.k) in sizes]
    if not rows:
        known = ", ".join(f"{n}x{k}" for n, k in sorted({(r.problem.n, r.problem.k) for r in of_kind}))
        if not of_kind:
            known = ", ".join(sorted({str(Kind.of(r.problem)) for r in found.rows}))
        asked = " ".join(word for word in (shapes, formats, dtypes) if word) or "anything"
        raise ValueError(f"the table of {found.gpu.slug} has no row for {asked}; it has {known or 'no rows at all'}")
    if json:
        summaries = bench.summarise(speedups.bench_rows(rows), attainable_tflops(found.gpu))
        print_json({
            "gpu": found.gpu.to_json(), "folder": str(source or found.folder), "runs": list(found.runs),
            "rows": [speedups.as_json(row, found.gpu) for row in rows],
            "summary": [asdict(summary) for summary in summaries],
        })  # fmt: skip
        return
    kinds = sorted({Kind.of(row.problem) for row in rows})
    for kind in kinds:
        title = f"{found.gpu.name}, {kind}" if len(kinds) > 1 else found.gpu.name
        _print([row for row in rows if Kind.of(row.problem) == kind], found, title, plans)
    note(f"{len(rows)} rows, {len(found.kernels)} kernels; {_when(found)}{source or found.folder}")


def _print(rows: Sequence[TableRow], found: DispatchTable, title: str, plans: bool) -> None:
    if plans:
        lines = [(f"{r.problem.n}x{r.problem.k}", str(r.problem.m), r.plan.key) for r in rows]
        out.print(table(title, ("n x k", ">m", "plan"), lines))
    else:
        out.print(speedups.speedup_table(rows, found.gpu, title))
    out.print(speedups.summary_table(rows, found.gpu))


def choose_table(gpu: str | None, tables: list[DispatchTable]) -> DispatchTable:
    """The table that ``--gpu`` names, else this GPU's, else the only one there is; a ValueError that lists them."""
    if gpu is None and (here := gpus.this_gpu()):
        matching = [found for found in tables if here.same_class(found.gpu)]
        if not matching:
            raise ValueError(f"no table for this GPU ({here.slug}); make one with marlin-gen tune, or name one of"
                             f" {_names(tables)} with --gpu")  # fmt: skip
        return matching[0]
    matching = [found for found in tables if found.gpu.slug.startswith(gpu or "")]
    distinct = {found.gpu.slug for found in matching}
    if len(distinct) != 1:
        wanted = f"--gpu {gpu} names {len(distinct)} tables" if gpu else "there is no GPU here"
        raise ValueError(f"{wanted}; name one with --gpu: {_names(tables)}")
    return matching[0]


def _names(tables: list[DispatchTable]) -> str:
    return ", ".join(dict.fromkeys(found.gpu.slug for found in tables)) or "none are here, marlin-gen tune makes one"


def _when(found: DispatchTable) -> str:
    dates = [str(run["date"]) for run in found.runs if "date" in run and "export" not in run]
    return f"tuned {dates[-1]}; " if dates else ""
