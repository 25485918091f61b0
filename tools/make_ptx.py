"""Writes ptx/*.json.xz, the kernels that ship as PTX: the mma family's defaults for every format and type, and gather.

    python tools/make_ptx.py            # after a change of a template, a header or the defaults
    python tools/make_ptx.py --check    # only say what is out of date, by the sources' digests; compiles nothing

NVRTC's wheel is the compiler (extra: nvrtc), at the version that pyproject.toml pins. A file whose kernels come out as
they lie there stays as it is, byte for byte, whatever version of xz this Python has.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

from marlin_gen import env, xz
from marlin_gen.arch import ARCHS, PTX_ARCH
from marlin_gen.compile import CompileFailure, compile_all
from marlin_gen.config import KernelSpec
from marlin_gen.families.mma import MMA
from marlin_gen.formats import DTYPES, FORMATS, WeightFormat
from marlin_gen.render import render, source_digest
from marlin_gen.shipped_ptx import MAX_UNPACKED, PtxKernel, ShippedPtx, file_text
from marlin_gen.toolchain import Toolchain, find_toolchain

PLAIN = ("gather",)  # kernels that are no product


def specs(fmt: WeightFormat) -> list[KernelSpec]:
    """The products of one file."""
    configs = MMA.defaults(ARCHS[PTX_ARCH], fmt)
    return [KernelSpec(config, fmt.name, dtype, PTX_ARCH) for dtype in DTYPES for config in configs]


def sources() -> dict[str, dict[str, str]]:
    """What ships: the digest of each kernel's source, by file and key."""
    products = {fmt.name: {spec.key: render(spec).digest for spec in specs(fmt)} for fmt in FORMATS.values()}
    return products | {name: {name: plain_digest(name)} for name in PLAIN}


def plain_digest(name: str) -> str:
    """Of templates/<name>.cu, a kernel that no spec describes; its symbol is ``name``."""
    folder = env.templates_dir()
    return source_digest((folder / f"{name}.cu").read_text(), folder / "include")


def compiled_plain(name: str, toolchain: Toolchain) -> PtxKernel:
    """SystemExit with the compiler's words when it does not compile."""
    templates = env.templates_dir()
    with tempfile.TemporaryDirectory(prefix="marlin_gen-") as folder:
        # Copied: PTX would otherwise name the file where it lies.
        (Path(folder) / f"{name}.cu").write_bytes((templates / f"{name}.cu").read_bytes())
        command = toolchain.command(toolchain.flags(PTX_ARCH), templates / "include", f"{name}.cu", "ptx")
        done = subprocess.run(command, cwd=folder, env=env.child_environment(), capture_output=True, text=True)
        if done.returncode:
            sys.exit(f"{name}.cu does not compile: {done.stderr}")
        return PtxKernel(name, plain_digest(name), (Path(folder) / "ptx").read_text())


def compiled(name: str, toolchain: Toolchain) -> dict[str, PtxKernel]:
    """The kernels of one file; SystemExit with the compiler's words when one does not compile."""
    if name in PLAIN:
        return {name: compiled_plain(name, toolchain)}
    made = {}
    for result in compile_all([render(spec) for spec in specs(FORMATS[name])], toolchain).values():
        if isinstance(result, CompileFailure):
            sys.exit(f"{result.spec.key} does not compile: {result.reason}")
        made[result.spec.key] = PtxKernel(result.symbol, render(result.spec).digest, result.cubin.read_text())
    return made


def write(shipped: ShippedPtx, name: str, kernels: Mapping[str, PtxKernel], toolchain: Toolchain) -> bool:
    """Write a file unless it holds this already; whether it was written."""
    path, text = shipped.path(name), file_text(kernels, f"{toolchain.name} {toolchain.version}").encode()
    if path.exists() and xz.unpack(path.read_bytes(), MAX_UNPACKED) == text:
        return False
    path.write_bytes(xz.pack(text))
    return True


def stale(shipped: ShippedPtx) -> list[str]:
    """The files that are not what the templates give now, and those that nothing names."""
    wanted = sources()
    there = {name: {key: kernel.source for key, kernel in shipped.kernels(name).items()} for name in shipped.names()}
    return sorted(name for name in wanted.keys() | there.keys() if wanted.get(name) != there.get(name))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; status 1 when a file is out of date")
    only_check = parser.parse_args().check
    shipped = ShippedPtx(env.ptx_dir())
    if only_check:
        for name in (found := stale(shipped)):
            print(f"{shipped.path(name)} is out of date; run python tools/make_ptx.py")
        return 1 if found else 0
    toolchain, wanted = find_toolchain("nvrtc"), sources()
    for name in wanted:
        state = "written" if write(shipped, name, compiled(name, toolchain), toolchain) else "unchanged"
        print(f"{shipped.path(name)}: {len(wanted[name])} kernels, {shipped.path(name).stat().st_size} bytes, {state}")
    for name in set(shipped.names()) - wanted.keys():
        shipped.path(name).unlink()
    return 0


if __name__ == "__main__":
    sys.exit(main())
