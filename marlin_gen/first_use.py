"""One kernel, compiled while a call waits for it: announced, by one process of many, and not for ever."""

from __future__ import annotations

import logging
import time
from contextlib import ExitStack

from marlin_gen import env, kernel_cache, whole_files
from marlin_gen.compile import CompileFailure, compile_all, identity_of
from marlin_gen.config import KernelSpec
from marlin_gen.measurement import Artifact
from marlin_gen.render import render
from marlin_gen.toolchain import find_toolchain

log = logging.getLogger("marlin_gen")

# A kernel takes 1 to 6 s on an idle core.
SECONDS = 120.0


def compile_now(spec: KernelSpec, seconds: float | None = None) -> Artifact | CompileFailure:
    """The kernel of ``spec``: from the cache, or compiled within ``seconds`` (default ``SECONDS``).

    Other processes that ask for it meanwhile wait for this one's result. Raises TimeoutError when compiling, or waiting
    for another process that compiles, takes longer; ToolchainError without a compiler; OSError when the cache
    cannot be written; ValueError for a kernel that is not legal.
    """
    toolchain, source = find_toolchain(), render(spec)
    identity = identity_of(source, toolchain)
    if cached := kernel_cache.load(spec, identity):
        return cached
    ends = time.monotonic() + (SECONDS if seconds is None else seconds)
    folder = env.cache_dir() / "locks" / f"{spec.key}-{identity[:12]}"
    folder.mkdir(parents=True, exist_ok=True)
    with ExitStack() as held:
        try:
            held.enter_context(whole_files.locked(folder, seconds=0))
        except TimeoutError:
            log.warning("no prebuilt kernel %s; another process compiles it, waiting for that", spec.key)
            held.enter_context(whole_files.locked(folder, seconds=ends - time.monotonic()))
        if cached := kernel_cache.load(spec, identity):
            return cached
        log.warning("no prebuilt kernel %s; compiling it with %s, once", spec.key, toolchain.name)
        return compile_all([source], toolchain, seconds=ends - time.monotonic())[spec]
