"""Writing a table into a folder that other processes read from and write into."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from marlin_gen import kernel_pack, whole_files
from marlin_gen.measurement import Artifact
from marlin_gen.table import FILE_NAME, DispatchTable


def publish(
    folder: Path, table: DispatchTable, artifacts: Iterable[Artifact] = (), *, prefer: str = "newer"
) -> DispatchTable:
    """Merge ``table`` into the one in ``folder`` and write it, under a lock. Rows of other problems stay.

    Its kernels come from ``artifacts``, else from its own folder. Where both have a row of one problem, ``prefer`` says
    whose stays (``DispatchTable.merged``). Raises ValueError when the folder holds the table of another kind of GPU,
    TimeoutError when another process keeps the lock, OSError when the folder's table cannot be read now. One that is
    not used (damaged, or of another schema) is kept beside the new one as table.json.unused, without its kernels.
    """
    artifacts = list(artifacts)
    folder.mkdir(parents=True, exist_ok=True)
    with whole_files.locked(folder):
        old = DispatchTable.read(folder)
        if old and not old.gpu.same_class(table.gpu):
            raise ValueError(
                f"{folder} holds the table of {old.gpu.slug}; write that of {table.gpu.slug} to another folder"
            )
        if old is None and (folder / FILE_NAME).exists():
            os.replace(folder / FILE_NAME, folder / f"{FILE_NAME}.unused")
        _sweep(folder)
        sources = [table.folder] if table.folder else []
        if old:
            table = old.merged(table, prefer, damaged=old.kernels.keys() - old.intact(is_locked=True).kernels.keys())
        return table.write(folder, artifacts, sources)


def _sweep(folder: Path) -> None:
    """Remove what a writer that was killed left half written. Under the lock: there is no other writer now."""
    for left_over in (*folder.glob(f".{FILE_NAME}.*"), *(folder / kernel_pack.FOLDER).glob(".*.*")):
        left_over.unlink(missing_ok=True)
