"""Table rows to plans: which kernels to try for a problem, best guess first. Pure: nothing is loaded or launched here.

The rule, in order; a plan whose family rejects the problem is skipped:

1. The plan that MARLIN_GEN_CONFIG forces, if set.
2. *Exact shape*: rows of the same (n, k), formats included. First the row with the smallest m >= the problem's m, then
   the larger ones upwards, then the smaller ones downwards. First tables measured on a GPU of the same class, then
   *related* ones (same compute capability and SM count, other memory bandwidth). Tables of one kind are searched as
   one, an earlier table's row hiding a later one's of the same problem: the table that MARLIN_GEN_TABLE names, else
   the user's own, then the shipped ones. Rows of twice as many tokens and more, or of fewer, come after the defaults
   that lie ready, unless both are 512 and more: a plan for 16 tokens is none for a prefill. (An H100's table cut down
   to m = 1 and 16: such rows 16 % and more from the best, at worst 2.1 times, the defaults 2 %, at worst 15 %.) Where
   the first row is of a third more tokens and more (160 served by 256), or of fewer, a plan whose tiles fit comes
   before it: by an estimate the best of what won anywhere for a quarter as many tokens or more, else the default. Not
   where both have as many tiles as at the row, where they met.
3. *Nearest shape*: the same choice of m at the other shapes, nearest first, rows far from the tokens asked for last
   again, where

       distance = |log2(n / n')| + |log2(k / k')| + max(0, log2(fill' / fill))

   and fill is the fraction of block slots the plan keeps busy over its waves (``wave_fill``) at the row's own shape
   (fill') and at the problem's (fill). The last term keeps 48-row blocks, right for n = 6144, away from n = 4096, where
   a third of the SMs would idle. Shapes further than ``MAX_DISTANCE`` are not considered.
4. ``default_plan``, then every family's own default. *Before* step 3 where the rows of these formats say that
   defaults are good on this GPU: at the tuned shapes they took at most ``GOOD_DEFAULTS`` times as long as the winners,
   in the mean (``TableIndex.default_loss``); only those that lie ready, since to compile one on first use is no better
   than a neighbour's kernel now. (Ten unseen shapes on an H100: nearest 16 % from tuning them, at worst 2.2 times;
   defaults 1.1 %, 1.10.) Before even the defaults comes what won anywhere and fits better, as in step 2 (six shapes at
   13 numbers of tokens from 48 to 896, each left out in turn: defaults 15 % from the best, this 2 %), then the nearest
   row if within an octave, not far in tokens, and today's default lost more than 6 % there (each shape left out of its
   own table, with defaults that were worse, 1.6 % from the best on an H200 instead of 3.0 %; with today's 1.2 %, and
   1.4 % on an H100, with or without).
5. ``ptx_plan``, where it ships as PTX (shipped_ptx.py): for where nothing can be compiled.

What fits a GPU above 32 tokens is sought among the winners of all GPUs of its architecture (an H20 or a slice of an
H100 among the H100's), of each problem that of the one most like it: the estimate knows how many SMs it has. Whether
defaults are good related ones say, where its own rows do not. Kernels are taken from the tables of all, so that there
a default needs no compiler.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from marlin_gen import env
from marlin_gen.arch import PTX_ARCH, Gpu
from marlin_gen.config import KernelSpec, Plan
from marlin_gen.families import FAMILIES
from marlin_gen.families.base import LAUNCH_VERSION
from marlin_gen.families.defaults import default_plan, fits_better, ptx_plan
from marlin_gen.formats import DEFAULT_FORMAT, LAYOUT_VERSION, weight_format
from marlin_gen.problem import Problem
from marlin_gen.shipped_ptx import ShippedPtx
from marlin_gen.table import DispatchTable
from marlin_gen.table_index import FEW_TOKENS, TableIndex, fits_elsewhere, rejected, shape_of, speaks_for
from marlin_gen.table_row import TableRow

GOOD_DEFAULTS = 1.08


class KernelLocation(NamedTuple):
    """Where a kernel lies: its file, or, with the kernel itself, the table's folder or the file of several."""

    place: Path
    symbol: str
    image: bytes | None = None  # a cubin or PTX


