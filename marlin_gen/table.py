"""Dispatch tables: what was measured to be fastest on one GPU, and the compiled kernels it names.

A folder ``tuned/<gpu.slug>`` holds ``table.json`` (one row per line, sorted, named fields) and ``kernels/<spec
key>.cubin``, whose sha256 the table records. Whatever cannot be read or trusted is left out with one warning per
table, so a damaged table costs speed and never a crash or a wrong result. Writes are atomic and locked: two processes
may tune into, or load from, one folder at once. A reader that meets a cubin of the other side of a write sees a hash
that differs, which is a miss.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import tempfile
import warnings
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from marlin_gen.arch import Gpu
from marlin_gen.formats import LAYOUT_VERSION
from marlin_gen.measurement import PROTOCOL, Artifact
from marlin_gen.table_row import FieldError, KernelFile, TableRow, take

SCHEMA = 2  # 2: kernels take a tensor map for the last token tile, and a bias
FILE_NAME = "table.json"


class TableWarning(UserWarning):
    """A table, or a part of one, is not used; the message says which and how to mend it."""


@dataclass(frozen=True)
class DispatchTable:
    """The rows and kernels of one GPU. ``folder`` is where its cubins lie; None before the first write."""

    gpu: Gpu
    rows: tuple[TableRow, ...]  # sorted by (n, k, m), one per problem
    kernels: Mapping[str, KernelFile]  # by KernelSpec.key
    runs: tuple[
        dict[str, Any], ...
    ] = ()  # provenance of each tuning run, oldest first: date, driver, torch, compiler ...
    protocol: str = PROTOCOL
    folder: Path | None = None
    _checked: dict[str, Path | None] = field(default_factory=dict, compare=False, repr=False)

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

    def merged(self, newer: DispatchTable) -> DispatchTable:
        """The rows of both, the newer one's where both have a problem; kernels that nothing names are dropped."""
        rows = {row.problem: row for row in (*self.rows, *newer.rows)}
        named = {spec.key for row in rows.values() for spec in row.specs(self.gpu)}
        kept = {key: kernel for key, kernel in self.kernels.items() if key in named}
        runs = tuple(run for run in self.runs if run not in newer.runs) + newer.runs
        return replace(
            newer, rows=_sorted(rows.values()), kernels={**kept, **newer.kernels}, runs=runs, folder=self.folder
        )

    def cubin(self, key: str) -> Path | None:
        """The intact cubin of a spec; None when there is none, with one warning when it is missing or altered."""
        if key not in self._checked:
            self._checked[key] = self._verified(key)
        return self._checked[key]

    def _verified(self, key: str) -> Path | None:
        kernel = self.kernels.get(key)
        if kernel is None or self.folder is None:
            return None
        path = self.folder / kernel.file
        try:
            if hashlib.sha256(path.read_bytes()).hexdigest() == kernel.sha256:
                return path
            fault = "is not the file that its table names (sha256 differs)"
        except OSError as error:
            fault = f"cannot be read ({error.strerror})"
        _warn(f"{path} {fault}; using the next candidate instead. Restore the file, or tune again")
        return None

    @classmethod
    def load(cls, folder: Path) -> DispatchTable | None:
        """The table in ``folder``; None when there is none, or with one warning when it cannot be used at all.

        Rows and kernels that are not understood are left out, all in one warning.
        """
        path = folder / FILE_NAME
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            _warn(f"{path} cannot be read ({error}); going on without it. Restore the file, or tune again")
            return None
        table, faults = parse(data, folder)
        if table is None:
            _warn(f"{path} is not used: {faults[0]}")
        elif faults:
            _warn(
                f"{path}: {len(faults)} entries are not used, the first: {faults[0]}. Restore the file, or tune again"
            )
        return table

    def text(self) -> str:
        """The file's text: equal tables give equal bytes."""
        head = {
            "schema": SCHEMA,
            "layout_version": LAYOUT_VERSION,
            "protocol": self.protocol,
            "gpu": self.gpu.to_json(),
        }
        lines = [f" {json.dumps(name)}: {json.dumps(value)}," for name, value in head.items()]
        runs = [f"  {json.dumps(run, sort_keys=True)}" for run in self.runs]
        kernels = [f"  {json.dumps(key)}: {json.dumps(vars(kernel))}" for key, kernel in sorted(self.kernels.items())]
        rows = [f"  {json.dumps(row.to_json())}" for row in self.rows]
        for name, marks, entries in (("runs", "[]", runs), ("kernels", "{}", kernels), ("rows", "[]", rows)):
            comma = "" if name == "rows" else ","
            lines += [f' "{name}": {marks[0]}', ",\n".join(entries), f" {marks[1]}{comma}"]
        return "\n".join(["{", *lines, "}", ""])

    def write(self, folder: Path, artifacts: Iterable[Artifact] = ()) -> DispatchTable:
        """Write table and cubins, and delete cubins that the table does not name. Returns the table as it lies there.

        A kernel without an artifact must already lie in ``folder``. Readers see the old table or the new one.
        """
        cubins = {artifact.spec.key: artifact.cubin for artifact in artifacts}
        (folder / "kernels").mkdir(parents=True, exist_ok=True)
        for key, kernel in self.kernels.items():
            source = cubins.get(key, folder / kernel.file)
            content = source.read_bytes()
            if hashlib.sha256(content).hexdigest() != kernel.sha256:
                raise ValueError(f"{source} is not the kernel that the table names; compile {key} again")
            if source != folder / kernel.file:
                _write(folder / kernel.file, content)
        _write(folder / FILE_NAME, self.text().encode())
        for stray in (folder / "kernels").glob("*.cubin"):
            if stray.stem not in self.kernels:
                stray.unlink(missing_ok=True)
        return replace(self, folder=folder, _checked={})


