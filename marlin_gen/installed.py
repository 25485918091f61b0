"""The dispatch tables on this machine: the user's own, then those that ship."""

from __future__ import annotations

import warnings
from pathlib import Path

from marlin_gen import env
from marlin_gen.table import FILE_NAME, DispatchTable, TableWarning


def find_tables() -> list[DispatchTable]:
    """Every usable one in the order of the look-up's rule: MARLIN_GEN_TABLE, else the user's; then the shipped.

    Raises FileNotFoundError when MARLIN_GEN_TABLE holds none.
    """
    explicit = env.table_dir()
    try:
        tables = tables_below(explicit or env.user_data_dir() / "tuned")
    except OSError as error:  # as in a container whose HOME is another user's
        if explicit:
            raise
        warnings.warn(f"no table of this user is used: {error}", TableWarning, stacklevel=2)
        tables = []
    if explicit and not tables and not any(_table_folders(explicit)):
        raise FileNotFoundError(f"MARLIN_GEN_TABLE={explicit} holds no {FILE_NAME}; name a folder that tune wrote")
    return tables + tables_below(env.tuned_dir())


def tables_below(folder: Path) -> list[DispatchTable]:
    """The usable tables in ``folder`` and its subfolders."""
    return [table for found in _table_folders(folder) if (table := DispatchTable.load(found))]


def _table_folders(folder: Path) -> list[Path]:
    """``folder`` itself or its subfolders, sorted, that hold a table."""
    return sorted(path.parent for pattern in (FILE_NAME, f"*/{FILE_NAME}") for path in folder.glob(pattern))
