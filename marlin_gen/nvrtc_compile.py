"""A compiler command around NVRTC: ``python nvrtc_compile.py LIBNVRTC SOURCE CUBIN [nvrtc option ...]``.

NVRTC is nvcc's device compiler as a library: no host C++ compiler, no nvcc. Run as a process of its own, it compiles in
parallel under ninja as nvcc does, and a compiler crash is one failed candidate. Standard library only, and never
imported by the package: starting must cost milliseconds (ctypes 16 ms; importing cuda.bindings 145 ms).
The log, ptxas report included, goes to standard error. Exit status 1: the source does not compile; 2: NVRTC failed.
With the option --ptx-version=8.0 the output is PTX that says it is of this version, and not of NVRTC's own.
"""

from __future__ import annotations

import ctypes
import re
import sys
from pathlib import Path

COMPILATION_ERROR = 6  # nvrtcResult
PTX_OPTION = "--ptx-version="


def load(library: Path) -> ctypes.CDLL:
    """libnvrtc, with the builtins that it would otherwise look for on the loader's path only."""
    major = library.name.split(".so.")[-1].split(".")[0]
    for builtins in sorted(library.parent.glob(f"libnvrtc-builtins.so.{major}*")):
        ctypes.CDLL(str(builtins), mode=ctypes.RTLD_GLOBAL)
    nvrtc = ctypes.CDLL(str(library))
    nvrtc.nvrtcGetErrorString.restype = ctypes.c_char_p
    return nvrtc


def check(nvrtc: ctypes.CDLL, status: int) -> None:
    if status:
        print(f"nvrtc: {nvrtc.nvrtcGetErrorString(status).decode()}", file=sys.stderr)
        sys.exit(1 if status == COMPILATION_ERROR else 2)


def fetch(nvrtc: ctypes.CDLL, program: ctypes.c_void_p, what: str) -> bytes:
    """The program's "CUBIN", "PTX" or "ProgramLog"."""
    size = ctypes.c_size_t()
    check(nvrtc, getattr(nvrtc, f"nvrtcGet{what}Size")(program, ctypes.byref(size)))
    content = ctypes.create_string_buffer(size.value)
    check(nvrtc, getattr(nvrtc, f"nvrtcGet{what}")(program, content))
    return content.raw


def ptx(nvrtc: ctypes.CDLL, program: ctypes.c_void_p, version: str) -> bytes:
    """The program's PTX, without the NUL at its end."""
    text = fetch(nvrtc, program, "PTX").rstrip(b"\0")
    return re.sub(rb"^\.version \d+\.\d+$", b".version " + version.encode(), text, count=1, flags=re.MULTILINE)


def main(library: str, source: str, cubin: str, *options: str) -> None:
    nvrtc = load(Path(library))
    program = ctypes.c_void_p()
    text = Path(source).read_bytes()
    check(nvrtc, nvrtc.nvrtcCreateProgram(ctypes.byref(program), text, Path(source).name.encode(), 0, None, None))
    own = [option for option in options if not option.startswith(PTX_OPTION)]
    values = (ctypes.c_char_p * len(own))(*(option.encode() for option in own))
    status = nvrtc.nvrtcCompileProgram(program, len(own), values)
    print(fetch(nvrtc, program, "ProgramLog").rstrip(b"\0").decode(errors="replace"), file=sys.stderr)
    check(nvrtc, status)
    versions = [option.removeprefix(PTX_OPTION) for option in options if option.startswith(PTX_OPTION)]
    Path(cubin).write_bytes(ptx(nvrtc, program, versions[-1]) if versions else fetch(nvrtc, program, "CUBIN"))


if __name__ == "__main__":
    main(*sys.argv[1:])
