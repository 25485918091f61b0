"""Packed kernels: what is not as it was packed is a miss with one warning, what is not read is not written."""

from __future__ import annotations

import errno
import os
import sys
import tarfile
from dataclasses import replace
from pathlib import Path

import pytest
import tables
from tables import H100, edit, load, mma, row, wgmma

from marlin_gen import kernel_pack, whole_files, xz
from marlin_gen.problem import Problem
from marlin_gen.table import DispatchTable, TableWarning
from marlin_gen.table_publish import publish

ROWS = [row(4096, 4096, 16, wgmma(16, 256), default=mma(64, 16)), row(4096, 4096, 1, mma()), row(4096, 14336, 1, mma())]


@pytest.fixture
def written(tmp_path: Path) -> DispatchTable:
    return tables.table(tmp_path, ROWS)


def mma_key(found: DispatchTable) -> str:
    return next(key for key in found.kernels if key.startswith("mma-m8"))


@pytest.mark.parametrize("harm", ["flip", "truncate", "leave out"])
def test_a_damaged_cubin_is_a_miss_with_one_warning(written, harm):
    """In a file that is whole: who writes one can pack anything."""
    key = mma_key(written)
    content = written.cubin(key)
    tables.damage(written, key, {"flip": content[:-1] + b"?", "truncate": content[:-1], "leave out": None}[harm])
    found = load(written.folder)
    with pytest.warns(TableWarning, match=r"1 kernels are not used, but the next candidates") as caught:
        assert found.cubin(key) is None
        assert found.cubin(key) is None
    assert len(caught) == 1
    others = [found.cubin(other) for other in found.kernels if other != key]
    assert others and all(others)


@pytest.mark.parametrize("harm", ["flip", "truncate", "delete", "no archive", "not named"])
def test_a_damaged_file_costs_the_kernels_of_its_kind_one_warning(written, harm):
    path = tables.pack_of(written, mma_key(written))
    content = path.read_bytes()
    if harm == "delete":
        path.unlink()
    elif harm == "not named":
        edit(written.folder, lambda d: d["packs"].clear())
    else:
        half = len(content) // 2
        flipped = content[:half] + bytes([content[half] ^ 1]) + content[half + 1 :]
        path.write_bytes({"flip": flipped, "truncate": content[:-1], "no archive": xz.pack(b"kernels" * 99)}[harm])
    found = load(written.folder)
    with pytest.warns(TableWarning, match=f"{len(found.kernels)} kernels are not used") as caught:
        assert not any(map(found.cubin, found.kernels)) and found.intact().rows == ()
    assert len(caught) == 1


def test_without_lzma_kernels_are_a_miss_and_none_are_written(written, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "lzma", None)
    with pytest.warns(TableWarning, match="built without lzma"):
        assert not any(map(written.cubin, written.kernels))
    with pytest.raises(ValueError, match="built without lzma"):
        tables.table(tmp_path / "other", ROWS)


def header(name: str = "x.cubin", kind: bytes = tarfile.REGTYPE, **fields) -> bytes:
    """A block that a reader of tar files takes for whole: its checksum is right."""
    entry = tarfile.TarInfo(name)
    entry.type, entry.linkname = kind, "/etc/hostname"
    block = bytearray(entry.tobuf(tarfile.GNU_FORMAT)[:512])
    for at, content in {"size": 124, "extended": 482}.items():
        if at in fields:
            block[content : content + len(fields[at])] = fields[at]
    block[148:156] = b"%06o\0 " % (sum(block[:148]) + sum(block[156:]) + 8 * 32)
    return bytes(block)


BACKWARDS = b"\xff" * 10 + (-1024).to_bytes(2, "big", signed=True)
ODD_FILES = {
    **{f"type {kind}": header(kind=kind.encode()) for kind in "123567KxgZ"},
    "sparse": header(kind=tarfile.GNUTYPE_SPARSE, extended=b"\1"),
    "goes elsewhere": header("../x.cubin"),
    "no cubin": header("x.txt"),
    "twice": header() + header(),
    "backwards": header("a.cubin") + header("b.cubin") + header("c.cubin", size=BACKWARDS),
    "beyond the end": header(size=b"00007777777\0"),
    "half a header": header()[:140],
    "no header": b"kernels" * 99,
    "many": b"".join(header(f"x{i}.cubin") for i in range(9)),
}  # fmt: skip


