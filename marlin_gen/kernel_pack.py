"""A table's compiled kernels: a file for each weight format and activation type, ``kernels/<kind>-<digest>.tar.xz``.

Kernels of one kind are much alike: together they pack to a twelfth of their size, each by itself to three tenths. A
file's name has a digest of what is in it, and no file is ever altered: a table passes from one set of kernels to the
next by its own file alone, whenever its writer is killed.
"""

from __future__ import annotations

import hashlib
import io
import re
import tarfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from marlin_gen import whole_files, xz
from marlin_gen.config import KernelSpec
from marlin_gen.table_row import KernelEntry

FOLDER = "kernels"
SUFFIX = ".tar.xz"
MAX_BYTES = 64 << 20  # of a file; two hundred times a large one
MAX_CUBIN_BYTES = 16 << 20  # three hundred times a large kernel
MAX_KERNELS = 16384
MAX_UNPACKED = 128 << 20  # thirty times a large one

_MEMBER = re.compile(r"([a-z0-9_-]{1,160})\.cubin", re.ASCII)


def kind_of(key: str) -> str:
    """Of a spec's key: such as u4b8g128-f16."""
    spec = KernelSpec.from_key(key)
    return f"{spec.weight_format}-{spec.act_dtype}"


Kernels = Mapping[str, KernelEntry]  # by KernelSpec.key, sorted where they are of one kind


def by_kind(kernels: Kernels) -> dict[str, Kernels]:
    """The kernels of a table, each kind's by themselves, sorted."""
    kinds: dict[str, dict[str, KernelEntry]] = {}
    for key, kernel in sorted(kernels.items()):
        kinds.setdefault(kind_of(key), {})[key] = kernel
    return dict(sorted(kinds.items()))


def names(kinds: Mapping[str, Kernels]) -> dict[str, str]:
    """By kind the file that holds these kernels and no others, relative to the table's folder."""
    found = {}
    for kind, kernels in kinds.items():
        lines = "".join(f"{key} {kernel.sha256}\n" for key, kernel in kernels.items())
        found[kind] = f"{FOLDER}/{kind}-{hashlib.sha256(lines.encode()).hexdigest()[:12]}{SUFFIX}"
    return found


def is_name(kind: str, file: str) -> bool:
    """Whether ``file`` is written as the name of a file of this kind, and that as a kind is."""
    is_kind = re.fullmatch("[a-z0-9]{1,40}-[a-z0-9]{1,20}", kind, re.ASCII)
    return bool(is_kind and re.fullmatch(rf"{FOLDER}/{kind}-[0-9a-f]{{12}}{re.escape(SUFFIX)}", file, re.ASCII))


def files(folder: Path) -> set[Path]:
    """What lies in a table's folder as its kernels; those of an earlier schema, a file for each, too."""
    return {path for ending in (SUFFIX, ".cubin") for path in (folder / FOLDER).glob(f"*{ending}")}


def pack(cubins: Mapping[str, bytes]) -> bytes:
    """The file of these cubins, by spec key: equal cubins give equal bytes. A ValueError for what is not read."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        for key, cubin in sorted(cubins.items()):
            entry = tarfile.TarInfo(f"{key}.cubin")
            entry.size = len(cubin)
            archive.addfile(entry, io.BytesIO(cubin))
    packed = xz.pack(buffer.getvalue())
    if max(len(buffer.getvalue()) / MAX_UNPACKED, len(packed) / MAX_BYTES, len(cubins) / MAX_KERNELS) > 1:
        raise ValueError(f"{len(cubins)} kernels of {buffer.tell() >> 20} MiB are too many for one file of a table")
    return packed


def unpacked(packed: bytes) -> dict[str, bytes]:
    """The inverse of ``pack``; a ValueError says why no part is used.

    Only what ``pack`` writes is understood: tarfile's own reader follows extensions, of which a negative size leads it
    round for ever and a sparse file out of its bounds.
    """
    content = xz.unpack(packed, MAX_UNPACKED)
    found: dict[str, bytes] = {}
    at = 0
    while any(block := content[at : at + tarfile.BLOCKSIZE]):
        try:
            entry = tarfile.TarInfo.frombuf(block, "ascii", "strict")
        except (tarfile.TarError, ValueError) as error:
            raise ValueError(f"it is no archive of kernels ({error})") from None
        at += tarfile.BLOCKSIZE
        name = _MEMBER.fullmatch(entry.name)
        is_whole = entry.type == tarfile.REGTYPE and 0 <= entry.size <= len(content) - at
        if not name or name[1] in found or not is_whole or len(found) == MAX_KERNELS:
            raise ValueError(f"{entry.name!r:.200} is not a kernel's, or is there twice")
        found[name[1]] = content[at : at + entry.size]
        at += -(-entry.size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
    return found


def intact(
    folder: Path, file: str | None, wanted: Kernels, strict: bool = False
) -> tuple[dict[str, tuple[KernelEntry, bytes]], str]:
    """Those of ``wanted`` that lie in ``folder``'s ``file`` unaltered, with their cubins.

    And, as the end of a sentence that begins with the file, what is wrong with it where some are not. ``strict``: an
    OSError where it is there and cannot be read now, which says nothing of what is in it.
    """
    if file is None:
        return {}, "has no file of this kind that the table names"
    try:
        cubins = unpacked(whole_files.read(folder / file, MAX_BYTES))
    except OSError as error:
        if strict and not isinstance(error, FileNotFoundError):
            raise
        return {}, f"cannot be read ({error.strerror})"
    except ValueError as error:
        return {}, f"is not used: {error}"
    pairs = {key: (kernel, cubins[key]) for key, kernel in wanted.items() if key in cubins}
    same = {key: (kernel, cubin) for key, (kernel, cubin) in pairs.items() if kernel.is_of(cubin)}
    return same, "is not the file that its table names (a sha256 differs)"


def collect(
    kind: str, wanted: Kernels, made: Mapping[str, Path], places: Mapping[Path, Mapping[str, str]]
) -> dict[str, bytes]:
    """The cubins of ``wanted``: fresh ones from their files ``made``, else from tables' folders (with their ``packs``).

    A ValueError names one that is nowhere.
    """
    found: dict[str, bytes] = {}
    for key in made.keys() & wanted.keys():
        with suppress(OSError, ValueError):
            cubin = whole_files.read(made[key], MAX_CUBIN_BYTES)
            if wanted[key].is_of(cubin):
                found[key] = cubin
    for folder, packs in places.items():
        if kind in packs and len(found) < len(wanted):
            found = {key: cubin for key, (_, cubin) in intact(folder, packs[kind], wanted)[0].items()} | found
    if lost := sorted(wanted.keys() - found.keys()):
        where = made.get(lost[0]) or f"what lies in {next(iter(places))}"
        raise ValueError(f"{where} is not the kernel that the table names; compile {lost[0]} again")
    return found
