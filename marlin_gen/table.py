"""Dispatch tables: what was measured to be fastest on one GPU, and the compiled kernels it names.

A folder ``tuned/<gpu.slug>`` holds ``table.json`` (one row per line, sorted, named fields) and ``kernels/<spec
key>.cubin``, whose sha256 the table records; the table's own is its first field. Whatever cannot be read or trusted is
left out with one warning per table, so a damaged table costs speed and never a crash or a wrong result. Files are
written whole and under a lock: any number of processes may tune into, import into and load from one folder at once.
"""

from __future__ import annotations

import hashlib
import warnings
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from marlin_gen import whole_files
from marlin_gen.arch import Gpu
from marlin_gen.measurement import PROTOCOL, Artifact
from marlin_gen.problem import Problem
from marlin_gen.table_file import FILE_NAME, MAX_CUBIN_BYTES, Parsed, file_text, read_file
from marlin_gen.table_row import KernelFile, TableRow, chosen_rows, named_kernels

__all__ = ["FILE_NAME", "DispatchTable", "TableWarning", "fault_of", "parse"]


READ_SECONDS = 2.0  # that serving waits for a writer, at most, and only to judge a kernel that looks damaged
PREFERENCES = ("newer", "older", "faster")  # whose row of a problem a merge keeps


class TableWarning(UserWarning):
    """A table, or a part of one, is not used; the message says which and how to mend it."""


@dataclass(frozen=True)
class DispatchTable:
    """The rows and kernels of one GPU. ``folder`` is where its cubins lie; None before the first write."""

    gpu: Gpu
    rows: tuple[TableRow, ...]  # sorted by (n, k, m), one per problem
    kernels: Mapping[str, KernelFile]  # by KernelSpec.key
    runs: tuple[dict[str, Any], ...] = ()  # of each tuning run, oldest first: date, driver, torch, compiler ...
    protocol: str = PROTOCOL
    folder: Path | None = None
    _checked: dict[str, KernelFile | None] = field(default_factory=dict, compare=False, repr=False)

    @classmethod
    def build(
        cls, gpu: Gpu, rows: Iterable[TableRow], artifacts: Iterable[Artifact], provenance: Mapping[str, Any]
    ) -> DispatchTable:
        """A table of fresh results. ``artifacts`` hold every row's kernel and any others to ship (family defaults)."""
        kernels = {artifact.spec.key: KernelFile.of(artifact) for artifact in artifacts}
        table = cls(gpu, _sorted(rows), kernels, (dict(provenance),))
        if missing := sorted({row.specs(gpu)[0].key for row in table.rows} - kernels.keys()):
            raise ValueError(f"no artifact for {len(missing)} kernels that rows name, the first is {missing[0]}")
        return table

    def merged(self, newer: DispatchTable, prefer: str = "newer", damaged: Collection[str] = ()) -> DispatchTable:
        """The rows of both; ``prefer`` says whose where both have a problem: one of ``PREFERENCES``.

        Kernels that no look-up names are dropped. Of two builds of one kernel the newer's stays under "newer", for all
        its rows, whose times are then of the build before. Else that which more of the chosen rows were timed with
        ("older": any of the older's), and what was timed with the other is left out: a row, or its default's time.
        ``damaged``: kernels of which this table has but the sha256.
        """
        if prefer not in PREFERENCES:
            raise ValueError(f"prefer={prefer!r} is not one of {', '.join(PREFERENCES)}")
        if prefer == "faster" and self.protocol != newer.protocol:
            raise ValueError(
                f"the times of these tables cannot be compared: protocols {self.protocol!r} and {newer.protocol!r};"
                " say whose rows to take, newer or older"
            )
        ours = {key: kernel for key, kernel in self.kernels.items() if key not in damaged}
        rows, both = chosen_rows(self.rows, newer.rows, prefer), {**ours, **newer.kernels}
        if prefer != "newer":
            both |= self._builds_that_stay(ours, newer, rows, prefer)
            rows = chosen_rows(self._timed_with(both), newer._timed_with(both), prefer)
        kernels = {key: both[key] for key in both.keys() & named_kernels(self.gpu, rows.values())}
        if prefer == "newer":  # a tune ships what it was told to, defaults of other shapes included
            kernels |= newer.kernels
        runs = tuple(run for run in self.runs if run not in newer.runs) + newer.runs
        # Of rows of two protocols both are named, which no other table's times are compared with.
        both_protocols = dict.fromkeys((*self.protocol.split("; "), *newer.protocol.split("; ")))
        return replace(
            self, protocol="; ".join(both_protocols), rows=_sorted(rows.values()), kernels=kernels, runs=runs,
            _checked={},
        )  # fmt: skip

    def _builds_that_stay(
        self, kernels: Mapping[str, KernelFile], newer: DispatchTable, rows: Mapping[Problem, TableRow], prefer: str
    ) -> dict[str, KernelFile]:
        """Those of this table's ``kernels`` that ``merged`` does not take in the newer's build."""
        ours, theirs = (
            Counter(row.specs(self.gpu)[0].key for row in table.rows if rows[row.problem] is row)
            for table in (self, newer)
        )
        return {
            key: kernel for key, kernel in kernels.items()
            if not theirs[key] or (ours[key] if prefer == "older" else ours[key] >= theirs[key])
        }  # fmt: skip

    def _timed_with(self, kernels: Mapping[str, KernelFile]) -> Iterator[TableRow]:
        """The rows whose kernel is of no other build; without the default's time where that is."""
        for row in self.rows:
            own, *default = (kernels.get(s.key) in (None, self.kernels.get(s.key)) for s in row.specs(self.gpu))
            if own:
                yield row if all(default) else replace(row, default_us=None)

    def intact(self) -> DispatchTable:
        """Only the kernels that are there unaltered, and the rows that one of them serves. Warns of nothing."""
        folder = self.folder
        kernels = {k: v for k, v in self.kernels.items() if folder and fault_of(folder / v.file, v) is None}
        rows = tuple(row for row in self.rows if row.specs(self.gpu)[0].key in kernels)
        return replace(self, rows=rows, kernels=kernels)

    def cubin(self, key: str) -> Path | None:
        """The intact cubin of a spec; None when there is none, with one warning when it is missing or altered."""
        kernel = self.intact_kernel(key)
        return self.folder / kernel.file if kernel and self.folder else None

    def intact_kernel(self, key: str) -> KernelFile | None:
        """The entry that ``cubin``'s file was found to be: this table's, or that of another process's later build."""
        if key not in self._checked:
            self._checked[key] = self._verified(key)
        return self._checked[key]

    def _verified(self, key: str) -> KernelFile | None:
        kernel = self.kernels.get(key)
        if kernel is None or self.folder is None:
            return None
        path = self.folder / kernel.file
        fault = fault_of(path, kernel)
        if fault is None:
            return kernel
        # Another process may have written since: its build of the same kernel serves as well, and where it dropped the
        # kernel nothing is broken. Under the lock, not between its cubins and its table.
        with suppress(OSError), whole_files.locked(self.folder, shared=True, seconds=READ_SECONDS):
            now = _kernels_now(self.folder)
            if now is not None and now.get(key) != kernel:
                return now[key] if key in now and fault_of(path, now[key]) is None else None
            fault = fault_of(path, kernel)
        if fault is None:
            return kernel
        _warn(f"{path} {fault}; using the next candidate instead. Restore the file, or tune again")
        return None

    @classmethod
    def load(cls, folder: Path) -> DispatchTable | None:
        """The table in ``folder``; None when there is none, or with one warning when it cannot be used at all.

        Rows and kernels that are not understood are left out, all in one warning.
        """
        try:
            return cls.read(folder)
        except OSError as error:
            _warn(f"{folder / FILE_NAME} is not used: {error}")
            return None

    @classmethod
    def read(cls, folder: Path) -> DispatchTable | None:
        """``load``, but an OSError where there is a file that cannot be read now."""
        path = folder / FILE_NAME
        try:
            found = read_file(path)
        except FileNotFoundError:
            return None
        except ValueError as error:
            _warn(f"{path} is not used: {error}")
            return None
        if found.faults:
            _warn(
                f"{path}: {len(found.faults)} entries are not used, the first: {found.faults[0]}."
                " Restore the file, or tune again"
            )
        return _of(found, folder)

    def text(self) -> str:
        """The file's text: equal tables give equal bytes."""
        return file_text(Parsed(self.gpu, self.protocol, self.runs, self.kernels, self.rows))

    def write(
        self, folder: Path, artifacts: Iterable[Artifact] = (), sources: Sequence[Path] = ()
    ) -> DispatchTable:
        """Write table and cubins, and delete cubins that the table does not name. Returns the table as it lies there.

        A kernel without an artifact must lie in ``folder``, or in one of the tables' folders ``sources``; a ValueError
        names one that does not. Readers see each file as it was or as it is now. A kill between a rebuilt kernel and
        the table leaves that kernel to no row, with a warning, until it is written again.
        """
        cubins = {artifact.spec.key: artifact.cubin for artifact in artifacts}
        (folder / "kernels").mkdir(parents=True, exist_ok=True)
        for key, kernel in self.kernels.items():
            there = folder / kernel.file
            made = [cubins[key]] if key in cubins else []
            places = [*made, there, *(source / kernel.file for source in sources)]
            good = next((place for place in places if fault_of(place, kernel) is None), None)
            if good is None:
                raise ValueError(f"{places[0]} is not the kernel that the table names; compile {key} again")
            if good != there:
                whole_files.write(there, whole_files.read(good, MAX_CUBIN_BYTES))
        whole_files.write(folder / FILE_NAME, self.text().encode())
        for stray in (folder / "kernels").glob("*.cubin"):
            if stray.stem not in self.kernels:
                stray.unlink(missing_ok=True)
        return replace(self, folder=folder, _checked={})


