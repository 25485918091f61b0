"""Finding a CUDA compiler: nvcc or NVRTC, behind one value.

nvcc is looked for as MARLIN_GEN_NVCC, in the PyPI wheels, in CUDA_HOME, on PATH; NVRTC in its wheel (CUDA builds of
torch bring it), then in CUDA_HOME. The first one found is checked and used: a broken one is an error that says how to
mend it, never a silent step to the next. NVRTC needs no host C++ compiler. tools/FACTS.md says how the two compare.
"""

from __future__ import annotations

import importlib.metadata
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from marlin_gen import env
from marlin_gen.arch import ARCHS

# The wheels of which nvcc is made; all must be of one CUDA minor version.
NVCC_WHEELS = ("nvidia-cuda-nvcc", "nvidia-nvvm", "nvidia-cuda-crt", "nvidia-cuda-runtime", "nvidia-cuda-cccl")
NVRTC_WHEELS = ("nvidia-cuda-nvrtc", "nvidia-cuda-nvrtc-cu12")
GET_NVCC = "get it with: pip install 'marlin_gen[nvcc]'"
GET_NVRTC = "get it with: pip install 'marlin_gen[nvrtc]'"
PROBE_SECONDS = 120  # a cold compiler on a slow disk needs several
MIN_NVCC = (12, 3)  # sm_90a with every PTX instruction the templates use
# That PTX says it is written in: what the oldest driver reads that the native launcher takes (CUDA 12.0). The compiler
# states its own version whatever it used; that no kernel uses more, tests/cpu/test_ptx.py lets ptxas say.
PTX_VERSION = "8.0"

_PROBE = 'extern "C" __global__ void probe(int* out) { *out = 1; }\n'


class ToolchainError(RuntimeError):
    """No usable compiler; the message says what is wrong and how to get one."""


@dataclass(frozen=True)
class Toolchain:
    """One compiler. ``name`` and ``version`` are part of every kernel's identity, the path is not."""

    name: str  # "nvcc" or "nvrtc"
    version: str  # "13.0.88"
    path: Path  # nvcc, or libnvrtc.so
    origin: str  # how it was found, for people

    def flags(self, arch: str, lineinfo: bool = False) -> tuple[str, ...]:
        """Everything that can change the binary, bar the include folder. ``arch`` is a name of ``ARCHS``.

        A ToolchainError for PTX and nvcc, which would not say what registers its kernels need.
        """
        is_ptx = arch in ARCHS and ARCHS[arch].is_ptx
        # ptxas -v is the report that registers and spills are read from.
        common = ("-std=c++17", "--ptxas-options=-v", *(["-lineinfo"] if lineinfo else []))
        if self.name == "nvrtc":
            # A plain constexpr function is device code here, as it is for nvcc in a constant expression.
            ptx = (f"--ptx-version={PTX_VERSION}",) if is_ptx else ()
            # Of PTX too the report: it is that of the least GPU.
            return (f"-arch={arch.replace('compute_', 'sm_')}", "-default-device", *ptx, *common)
        if is_ptx:
            raise ToolchainError(f"kernels for {arch} are made by NVRTC: MARLIN_GEN_COMPILER=nvrtc ({GET_NVRTC})")
        return ("-O3", "-cubin", f"-gencode=arch={arch.replace('sm_', 'compute_')},code={arch}", *common)

    def command(self, flags: tuple[str, ...], include: Path, source: str, cubin: str) -> list[str]:
        """The argument list that compiles ``source`` into ``cubin``, which is PTX where the flags say so."""
        if self.name == "nvrtc":
            script = Path(__file__).with_name("nvrtc_compile.py")
            return [sys.executable, "-I", str(script), str(self.path), source, cubin, *flags, f"-I{include}"]
        return [str(self.path), *flags, f"-I{include}", source, "-o", cubin]

    def probe(self) -> None:
        """Compile two lines; a ToolchainError with the compiler's own words when that fails."""
        with tempfile.TemporaryDirectory(prefix="marlin_gen-probe-") as folder:
            (Path(folder) / "probe.cu").write_text(_PROBE)
            command = self.command(self.flags("sm_80"), Path(folder), "probe.cu", "probe.cubin")
            done = _run(command, folder)
            if done.returncode:
                get = GET_NVCC if self.name == "nvcc" else GET_NVRTC
                raise ToolchainError(
                    f"{self.name} {self.version} ({self.path}, from {self.origin}) is broken; {get}\n"
                    f"{done.stderr.strip()}"
                )


def find_toolchain(prefer: str | None = None) -> Toolchain:
    """The compiler to use. ``prefer`` is "auto", "nvcc" or "nvrtc"; by default what MARLIN_GEN_COMPILER says.

    "auto" is nvcc where MARLIN_GEN_NVCC is set, else NVRTC, else nvcc.
    """
    prefer = prefer or env.compiler()
    if prefer not in env.COMPILERS:
        raise ValueError(f"compiler {prefer!r} is not one of {', '.join(env.COMPILERS)}")
    if prefer == "nvrtc":
        return find_nvrtc()
    if prefer == "nvcc" or env.nvcc():
        return find_nvcc()
    problems = []
    for find in (find_nvrtc, find_nvcc):
        try:
            return find()
        except ToolchainError as error:
            problems.append(str(error))
    raise ToolchainError("no CUDA compiler:\n  " + "\n  ".join(problems))


