"""What is here, what is missing, and how to get it. Changes nothing; what is broken is a finding."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from marlin_gen import env, xz
from marlin_gen.arch import Gpu, arch_for

PURPOSES = {
    "serve": "run tuned kernels from PyTorch",
    "tune": "search for kernels on this GPU",
    "replay": "run the search against a recording, without a GPU",
}
TUNE_PACKAGES = ("jinja2", "ninja", "numpy", "optuna", "rich", "typer")
LOW_DISK_BYTES = 2 << 30


@dataclass(frozen=True)
class Finding:
    """One thing that was looked for."""

    name: str
    ok: bool
    found: str  # what is there, or what is wrong with it
    fix: str = ""  # how to get it, when it is not ok
    needed_for: tuple[str, ...] = ()  # the purposes that fail without it


def examine(purpose: str | None = None) -> tuple[str, list[Finding]]:
    """Look at everything. Returns the purpose (by default tune with a GPU, replay without one) and the findings."""
    if purpose is not None and purpose not in PURPOSES:
        raise ValueError(f"--for {purpose!r} is not one of {', '.join(PURPOSES)}")
    gpu, gpu_findings = _gpu()
    findings = [*gpu_findings, _torch(gpu), _launcher(), *_compilers(), *_packages(), *_tables(gpu)]
    findings += [_lzma(), _ptx(), _recordings(), _cache(), *_variables()]
    return purpose or ("tune" if gpu else "replay"), findings


def broken(purpose: str, findings: list[Finding]) -> list[Finding]:
    """The findings that stand in the way of ``purpose``."""
    return [finding for finding in findings if not finding.ok and purpose in finding.needed_for]


def _torch(gpu: Gpu | None) -> Finding:
    try:
        import torch
    except ImportError as error:
        return Finding("torch", False, f"cannot be imported: {error}", "pip install torch", tuple(PURPOSES))
    if not torch.version.cuda:
        fix = "install a CUDA build of torch to use a GPU"
        return Finding("torch", not gpu, f"{torch.__version__}, CPU build", fix, ("serve", "tune"))
    return Finding("torch", True, f"{torch.__version__}, built for CUDA {torch.version.cuda}")


def _lzma() -> Finding:
    try:
        xz.module()
    except ValueError as error:
        return Finding("lzma", False, str(error), "use a Python with it, as most are", ("serve", "tune", "replay"))
    return Finding("lzma", True, "unpacks the kernels of tables")


def _launcher() -> Finding:
    """Which launcher calls on a GPU would use. Builds and loads nothing."""
    from marlin_gen import native_build

    if env.set_variables().get("MARLIN_GEN_LAUNCHER", "").lower() == "python":
        return Finding("launcher", True, "Python, as MARLIN_GEN_LAUNCHER asks")
    if found := native_build.candidates():
        return Finding("launcher", True, f"native, {found[0]}")
    if compiler := native_build.compiler():
        return Finding("launcher", True, f"native, to be built by {compiler} on the first call")
    fix = "install a C++ compiler, or a wheel built where there was one, for shorter calls"
    return Finding("launcher", False, f"Python: no C++ compiler of {', '.join(native_build.COMPILERS)}", fix)


def _gpu() -> tuple[Gpu | None, list[Finding]]:
    """The first GPU and its driver; both are findings."""
    from marlin_gen import driver

    needed = ("serve", "tune")
    try:
        found = [Finding("driver", True, f"supports CUDA {driver.driver_version()}")]
    except driver.LaunchError as error:  # cuda-bindings is not there, or the driver does not answer
        return None, [Finding("driver", False, str(error), "install the NVIDIA driver and cuda-bindings", needed)]
    except (OSError, RuntimeError):  # what cuda-bindings raises without libcuda differs by version
        fix = "install the NVIDIA driver; without a GPU, tune replays a recording"
        return None, [Finding("driver", False, "no NVIDIA driver (libcuda is not there)", fix, needed)]
    try:
        gpu = driver.identify(0)
        arch = arch_for(gpu.capability)
    except (driver.LaunchError, ValueError) as error:
        fix = "use a GPU of compute capability 8.0 or newer"
        return None, [*found, Finding("GPU", False, str(error), fix, needed)]
    return gpu, [*found, Finding("GPU", True, f"{gpu.name} ({gpu.slug}, kernels for {arch.name})")]


def _compilers() -> Iterator[Finding]:
    from marlin_gen import toolchain

    host = env.which("g++") or env.which("gcc")
    yield Finding("host compiler", host is not None, str(host or "no g++ on PATH"), "" if host else
                  "only nvcc needs one: install g++, or use NVRTC")  # fmt: skip
    for name, find in (("nvcc", toolchain.find_nvcc), ("NVRTC", toolchain.find_nvrtc)):
        yield _compiler(name, find, ())
    yield _compiler("compiler in use", toolchain.find_toolchain, ("tune", "replay"))


def _compiler(name: str, find: Callable[[], object], needed_for: tuple[str, ...]) -> Finding:
    from marlin_gen.toolchain import Toolchain, ToolchainError

    try:
        found = find()
        assert isinstance(found, Toolchain)
        if needed_for:
            found.probe()  # the one that will be used must not only be there but work
    except (ToolchainError, ValueError) as error:
        fix = "correct MARLIN_GEN_COMPILER" if isinstance(error, ValueError) else "pip install 'marlin_gen[nvcc]'"
        return Finding(name, False, str(error), fix, needed_for)
    return Finding(name, True, f"{found.name} {found.version}, from {found.origin}: {found.path}")


def _packages() -> Iterator[Finding]:
    present, missing = [], []
    for name in TUNE_PACKAGES:
        try:
            present.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            missing.append(name)
    said = ", ".join(present) + (f"; missing: {', '.join(missing)}" if missing else "")
    fix = "pip install 'marlin_gen[tune]'" if missing else ""
    yield Finding("tuning packages", not missing, said, fix, ("tune", "replay"))


def _tables(gpu: Gpu | None) -> Iterator[Finding]:
    from marlin_gen.dispatch import Dispatcher, digest
    from marlin_gen.installed import find_tables

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            tables = find_tables()
        except (OSError, ValueError) as error:
            yield Finding("tables", False, str(error), "correct or unset MARLIN_GEN_TABLE", ("serve",))
            return
    for warning in caught:
        yield Finding("table", False, str(warning.message), "restore the file from the repository, or tune again")
    in_force = Dispatcher(gpu, tables).tables if gpu else tables
    yield Finding("table hash", True, f"{digest(in_force)[:12]}, equal on all ranks of a job that choose alike")
    for table in tables:
        missing = sum(table.cubin(key) is None for key in table.kernels)
        fits = " (this GPU)" if gpu and gpu.same_class(table.gpu) else ""
        said = f"{table.gpu.slug}{fits}: {len(table.rows)} rows, {len(table.kernels)} kernels, {table.folder}"
        if missing:
            said += f"; {missing} of its kernels are missing or damaged"
        yield Finding("table", not missing, said, "restore the files, or tune again" if missing else "")
    if gpu and not any(gpu.same_class(table.gpu) for table in tables):
        said = f"none for {gpu.slug}; what fits of other tables runs, else defaults, compiled as needed, or from PTX"
        yield Finding("table for this GPU", False, said, "marlin-gen tune --model <preset or config.json>")


def _ptx() -> Finding:
    """The kernels for where nothing else is to be had; reads them all."""
    from marlin_gen.shipped_ptx import shipped_ptx

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            shipped = shipped_ptx()
            counts = {name: len(shipped.kernels(name)) for name in shipped.names()}
        except FileNotFoundError as error:
            return Finding("PTX", False, str(error), "reinstall the package")
    if caught:
        return Finding("PTX", False, str(caught[0].message), "reinstall the package")
    said = f"{sum(counts.values())} untuned kernels, for any GPU of 8.0 or newer that has neither table nor compiler"
    return Finding("PTX", bool(counts), said, "" if counts else "reinstall the package")


def _recordings() -> Finding:
    from marlin_gen.replay import shipped_recordings

    shipped = shipped_recordings()
    found = ", ".join(shipped) or "none"
    return Finding("recordings", bool(shipped), found, "" if shipped else "use a full checkout or wheel", ("replay",))


def _cache() -> Finding:
    fix = "set MARLIN_GEN_CACHE_DIR to a folder you can write"
    try:
        folder = env.cache_dir()
    except OSError as error:
        return Finding("cache folder", False, str(error), fix, ("tune", "replay"))
    above = next(path for path in (folder, *folder.parents) if os.path.exists(path))
    if not os.access(above, os.W_OK):
        return Finding("cache folder", False, f"{folder} cannot be written", fix, ("tune", "replay"))
    free = shutil.disk_usage(above).free
    said = f"{folder}: {_entries(folder)} kernels, {free / 2**30:.1f} GiB free"
    if free < LOW_DISK_BYTES:
        return Finding("cache folder", False, said, f"free some space, or {fix}")
    return Finding("cache folder", True, said)


def _entries(folder: Path) -> int:
    kernels = folder / "kernels"
    return sum(1 for _ in kernels.iterdir()) if kernels.is_dir() else 0


def _variables() -> Iterator[Finding]:
    """Only those that are set: they explain surprises. One that its reader refuses is a finding."""
    from marlin_gen.dispatch import forced_plan

    readers = {"COMPILER": env.compiler, "CONFIG": forced_plan, "DEPENDENT": env.dependent_launches,
               "LAUNCHER": env.launcher, "LINEINFO": env.lineinfo, "LOG": env.log_level}  # fmt: skip
    for name, value in env.set_variables().items():
        try:
            readers.get(name.removeprefix("MARLIN_GEN_"), str)()
            yield Finding(name, True, value)
        except ValueError as error:
            needed_for = () if name == "MARLIN_GEN_LOG" else ("serve",)
            yield Finding(name, False, str(error), f"correct or unset {name}", needed_for)
