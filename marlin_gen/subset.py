"""Which of a table's kernels to ship: the fewest with which no row is slower than a stated regret.

The regret of a kernel on a row is how much longer its best plan took there than the row's own: 0.03 is 3 %. It is only
known where it was measured. Two times are compared only if they were taken under like conditions: finals (interleaved)
with finals, first timings with first timings. Where the row's own plan has two times the lower one counts, so that an
unlucky timing of the winner does not flatter its rivals: the error is on the side of more kernels.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

from marlin_gen.config import KernelConfig, KernelSpec, Plan
from marlin_gen.measurement import Measurement
from marlin_gen.problem import Problem
from marlin_gen.record import Recording
from marlin_gen.set_cover import smallest_cover
from marlin_gen.table import DispatchTable
from marlin_gen.table_row import TableRow

CURVE = (0.0, 0.005, 0.01, 0.02, 0.03, 0.05, 0.1, 0.2)  # regrets at which the size is shown


@dataclass(frozen=True)
class Option:
    """A row as it would stand with another kernel, and what that costs."""

    row: TableRow
    regret: float  # 0.03: 3 % longer than the row's own plan


Options = Mapping[Problem, Mapping[str, Option]]  # by row, by KernelSpec.key


@dataclass(frozen=True)
class Selection:
    """A choice of kernels and the table's rows with the best plan that each leaves."""

    limit: float  # the regret that was allowed
    kernels: tuple[str, ...]  # KernelSpec keys, sorted; those that had to be kept included
    rows: tuple[TableRow, ...]
    worst: float  # regret over the rows
    mean: float  # geometric
    least: int  # no choice of fewer kernels serves within the limit


def options_of(table: DispatchTable, recordings: Sequence[Recording], usable: Collection[str]) -> Options:
    """What was measured to serve each row, among the kernels ``usable`` (KernelSpec keys).

    Without recordings these are each row's own plan and its default. A ValueError for the recording of another GPU.
    """
    for recording in recordings:
        if not table.gpu.same_class(recording.gpu):
            raise ValueError(f"the recording is of {recording.gpu.slug}, the table of {table.gpu.slug}; name its own")
    failed = {
        (m.plan.config, *m.problem.kind)
        for recording in recordings
        for m in (*recording.measurements, *recording.finals)
        if m.status not in ("ok", "launch")
    }
    rounds = [_by_problem(r.finals) for r in recordings] + [_by_problem(r.measurements) for r in recordings]
    return {row.problem: _options(row, table, rounds, failed, usable) for row in table.rows}


def _by_problem(measured: Sequence[Measurement]) -> dict[Problem, dict[Plan, Measurement]]:
    found: dict[Problem, dict[Plan, Measurement]] = {}
    for m in measured:
        if m.ok and m.us and m.relative_error is not None:
            found.setdefault(m.problem, {})[m.plan] = m
    return found


def _options(
    row: TableRow,
    table: DispatchTable,
    rounds: Sequence[dict[Problem, dict[Plan, Measurement]]],
    failed: Collection[tuple[KernelConfig, str, str]],
    usable: Collection[str],
) -> dict[str, Option]:
    """The best plan of each kernel on one row; of the rounds that timed a kernel the first counts."""
    found: dict[str, Option] = {}

    def key_of(config: KernelConfig) -> str:
        return KernelSpec(config, *row.problem.kind, table.gpu.arch.name).key

    for times in rounds:
        measured = times.get(row.problem, {})
        own = measured.get(row.plan)
        if own is None or own.us is None:  # nothing here to compare with
            continue
        reference = min(row.us, own.us)
        best: dict[str, Option] = {}
        for plan, m in measured.items():
            key = key_of(plan.config)
            if key in found or key not in usable or (plan.config, *row.problem.kind) in failed or m.us is None:
                continue
            option = Option(_with(row, m), max(m.us / reference - 1.0, 0.0))
            if key not in best or option.regret < best[key].regret:
                best[key] = option
        found |= best
    default = row.default_plan
    if default and row.default_us and (key := key_of(default.config)) in usable and key not in found:
        slower = replace(row, plan=default, us=row.default_us, us_low=row.default_us, us_high=row.default_us)
        found[key] = Option(slower, max(row.default_us / row.us - 1.0, 0.0))
    if (key := key_of(row.plan.config)) in usable:
        found[key] = Option(row, 0.0)
    return found


def _with(row: TableRow, m: Measurement) -> TableRow:
    assert m.us is not None and m.relative_error is not None
    low, high = m.us_low or m.us, m.us_high or m.us
    return replace(row, plan=m.plan, us=m.us, us_low=low, us_high=high, relative_error=m.relative_error)


def select(options: Options, limit: float, keep: Collection[str] = ()) -> Selection:
    """The fewest kernels within ``limit``; ``keep`` (KernelSpec keys) are in it whatever they serve.

    Of equally few, those of the lower mean regret that exchanging one at a time finds. A ValueError names a row that no
    usable kernel serves within the limit.
    """
    chosen, least = set(keep), len(set(keep))
    kinds: dict[tuple[str, str], list[Problem]] = {}
    for problem in sorted(options):
        kinds.setdefault(problem.kind, []).append(problem)
    for problems in kinds.values():  # kernels of one kind serve no other: each is a cover of its own
        sets: dict[str, int] = {}
        for bit, problem in enumerate(problems):
            good = [key for key, option in options[problem].items() if option.regret <= limit]
            if not good:
                raise ValueError(
                    f"no intact kernel serves n={problem.n}, k={problem.k}, m={problem.m} ({problem.weight_format})"
                    f" within {limit:.1%}; restore the table's kernels, or tune again"
                )
            if not chosen.intersection(good):
                for key in good:
                    sets[key] = sets.get(key, 0) | 1 << bit
        rows = 0
        for bits in sets.values():
            rows |= bits
        cover = smallest_cover(sets, rows)
        chosen |= _refined(set(cover.names), chosen, sets, rows, options, problems)
        least += cover.least
    best = {p: min((o for key, o in options[p].items() if key in chosen), key=_order) for p in sorted(options)}
    regrets = [option.regret for option in best.values()]
    mean = math.expm1(sum(map(math.log1p, regrets)) / len(regrets)) if regrets else 0.0
    rows_now = tuple(option.row for option in best.values())
    return Selection(limit, tuple(sorted(chosen)), rows_now, max(regrets, default=0.0), mean, least)


def _order(option: Option) -> tuple[float, str]:
    return option.regret, option.row.plan.key


def _refined(
    cover: set[str], fixed: Collection[str], sets: Mapping[str, int], rows: int, options: Options,
    problems: Sequence[Problem],
) -> set[str]:  # fmt: skip
    """The cover after every exchange of one kernel for another that still serves all and lowers the sum of regrets."""

    def cost(names: Collection[str]) -> float:
        there = {*names, *fixed}
        return sum(min(o.regret for key, o in options[p].items() if key in there) for p in problems)

    now = cost(cover) if cover else 0.0
    for old in sorted(cover):
        others = 0
        for name in cover - {old}:
            others |= sets[name]
        needed = rows & ~others
        for new in sorted(sets.keys() - cover):
            if needed & ~sets[new] == 0 and (then := cost(cover - {old} | {new})) < now - 1e-12:
                cover, now, old = cover - {old} | {new}, then, new
    return cover
