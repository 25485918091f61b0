"""Times what a dispatch table promises beyond its own rows: between its token counts, at other shapes, on another GPU.

    python tools/offgrid.py cliffs --table tuned/<gpu> --csv cliffs.csv
    marlin-gen tune $(python tools/offgrid.py regret --shapes) --out unseen --record
    python tools/offgrid.py regret --table tuned/<gpu> --tuned unseen/<gpu> --csv regret.csv
    python tools/offgrid.py transfer --from tuned/<gpu> --tuned tuned/<this gpu> --csv transfer.csv

Plans of one problem are timed interleaved, in the finals. Kernels are those that the tables ship, the first-named
table's where both have one; the rest are compiled first. The CSV is written after every row.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(1, str(Path(__file__).resolve().parent))

from plan_timer import Question, Timer

from marlin_gen import csv_rows
from marlin_gen.arch import Gpu
from marlin_gen.bench import geomean
from marlin_gen.cli import gpus
from marlin_gen.cli.console import out
from marlin_gen.cli.progress import cells_progress
from marlin_gen.cli.root import USER_ERRORS
from marlin_gen.dispatch import Dispatcher
from marlin_gen.families import FAMILIES
from marlin_gen.formats import DEFAULT_DTYPE, DEFAULT_FORMAT
from marlin_gen.problem import Problem
from marlin_gen.record import load_recording
from marlin_gen.replay import recording_name
from marlin_gen.table import FILE_NAME, DispatchTable
from marlin_gen.table_row import TableRow

OFF_GRID = (3, 5, 12, 17, 24, 33, 40, 65, 100, 200, 300, 1000, 3000)  # m that tables do not have
# (n, k) that neither llama-3.1-8b nor 8192x8192 and 28672x8192 cover. Projections are fused as in models.py.
UNSEEN_SHAPES = (
    (1024, 8192),  # Llama 3.1 70B, k_proj or v_proj by itself
    (8192, 1024),  # Llama 3.1 70B, o_proj on one of 8 ranks
    (7168, 8192),  # Llama 3.1 70B, gate_up_proj on one of 8 ranks
    (2048, 8192),  # Llama 3.2 1B, down_proj
    (4608, 3584),  # Qwen2.5 7B, qkv_proj
    (3584, 18944),  # Qwen2.5 7B, down_proj
    (5120, 5120),  # Qwen2.5 14B, o_proj
    (5120, 32768),  # Mistral Small 24B, down_proj
    (43008, 5376),  # Gemma 3 27B, gate_up_proj
    (16384, 3072),  # Phi-3 mini, gate_up_proj
)


@dataclass(frozen=True)
class Cell:
    """What every CSV begins with. Times are medians in microseconds, configs are plan keys."""

    n: int
    k: int
    m: int
    us: float
    config: str


@dataclass(frozen=True)
class Cliff(Cell):
    """A token count between two of a table's rows, beside the next larger one."""

    grid_m: int
    grid_us: float  # of grid_m tokens, with the plan that serves them
    ratio: float  # us / grid_us; above 1.0 fewer tokens take longer than more


@dataclass(frozen=True)
class Regret(Cell):  # what the look-up gives at a shape that its table lacks, beside what a tune found there
    tuned_us: float
    tuned_config: str
    tried: int  # kernels that the tune timed there; 0 where its recording does not lie beside its table
    regret: float  # us / tuned_us; 1.0 = nothing lost


@dataclass(frozen=True)
class Transfer(Cell):  # the best of another GPU's winners, beside what a tune found here
    tuned_us: float
    tuned_config: str
    loss: float  # us / tuned_us; 1.0 = nothing lost


LIMITS = {Cliff: 1.10, Regret: 1.15, Transfer: 1.15}  # the summary counts what is above


def answers(row_type: Any, questions: list[Question], timer: Timer, path: Path) -> list[Any]:
    """The rows; the file is written after each, so that it can be read at any time."""
    rows: list[Any] = []
    with cells_progress(len(questions), row_type.__name__.lower()) as advance:
        for q in questions:
            p, found = q.problem, timer.answer(q)
            if found:
                plan, us, other_us = found
                other: tuple[Any, ...] = (q.other.m, other_us) if row_type is Cliff else (other_us, q.other_plan.key)
                other += (q.tried,) if row_type is Regret else ()
                rows.append(row_type(p.n, p.k, p.m, us, plan.key, *other, us / other_us))
                csv_rows.write(path, row_type, rows, digits=4)
            advance(f"{p.n}x{p.k} m={p.m}: {f'{us / other_us:.3f}' if found else 'no time'}")
    if not rows:
        raise ValueError(f"none of the {len(questions)} cells could be timed; marlin-gen doctor says what is wrong")
    return rows


def summary(rows: Sequence[Any], asked: int) -> str:
    """One line on the last column."""
    column, limit = csv_rows.columns_of(type(rows[0]))[-1], LIMITS[type(rows[0])]
    ratios = [getattr(row, column) for row in rows]
    at = rows[ratios.index(max(ratios))]
    tried = [row.tried for row in rows if isinstance(row, Regret)]
    effort = f", beside the best of {min(tried)} to {max(tried)} kernels" if any(tried) else ""
    return (
        f"{column}: {len(rows)} of {asked} cells, geomean {geomean(ratios):.3f}, worst {max(ratios):.3f} at"
        f" {at.n}x{at.k} m={at.m}, {sum(ratio > limit for ratio in ratios)} above {limit:.2f}{effort}"
    )


