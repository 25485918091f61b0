"""One safetensors file, written tensor by tensor, whole or not at all, and checked against its own digest.

safetensors' own writer wants all tensors of a file at once. Here the header's place is kept free, the data are
appended as they come, and the header is written last: memory holds one tensor at a time. What follows the JSON in that
place are blanks, which the format allows.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

KEY = "marlin_gen"  # in the file's metadata: a JSON object of ours
ALIGNMENT = 64  # bytes: a tensor in a memory map begins at a multiple, as kernels and vector loads like it
_CHUNK = 1 << 24
DTYPES = {  # as safetensors names them
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2",
    torch.float8_e8m0fnu: "F8_E8M0",
}  # fmt: skip


class ShardWriter:
    """A context: ``add`` the tensors, then ``finish``; leaving without ``finish`` removes what was written."""

    def __init__(self, path: Path, header_bytes: int) -> None:
        self._path, self._temporary = path, path.with_name(path.name + ".part")
        self._header_bytes = -(-header_bytes // ALIGNMENT) * ALIGNMENT - 8  # eight bytes before it say its length
        self._file = open(self._temporary, "wb")  # noqa: SIM115 - closed by __exit__
        self._file.seek(8 + self._header_bytes)
        self._entries: dict[str, dict[str, Any]] = {}
        self._odd: list[tuple[str, torch.Tensor]] = []  # sizes that would misalign what follows: they go last
        self._end = 0
        self._digest = hashlib.sha256()

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Write a tensor of any device. Small ones are kept until ``finish``; others are in the file when it returns.

        ValueError for a type that safetensors does not have.
        """
        if tensor.dtype not in DTYPES:
            raise ValueError(f"tensor {name!r} is {tensor.dtype}, which safetensors files written here do not hold")
        if tensor.nbytes % ALIGNMENT:
            self._odd.append((name, tensor))
        else:
            self._append(name, tensor)

    def finish(self, about: dict[str, Any]) -> None:
        """Complete the file, ``about`` in its metadata, force it to disk and rename it into place."""
        for name, tensor in sorted(self._odd, key=lambda entry: -entry[1].element_size()):
            self._append(name, tensor)
        about = {**about, "sha256": self._digest.hexdigest()}
        metadata = {"format": "pt", KEY: json.dumps(about, sort_keys=True)}
        header = json.dumps({"__metadata__": metadata, **self._entries}, separators=(",", ":")).encode()
        if len(header) > self._header_bytes:
            raise AssertionError(f"{self._path.name}: a header of {len(header)} bytes, {self._header_bytes} were kept")
        self._file.seek(0)
        self._file.write(struct.pack("<Q", self._header_bytes) + header.ljust(self._header_bytes))
        self._file.flush()
        os.fsync(self._file.fileno())
        os.replace(self._temporary, self._path)
        sync_folder(self._path.parent)

    def _append(self, name: str, tensor: torch.Tensor) -> None:
        data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
        self._file.write(data)
        self._digest.update(data)
        self._entries[name] = {
            "dtype": DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [self._end, self._end + len(data)],
        }
        self._end += len(data)

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._file.close()
        self._temporary.unlink(missing_ok=True)


def read_header(path: Path) -> tuple[dict[str, dict[str, Any]], dict[str, str], int]:
    """(entries by name, metadata, where the data begin); a ValueError that names a file that is not whole."""
    try:
        with open(path, "rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > path.stat().st_size:
                raise ValueError("its header is longer than the file")
            header = json.loads(file.read(length))
        metadata = header.pop("__metadata__", {})
        needed = 8 + length + max((entry["data_offsets"][1] for entry in header.values()), default=0)
        if path.stat().st_size != needed:
            raise ValueError(f"it has {path.stat().st_size} bytes, its header says {needed}")
    except (struct.error, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is not a whole safetensors file ({error}); copy it anew") from error
    return header, metadata, 8 + length


def about(path: Path) -> dict[str, Any] | None:
    """What ``finish`` was told of a file that ``ShardWriter`` wrote; None for another file or one that is not whole."""
    try:
        _, metadata, _ = read_header(path)
        found: dict[str, Any] = json.loads(metadata[KEY])
    except (ValueError, KeyError, OSError):
        return None
    return found


def is_intact(path: Path) -> bool:
    """Whether every byte of the data is as ``ShardWriter`` wrote it."""
    said = about(path)
    if said is None:
        return False
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        file.seek(read_header(path)[2])
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return bool(digest.hexdigest() == said["sha256"])


def write_text(path: Path, text: str) -> None:
    """A small file, whole or not at all: beside it only ever a .part, which the next run removes."""
    temporary = path.with_name(path.name + ".part")
    with open(temporary, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Force renames in ``folder`` to disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