def publish(folder: Path, table: DispatchTable, artifacts: Iterable[Artifact]) -> DispatchTable:
    """Merge ``table`` into the one in ``folder`` and write it, under a lock. Rows of other problems stay.

    Raises ValueError when the folder holds the table of another kind of GPU. A table that cannot be used (damaged, or
    of another schema) is kept beside the new one as table.json.unused.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        old = DispatchTable.load(folder)
        if old and not old.gpu.same_class(table.gpu):
            raise ValueError(
                f"{folder} holds the table of {old.gpu.slug}; write that of {table.gpu.slug} to another folder"
            )
        if old is None and (folder / FILE_NAME).exists():
            os.replace(folder / FILE_NAME, folder / f"{FILE_NAME}.unused")
        if old:
            fresh = {artifact.spec.key for artifact in artifacts}
            intact = {key: kernel for key, kernel in old.kernels.items() if key in fresh or old.cubin(key)}
            table = replace(old, kernels=intact).merged(table)
        return table.write(folder, artifacts)


def parse(data: Any, folder: Path | None = None) -> tuple[DispatchTable | None, list[str]]:
    """The schema: the table in ``data`` and every fault found; no table when the head is at fault."""
    try:
        for name, expected in (("schema", SCHEMA), ("layout_version", LAYOUT_VERSION)):
            if (found := take(data, name, int)) != expected:
                raise FieldError(
                    f"{name}={found} is not {expected}; it was written by another version of marlin_gen, tune again"
                )
        gpu = Gpu.from_json(take(data, "gpu", dict))
        gpu.arch  # noqa: B018  raises for a GPU that no kernel can run on
        protocol, runs = take(data, "protocol", str), take(data, "runs", list)
        kernel_data, row_data = take(data, "kernels", dict), take(data, "rows", list)
    except (FieldError, TypeError, ValueError, KeyError) as error:
        return None, [str(error)]
    faults: list[str] = []
    kernels: dict[str, KernelFile] = {}
    for key, entry in kernel_data.items():
        try:
            kernels[key] = KernelFile.from_json(key, entry)
        except ValueError as error:
            faults.append(f"kernel {key}: {error}")
    rows = []
    for number, entry in enumerate(row_data):
        try:
            rows.append(TableRow.from_json(entry))
        except ValueError as error:
            faults.append(f"row {number}: {error}")
    return DispatchTable(gpu, _sorted(rows), kernels, tuple(runs), protocol, folder), faults


def _sorted(rows: Iterable[TableRow]) -> tuple[TableRow, ...]:
    return tuple(sorted({row.problem: row for row in rows}.values(), key=lambda row: row.problem))


def _warn(message: str) -> None:
    warnings.warn(message, TableWarning, stacklevel=3)


def _write(path: Path, content: bytes) -> None:
    """Write a whole file or none: a full disk leaves what was there."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        with suppress(OSError):
            os.unlink(name)
        raise