class Choice(NamedTuple):
    """One candidate for a problem."""

    plan: Plan
    spec: KernelSpec
    origin: str  # forced, exact, related exact, fitting, nearest, related nearest, default, ptx
    kernel: KernelLocation | None  # None: nothing ships it intact, so it must be compiled

    @property
    def key(self) -> str:
        return f"{self.plan.key} ({self.origin})"


class Dispatcher:
    """The tables that concern one GPU, indexed. Immutable: build a new one after a tune.

    ``ptx``: the last candidates, none by default. Raises ValueError for a GPU that no kernel can run on.
    """

    def __init__(
        self, gpu: Gpu, tables: Sequence[DispatchTable], forced: Plan | None = None, ptx: ShippedPtx | None = None
    ) -> None:
        self.gpu = gpu
        self.ptx = ptx
        self.arch = gpu.arch  # raises here for a GPU that no kernel runs on
        self.forced = forced
        same = [table for table in tables if gpu.same_class(table.gpu)]
        related = [table for table in tables if gpu.related(table.gpu) and not gpu.same_class(table.gpu)]
        others = [table for table in tables if table.gpu.arch == self.arch and not gpu.related(table.gpu)]
        self.tables = [*same, *related, *others]
        self._indices = (("", TableIndex.of(same)), ("related ", TableIndex.of(related)))
        self.winners = TableIndex.of(self.tables)  # of each problem on this GPU, else on one that is like it

    def choose(self, problem: Problem) -> Iterator[Choice]:
        """Every candidate, best first, each plan once. Lazy: later candidates cost nothing unless asked for."""
        seen: set[Plan] = set()
        for origin, plan, must_be_ready in self._plans(problem):
            if plan in seen or rejected(plan, problem):
                continue
            spec = KernelSpec(plan.config, problem.weight_format, problem.act_dtype, self.arch.name)
            kernel = self.locate(spec)
            if kernel or not must_be_ready:
                seen.add(plan)
                yield Choice(plan, spec, origin, kernel)
        # Not compared with what was seen: it is another kernel of perhaps the same plan.
        plan = ptx_plan(problem, self.gpu)
        spec = KernelSpec(plan.config, problem.weight_format, problem.act_dtype, PTX_ARCH)
        if spec.arch != self.arch.name and not rejected(plan, problem) and (kernel := self.locate(spec)):
            yield Choice(plan, spec, "ptx", kernel)

    def _plans(self, problem: Problem) -> Iterator[tuple[str, Plan, bool]]:
        """Origin, plan, and whether it counts only where its kernel lies ready; in the order of the rule."""
        if self.forced:
            yield "forced", self.forced, False
        exact = [
            (f"{mark}exact", row)
            for mark, index in self._indices
            for row in index.exact(shape_of(problem), problem.m)
        ]
        if exact and problem.m > FEW_TOKENS and not problem.m <= (row := exact[0][1]).problem.m < 4 / 3 * problem.m:
            for origin, plan, ready in islice(self._ready(problem), 1):
                if fits_elsewhere(plan, row, problem.m) and fits_better(plan, row.plan, problem, self.gpu):
                    yield origin, plan, ready
        yield from self._rows(problem, exact)
        if fitting := self._fitting(problem):
            yield "fitting", fitting, True
        mark, known = next((i for i in self._indices if problem.kind in i[1].default_loss), self._indices[0])
        if known.default_loss.get(problem.kind, math.inf) <= math.log(GOOD_DEFAULTS):
            if better := known.beats_default(problem, self.gpu):
                yield f"{mark}nearest", better.plan, True
            yield from self._defaults(problem, must_be_ready=True)
        nearest = [(f"{mark}nearest", r) for mark, index in self._indices for r in index.nearest(problem, self.gpu)]
        yield from self._rows(problem, nearest)
        yield from self._defaults(problem, must_be_ready=False)

    def _rows(self, problem: Problem, rows: Sequence[tuple[str, TableRow]]) -> Iterator[tuple[str, Plan, bool]]:
        """Those that speak for the problem's tokens; before any that do not, what lies ready without a row."""
        silent = [(origin, row) for origin, row in rows if not speaks_for(row, problem.m)]
        for origin, row in rows:
            if speaks_for(row, problem.m):
                yield origin, row.plan, False
        if silent:
            yield from self._ready(problem)
        for origin, row in silent:
            yield origin, row.plan, False

    def _ready(self, problem: Problem) -> Iterator[tuple[str, Plan, bool]]:
        if plan := self._fitting(problem):
            yield "fitting", plan, True
        yield from self._defaults(problem, must_be_ready=True)

    def _fitting(self, problem: Problem) -> Plan | None:
        """For few tokens of what won on this GPU, since memory decides; else of what won on any of its architecture."""
        index = self.winners if problem.m > FEW_TOKENS else self._indices[0][1]
        return index.fitting(problem, self.gpu)

    def _defaults(self, problem: Problem, must_be_ready: bool) -> Iterator[tuple[str, Plan, bool]]:
        fmt = weight_format(problem.weight_format)
        defaults = [default_plan(problem, self.gpu)]
        defaults += [family.default(problem, self.gpu) for family in FAMILIES.rows.values()]
        for plan in defaults:
            if FAMILIES.of(plan.config).reject_reason(plan.config, fmt, self.arch) is None:
                yield "default", plan, must_be_ready

    def locate(self, spec: KernelSpec) -> KernelLocation | None:
        """The first table's intact cubin of ``spec``, else what ships as PTX."""
        for table in self.tables:
            if table.folder and (found := table.find(spec.key)):
                return KernelLocation(table.folder, found[0].symbol, found[1])
        if self.ptx and (ptx := self.ptx.find(spec)):
            return KernelLocation(self.ptx.path(spec.weight_format), ptx.symbol, ptx.image)
        return None


