"""``bench --sustained``: one cell without a pause, beside cuBLAS in the same run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from marlin_gen import sustained
from marlin_gen.cli.console import note, out, print_json, table
from marlin_gen.cli.progress import cells_progress
from marlin_gen.config import Plan
from marlin_gen.measurement import Artifact, Measurer
from marlin_gen.problem import Problem
from marlin_gen.sustained import SustainedRow


def check_one(problems: Sequence[Problem]) -> None:
    """A ValueError unless there is exactly one cell."""
    if len(problems) != 1:
        raise ValueError(
            f"--sustained runs one cell, not {len(problems)}; name it, as --shapes 28672x4096 --tokens 4096"
        )


def run(
    measurer: Measurer, problem: Problem, artifact: Artifact, plan: Plan, seconds: float, path: Path, json: bool
) -> None:
    """Run both, write the CSV, print what each kept of its first second."""
    rows: list[SustainedRow] = []
    with cells_progress(round(2 * seconds), "sustained") as advance:
        for row in sustained.measure(measurer, problem, artifact, plan, seconds):
            if not rows or int(rows[-1].seconds) != int(row.seconds) or rows[-1].kernel != row.kernel:
                advance(f"{row.kernel}: {row.tflops:.0f} TFLOP/s, {row.sm_clock_mhz or 0:.0f} MHz")
            rows.append(row)
    sustained.write_csv(path, rows)
    runs = [[row for row in rows if row.kernel == name] for name in dict.fromkeys(row.kernel for row in rows)]
    if json:
        kept = {run[0].kernel: sustained.kept_share(run) for run in runs}
        print_json({"csv": str(path), "kept": kept, "rows": [vars(row) for row in rows]})
        return
    columns = ("kernel", ">first s", ">last s", ">kept", ">MHz at the end", ">W", ">C")
    out.print(table(f"{problem.n}x{problem.k} m={problem.m}, TFLOP/s", columns, (_line(run) for run in runs)))
    note(f"written to {path}")


def _line(run: Sequence[SustainedRow]) -> tuple[str, ...]:
    share, last = sustained.kept_share(run), run[-1]
    first = [row.tflops for row in run if row.seconds <= 1.0] or [run[0].tflops]
    start = sum(first) / len(first)
    card = ("-" if v is None else f"{v:.0f}" for v in (last.sm_clock_mhz, last.power_w, last.temperature_c))
    return (run[0].kernel, f"{start:.0f}", f"{start * share:.0f}", f"{share:.1%}", *card)
