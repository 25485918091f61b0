"""The rows of dispatch tables by shape: which of them concern a problem, and how far its shape is from theirs."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from operator import itemgetter
from typing import NamedTuple

from marlin_gen.arch import Arch, Gpu
from marlin_gen.config import Plan
from marlin_gen.families import FAMILIES
from marlin_gen.families.defaults import default_plan, estimate, fits_better
from marlin_gen.formats import weight_format
from marlin_gen.problem import Problem
from marlin_gen.table import DispatchTable
from marlin_gen.table_row import TableRow

MAX_DISTANCE = 3.0  # in octaves: beyond it a family's arithmetic is a better guide than another shape's winner
MAX_NEAREST = 4  # rows of other shapes: each costs a load attempt when it fails
NEAR_TOKENS = 2  # a row speaks for as many tokens, and for fewer down to a half of them
MANY_TOKENS = 512  # from here on more of them are more of the same: such rows speak for one another
FEW_TOKENS = 32  # above, what tiles of tokens leave empty costs time; from 9 to 16 all tiles are the same
CLOSE = 1.0  # in octaves: so near, a row tells whether the default is good
POOR_DEFAULT = 1.06  # what the default took there, over what the winner took


Kind = tuple[str, str]  # weight format, activation type


class Shape(NamedTuple):
    n: int
    k: int
    weight_format: str
    act_dtype: str


@dataclass
class TableIndex:
    """The rows of several tables by shape, for one bisection per look-up."""

    shapes: dict[Shape, tuple[list[int], list[TableRow]]]
    arch: Arch | None  # of their GPUs; None without any

    @classmethod
    def of(cls, tables: Sequence[DispatchTable]) -> TableIndex:
        by_problem: dict[Problem, TableRow] = {}
        for table in tables:
            for row in table.rows:
                by_problem.setdefault(row.problem, row)
        shapes: dict[Shape, tuple[list[int], list[TableRow]]] = {}
        for problem in sorted(by_problem):
            sizes, rows = shapes.setdefault(shape_of(problem), ([], []))
            sizes.append(problem.m)
            rows.append(by_problem[problem])
        return cls(shapes, tables[0].gpu.arch if tables else None)

    @cached_property
    def default_loss(self) -> dict[Kind, float]:
        """By formats the mean of log(what defaults took / what winners took).

        But for rows whose winner leaves fewer tokens of its tiles empty: which shapes defaults suit, those do not say.
        """
        losses: dict[Kind, list[float]] = {}
        for row in self._rows():
            default, m = row.default_plan, row.problem.m
            if row.default_us and default and _computed(row.plan, m) >= _computed(default, m):
                losses.setdefault(row.problem.kind, []).append(math.log(row.default_us) - math.log(row.us))
        return {kind: sum(logs) / len(logs) for kind, logs in losses.items()}

    @cached_property
    def plans(self) -> dict[Kind, dict[Plan, int]]:
        """By formats what won, and the largest m at which it did; of what can be built at all."""
        found: dict[Kind, dict[Plan, int]] = {}
        for row in self._rows():
            won = found.setdefault(row.problem.kind, {})
            won[row.plan] = max(won.get(row.plan, 0), row.problem.m)
        return {kind: {plan: m for plan, m in won.items() if self._legal(plan, kind)} for kind, won in found.items()}

    def _legal(self, plan: Plan, kind: Kind) -> bool:
        family, fmt = FAMILIES.of(plan.config), weight_format(kind[0])
        return self.arch is not None and family.reject_reason(plan.config, fmt, self.arch) is None

    def _rows(self) -> Iterator[TableRow]:
        return (row for _, rows in self.shapes.values() for row in rows)

    def exact(self, shape: Shape, m: int) -> Iterator[TableRow]:
        """The shape's rows in the order of step 2."""
        sizes, rows = self.shapes.get(shape, ([], []))
        at = bisect_left(sizes, m)
        yield from rows[at:]
        yield from reversed(rows[:at])

    def nearest(self, problem: Problem, gpu: Gpu) -> list[TableRow]:
        """At most ``MAX_NEAREST`` rows of other shapes, in the order of step 3."""
        return [row for _, row in self._by_distance(problem, gpu)[:MAX_NEAREST]]

    def beats_default(self, problem: Problem, gpu: Gpu) -> TableRow | None:
        """The nearest row if it is ``CLOSE``, speaks for the tokens, and has a ``POOR_DEFAULT`` that still is it."""
        for near, row in self._by_distance(problem, gpu)[:1]:
            if near <= CLOSE and row.default_us and speaks_for(row, problem.m):
                poor = math.log(row.default_us) - math.log(row.us) > math.log(POOR_DEFAULT)
                return row if poor and row.default_plan == default_plan(row.problem, gpu) else None
        return None

    def fitting(self, problem: Problem, gpu: Gpu) -> Plan | None:
        """What won at any shape, for a quarter as many tokens or more, and is estimated to take the least; None if a
        default does. Its tile may go into the tokens several times, or the row's be several of its tiles."""
        m = problem.m
        won = self.plans.get(problem.kind, {}) if m > FEW_TOKENS or 8 < m <= 16 else {}
        known = (plan for plan, most in won.items() if m <= 4 * most)
        # A plan for one token tile says nothing of the order of several.
        plans = [replace(plan, raster=8) if m > plan.config.block_m and plan.raster == 1 else plan for plan in known]
        works = [(estimate(plan, problem, gpu), plan) for plan in plans if not rejected(plan, problem)]
        _, best = min(((work, plan) for work, plan in works if work > 0), key=itemgetter(0), default=(0.0, None))
        return best if best and fits_better(best, default_plan(problem, gpu), problem, gpu) else None

    def _by_distance(self, problem: Problem, gpu: Gpu) -> list[tuple[float, TableRow]]:
        """A row of each other shape within ``MAX_DISTANCE``, nearest first."""
        found = []
        for shape in self.shapes:
            if shape[2:] == problem.kind and shape != shape_of(problem):
                row = next((row for row in self.exact(shape, problem.m) if not rejected(row.plan, problem)), None)
                if row and (d := distance(problem, row, gpu.num_sms)) <= MAX_DISTANCE:
                    found.append((d, row.problem, row))
        return [(d, row) for d, _, row in sorted(found, key=lambda entry: entry[:2])]