def choose(problem: Problem, gpu: Gpu, tables: Sequence[DispatchTable]) -> Iterator[Choice]:
    """The candidates for one problem, best first. Build a ``Dispatcher`` to ask more than once."""
    return Dispatcher(gpu, tables, forced_plan()).choose(problem)


def known_winners(
    gpu: Gpu, tables: Sequence[DispatchTable], problems: Sequence[Problem], own: bool = True
) -> dict[Problem, list[Plan]]:
    """The plans that tables have for each of these problems, to be tried early by a search: those of this GPU (unless
    not ``own``), of related ones and of any of its architecture; for numbers that they lack, of the default kind."""
    dispatcher = Dispatcher(gpu, [table for table in tables if own or not gpu.same_class(table.gpu)])
    found: dict[Problem, list[Plan]] = {}
    size = weight_format(DEFAULT_FORMAT).group_size  # smaller groups divide a k that these do not
    for problem in problems:
        usual = problem if problem.k % size else Problem(problem.n, problem.k, problem.m)
        for asked in dict.fromkeys((problem, usual)):
            rows = dispatcher.winners.exact(shape_of(asked), asked.m)
            plans = [*islice((c.plan for c in dispatcher.choose(asked) if c.origin not in ("default", "ptx")), 2),
                     *islice((row.plan for row in rows if not rejected(row.plan, asked)), 1)]  # fmt: skip
            if plans:
                found[problem] = list(dict.fromkeys(plans))
                break
    return found


def forced_plan() -> Plan | None:
    """The plan that MARLIN_GEN_CONFIG names; a ValueError when it is not a plan key."""
    key = env.forced_plan()
    return Plan.from_key(key) if key else None


def digest(tables: Sequence[DispatchTable], forced: Plan | None = None) -> str:
    """sha256 (hex) of everything by which these tables, in this order, choose: rows, kernels, which of them are intact.

    Where a table lies and when it was made do not count.
    """
    parts: list[Any] = [LAYOUT_VERSION, LAUNCH_VERSION, forced.key if forced else None]
    for table in tables:
        gpu = {name: value for name, value in table.gpu.to_json().items() if name != "name"}
        kernels = [(key, kernel.sha256) for key, kernel in sorted(table.kernels.items()) if table.cubin(key)]
        parts.append([gpu, kernels, [(vars(row.problem), row.plan.key) for row in table.rows]])
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
