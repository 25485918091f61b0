"""Dataclasses as rows of a CSV file: the fields are the columns, in order."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterable
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar

from marlin_gen import whole_files

Row = TypeVar("Row")

_CONVERT: dict[str, Callable[[str], Any]] = {
    "int": int,
    "float": float,
    "str": str,
    "float | None": lambda cell: float(cell) if cell else None,
}


def columns_of(row_type: type[Any]) -> tuple[str, ...]:
    return tuple(f.name for f in fields(row_type))


def write(path: Path, row_type: type[Row], rows: Iterable[Row], digits: int) -> None:
    """Floats with ``digits`` significant digits, None as an empty cell; the file appears whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns_of(row_type))
    for row in rows:
        writer.writerow(_text(getattr(row, name), digits) for name in columns_of(row_type))
    whole_files.write(path, text.getvalue().encode())


def read(path: Path, row_type: type[Row], what: str) -> list[Row]:
    """All rows; a ValueError that says that the file is not ``what``, or which line is wrong."""
    expected = columns_of(row_type)
    typed: Any = row_type
    with open(path, newline="", encoding="utf-8", errors="backslashreplace") as file:  # so that a line is named
        reader = csv.DictReader(file)
        if tuple(reader.fieldnames or ()) != expected:
            raise ValueError(f"{path} is not {what}: its columns are {reader.fieldnames}, expected {list(expected)}")
        rows = []
        for number, cells in enumerate(reader, 2):
            try:
                values = {f.name: _CONVERT[str(f.type)](cells[f.name]) for f in fields(typed)}
                rows.append(row_type(**values))
            except (TypeError, ValueError) as error:
                raise ValueError(f"{path}, line {number}: {error}") from None
    return rows


def _text(value: object, digits: int) -> str:
    if value is None or not isinstance(value, float):
        return "" if value is None else str(value)
    # Never an exponent: from 10 ** (digits - 1) on, one decimal.
    return f"{value:.{digits}g}" if abs(value) < 10 ** (digits - 1) else f"{value:.1f}"
