"""What a change of the templates gains or costs: the kernels of two tables, plan by plan, interleaved on one GPU.

    cp -r tuned/<gpu> before                       # ahead of the change
    python tools/rebuild_table.py tuned/<gpu>      # after it
    python tools/time_diff.py before tuned/<gpu> --csv diff.csv --tokens 32,64

Times every plan that a row of the second table names and both have a kernel of, on the row's problem. Kernels that take
other arguments cannot be compared: a table of another launch_version is not read. ``render_diff.py`` says, without a
GPU, which kernels a change alters. Exit status 1 where a kernel fails.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from marlin_gen import csv_rows
from marlin_gen.bench import REGIMES, geomean
from marlin_gen.cli import gpus
from marlin_gen.cli.arguments import token_counts
from marlin_gen.cli.console import note, out
from marlin_gen.cli.progress import cells_progress
from marlin_gen.cli.root import USER_ERRORS
from marlin_gen.config import KernelSpec
from marlin_gen.measurement import Artifact, Measurer
from marlin_gen.table import FILE_NAME, DispatchTable
from marlin_gen.table_row import TableRow


@dataclass(frozen=True)
class Change:
    """One plan on one problem. Times are medians in microseconds."""

    n: int
    k: int
    m: int
    weight_format: str
    act_dtype: str
    config: str  # plan key
    before_us: float
    after_us: float
    ratio: float  # below 1.0 the change gains


def kernels_of(table: DispatchTable, specs: Iterable[KernelSpec], scratch: Path) -> dict[KernelSpec, Artifact]:
    """Those of ``specs`` that lie in the table, intact."""
    scratch.mkdir()
    found: dict[KernelSpec, Artifact] = {}
    for spec in specs:
        cubin, kernel = table.cubin(spec.key), table.intact_kernel(spec.key)
        if cubin and kernel:
            found[spec] = kernel.artifact(spec, cubin, scratch)
    return found


def changes(
    measurer: Measurer, before: DispatchTable, after: DispatchTable, rows: Sequence[TableRow], scratch: Path
) -> Iterator[Change | None]:
    """For each of ``rows`` whose kernel both tables have what it took, or None where one of the two failed."""
    asked = [(row, row.specs(measurer.gpu)[0]) for row in rows]
    specs = dict.fromkeys(spec for _, spec in asked)
    old, new = (kernels_of(table, specs, scratch / name) for name, table in (("before", before), ("after", after)))
    both = [(row, spec) for row, spec in asked if spec in old and spec in new]
    note(f"{len(both)} of {len(rows)} rows have a kernel in both tables")
    with cells_progress(len(both), "change") as advance:
        for row, spec in both:
            p = row.problem
            one, other = measurer.finals(p, [(old[spec], row.plan), (new[spec], row.plan)])
            if one.us and other.us:
                ratio = other.us / one.us
                advance(f"{p.n}x{p.k} m={p.m}: {ratio:.3f}")
                yield Change(p.n, p.k, p.m, p.weight_format, p.act_dtype, row.plan.key, one.us, other.us, ratio)
            else:
                advance(f"{p.n}x{p.k} m={p.m}: {one.status} before, {other.status} after")
                yield None


def summary(found: Sequence[Change]) -> str:
    """A line for each regime: mean, best and worst ratio."""
    lines = []
    for regime in REGIMES:
        there = sorted((change for change in found if regime.holds(change.m)), key=lambda change: change.ratio)
        if there:
            ends = " to ".join(f"{c.ratio:.3f} ({c.n}x{c.k} m={c.m})" for c in (there[0], there[-1]))
            lines.append(f"{regime.name}: {geomean([c.ratio for c in there]):.3f} in the mean of {len(there)}, {ends}")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", type=Path, help="a table's folder")
    parser.add_argument("after", type=Path, help="the other's")
    parser.add_argument("--tokens", help="only these m, as 32,64")
    parser.add_argument("--csv", type=Path, help="where to write every row")
    parser.add_argument("--device", default="cuda:0", help="cuda:0, cuda:1, ... or replay:h100")
    options = parser.parse_args(arguments)
    try:
        before, after = (DispatchTable.load(folder) for folder in (options.before, options.after))
        if not before or not after:
            raise ValueError(f"no usable {FILE_NAME} in {options.after if before else options.before}")
        wanted = token_counts(options.tokens) if options.tokens else None
        rows = [row for row in after.rows if wanted is None or row.problem.m in wanted]
        if not rows:
            raise ValueError(f"no row of {options.after} has --tokens {options.tokens}")
        with gpus.measurer(options.device) as measurer, tempfile.TemporaryDirectory(prefix="marlin_gen-") as scratch:
            answers: list[Change | None] = []
            for answer in changes(measurer, before, after, rows, Path(scratch)):
                answers.append(answer)
                if options.csv:  # after every row, so that it can be read at any time
                    csv_rows.write(options.csv, Change, filter(None, answers), digits=4)
    except USER_ERRORS as error:
        parser.exit(2, f"error: {error}\n")
    found = [change for change in answers if change]
    out.print(summary(found) or "nothing could be compared", soft_wrap=True)
    return 0 if found and len(found) == len(answers) else 1


if __name__ == "__main__":
    sys.exit(main())
