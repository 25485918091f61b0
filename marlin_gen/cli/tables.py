"""``import``, ``merge`` and ``diff``: tables from elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from marlin_gen import env
from marlin_gen.cli.console import note, out, print_json, table, us
from marlin_gen.installed import tables_below
from marlin_gen.problem import Problem
from marlin_gen.table import PREFERENCES, DispatchTable
from marlin_gen.table_archive import held, opened
from marlin_gen.table_diff import TableDiff
from marlin_gen.table_diff import diff as difference
from marlin_gen.table_publish import publish

Prefer = Annotated[str, typer.Option(help=f"Whose row of a problem that both have: {', '.join(PREFERENCES)}.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for machines.")]
SOURCE_HELP = "A folder of tables, or an archive made by `marlin-gen export`."


@dataclass(frozen=True)
class Taken:
    """What became of one table that was taken in."""

    table: str  # the folder it is in now
    rows_added: int
    rows_replaced: int
    rows_kept: int  # not taken: the other's row was preferred, or its build of the kernel
    rows_dropped: int  # of before: timed with a build of the kernel that does not stay
    rows_damaged: int  # not read, or without an intact kernel
    kernels: int


def import_(
    source: Annotated[Path, typer.Argument(help=SOURCE_HELP)],
    to: Annotated[Path | None, typer.Option(help="Folder of tables to add to; default: the user's.")] = None,
    prefer: Prefer = "newer",
    json: AsJson = False,
) -> None:
    """Add tables from a folder or an archive to those used here; the imported count as newer."""
    _finish(_take_in(source, to or env.user_data_dir() / "tuned", prefer), json)


def merge(
    sources: Annotated[list[Path], typer.Argument(help=f"{SOURCE_HELP} Later ones count as newer.")],
    to: Annotated[Path, typer.Option("--out", help="Folder of tables to write to; what it holds is the oldest.")],
    prefer: Prefer = "faster",
    json: AsJson = False,
) -> None:
    """Merge tables, as of several machines with equal GPUs, into one folder."""
    _finish([taken for source in sources for taken in _take_in(source, to, prefer)], json)


def diff(
    old: Annotated[Path, typer.Argument(help=SOURCE_HELP)],
    new: Annotated[Path, typer.Argument(help=SOURCE_HELP)],
    json: AsJson = False,
) -> None:
    """Show how two tables differ: rows, plans, times, kernels. Exits with 1 if they do."""
    with opened(old) as before, opened(new) as after:
        found = {name: difference(*pair) for name, pair in _pairs(before, after).items()}
    if json:
        print_json({name: _diff_json(changes) for name, changes in found.items()})
    else:
        for name, changes in found.items():
            _print_diff(name, changes)
    if not all(changes.is_empty for changes in found.values()):
        raise typer.Exit(1)


def _take_in(source: Path, folder: Path, prefer: str) -> list[Taken]:
    if prefer not in PREFERENCES:
        raise ValueError(f"--prefer {prefer!r} is not one of {', '.join(PREFERENCES)}")
    done = []
    with opened(source) as tables:
        for found in tables:
            target = _place(folder, found)
            if found.folder and target.resolve() == found.folder.resolve():
                raise ValueError(f"{source} is the folder to write to; name another one")
            with held(found) as now:
                done.append(_publish(now, target, prefer))
    return done


def _place(folder: Path, found: DispatchTable) -> Path:
    """Where the table belongs: with one of the same kind of GPU, which may have another name."""
    named = folder / found.gpu.slug
    same = (there.folder for there in tables_below(folder) if there.folder and there.gpu.same_class(found.gpu))
    return named if named.exists() else next(same, named)


def _publish(found: DispatchTable, target: Path, prefer: str) -> Taken:
    whole = found.intact()
    old = DispatchTable.load(target)
    before = {row.problem for row in old.rows} if old else set()
    now = publish(target, whole, prefer=prefer)
    rows = {row.problem: row for row in now.rows}
    taken = [p for r in whole.rows if (p := r.problem) in rows and (rows[p].plan, rows[p].us) == (r.plan, r.us)]
    added, replaced = len(rows.keys() - before), sum(problem in before for problem in taken)
    lost, dropped = len(found.rows) - len(whole.rows), len(before - rows.keys())
    return Taken(str(target), added, replaced, len(whole.rows) - added - replaced, dropped, lost, len(now.kernels))


def _finish(done: Sequence[Taken], json: bool) -> None:
    if json:
        print_json({"tables": [vars(taken) for taken in done]})
    else:
        columns = ("table", ">rows added", ">replaced", ">kept", ">dropped", ">damaged", ">kernels")
        lines = ([escape(taken.table), *(str(v) for v in list(vars(taken).values())[1:])] for taken in done)
        out.print(table("", columns, lines))
    if damaged := sum(taken.rows_damaged for taken in done):
        note(f"{damaged} rows were left out, as their kernels are missing or damaged; copy the table again")
        raise typer.Exit(1)


Pair = tuple[DispatchTable, DispatchTable]


def _pairs(before: Sequence[DispatchTable], after: Sequence[DispatchTable]) -> dict[str, Pair]:
    """Tables of the same kind of GPU, by their names; a ValueError when one has no partner, or shares its name."""
    pairs: dict[str, Pair] = {}
    for one, other in product(before, after):
        if one.gpu.same_class(other.gpu):
            name = " ".join(dict.fromkeys((one.gpu.slug, other.gpu.slug)))
            if name in pairs:
                raise ValueError(f"there are several tables of {name}; name the folder of one, on either side")
            pairs[name] = (one, other)
    alone = [t.gpu.slug for t in (*before, *after) if not any(t in pair for pair in pairs.values())]
    if alone:
        raise ValueError(f"only one side has a table of {', '.join(alone)}; name folders of the same GPUs' tables")
    return pairs


def _diff_json(found: TableDiff) -> dict[str, object]:
    return {
        "same": found.is_empty,
        "added": [row.to_json() for row in found.added],
        "removed": [row.to_json() for row in found.removed],
        "changed": [
            {
                **vars(c.old.problem), "old_plan": c.old.plan.key, "new_plan": c.new.plan.key,
                "old_us": c.old.us, "new_us": c.new.us, "ratio": round(c.ratio, 4), "clear": c.is_clear,
            }
            for c in found.changed
        ],
        **{name: list(getattr(found, name)) for name in ("kernels_added", "kernels_removed", "kernels_rebuilt")},
    }  # fmt: skip


def _print_diff(name: str, found: TableDiff) -> None:
    lines = [("+", _cell(row.problem), "", row.plan.key, "-", us(row.us), "") for row in found.added]
    lines += [("-", _cell(row.problem), row.plan.key, "", us(row.us), "-", "") for row in found.removed]
    for c in found.changed:
        plans = (c.old.plan.key, c.new.plan.key if c.new.plan != c.old.plan else "the same")
        ratio = f"{c.ratio:.3f}{'' if c.is_clear else ' ~'}"  # ~: the 95 % intervals overlap
        lines.append(("*", _cell(c.old.problem), *plans, us(c.old.us), us(c.new.us), ratio))
    if lines:
        out.print(table(name, ("", "problem", "old plan", "new plan", ">old us", ">new us", ">ratio"), lines))
    note(
        f"{name}: {len(found.added)} rows added, {len(found.removed)} removed, {len(found.changed)} changed; kernels:"
        f" {len(found.kernels_added)} added, {len(found.kernels_removed)} removed, {len(found.kernels_rebuilt)} rebuilt"
    )


def _cell(p: Problem) -> str:
    return f"{p.n}x{p.k} m={p.m} {p.weight_format} {p.act_dtype}"
