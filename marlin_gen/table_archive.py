"""Tables in one file: a zip archive of ``<gpu.slug>/table.json`` and ``<gpu.slug>/kernels/*.tar.xz``.

Equal tables give equal bytes. A reader takes no name but of these two forms, no more of anything than the bounds below,
and lets the tables' own hashes judge the content.
"""

from __future__ import annotations

import io
import re
import tempfile
import warnings
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from marlin_gen import kernel_pack, whole_files
from marlin_gen.installed import tables_below
from marlin_gen.table import FILE_NAME, DispatchTable, TableWarning
from marlin_gen.table_file import MAX_TABLE_BYTES

SUFFIX = ".zip"
MAX_FILES = 16384
MAX_BYTES = 512 << 20  # of the archive, and of what is in it

_NAME = re.compile(r"([a-z0-9][a-z0-9-]{0,80})/(table\.json|kernels/[a-z0-9_-]{1,160}\.tar\.xz)", re.ASCII)
_DATE = (1980, 1, 1, 0, 0, 0)  # the least that a zip can say
# What zipfile raises for damaged archives, beside ValueError and OSError.
_DAMAGE = (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError, IndexError)


def write_archive(path: Path, tables: Sequence[DispatchTable]) -> int:
    """Write the tables with their kernels; returns the archive's size in bytes. The file appears whole or not at all.

    A ValueError names a kernel that is not there unaltered, or the GPU that has two tables.
    """
    buffer = io.BytesIO()
    slugs = [table.gpu.slug for table in tables]
    if twice := [slug for slug in slugs if slugs.count(slug) > 1]:
        raise ValueError(f"there are {slugs.count(twice[0])} tables of {twice[0]}; merge them first")
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
        for table in sorted(tables, key=lambda table: table.gpu.slug):
            archive.writestr(_entry(f"{table.gpu.slug}/{FILE_NAME}"), table.text())
            for kind, file in kernel_pack.names(table.kinds).items():
                content = _packed(table, kind, file)
                archive.writestr(_entry(f"{table.gpu.slug}/{file}", zipfile.ZIP_STORED), content)
    path.parent.mkdir(parents=True, exist_ok=True)
    whole_files.write(path, buffer.getvalue())
    return len(buffer.getvalue())


def _packed(table: DispatchTable, kind: str, file: str) -> bytes:
    """The table's kernels of a kind: its file, if it is what it was when they were judged, since packing takes long."""
    cubins: dict[str, bytes] = {}
    for key in table.kinds[kind]:
        cubin = table.cubin(key)
        if cubin is None:
            raise ValueError(f"the table of {table.gpu.slug} has no intact {key}; tune again")
        cubins[key] = cubin
    assert table.folder  # or there was no cubin
    with suppress(OSError, ValueError):
        content = whole_files.read(table.folder / file, kernel_pack.MAX_BYTES)
        if kernel_pack.unpacked(content) == cubins:
            return content
    return kernel_pack.pack(cubins)


def _entry(name: str, compress_type: int = zipfile.ZIP_DEFLATED) -> zipfile.ZipInfo:
    entry = zipfile.ZipInfo(name, _DATE)
    entry.compress_type = compress_type
    entry.external_attr = 0o644 << 16
    return entry


@contextmanager
def opened(path: Path) -> Iterator[list[DispatchTable]]:
    """The tables in a folder, in its subfolders or in an archive. An archive's lie in a temporary folder meanwhile.

    Raises FileNotFoundError or a ValueError when there is none to read; parts that are damaged are left out, with one
    warning for each table.
    """
    if path.is_dir():
        yield _some(tables_below(path), path)
        return
    if not path.exists():
        raise FileNotFoundError(f"no such file: {path}; name a folder of tables, or an archive of marlin-gen export")
    with tempfile.TemporaryDirectory(prefix="marlin_gen-tables-") as folder:
        _unpack(path, Path(folder))
        yield _some(tables_below(Path(folder)), path)


@contextmanager
def held(table: DispatchTable) -> Iterator[DispatchTable]:
    """The table as it lies in its folder now, which no other process changes meanwhile: a tune may be writing there.

    A TimeoutError when a writer keeps the folder's lock.
    """
    assert table.folder
    with whole_files.locked(table.folder, shared=True):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", TableWarning)  # it was said when the table was first read
            now = DispatchTable.load(table.folder)
        yield now or table


def _some(tables: list[DispatchTable], path: Path) -> list[DispatchTable]:
    if not tables:
        raise ValueError(f"{path} holds no table that can be used")
    return tables


def _unpack(path: Path, folder: Path) -> None:
    try:
        with zipfile.ZipFile(io.BytesIO(whole_files.read(path, MAX_BYTES))) as archive:
            entries = _checked(archive.infolist(), path)
            left = MAX_BYTES
            for entry in entries:
                # What a header says of a size is not believed: reading stops at the bound.
                bound = min(MAX_TABLE_BYTES if entry.filename.endswith(FILE_NAME) else kernel_pack.MAX_BYTES, left)
                with archive.open(entry) as stream:
                    content = stream.read(bound + 1)
                if len(content) > bound:
                    raise ValueError(f"{path}: {entry.filename} is larger than {bound} bytes")
                left -= len(content)
                target = folder / entry.filename
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(content)
    except _DAMAGE as error:
        fix = f"name its folder, {path.parent}" if path.name == FILE_NAME else "copy it again"
        raise ValueError(f"{path} is not an intact archive ({error}); {fix}") from None


def _checked(entries: Sequence[zipfile.ZipInfo], path: Path) -> Sequence[zipfile.ZipInfo]:
    """The entries; a ValueError names one that a table has not, or that is there twice."""
    if len(entries) > MAX_FILES:
        raise ValueError(f"{path} holds {len(entries)} files, {MAX_FILES} at most are read")
    seen: set[str] = set()
    for entry in entries:
        # zipfile ends a name at a NUL; the original still has it.
        if not _NAME.fullmatch(entry.orig_filename) or entry.filename in seen:
            said = f"{entry.orig_filename!r:.200} is not a file of a table of this version, or is there twice"
            raise ValueError(f"{path}: {said}; nothing was read")
        if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise ValueError(f"{path}: {entry.filename} is compressed in a way that export does not use; copy it again")
        seen.add(entry.filename)
    return entries