def speaks_for(row: TableRow, m: int) -> bool:
    """Whether the plan that won at this row may be trusted with ``m`` tokens."""
    return m <= row.problem.m < NEAR_TOKENS * m or min(m, row.problem.m) >= MANY_TOKENS


def fits_elsewhere(plan: Plan, row: TableRow, m: int) -> bool:
    """Whether ``m`` tokens are other tiles than the row's, of its plan or of this one: if not, they compared there."""
    own = row.plan
    return _computed(plan, m) != _computed(plan, row.problem.m) or _computed(own, m) != _computed(own, row.problem.m)


def _computed(plan: Plan, m: int) -> int:
    """Tokens of all tiles, with what is empty of the last."""
    return -(-m // plan.config.block_m) * plan.config.block_m


def shape_of(problem: Problem) -> Shape:
    return Shape(problem.n, problem.k, *problem.kind)


def rejected(plan: Plan, problem: Problem) -> str | None:
    """Why this plan cannot serve this problem, as a sentence; None when it can."""
    return FAMILIES.of(plan.config).reject_problem(plan.config, problem)


def distance(problem: Problem, row: TableRow, num_sms: int) -> float:
    """How far a row's shape is from the problem's, in octaves, for this row's plan: see the rule."""
    there = row.problem
    lost = wave_fill(row.plan, there, num_sms) / wave_fill(row.plan, problem, num_sms)
    return abs(math.log2(problem.n / there.n)) + abs(math.log2(problem.k / there.k)) + max(0.0, math.log2(lost))


def wave_fill(plan: Plan, problem: Problem, num_sms: int) -> float:
    """Busy over all block slots of the waves a problem takes, in (0, 1]; 1 for striped, which has no tail."""
    config = plan.config
    if config.partition == "striped":
        return 1.0
    tiles = -(-problem.n // config.block_n) * -(-max(problem.m, 1) // config.block_m)
    blocks = tiles * (config.cluster_size if config.partition == "clusterk" else 1)
    slots = num_sms * config.blocks_per_sm
    return blocks / (-(-blocks // slots) * slots)
