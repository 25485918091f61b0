"""Files that are read whole or not at all, written whole or not at all, and folders that one process writes at a time.

What comes from outside may be anything: a reader here never waits on a pipe, nor takes more than it is told to.
"""

from __future__ import annotations

import errno
import fcntl
import gzip
import io
import os
import stat
import tempfile
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

LOCK_FILE = ".lock"
LOCK_SECONDS = 60.0  # no writer takes a tenth of it; a process stopped by hand might for ever


def read(path: Path, limit: int) -> bytes:
    """The content of a regular file of at most ``limit`` bytes; a ValueError for another kind, or a larger one."""
    # Non-blocking: opening a named pipe would otherwise wait for a writer that never comes.
    with os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise ValueError(f"{path} is not a regular file")
        content = file.read(limit + 1)
    if len(content) > limit:
        raise ValueError(f"{path} is larger than {limit} bytes")
    return content


def read_unpacked(path: Path, limit: int) -> bytes:
    """``read``, decompressed if it is a gzip file; a ValueError too when that is damaged, or unpacks to more."""
    raw = read(path, limit)
    if raw[:2] != b"\x1f\x8b":
        return raw
    try:
        with gzip.GzipFile(fileobj=io.BytesIO(raw)) as file:
            content = file.read(limit + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"cannot unpack {path}: {error}") from error
    if len(content) > limit:
        raise ValueError(f"{path} unpacks to more than {limit} bytes")
    return content


def write(path: Path, content: bytes) -> None:
    """Write a whole file or none: a full disk, or a kill, leaves what was there."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException as error:
        with suppress(OSError):
            os.unlink(name)
        if isinstance(error, OSError) and not error.filename:  # of a full disk
            error.filename = str(path)
        raise


@contextmanager
def locked(folder: Path, *, shared: bool = False, seconds: float = LOCK_SECONDS) -> Iterator[None]:
    """Hold the folder's lock: alone, or ``shared`` with other readers (no lock at all where nobody ever wrote).

    A TimeoutError that names the lock when another process keeps it for ``seconds``.
    """
    path = folder / LOCK_FILE
    try:
        handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC if shared else os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError:
        if not shared:
            raise
        yield
        return
    try:
        _acquire(handle, path, fcntl.LOCK_SH if shared else fcntl.LOCK_EX, seconds)
        yield
    finally:
        os.close(handle)  # releases it


def _acquire(handle: int, path: Path, kind: int, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while True:
        try:
            return fcntl.flock(handle, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise TimeoutError(
                    f"{path} has been held by another process for {seconds:.0f} s; wait for it, or end it"
                ) from None
            time.sleep(0.02)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Turns a full disk into an error that names the file and says that what was written is kept."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        raise OSError(
            error.errno,
            f"cannot write (disk or quota full: {os.strerror(error.errno)}); all earlier measurements are kept:"
            " free some space and run the same command again",
            str(path),
        ) from error
