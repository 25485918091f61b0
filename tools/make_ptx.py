"""Writes ptx/*.json.xz, the kernels that ship as PTX: the mma family's defaults for every format and activation type.

    python tools/make_ptx.py            # after a change of templates/mma.cu.jinja, of its headers or of the defaults
    python tools/make_ptx.py --check    # only say what is out of date, by the sources' digests; compiles nothing

NVRTC's wheel is the compiler (extra: nvrtc), at the version that pyproject.toml pins. A file whose kernels come out as
they lie there stays as it is, byte for byte, whatever version of xz this Python has.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping

from marlin_gen import env
from marlin_gen.arch import ARCHS, PTX_ARCH
from marlin_gen.compile import CompileFailure, compile_all
from marlin_gen.config import KernelSpec
from marlin_gen.families.mma import MMA
from marlin_gen.formats import DTYPES, FORMATS, WeightFormat
from marlin_gen.render import render
from marlin_gen.shipped_ptx import PtxKernel, ShippedPtx, file_text, pack, unpack
from marlin_gen.toolchain import Toolchain, find_toolchain


def specs(fmt: WeightFormat) -> list[KernelSpec]:
    """The products of one file."""
    configs = MMA.defaults(ARCHS[PTX_ARCH], fmt)
    return [KernelSpec(config, fmt.name, dtype, PTX_ARCH) for dtype in DTYPES for config in configs]


def sources() -> dict[str, dict[str, str]]:
    """What ships: the digest of each kernel's source, by file and key."""
    return {fmt.name: {spec.key: render(spec).digest for spec in specs(fmt)} for fmt in FORMATS.values()}


def compiled(name: str, toolchain: Toolchain) -> dict[str, PtxKernel]:
    """The kernels of one file; SystemExit with the compiler's words when one does not compile."""
    made = {}
    for result in compile_all([render(spec) for spec in specs(FORMATS[name])], toolchain).values():
        if isinstance(result, CompileFailure):
            sys.exit(f"{result.spec.key} does not compile: {result.reason}")
        made[result.spec.key] = PtxKernel(result.symbol, render(result.spec).digest, result.cubin.read_text())
    return made


def write(shipped: ShippedPtx, name: str, kernels: Mapping[str, PtxKernel], toolchain: Toolchain) -> bool:
    """Write a file unless it holds this already; whether it was written."""
    path, text = shipped.path(name), file_text(kernels, f"{toolchain.name} {toolchain.version}").encode()
    if path.exists() and unpack(path.read_bytes()) == text:
        return False
    path.write_bytes(pack(text))
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
