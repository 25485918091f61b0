"""Dispatch tables: what was measured to be fastest on one GPU, and the compiled kernels it names.

A folder ``tuned/<gpu.slug>`` holds ``table.json`` (one row per line, sorted, named fields) and its kernels, packed by
kind (``kernel_pack``), whose sha256 the table records; the table's own is its first field. Whatever cannot be read or
trusted is left out with one warning, so a damaged table costs speed and never a crash or a wrong result. Files are
written whole and under a lock: any number of processes may tune into, import into and load from one folder at once.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from marlin_gen import kernel_pack, whole_files
from marlin_gen.arch import Gpu
from marlin_gen.measurement import PROTOCOL, Artifact
from marlin_gen.problem import Problem
from marlin_gen.table_file import FILE_NAME, Parsed, file_text, read_file
from marlin_gen.table_row import KernelEntry, TableRow, chosen_rows, named_kernels

__all__ = ["FILE_NAME", "DispatchTable", "TableWarning", "parse"]


READ_SECONDS = 2.0  # that serving waits for a writer, at most, and only to judge kernels that look damaged
PREFERENCES = ("newer", "older", "faster")  # whose row of a problem a merge keeps


class TableWarning(UserWarning):
    """A table, or a part of one, is not used; the message says which and how to mend it."""


@dataclass(frozen=True)
class DispatchTable:
    """The rows and kernels of one GPU. ``folder`` is where its kernels lie; None before the first write."""

    gpu: Gpu
    rows: tuple[TableRow, ...]  # sorted by (n, k, m), one per problem
    kernels: Mapping[str, KernelEntry]  # by KernelSpec.key
    runs: tuple[dict[str, Any], ...] = ()  # of each tuning run, oldest first: date, driver, torch, compiler ...
    protocol: str = PROTOCOL
    folder: Path | None = None
    packs: Mapping[str, str] = field(default_factory=dict, compare=False)  # by kind the file of its kernels in there
    _judged: dict[str, tuple[KernelEntry, bytes] | None] = field(default_factory=dict, compare=False, repr=False)

    @classmethod
    def build(
        cls, gpu: Gpu, rows: Iterable[TableRow], artifacts: Iterable[Artifact], provenance: Mapping[str, Any]
    ) -> DispatchTable:
        """A table of fresh results. ``artifacts`` hold every row's kernel and any others to ship (family defaults)."""
        kernels = {artifact.spec.key: KernelEntry.of(artifact) for artifact in artifacts}
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
            _judged={},
        )  # fmt: skip

    def _builds_that_stay(
        self, kernels: Mapping[str, KernelEntry], newer: DispatchTable, rows: Mapping[Problem, TableRow], prefer: str
    ) -> dict[str, KernelEntry]:
        """Those of this table's ``kernels`` that ``merged`` does not take in the newer's build."""
        ours, theirs = (
            Counter(row.specs(self.gpu)[0].key for row in table.rows if rows[row.problem] is row)
            for table in (self, newer)
        )
        return {
            key: kernel for key, kernel in kernels.items()
            if not theirs[key] or (ours[key] if prefer == "older" else ours[key] >= theirs[key])
        }  # fmt: skip

    def _timed_with(self, kernels: Mapping[str, KernelEntry]) -> Iterator[TableRow]:
        """The rows whose kernel is of no other build; without the default's time where that is."""
        for row in self.rows:
            own, *default = (kernels.get(s.key) in (None, self.kernels.get(s.key)) for s in row.specs(self.gpu))
            if own:
                yield row if all(default) else replace(row, default_us=None)

    @cached_property
    def kinds(self) -> Mapping[str, kernel_pack.Kernels]:
        """The kernels as they lie in files: by weight format and activation type."""
        return kernel_pack.by_kind(self.kernels)

    def intact(self, is_locked: bool = False) -> DispatchTable:
        """Only the kernels that are there unaltered, and the rows that one of them serves. Warns of nothing.

        ``is_locked``: by the caller, who writes. An OSError then where a file of kernels is there and cannot be read.
        """
        judged = (self._judge(kind, is_locked)[0] for kind in self.kinds) if self.folder else ()
        kernels = {key: kernel for found in judged for key, (kernel, _) in found.items()}
        rows = tuple(row for row in self.rows if row.specs(self.gpu)[0].key in kernels)
        return replace(self, rows=rows, kernels=kernels)

    def cubin(self, key: str) -> bytes | None:
        """The intact cubin of a spec: see ``find``."""
        found = self.find(key)
        return found[1] if found else None

    def find(self, key: str) -> tuple[KernelEntry, bytes] | None:
        """The intact kernel of a spec, and the entry that it is of: this table's, or another process's later build.

        None when there is none, with one warning for all of its kind. Later changes of their file change nothing.
        """
        if key not in self._judged:
            if self.folder is None or key not in self.kernels:
                return None
            kind = kernel_pack.kind_of(key)
            found, fault = self._judge(kind)
            if fault:
                _warn(f"{self.folder}/{fault}. Restore the file, or tune again")
            self._judged.update({key: found.get(key) for key in self.kinds[kind]})
        return self._judged[key]

    def _judge(self, kind: str, is_locked: bool = False) -> tuple[dict[str, tuple[KernelEntry, bytes]], str]:
        """The intact kernels of a kind: they lie in one file. And what is wrong with the others; "" if there are none.

        Another process may have written since: its build of the same kernel serves as well, and where it dropped the
        kernel nothing is broken. Looked at under the lock, or its files could go as these did.
        """
        assert self.folder
        file, ours = self.packs.get(kind), self.kinds[kind]
        found, fault = kernel_pack.intact(self.folder, file, ours, strict=is_locked)
        lost = ours.keys() - found.keys()
        if lost and not is_locked:
            with suppress(OSError, ValueError), whole_files.locked(self.folder, shared=True, seconds=READ_SECONDS):
                now = read_file(self.folder / FILE_NAME)
                theirs = {key: now.kernels[key] for key in lost & now.kernels.keys()}
                file = now.packs.get(kind)
                again, fault = kernel_pack.intact(self.folder, file, theirs)
                found, lost = found | again, theirs.keys() - again.keys()
        said = f"{file or kernel_pack.FOLDER} {fault}; {len(lost)} kernels are not used, but the next candidates"
        return found, said if lost else ""

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
        packs = kernel_pack.names(self.kinds)
        return file_text(Parsed(self.gpu, self.protocol, self.runs, packs, self.kernels, self.rows))

    def write(self, folder: Path, artifacts: Iterable[Artifact] = (), sources: Sequence[Path] = ()) -> DispatchTable:
        """Write table and kernels, and delete kernels that it does not name. Returns the table as it lies there.

        A kernel without an artifact must lie in ``folder``, or in one of the tables' folders ``sources``; a ValueError
        names one that does not. Readers see the table and its kernels as they were or as they are now, a kill likewise.
        """
        made = {artifact.spec.key: artifact.cubin for artifact in artifacts}
        packs, places = kernel_pack.names(self.kinds), {place: _packs(place) for place in (folder, *sources)}
        (folder / kernel_pack.FOLDER).mkdir(parents=True, exist_ok=True)
        for kind, wanted in self.kinds.items():
            if len(kernel_pack.intact(folder, packs[kind], wanted)[0]) < len(wanted):
                content = kernel_pack.pack(kernel_pack.collect(kind, wanted, made, places))
                whole_files.write(folder / packs[kind], content)
        whole_files.write(folder / FILE_NAME, self.text().encode())
        for stray in kernel_pack.files(folder) - {folder / file for file in packs.values()}:
            stray.unlink(missing_ok=True)
        return replace(self, folder=folder, packs=packs, _judged={})


def parse(data: Any, folder: Path | None = None) -> tuple[DispatchTable | None, list[str]]:
    """The table in ``data`` and every fault found; no table when the head is at fault."""
    try:
        found = Parsed.of(data)
    except ValueError as error:
        return None, [str(error)]
    return _of(found, folder), list(found.faults)


def _of(found: Parsed, folder: Path | None) -> DispatchTable:
    rows, runs = _sorted(found.rows), tuple(found.runs)
    return DispatchTable(found.gpu, rows, found.kernels, runs, found.protocol, folder, found.packs)


def _packs(folder: Path) -> Mapping[str, str]:
    """The files of kernels that the table there names; none where it cannot be read."""
    try:
        return read_file(folder / FILE_NAME).packs
    except (OSError, ValueError):
        return {}


def _sorted(rows: Iterable[TableRow]) -> tuple[TableRow, ...]:
    return tuple(sorted({row.problem: row for row in rows}.values(), key=lambda row: row.problem))


def _warn(message: str) -> None:
    warnings.warn(message, TableWarning, stacklevel=3)