def find_nvcc() -> Toolchain:
    """nvcc with a host compiler beside it, or a ToolchainError."""
    path, origin = _locate_nvcc()
    done = _run([str(path), "--version"])
    release = re.search(r"release (\d+)\.(\d+), V(\S+)", done.stdout)
    if done.returncode or not release:
        detail = (done.stderr or done.stdout).strip()[:300]
        raise ToolchainError(f"nvcc at {path} (from {origin}) is broken: {detail or 'no version'}; {GET_NVCC}")
    if (int(release[1]), int(release[2])) < MIN_NVCC:
        raise ToolchainError(f"nvcc {release[3]} (from {origin}) is older than {MIN_NVCC[0]}.{MIN_NVCC[1]}; {GET_NVCC}")
    if not env.which("gcc") and not env.which("g++"):
        raise ToolchainError(
            "nvcc needs a host C++ compiler and PATH has no gcc; install g++, or use NVRTC, which needs none:"
            f" MARLIN_GEN_COMPILER=nvrtc ({GET_NVRTC})"
        )
    return Toolchain("nvcc", release[3], path, origin)


def find_nvrtc() -> Toolchain:
    """libnvrtc, or a ToolchainError."""
    for name in NVRTC_WHEELS:
        found = _in_wheel(name, r"/libnvrtc\.so\.\d+$")
        if found:
            return Toolchain("nvrtc", importlib.metadata.version(name), found, f"the wheel {name}")
    home = env.cuda_home()
    if home:
        for library in sorted((home / "lib64").glob("libnvrtc.so.*"), key=lambda path: len(path.name), reverse=True):
            # The longest name is the full version: libnvrtc.so.13.0.88.
            return Toolchain("nvrtc", library.resolve().name.split(".so.")[-1], library, f"CUDA_HOME={home}")
    raise ToolchainError(f"NVRTC is neither in a PyPI wheel nor in CUDA_HOME; {GET_NVRTC}")


def _locate_nvcc() -> tuple[Path, str]:
    if explicit := env.nvcc():
        if not explicit.is_file():
            raise ToolchainError(f"MARLIN_GEN_NVCC={explicit} is not a file; unset it, or {GET_NVCC}")
        return explicit, "MARLIN_GEN_NVCC"
    wheel = _in_wheel("nvidia-cuda-nvcc", r"/bin/nvcc$")
    if wheel:
        _check_wheels()
        return wheel, "the PyPI wheels"
    home = env.cuda_home()
    if home:
        path = home / "bin" / "nvcc"
        if not path.is_file():
            raise ToolchainError(f"CUDA_HOME={home} has no bin/nvcc; unset or correct it, or {GET_NVCC}")
        return path, f"CUDA_HOME={home}"
    on_path = env.which("nvcc")
    if on_path:
        return on_path, "PATH"
    raise ToolchainError(f"nvcc is neither set (MARLIN_GEN_NVCC), nor in PyPI wheels, CUDA_HOME or PATH; {GET_NVCC}")


def _check_wheels() -> None:
    """nvcc's wheels are installed and of one minor version; pip does not see to it."""
    versions = {}
    for name in NVCC_WHEELS:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            raise ToolchainError(f"the wheel {name}, a part of nvcc, is not installed; {GET_NVCC}") from None
    if len({tuple(version.split(".")[:2]) for version in versions.values()}) > 1:
        listed = ", ".join(f"{name} {version}" for name, version in versions.items())
        minor = ".".join(versions["nvidia-cuda-nvcc"].split(".")[:2])
        raise ToolchainError(
            f"nvcc's wheels are of different CUDA versions ({listed}); install one:"
            f" pip install {' '.join(f'{name}=={minor}.*' for name in NVCC_WHEELS)}"
        )


def _in_wheel(distribution: str, pattern: str) -> Path | None:
    """The installed file of a distribution whose path matches."""
    try:
        files = importlib.metadata.files(distribution) or []
    except importlib.metadata.PackageNotFoundError:
        return None
    for file in files:
        if re.search(pattern, file.as_posix()):
            path = Path(str(file.locate()))
            return path if path.is_file() else None
    return None


def _run(command: list[str], folder: str | None = None) -> subprocess.CompletedProcess[str]:
    """Run a compiler command; a ToolchainError when it cannot even start."""
    try:
        return subprocess.run(
            command, cwd=folder, env=env.child_environment(), capture_output=True, text=True, errors="replace",
            timeout=PROBE_SECONDS,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ToolchainError(f"cannot run {command[0]}: {error}; {GET_NVCC}") from error
