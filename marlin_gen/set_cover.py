"""The smallest set cover: few kernels, each good enough for some rows, so that every row has one.

Greedy first (within a factor of ln(rows) + 1 of the least), then branch and bound until it is proved the least, or
``MAX_NODES`` is spent; the answer says what is proved. Sets are whole numbers, a bit for each row. Pure and repeatable.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

MAX_NODES = 20_000  # about two seconds


class Cover(NamedTuple):
    """Names whose sets together hold every row, and how many any such choice needs at least."""

    names: tuple[str, ...]
    least: int  # len(names) when it is proved that no smaller choice exists


def smallest_cover(sets: Mapping[str, int], rows: int) -> Cover:
    """The fewest of ``sets`` (name -> bits of the rows it serves) whose union is ``rows``.

    Of equals the first name is taken. A ValueError when a row is in none.
    """
    useful = _undominated({name: bits & rows for name, bits in sorted(sets.items()) if bits & rows})
    names = list(useful)
    served = 0
    for bits in useful.values():
        served |= bits
    if served != rows:
        raise ValueError(f"{(rows & ~served).bit_count()} rows are served by no kernel")
    columns = [useful[name] for name in names]
    search = _Search(columns, [i for i in range(rows.bit_length()) if rows >> i & 1])
    best = search.run(rows)
    return Cover(tuple(sorted(names[i] for i in best)), len(best) if search.complete else search.bound(rows))


def _undominated(sets: dict[str, int]) -> dict[str, int]:
    """Without those whose rows another one serves too: some least choice does without them."""
    kept: dict[str, int] = {}
    for name, bits in sorted(sets.items(), key=lambda entry: (-entry[1].bit_count(), entry[0])):
        if not any(bits & ~larger == 0 for larger in kept.values()):
            kept[name] = bits
    return kept


class _Search:
    """Branch and bound. ``columns``: the rows of each set; ``rows``: the numbers of the rows to serve."""

    def __init__(self, columns: Sequence[int], rows: Sequence[int]) -> None:
        self.columns = columns
        self.servers = {row: sum(1 << i for i, bits in enumerate(columns) if bits >> row & 1) for row in rows}
        self.by_choice = sorted(rows, key=lambda row: (self.servers[row].bit_count(), row))  # least free first
        self.complete = True
        self._nodes = 0
        self._best: list[int] = []

    def run(self, rows: int) -> list[int]:
        self._best = self._greedy(rows)
        self._branch(rows, [])
        return self._best

    def bound(self, rows: int) -> int:
        """Rows no two of which share a server: each needs a set of its own."""
        taken = count = 0
        for row in self.by_choice:
            if rows >> row & 1 and not self.servers[row] & taken:
                taken |= self.servers[row]
                count += 1
        return count

    def _greedy(self, rows: int) -> list[int]:
        chosen: list[int] = []
        left = rows
        while left:
            chosen.append(max(range(len(self.columns)), key=lambda i: ((self.columns[i] & left).bit_count(), -i)))
            left &= ~self.columns[chosen[-1]]
        for i in list(chosen):  # an early choice may have become needless
            others = 0
            for j in chosen:
                others |= self.columns[j] if j != i else 0
            if rows & ~others == 0:
                chosen.remove(i)
        return chosen

    def _branch(self, left: int, chosen: list[int]) -> None:
        if not left:
            self._best = list(chosen)  # the bound below has seen to it that it is smaller
            return
        self._nodes += 1
        if self._nodes > MAX_NODES:
            self.complete = False
            return
        if len(chosen) + self.bound(left) >= len(self._best):
            return
        row = next(row for row in self.by_choice if left >> row & 1)
        servers = [i for i in range(len(self.columns)) if self.servers[row] >> i & 1]
        for i in sorted(servers, key=lambda i: (-(self.columns[i] & left).bit_count(), i)):
            if len(chosen) + 1 >= len(self._best):
                return
            self._branch(left & ~self.columns[i], [*chosen, i])