@pytest.mark.parametrize("what", ODD_FILES)
def test_what_else_lies_in_a_file_of_kernels_makes_it_none(written, what, monkeypatch):
    """Also what tarfile would follow: round in circles, or beyond the end."""
    monkeypatch.setattr(kernel_pack, "MAX_KERNELS", 8)
    tables.pack_of(written, mma_key(written)).write_bytes(xz.pack(ODD_FILES[what] + bytes(1024)))
    with pytest.warns(TableWarning, match="is not used: .* (is not a kernel's|is no archive)") as caught:
        assert not any(map(written.cubin, written.kernels))
    assert len(caught) == 1


def test_what_would_not_be_read_is_not_written(monkeypatch):
    monkeypatch.setattr(kernel_pack, "MAX_UNPACKED", 16 << 20)
    with pytest.raises(ValueError, match="1 kernels of 17 MiB are too many for one file"):
        kernel_pack.pack({"x": bytes(17 << 20)})
    with pytest.raises(ValueError, match="unpacks to more than 16777216 bytes"):
        kernel_pack.unpacked(xz.pack(bytes(17 << 20)))
    monkeypatch.setattr(kernel_pack, "MAX_KERNELS", 1)
    with pytest.raises(ValueError, match="2 kernels of 0 MiB are too many"):
        kernel_pack.pack({"x": b"", "y": b""})


def test_equal_kernels_are_equal_bytes_in_whatever_order(written):
    cubins = {key: written.cubin(key) for key in written.kernels}
    backwards = dict(reversed(cubins.items()))
    assert list(cubins) != list(backwards) and kernel_pack.pack(cubins) == kernel_pack.pack(backwards)
    assert tables.pack_of(written, mma_key(written)).read_bytes() == kernel_pack.pack(cubins)


def test_a_file_of_kernels_stays_unless_they_change_or_are_damaged(written, tmp_path):
    key = mma_key(written)
    path = tables.pack_of(written, key)
    before, content = path.stat(), path.read_bytes()
    (written.folder / "kernels" / f"{key}.cubin").write_bytes(b"of a table of before")
    other = tables.artifact(tmp_path / "new", mma(96), weight_format="u4b8g64")
    rows = [replace(row(4096, 4096, 1, mma(96)), problem=Problem(4096, 4096, 1, "u4b8g64"))]
    publish(written.folder, DispatchTable.build(H100, rows, [other], {}), [other])
    now = path.stat()
    assert (now.st_ino, now.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    assert kernel_pack.files(written.folder) == {path, tables.pack_of(load(written.folder), other.spec.key)}
    # What is damaged is dropped by the next publish, and mended by one that has it.
    path.write_bytes(content[:-1])
    found = publish(written.folder, DispatchTable.build(H100, rows, [other], {}), [other])
    assert [r.problem.weight_format for r in found.intact().rows] == ["u4b8g64"] and not path.exists()
    again = tables.table(tmp_path / "again", ROWS)
    found = publish(written.folder, again)
    assert found.intact() == found and len(found.rows) == 4 and path.read_bytes() == content


def test_kernels_that_cannot_be_read_now_are_not_taken_for_damaged(written, tmp_path, monkeypatch):
    """As where too many files are open: a publish would drop the whole kind."""
    read = whole_files.read

    def short_of_files(path, limit):
        if path.name.endswith(".xz"):
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE), str(path))
        return read(path, limit)

    made = tables.artifact(tmp_path / "new", mma(96))
    monkeypatch.setattr(whole_files, "read", short_of_files)
    with pytest.raises(OSError, match="Too many open files"):
        publish(written.folder, DispatchTable.build(H100, [row(64, 4096, 1, mma(96))], [made], {}), [made])
    monkeypatch.undo()
    assert load(written.folder) == written and written.intact() == written


def test_what_another_process_published_is_intact_too(written, tmp_path):
    """A table that was read a moment ago: its file of kernels is gone, and they lie in the next."""
    made = tables.artifact(tmp_path / "new", mma(96))
    publish(written.folder, DispatchTable.build(H100, [row(64, 4096, 1, mma(96))], [made], {}), [made])
    assert not tables.pack_of(written, mma_key(written)).exists()
    assert written.intact() == written
