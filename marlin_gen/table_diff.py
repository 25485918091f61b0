"""How two tables differ: rows that one lacks, other plans, other times, other builds of a kernel."""

from __future__ import annotations

from dataclasses import dataclass

from marlin_gen.table import DispatchTable
from marlin_gen.table_row import TableRow


@dataclass(frozen=True)
class RowChange:
    """One problem's rows in both tables."""

    old: TableRow
    new: TableRow

    @property
    def ratio(self) -> float:
        """New time over old."""
        return self.new.us / self.old.us

    @property
    def is_clear(self) -> bool:
        """Whether the 95 % intervals of the two times are apart."""
        return self.new.us_high < self.old.us_low or self.new.us_low > self.old.us_high


@dataclass(frozen=True)
class TableDiff:
    """What is in one of two tables and not in the other."""

    added: tuple[TableRow, ...]
    removed: tuple[TableRow, ...]
    changed: tuple[RowChange, ...]  # another plan or another time
    kernels_added: tuple[str, ...]  # KernelSpec keys
    kernels_removed: tuple[str, ...]
    kernels_rebuilt: tuple[str, ...]  # the same kernel, another cubin

    @property
    def is_empty(self) -> bool:
        return not any(vars(self).values())


def diff(old: DispatchTable, new: DispatchTable) -> TableDiff:
    """Row by row, kernel by kernel. Provenance does not count. A ValueError for tables of different kinds of GPUs."""
    if not old.gpu.same_class(new.gpu):
        raise ValueError(f"the tables are of {old.gpu.slug} and {new.gpu.slug}: different kinds of GPUs")
    before, after = ({row.problem: row for row in table.rows} for table in (old, new))
    both = sorted(before.keys() & after.keys())
    return TableDiff(
        added=tuple(after[problem] for problem in sorted(after.keys() - before.keys())),
        removed=tuple(before[problem] for problem in sorted(before.keys() - after.keys())),
        changed=tuple(RowChange(before[p], after[p]) for p in both if before[p].to_json() != after[p].to_json()),
        kernels_added=tuple(sorted(new.kernels.keys() - old.kernels.keys())),
        kernels_removed=tuple(sorted(old.kernels.keys() - new.kernels.keys())),
        kernels_rebuilt=tuple(
            key for key in sorted(old.kernels.keys() & new.kernels.keys()) if old.kernels[key] != new.kernels[key]
        ),
    )
