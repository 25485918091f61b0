"""Table rows to plans: which kernels to try for a problem, best guess first. Pure: nothing is loaded or launched here.

The rule, in order; a plan whose family rejects the problem is skipped:

1. The plan that MARLIN_GEN_CONFIG forces, if set.
2. *Exact shape*: rows of the same (n, k), formats included. First the row with the smallest m >= the problem's m, then
   the larger ones upwards, then the smaller ones downwards. First tables measured on a GPU of the same class, then
   *related* ones (same compute capability and SM count, other memory bandwidth). Tables of one kind are searched as
   one, an earlier table's row hiding a later one's of the same problem: the table that MARLIN_GEN_TABLE names, else
   the user's own, then the shipped ones.
3. *Nearest shape*: the same choice of m at the other shapes, nearest first, where

       distance = |log2(n / n')| + |log2(k / k')| + max(0, log2(fill' / fill))

   and fill is the fraction of block slots the plan keeps busy over its waves (``wave_fill``) at the row's own shape
   (fill') and at the problem's (fill). The last term keeps 48-row blocks, right for n = 6144, away from n = 4096, where
   a third of the SMs would idle. Shapes further than ``MAX_DISTANCE`` are not considered.
4. ``families.default_plan``, then every family's own default.
5. ``families.ptx_plan``, where it ships as PTX (shipped_ptx.py): for where nothing can be compiled.
"""

from __future__ import annotations

import hashlib
import json
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from marlin_gen import env
from marlin_gen.arch import PTX_ARCH, Gpu
from marlin_gen.config import KernelSpec, Plan
from marlin_gen.distance import distance
from marlin_gen.families import FAMILIES, default_plan, ptx_plan
from marlin_gen.families.base import LAUNCH_VERSION
from marlin_gen.formats import LAYOUT_VERSION, weight_format
from marlin_gen.problem import Problem
from marlin_gen.shipped_ptx import ShippedPtx
from marlin_gen.table import FILE_NAME, DispatchTable
from marlin_gen.table_row import TableRow

MAX_DISTANCE = 3.0  # in octaves: beyond it a family's arithmetic is a better guide than another shape's winner
MAX_NEAREST = 4  # candidates of step 3: each costs a load attempt when it fails


class KernelLocation(NamedTuple):
    """A kernel's file. ``sha256`` of one that a table ships, verified already and once more by whoever loads it."""

    cubin: Path
    symbol: str
    sha256: str | None = None
    ptx: str | None = None  # the kernel itself, where ``cubin`` is the file of several that it was read from


class Choice(NamedTuple):
    """One candidate for a problem."""

    plan: Plan
    spec: KernelSpec
    origin: str  # forced, exact, related exact, nearest, related nearest, default, ptx
    kernel: KernelLocation | None  # None: nothing ships it intact, so it must be compiled

    @property
    def key(self) -> str:
        return f"{self.plan.key} ({self.origin})"


class _Shape(NamedTuple):
    n: int
    k: int
    weight_format: str
    act_dtype: str