def rows_of(table: DispatchTable) -> list[TableRow]:
    """Those of the default formats: others have kernels of their own, and the files here no column for them."""
    kind = DEFAULT_FORMAT, DEFAULT_DTYPE
    return [row for row in table.rows if row.problem.kind == kind]


def cliffs(gpu: Gpu, table: DispatchTable) -> Iterator[Question]:
    """Every shape at every off-grid m, and at the next larger m of its rows."""
    dispatcher = Dispatcher(gpu, [table])
    grids: dict[Problem, list[int]] = {}  # by the shape without tokens; rows are sorted
    for row in rows_of(table):
        grids.setdefault(replace(row.problem, m=0), []).append(row.problem.m)
    for shape, grid in grids.items():
        for m in OFF_GRID:
            if m < grid[-1] and m not in grid:
                p, larger = replace(shape, m=m), replace(shape, m=grid[bisect_left(grid, m)])
                plan, larger_plan = (next(dispatcher.choose(asked)).plan for asked in (p, larger))
                yield Question(p, [plan], larger, larger_plan)


def regret(gpu: Gpu, table: DispatchTable, tuned: DispatchTable) -> Iterator[Question]:
    """Every row of ``tuned`` whose shape ``table`` has not seen."""
    dispatcher = Dispatcher(gpu, [table])
    seen = {(row.problem.n, row.problem.k) for row in rows_of(table)}
    path = (tuned.folder or Path()) / recording_name(DEFAULT_FORMAT, DEFAULT_DTYPE)
    tried = load_recording(path).kernels_tried() if path.exists() else Counter[Problem]()
    for row in rows_of(tuned):
        if (row.problem.n, row.problem.k) not in seen:
            plan = next(dispatcher.choose(row.problem)).plan
            yield Question(row.problem, [plan], row.problem, row.plan, tried[row.problem])


def transfer(gpu: Gpu, table: DispatchTable, tuned: DispatchTable) -> Iterator[Question]:
    """Every row of ``tuned``, with all plans of ``table`` that can serve it."""
    plans = dict.fromkeys(row.plan for row in rows_of(table))
    for row in rows_of(tuned):
        usable = [p for p in plans if not FAMILIES.of(p.config).reject_problem(p.config, row.problem)]
        yield Question(row.problem, usable, row.problem, row.plan)


def run(options: argparse.Namespace) -> None:
    """Ask what ``options`` say on one device and print the summary; a ValueError where that makes no sense."""
    folders = [folder for folder in (options.table, options.tuned) if folder]
    tables = [table for folder in folders if (table := DispatchTable.load(folder)) and table.rows]
    if len(tables) < len(folders):
        raise ValueError(f"no usable {FILE_NAME} in one of {', '.join(map(str, folders))}; name what tune wrote")
    with tempfile.TemporaryDirectory(prefix="marlin_gen-") as scratch, gpus.measurer(options.device) as measurer:
        gpu, first = measurer.gpu, tables[0]
        if not (gpu.arch == first.gpu.arch if options.ask is transfer else gpu.related(first.gpu)):
            raise ValueError(f"{first.folder} is of {first.gpu.slug} and cannot serve {gpu.slug}; name one that can")
        if not all(gpu.same_class(tuned.gpu) for tuned in tables[1:]):
            raise ValueError(f"{options.tuned} was tuned on another GPU than this, {gpu.slug}; tune the same here")
        questions = list(options.ask(gpu, *tables))
        if not questions:
            raise ValueError(f"{first.folder} covers all that is asked; name a table that leaves something out")
        began = time.monotonic()
        timer = Timer(measurer, tables, questions, Path(scratch))
        compiled = time.monotonic()
        out.print(summary(answers(options.row, questions, timer, options.csv), len(questions)), soft_wrap=True)
        timing, compiling = (time.monotonic() - compiled) / 60, (compiled - began) / 60
    out.print(f"{timing:.2f} minutes, {timing + compiling:.2f} with compiling {timer.compiled} kernels")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    for ask, row in ((cliffs, Cliff), (regret, Regret), (transfer, Transfer)):
        command = commands.add_parser(ask.__name__, help=ask.__doc__, formatter_class=parser.formatter_class)
        command.set_defaults(ask=ask, row=row, tuned=None)
        command.add_argument("--from" if ask is transfer else "--table", dest="table", type=Path, required=True)
        if ask is not cliffs:
            command.add_argument("--tuned", type=Path, required=True, help="tuned on this GPU")
        if ask is regret:
            said = f"--shapes {','.join(f'{n}x{k}' for n, k in UNSEEN_SHAPES)}"
            command.add_argument("--shapes", action="version", version=said, help="only print tune's arguments")
        command.add_argument("--csv", type=Path, required=True, help="where to write")
        command.add_argument("--device", default="cuda:0", help="cuda:0, cuda:1, ... or replay:h100")
    try:
        run(parser.parse_args(arguments))
    except USER_ERRORS as error:
        parser.exit(2, f"error: {error}\n")


if __name__ == "__main__":
    main()
