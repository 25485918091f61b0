"""Text to cubins: many kernels at once, by ninja, through the cache. A kernel that does not compile is a result.

Freshness has one owner, the identity: sha256 over the rendered text, its headers, the flags and the compiler's version.
ninja is only the parallel executor; its own notion of age never matters, as every batch builds in an empty directory.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import re
import shlex
import shutil
import subprocess
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import ninja

from marlin_gen import env, kernel_cache
from marlin_gen.config import KernelSpec
from marlin_gen.families import FAMILIES
from marlin_gen.measurement import Artifact
from marlin_gen.render import KernelSource
from marlin_gen.toolchain import Toolchain, find_toolchain

FULL_DISK_BYTES = 1 << 20  # a compiler that fails with less than this left failed for want of it


@dataclass(frozen=True)
class CompileFailure:
    """A kernel that did not compile: a row of the study, not its end."""

    spec: KernelSpec
    reason: str  # one line: the compiler's first error
    log: str


@dataclass(frozen=True)
class PtxasReport:
    """What ``ptxas -v`` says about one kernel."""

    registers: int  # per thread, at launch
    spill_bytes: int  # stores + loads
    static_smem_bytes: int


Result = Artifact | CompileFailure


def compile_all(
    sources: Sequence[KernelSource],
    toolchain: Toolchain | None = None,
    jobs: int | None = None,
    on_done: Callable[[Result], None] | None = None,
    seconds: float | None = None,
) -> dict[KernelSpec, Result]:
    """Compile every source that the cache lacks, ``jobs`` at a time (default: the usable cores), and keep going.

    ``on_done`` is called in this thread with each result as it comes, cached ones first. Raises a ToolchainError when
    the compiler itself is at fault, an OSError naming the folder when the cache cannot be written, a TimeoutError when
    compiling takes longer than ``seconds``; what was finished before is kept, and nothing half-written is.
    """
    toolchain = toolchain or find_toolchain()
    results: dict[KernelSpec, Result] = {}

    def finish(result: Result) -> None:
        results[result.spec] = result
        if isinstance(result, Artifact):
            kernel_cache.dump(result)
        if on_done:
            on_done(result)

    missing: list[KernelSource] = []
    for source in {s.spec: s for s in sources}.values():
        with _naming_the_cache():
            cached = kernel_cache.load(source.spec, identity_of(source, toolchain))
        if cached:
            finish(cached)
        else:
            missing.append(source)
    if missing:
        # Closed at once when on_done raises, so that no compiler outlives this call.
        with contextlib.closing(_build(missing, toolchain, jobs or len(os.sched_getaffinity(0)), seconds)) as built:
            for result in built:
                finish(result)
        if not any(isinstance(results[source.spec], Artifact) for source in missing):
            toolchain.probe()  # not one compiled: is it the compiler?
    return results


def identity_of(source: KernelSource, toolchain: Toolchain) -> str:
    """sha256 (hex) of everything that can change the binary."""
    flags = toolchain.flags(source.spec.arch, env.lineinfo())
    parts = [source.digest, toolchain.name, toolchain.version, *flags]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def reject_artifact(artifact: Artifact) -> str | None:
    """Why a compiled kernel is not worth launching, as a sentence; None when it is."""
    config = artifact.spec.config
    if artifact.spill_bytes:
        return f"spills {artifact.spill_bytes} bytes of registers to local memory"
    most = FAMILIES.of(config).max_registers(config, artifact.spec.arch_row)
    if artifact.registers > most:
        return f"uses {artifact.registers} registers, {config.blocks_per_sm} blocks per SM leave {most}"
    return None


def parse_ptxas(text: str, symbol: str) -> PtxasReport:
    """The report on one kernel in a ``ptxas -v`` log of nvcc or NVRTC; a ValueError when it is not there."""
    _, found, section = text.partition(f"Compiling entry function '{symbol}'")
    section = section.partition("Compiling entry function")[0]
    registers = re.search(r"Used (\d+) registers", section)
    spills = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", section)
    if not found or not registers or not spills:
        raise ValueError(f"no ptxas report on {symbol}; the kernel's extern \"C\" name must be ${{ symbol }}")
    smem = re.search(r"(\d+) bytes smem", section)
    return PtxasReport(int(registers[1]), int(spills[1]) + int(spills[2]), int(smem[1]) if smem else 0)


@contextlib.contextmanager
def _naming_the_cache() -> Iterator[None]:
    """Add to an OSError which folder it is about and what to do."""
    try:
        yield
    except (ChildProcessError, TimeoutError):
        raise  # are OSErrors, of the compiler
    except OSError as error:
        raise OSError(
            error.errno,
            f"cannot use the kernel cache {env.cache_dir()} ({error.strerror or error}); free some space there, or set"
            " MARLIN_GEN_CACHE_DIR to another folder",
        ) from error


def _build(
    sources: Sequence[KernelSource], toolchain: Toolchain, jobs: int, seconds: float | None
) -> Generator[Result, None, None]:
    """Run one ninja over the sources; each result as soon as its compiler ends."""
    with _naming_the_cache(), kernel_cache.private_directory() as batch:
        _write_ninja(batch, sources, toolchain)
        process = subprocess.Popen(
            [str(Path(ninja.BIN_DIR) / "ninja"), "-k", "0", "-j", str(jobs)],
            cwd=batch,
            # nvcc's intermediate files go where they are removed with the batch, however it ends.
            env=env.child_environment(TMPDIR=str(batch), NINJA_STATUS=""),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        )
        assert process.stdout
        waiting = dict(enumerate(sources))
        expired = threading.Event()

        def expire() -> None:
            expired.set()
            process.terminate()  # and ninja its compilers

        timer = threading.Timer(seconds or 0, expire)
        if seconds is not None:
            timer.start()
        try:
            for line in process.stdout:
                done = re.fullmatch(r"done (\d+)", line.strip())
                if done and int(done[1]) in waiting:
                    index = int(done[1])
                    yield _collect(batch / str(index), waiting.pop(index), toolchain)
            process.wait()  # a status of its own, not that of being terminated
        finally:
            timer.cancel()
            process.terminate()
            process.wait()
            process.stdout.close()
        if waiting and expired.is_set():
            raise TimeoutError(f"{toolchain.name} has not compiled {waiting.popitem()[1].spec.key} in {seconds:.0f} s")
        if waiting and process.returncode < 0:
            raise ChildProcessError(
                f"ninja was killed by signal {-process.returncode} before {len(waiting)} kernels were compiled, by hand"
                " or for want of memory; run it again, with fewer compilers at once (--jobs) if memory is short"
            )
        if waiting:
            raise OSError(errno.EIO, f"ninja ended with status {process.returncode} before {len(waiting)} kernels")


def _write_ninja(batch: Path, sources: Sequence[KernelSource], toolchain: Toolchain) -> None:
    """One folder per source, and the build.ninja that compiles them all."""
    # A rule fails as a whole or leaves a whole cubin: the compiler writes kernel.part.
    lines = ["rule compile", "  command = cd $folder && $compiler > ptxas.log 2>&1 && mv kernel.part kernel.cubin"]
    lines += ["  description = done $folder"]
    for index, source in enumerate(sources):
        folder = batch / str(index)
        folder.mkdir()
        flags = toolchain.flags(source.spec.arch, env.lineinfo())
        command = shlex.join(toolchain.command(flags, env.templates_dir() / "include", "kernel.cu", "kernel.part"))
        (folder / "kernel.cu").write_text(source.text, encoding="utf-8")
        (folder / "command.txt").write_text(command.replace("kernel.part", "kernel.cubin") + "\n")
        lines += [f"build {index}/kernel.cubin: compile {index}/kernel.cu"]
        lines += [f"  folder = {index}", f"  compiler = {command.replace('$', '$$')}"]
    (batch / "build.ninja").write_text("\n".join(lines) + "\n")


def _collect(folder: Path, source: KernelSource, toolchain: Toolchain) -> Result:
    """What one compiler run left: an installed artifact, or why there is none."""
    text = (folder / "ptxas.log").read_text(errors="replace") if (folder / "ptxas.log").exists() else ""
    if not (folder / "kernel.cubin").exists():
        # Not every tool of a compiler says why it could not write.
        if shutil.disk_usage(folder).free < FULL_DISK_BYTES or os.strerror(errno.ENOSPC) in text:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return CompileFailure(source.spec, _first_error(text), text)
    try:
        report = parse_ptxas(text, source.symbol)
    except ValueError as error:
        return CompileFailure(source.spec, str(error), text)
    identity = identity_of(source, toolchain)
    artifact = Artifact(source.spec, source.symbol, folder, **vars(report))
    kernel_cache.write_description(folder, artifact, identity, f"{toolchain.name} {toolchain.version}")
    return kernel_cache.install(folder, source.spec, identity)


def _first_error(text: str) -> str:
    """The line of a compiler's log that says what is wrong."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if re.search(r"\b(error|fatal)\b", line, re.IGNORECASE)]
    return (errors or lines or ["the compiler died without a word"])[0]