@dataclass
class _Index:
    """The rows of several tables by shape, for one bisection per look-up."""

    shapes: dict[_Shape, tuple[list[int], list[TableRow]]]

    @classmethod
    def of(cls, tables: Sequence[DispatchTable]) -> _Index:
        by_problem: dict[Problem, TableRow] = {}
        for table in tables:
            for row in table.rows:
                by_problem.setdefault(row.problem, row)
        shapes: dict[_Shape, tuple[list[int], list[TableRow]]] = {}
        for problem in sorted(by_problem):
            sizes, rows = shapes.setdefault(_shape(problem), ([], []))
            sizes.append(problem.m)
            rows.append(by_problem[problem])
        return cls(shapes)

    def exact(self, shape: _Shape, m: int) -> Iterator[TableRow]:
        """The shape's rows in the order of step 2."""
        sizes, rows = self.shapes.get(shape, ([], []))
        at = bisect_left(sizes, m)
        yield from rows[at:]
        yield from reversed(rows[:at])

    def nearest(self, problem: Problem, gpu: Gpu) -> list[TableRow]:
        """At most ``MAX_NEAREST`` rows of other shapes, in the order of step 3."""
        found = []
        for shape in self.shapes:
            if shape[2:] == (problem.weight_format, problem.act_dtype) and shape != _shape(problem):
                row = next((row for row in self.exact(shape, problem.m) if not _rejected(row.plan, problem)), None)
                if row and (d := distance(problem, row, gpu.num_sms)) <= MAX_DISTANCE:
                    found.append((d, row.problem, row))
        return [row for _, _, row in sorted(found, key=lambda entry: entry[:2])[:MAX_NEAREST]]


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
        related = [table for table in tables if table not in same and _related(gpu, table.gpu)]
        self.tables = [*same, *related]
        self._indices = (("", _Index.of(same)), ("related ", _Index.of(related)))

    def choose(self, problem: Problem) -> Iterator[Choice]:
        """Every candidate, best first, each plan once. Lazy: later candidates cost nothing unless asked for."""
        seen: set[Plan] = set()
        for origin, plan in self._plans(problem):
            if plan not in seen and not _rejected(plan, problem):
                seen.add(plan)
                spec = KernelSpec(plan.config, problem.weight_format, problem.act_dtype, self.arch.name)
                yield Choice(plan, spec, origin, self.locate(spec))
        # Not compared with what was seen: it is another kernel of perhaps the same plan.
        plan = ptx_plan(problem, self.gpu)
        spec = KernelSpec(plan.config, problem.weight_format, problem.act_dtype, PTX_ARCH)
        if spec.arch != self.arch.name and not _rejected(plan, problem) and (kernel := self.locate(spec)):
            yield Choice(plan, spec, "ptx", kernel)

    def _plans(self, problem: Problem) -> Iterator[tuple[str, Plan]]:
        if self.forced:
            yield "forced", self.forced
        for mark, index in self._indices:
            for row in index.exact(_shape(problem), problem.m):
                yield f"{mark}exact", row.plan
        for mark, index in self._indices:
            for row in index.nearest(problem, self.gpu):
                yield f"{mark}nearest", row.plan
        fmt = weight_format(problem.weight_format)
        defaults = [default_plan(problem, self.gpu)]
        defaults += [family.default(problem, self.gpu) for family in FAMILIES.rows.values()]
        for plan in defaults:
            if FAMILIES.of(plan.config).reject_reason(plan.config, fmt, self.arch) is None:
                yield "default", plan

    def locate(self, spec: KernelSpec) -> KernelLocation | None:
        """The first table's intact cubin of ``spec``, else what ships as PTX."""
        for table in self.tables:
            path, kernel = table.cubin(spec.key), table.intact_kernel(spec.key)
            if path and kernel:
                return KernelLocation(path, kernel.symbol, kernel.sha256)
        if self.ptx and (found := self.ptx.find(spec)):
            return KernelLocation(self.ptx.path(spec.weight_format), found.symbol, ptx=found.text)
        return None


def choose(problem: Problem, gpu: Gpu, tables: Sequence[DispatchTable]) -> Iterator[Choice]:
    """The candidates for one problem, best first. Build a ``Dispatcher`` to ask more than once."""
    return Dispatcher(gpu, tables, forced_plan()).choose(problem)


def known_winners(
    gpu: Gpu, tables: Sequence[DispatchTable], problems: Sequence[Problem], own: bool = True
) -> list[Plan]:
    """The plans that tables have for these problems, to be tried early by a search: those of this GPU (unless not
    ``own``) and of related ones; for numbers that they lack, of the default kind."""
    dispatcher = Dispatcher(gpu, [table for table in tables if own or not gpu.same_class(table.gpu)])
    found: dict[Plan, None] = {}
    for problem in problems:
        usual = Problem(problem.n, problem.k, problem.m)
        for asked in dict.fromkeys((problem, usual)):
            if plans := [c.plan for c in islice(dispatcher.choose(asked), 2) if c.origin != "default"]:
                found |= dict.fromkeys(plans)
                break
    return list(found)


def forced_plan() -> Plan | None:
    """The plan that MARLIN_GEN_CONFIG names; a ValueError when it is not a plan key."""
    key = env.forced_plan()
    return Plan.from_key(key) if key else None


def find_tables() -> list[DispatchTable]:
    """Every usable table on this machine in the order of the rule: MARLIN_GEN_TABLE, else the user's; then the shipped.

    Raises FileNotFoundError when MARLIN_GEN_TABLE holds none.
    """
    explicit = env.table_dir()
    tables = tables_below(explicit) if explicit else tables_below(env.user_data_dir() / "tuned")
    if explicit and not tables and not any(_table_folders(explicit)):
        raise FileNotFoundError(f"MARLIN_GEN_TABLE={explicit} holds no {FILE_NAME}; name a folder that tune wrote")
    return tables + tables_below(env.tuned_dir())


def tables_below(folder: Path, *, schemas: Sequence[int] = ()) -> list[DispatchTable]:
    """The usable tables in ``folder`` and its subfolders; ``schemas``: earlier ones to read too."""
    return [table for found in _table_folders(folder) if (table := DispatchTable.load(found, schemas=schemas))]


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


def _table_folders(folder: Path) -> list[Path]:
    """``folder`` itself or its subfolders, sorted, that hold a table."""
    return sorted(path.parent for pattern in (FILE_NAME, f"*/{FILE_NAME}") for path in folder.glob(pattern))


def _shape(problem: Problem) -> _Shape:
    return _Shape(problem.n, problem.k, problem.weight_format, problem.act_dtype)


def _related(gpu: Gpu, other: Gpu) -> bool:
    return tuple(gpu.capability) == tuple(other.capability) and gpu.num_sms == other.num_sms


def _rejected(plan: Plan, problem: Problem) -> str | None:
    return FAMILIES.of(plan.config).reject_problem(plan.config, problem)
