"""``table.json``: the text of a dispatch table, sealed with its own sha256, and the reader that believes nothing.

The first field is the sha256 of every byte after its line, so a table that was cut short, edited or hit by a bad disk
is a miss as a whole. What passes is checked field by field all the same: a sealed table may come from anywhere.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from marlin_gen import kernel_pack, whole_files
from marlin_gen.arch import Gpu
from marlin_gen.config import KernelSpec
from marlin_gen.families.base import LAUNCH_VERSION
from marlin_gen.formats import LAYOUT_VERSION
from marlin_gen.table_row import FieldError, KernelEntry, TableRow, size, take

SCHEMA = 4  # earlier ones had a file for each kernel, and before no seal
FILE_NAME = "table.json"
MAX_TABLE_BYTES = 64 << 20  # 80000 rows

_SEAL = re.compile(rb'\{\n "sha256": "([0-9a-f]{64})",\n')


@dataclass(frozen=True)
class Parsed:
    """The content of a table's file, and ``faults``: a sentence for each entry that was left out."""

    gpu: Gpu
    protocol: str
    runs: Sequence[dict[str, Any]]
    packs: Mapping[str, str]  # by kind the file of its kernels, relative to the table's folder
    kernels: Mapping[str, KernelEntry]
    rows: Sequence[TableRow]
    faults: Sequence[str] = field(default=(), compare=False)

    @classmethod
    def of(cls, data: Any) -> Parsed:
        """The schema; a ValueError when the head is at fault."""
        try:
            check_versions(data)
            gpu = _gpu(take(data, "gpu", dict))
            protocol, runs = take(data, "protocol", str), take(data, "runs", list)
            packs, kernel_data = take(data, "packs", dict), take(data, "kernels", dict)
            row_data = take(data, "rows", list)
            if not all(isinstance(run, dict) for run in runs):
                raise FieldError("runs has an entry that is not an object")
            for kind, file in packs.items():
                if not isinstance(file, str) or not kernel_pack.is_name(kind, file):
                    raise FieldError(f"packs: {file!r:.120} is not the file of a kind {kind!r:.80}")
        except (TypeError, KeyError) as error:
            raise FieldError(str(error)) from None
        faults: list[str] = []
        kernels: dict[str, KernelEntry] = {}
        for key, entry in kernel_data.items():
            try:
                kernels[key] = KernelEntry.from_json(key, entry)
                if (arch := KernelSpec.from_key(key).arch) != gpu.arch.name:
                    del kernels[key]
                    raise FieldError(f"is for {arch}, this GPU runs {gpu.arch.name}")
            except ValueError as error:
                faults.append(f"kernel {key:.120}: {error}")
        rows = []
        for number, entry in enumerate(row_data):
            try:
                rows.append(TableRow.from_json(entry))
            except ValueError as error:
                faults.append(f"row {number}: {error}")
        return cls(gpu, protocol, runs, packs, kernels, rows, faults)


def check_versions(data: Any) -> None:
    """A ValueError unless the table is of this version's schema, packed layout and launch arguments."""
    fix = "it was written by another version of marlin_gen, tune again"
    for name, expected in (
        ("schema", SCHEMA), ("layout_version", LAYOUT_VERSION), ("launch_version", LAUNCH_VERSION)
    ):  # fmt: skip
        if (found := take(data, name, int)) != expected:
            raise FieldError(f"{name}={found} is not {expected}; {fix}")


def _gpu(data: dict[str, Any]) -> Gpu:
    capability = take(data, "capability", list)
    if len(capability) != 2 or not all(type(part) is int and 0 <= part < 1000 for part in capability):
        raise FieldError(f"gpu: capability={capability!r:.60} is not two small numbers")
    for name in ("num_sms", "l2_bytes", "smem_per_sm", "bandwidth_gbs"):
        if size(data, name) < 1:
            raise FieldError(f"gpu: {name}={data[name]} is not positive")
    take(data, "name", str)
    gpu = Gpu.from_json(data)
    gpu.arch  # noqa: B018  raises for a GPU that no kernel can run on
    return gpu


def read_file(path: Path) -> Parsed:
    """The table at ``path``; an OSError, or a ValueError that says why no part of it is used."""
    return parse_file(whole_files.read(path, MAX_TABLE_BYTES))


def parse_file(content: bytes) -> Parsed:
    """The table whose file has this content; a ValueError that says why no part of it is used."""
    try:
        data = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise FieldError(f"it cannot be read ({error}). Restore the file, or tune again") from None
    schema = data.get("schema") if isinstance(data, dict) else None
    # Another schema is named as such, be it sealed or not.
    if schema == SCHEMA or not isinstance(schema, int):
        check_seal(content)
    return Parsed.of(data)


def seal(rest: str) -> str:
    """A JSON object whose first field is the sha256 of ``rest``: the other fields' lines and the closing brace."""
    return f'{{\n "sha256": "{hashlib.sha256(rest.encode()).hexdigest()}",\n{rest}'


def check_seal(content: bytes) -> None:
    """A ValueError unless the content is as ``seal`` made it."""
    found = _SEAL.match(content)
    if not found:
        raise FieldError("it does not begin with its sha256: it was edited or damaged. Restore the file, or tune again")
    if hashlib.sha256(content[found.end() :]).hexdigest().encode() != found[1]:
        raise FieldError("its sha256 is not that of its content: it was edited or damaged. Restore it, or tune again")


def file_text(table: Parsed) -> str:
    """One row, kernel and run per line, sealed. Equal tables give equal bytes."""
    head = {
        "schema": SCHEMA, "layout_version": LAYOUT_VERSION, "launch_version": LAUNCH_VERSION,
        "protocol": table.protocol, "gpu": table.gpu.to_json(),
    }  # fmt: skip
    lines = [f" {json.dumps(name)}: {json.dumps(value)}," for name, value in head.items()]
    runs = [f"  {json.dumps(run, sort_keys=True)}" for run in table.runs]
    packs = [f"  {json.dumps(kind)}: {json.dumps(file)}" for kind, file in sorted(table.packs.items())]
    kernels = [f"  {json.dumps(key)}: {json.dumps(vars(kernel))}" for key, kernel in sorted(table.kernels.items())]
    rows = [f"  {json.dumps(row.to_json())}" for row in table.rows]
    parts = (("runs", "[]", runs), ("packs", "{}", packs), ("kernels", "{}", kernels), ("rows", "[]", rows))
    for name, marks, entries in parts:
        comma = "" if name == "rows" else ","
        lines += [f' "{name}": {marks[0]}', ",\n".join(entries), f" {marks[1]}{comma}"]
    return seal("\n".join([*lines, "}", ""]))
