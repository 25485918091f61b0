"""Builds ``csrc/*.cpp``, the op's hot path, with a host C++ compiler: neither CUDA nor torch is needed to build it.

A wheel brings the library built (``tools/hatch_build.py``). A checkout builds it once, on the first call on a GPU, into
``<cache>/native/<digest>/``; ``python -m marlin_gen.native_build`` puts it into ``build/`` there, to be carried to a
machine without a compiler. It is known by the digest of sources and flags, which it also says itself: one that is older
than its sources is not used.
"""

from __future__ import annotations

import hashlib
import logging
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from marlin_gen import env

log = logging.getLogger("marlin_gen")

LIBRARY = "libmarlin_gen.so"
COMPILERS = ("c++", "g++", "clang++")
FLAGS = ("-std=c++17", "-O2", "-fPIC", "-shared", "-fvisibility=hidden", "-Wall", "-Wextra", "-pthread")
TIMEOUT_SECONDS = 300


class BuildError(RuntimeError):
    """There is no library, and the reason."""


def sources(folder: Path) -> list[Path]:
    """The library's sources and headers, in one order everywhere."""
    return sorted((*folder.glob("*.cpp"), *folder.glob("*.h")))


def digest(folder: Path) -> str:
    """Of the sources in ``folder`` and the flags: 16 hex digits. Whichever compiler is used, it is the same library."""
    state = hashlib.sha256("\0".join(FLAGS).encode())
    for path in sources(folder):
        state.update(f"\0{path.name}\0".encode() + path.read_bytes())
    return state.hexdigest()[:16]


def compiler() -> Path | None:
    """The first host C++ compiler on PATH."""
    return next((found for name in COMPILERS if (found := env.which(name))), None)


def build(folder: Path, output: Path) -> Path:
    """Compile the sources in ``folder`` to ``output``, which is complete as soon as it is there. Raises BuildError."""
    program = compiler()
    if program is None:
        raise BuildError(f"no C++ compiler on PATH (looked for {', '.join(COMPILERS)})")
    output.parent.mkdir(parents=True, exist_ok=True)
    # Processes that build at once each write a file of their own; the renames replace equal by equal.
    descriptor, partial = tempfile.mkstemp(dir=output.parent, prefix=f".{output.name}.")
    os.close(descriptor)
    command = [
        str(program), *FLAGS, f'-DMARLIN_GEN_DIGEST="{digest(folder)}"',
        *(str(path) for path in sources(folder) if path.suffix == ".cpp"), "-o", partial, "-ldl",
    ]  # fmt: skip
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=TIMEOUT_SECONDS, env=env.child_environment()
        )
        if done.returncode:
            raise BuildError(f"{program} failed on the launcher: {done.stderr.strip()[-2000:]}")
        os.chmod(partial, 0o755)
        with open(partial, "rb") as written:  # else a power cut may leave the name to an empty file
            os.fsync(written.fileno())
        os.replace(partial, output)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BuildError(f"{program} did not build the launcher: {error}") from error
    finally:
        Path(partial).unlink(missing_ok=True)
    return output


def cached(folder: Path) -> Path:
    """Where the library of these sources lies in the cache, or would lie."""
    return env.cache_dir() / "native" / digest(folder) / LIBRARY


def candidates() -> list[Path]:
    """The libraries that may be there already, the one that came with the package first."""
    folder = env.native_dir()
    places = [folder / LIBRARY, carried(folder)]
    with suppress(OSError):  # a user without a home folder has no cache
        places.append(cached(folder))
    return [path for path in places if os.path.isfile(path)]


def carried(folder: Path) -> Path:
    """Where a checkout's library lies when it was asked for: what is in ``folder`` itself goes into every wheel."""
    return folder.parents[1] / "build" / LIBRARY


def build_cached(tried: Sequence[Path] = ()) -> Path:
    """Build into the cache, unless another process just did. Raises BuildError.

    One that was ``tried`` and did not load, as where machines that differ share a cache, is built anew.
    """
    folder = env.native_dir()
    output = cached(folder)
    if output in tried or not output.is_file():
        log.info("building the launcher with %s, once", compiler())
        build(folder, output)
    return output


def main() -> int:
    folder = env.native_dir()
    try:
        print(build(folder, carried(folder)))
    except BuildError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