def parse(data: Any, folder: Path | None = None) -> tuple[DispatchTable | None, list[str]]:
    """The table in ``data`` and every fault found; no table when the head is at fault."""
    try:
        found = Parsed.of(data)
    except ValueError as error:
        return None, [str(error)]
    return _of(found, folder), list(found.faults)


def _of(found: Parsed, folder: Path | None) -> DispatchTable:
    return DispatchTable(found.gpu, _sorted(found.rows), found.kernels, tuple(found.runs), found.protocol, folder)


def fault_of(path: Path, kernel: KernelFile) -> str | None:
    """What is wrong with the cubin at ``path``, as the end of a sentence; None when it is the table's."""
    try:
        content = whole_files.read(path, MAX_CUBIN_BYTES)
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    except ValueError:
        return "is not a cubin"
    if hashlib.sha256(content).hexdigest() != kernel.sha256:
        return "is not the file that its table names (sha256 differs)"
    return None


def _kernels_now(folder: Path) -> Mapping[str, KernelFile] | None:
    """The kernels of the table that lies there now; None when that cannot be read."""
    try:
        return read_file(folder / FILE_NAME).kernels
    except (OSError, ValueError):
        return None


def _sorted(rows: Iterable[TableRow]) -> tuple[TableRow, ...]:
    return tuple(sorted({row.problem: row for row in rows}.values(), key=lambda row: row.problem))


def _warn(message: str) -> None:
    warnings.warn(message, TableWarning, stacklevel=3)
