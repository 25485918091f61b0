"""The content-addressed store of compiled kernels: one directory an entry, complete by construction.

``<cache>/kernels/<spec.key>-<identity, 12 digits>/`` holds kernel.cu, kernel.cubin, ptxas.log, command.txt, spec.json.
An entry is filled in a private directory below ``<cache>/tmp`` and renamed into place: a directory that is present
is whole, and any number of processes may compile at once: the first rename wins and the others use its result. What
a bad disk or a curious user damages is noticed by its hash, removed and compiled again.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from marlin_gen import env
from marlin_gen.config import KernelSpec
from marlin_gen.measurement import Artifact

log = logging.getLogger("marlin_gen")

FILES = ("kernel.cu", "kernel.cubin", "ptxas.log", "command.txt", "spec.json")
ABANDONED_SECONDS = 24 * 3600  # no batch compiles for a day


def entry_path(spec: KernelSpec, identity: str) -> Path:
    """Where the kernel of this spec and identity (hex) lies, or would lie."""
    return env.cache_dir() / "kernels" / f"{spec.key}-{identity[:12]}"


def write_description(folder: Path, artifact: Artifact, identity: str, compiler: str) -> None:
    """Write spec.json, the last file of an entry: what was compiled, what came out, and the cubin's hash."""
    description = {
        "spec": artifact.spec.key,
        "symbol": artifact.symbol,
        "identity": identity,
        "compiler": compiler,
        "registers": artifact.registers,
        "spill_bytes": artifact.spill_bytes,
        "static_smem_bytes": artifact.static_smem_bytes,
        "cubin_sha256": sha256(folder / "kernel.cubin"),
    }
    (folder / "spec.json").write_text(json.dumps(description, indent=1) + "\n")


def load(spec: KernelSpec, identity: str) -> Artifact | None:
    """The entry, verified; None when there is none. A damaged one is removed, with one warning."""
    folder = entry_path(spec, identity)
    if not folder.is_dir():
        return None
    try:
        return _read(folder, spec, identity)
    except (OSError, ValueError, KeyError, TypeError) as damage:
        log.warning("the cached kernel %s is damaged (%s); compiling it again", folder, damage)
        discard(folder)
        return None


def _read(folder: Path, spec: KernelSpec, identity: str) -> Artifact:
    missing = [name for name in FILES if not (folder / name).is_file()]
    if missing:
        raise ValueError(f"{', '.join(missing)} missing")
    row = json.loads((folder / "spec.json").read_text())
    if (row["spec"], row["identity"]) != (spec.key, identity):
        raise ValueError("spec.json describes another kernel")
    if row["cubin_sha256"] != sha256(folder / "kernel.cubin"):
        raise ValueError("kernel.cubin does not have the hash in spec.json")
    return Artifact(spec, row["symbol"], folder, row["registers"], row["spill_bytes"], row["static_smem_bytes"])


def install(filled: Path, spec: KernelSpec, identity: str) -> Artifact:
    """Move a filled private directory into place, or take what another process put there meanwhile."""
    final = entry_path(spec, identity)
    final.parent.mkdir(parents=True, exist_ok=True)
    for _ in range(3):
        with contextlib.suppress(OSError):
            filled.rename(final)  # fails on a directory that is there: another process was first
        artifact = load(spec, identity)  # removes a damaged one, so that the next rename succeeds
        if artifact:
            return artifact
    filled.rename(final)  # raises what kept failing
    return _read(final, spec, identity)


def discard(folder: Path) -> None:
    """Remove an entry; by a rename first, so that nobody sees half of one."""
    with private_directory() as grave, contextlib.suppress(OSError):
        folder.rename(grave / "entry")


@contextlib.contextmanager
def private_directory() -> Iterator[Path]:
    """A fresh directory on the cache's file system, gone afterwards whatever happens."""
    parent = env.cache_dir() / "tmp"
    parent.mkdir(parents=True, exist_ok=True)
    for left_over in parent.iterdir():  # of a process that was killed
        with contextlib.suppress(OSError):
            if time.time() - left_over.stat().st_mtime > ABANDONED_SECONDS:
                shutil.rmtree(left_over, ignore_errors=True)
    folder = Path(tempfile.mkdtemp(dir=parent))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def dump(artifact: Artifact) -> None:
    """Copy an entry to MARLIN_GEN_DUMP_DIR, if that is set."""
    folder = env.dump_dir()
    if folder:
        shutil.copytree(artifact.directory, folder / artifact.directory.name, dirs_exist_ok=True)


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
