"""The kernels that ship as PTX: text for compute capability 8.0 that a driver compiles for any GPU from there on.

``ptx/<name>.json.xz`` holds the kernels of one weight format for both activation types, or one kernel that is no
product, such as "gather". It is JSON that begins with the sha256 of all that follows, as a table does: one that is cut
short, edited or of another version is a miss as a whole, with one warning. ``tools/make_ptx.py`` writes them.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path

from marlin_gen import env, whole_files, xz
from marlin_gen.arch import PTX_ARCH
from marlin_gen.config import KernelSpec
from marlin_gen.families.base import LAUNCH_VERSION
from marlin_gen.formats import LAYOUT_VERSION
from marlin_gen.table_file import check_seal, seal
from marlin_gen.table_row import FieldError, check_form, take

__all__ = ["PtxKernel", "PtxWarning", "ShippedPtx", "shipped_ptx"]

SCHEMA = 1
SUFFIX = ".json.xz"
MAX_BYTES = 1 << 20  # of a file; twenty times a large one
MAX_UNPACKED = 16 << 20  # twenty times a large one


class PtxWarning(UserWarning):
    """Shipped PTX is not used; the message says which and how to mend it."""


@dataclass(frozen=True)
class PtxKernel:
    """One kernel: what to look up, and the text to load."""

    symbol: str
    source: str  # sha256 (hex) of the CUDA text and its headers (``KernelSource.digest``)
    text: str

    @cached_property
    def image(self) -> bytes:
        """The text as the driver takes it: one object for all who remember it."""
        return self.text.encode()


class ShippedPtx:
    """The files of one folder, each read when it is first asked for. Any thread may ask."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._files: dict[str, Mapping[str, PtxKernel]] = {}

    def path(self, name: str) -> Path:
        return self.folder / f"{name}{SUFFIX}"

    def names(self) -> list[str]:
        """Of all files that are there, sorted; none is read."""
        return sorted(path.name.removesuffix(SUFFIX) for path in self.folder.glob(f"*{SUFFIX}"))

    def kernels(self, name: str) -> Mapping[str, PtxKernel]:
        """The kernels of a file by key; none, after one warning, where it is damaged, and none where it is missing."""
        if name not in self._files:
            self._files[name] = self._read(name)
        return self._files[name]

    def find(self, spec: KernelSpec) -> PtxKernel | None:
        """The kernel of ``spec``, whose target is ``PTX_ARCH``; None where it is not shipped."""
        return self.kernels(spec.weight_format).get(spec.key) if spec.arch == PTX_ARCH else None

    def _read(self, name: str) -> Mapping[str, PtxKernel]:
        path = self.path(name)
        try:
            return parse(xz.unpack(whole_files.read(path, MAX_BYTES), MAX_UNPACKED))
        except FileNotFoundError:
            return {}
        except (OSError, ValueError) as error:
            fix = "Restore the file from the package"
            warnings.warn(f"{path} is not used: {error}. {fix}", PtxWarning, stacklevel=4)
            return {}


@cache
def shipped_ptx() -> ShippedPtx:
    """What came with this package."""
    return ShippedPtx(env.ptx_dir())


def parse(content: bytes) -> Mapping[str, PtxKernel]:
    """The kernels by key; a ValueError that says why no part of the file is used."""
    check_seal(content)
    try:
        data = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise FieldError(f"it cannot be read ({error})") from None
    for field, expected in _versions().items():
        if (found := take(data, field, int)) != expected:
            raise FieldError(f"{field}={found} is not {expected}; it is of another version of marlin_gen")
    kernels = {}
    for key, entry in take(data, "kernels", dict).items():
        symbol, source, text = (take(entry, field, str) for field in ("symbol", "source", "ptx"))
        check_form("symbol", symbol)
        if not text.isascii() or "\0" in text:
            raise FieldError(f"{key:.120}: its PTX is not ASCII text")
        kernels[key] = PtxKernel(symbol, source, text)
    return kernels


def file_text(kernels: Mapping[str, PtxKernel], compiler: str) -> str:
    """The file's content, sealed: equal kernels give equal bytes. ``compiler``: such as "nvrtc 13.0.88"."""
    lines = [f" {json.dumps(field)}: {value}," for field, value in _versions().items()]
    lines += [f' "compiler": {json.dumps(compiler)},', ' "kernels": {']
    entries = []
    for key, kernel in sorted(kernels.items()):
        entry = {"symbol": kernel.symbol, "source": kernel.source, "ptx": kernel.text}
        entries.append(f"  {json.dumps(key)}: {json.dumps(entry)}")
    return seal("\n".join([*lines, ",\n".join(entries), " }", "}", ""]))


def _versions() -> dict[str, int]:
    """What a kernel's arguments and operands depend on."""
    return {"schema": SCHEMA, "layout_version": LAYOUT_VERSION, "launch_version": LAUNCH_VERSION}
