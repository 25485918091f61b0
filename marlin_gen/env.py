"""Everything that comes from outside: environment variables, user folders, and the resource folders of the package.

The only module that reads ``os.environ``. Variables are read when asked for, never at import, so a test or a program
may set them at any time. ``VARIABLES`` documents them; ``marlin-gen doctor`` lists those that are set.
"""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

COMPILERS = ("auto", "nvcc", "nvrtc")
LAUNCHERS = ("auto", "native", "python")
LOG_LEVELS = ("debug", "info", "warning", "error")


@dataclass(frozen=True)
class Variable:
    """One environment variable: its type and default in words, and what it does."""

    name: str
    kind: str
    default: str
    meaning: str


VARIABLES = {
    v.name: v
    for v in (
        Variable("MARLIN_GEN_CACHE_DIR", "folder", "~/.cache/marlin_gen", "compiled kernels; safe to delete"),
        Variable("MARLIN_GEN_NVCC", "file", "none", "the nvcc to use, before wheels, CUDA_HOME and PATH"),
        Variable("MARLIN_GEN_COMPILER", "auto|nvcc|nvrtc", "auto", "which compiler; auto takes the default that works"),
        Variable("MARLIN_GEN_TABLE", "folder", "none", "a table's folder, used before the shipped ones"),
        Variable("MARLIN_GEN_CONFIG", "plan key", "none", "force this plan for every problem, past the table"),
        Variable("MARLIN_GEN_OVERRIDE_DIR", "folder", "none", "a hand-edited <spec>.cu here wins over the template"),
        Variable("MARLIN_GEN_DUMP_DIR", "folder", "none", "copy every compiled kernel here, with source and report"),
        Variable("MARLIN_GEN_DEPENDENT", "0|1", "1", "start kernels while the one before them ends (sm_90 on)"),
        Variable("MARLIN_GEN_LAUNCHER", "|".join(LAUNCHERS), "auto", "who launches: C++ if it can be built, or Python"),
        Variable("MARLIN_GEN_LINEINFO", "0|1", "0", "compile with line numbers, for profilers"),
        Variable("MARLIN_GEN_LOG", "|".join(LOG_LEVELS), "warning", "how much the library logs"),
    )
}


def _text(name: str) -> str | None:
    """The value of a MARLIN_GEN_* variable; None when unset or empty."""
    return os.environ.get(VARIABLES[name].name) or None


def set_variables() -> dict[str, str]:
    """The variables of ``VARIABLES`` that are set, and to what."""
    return {name: value for name in VARIABLES if (value := _text(name))}


def _folder(name: str) -> Path | None:
    value = _text(name)
    return Path(value).expanduser().absolute() if value else None  # what was found there stays so after a chdir


def _choice(name: str, choices: tuple[str, ...], default: str) -> str:
    value = (_text(name) or default).lower()
    if value not in choices:
        raise ValueError(f"{name}={value!r} is not one of {', '.join(choices)}")
    return value


def cache_dir() -> Path:
    """Where compiled kernels are kept. Not created here."""
    return _folder("MARLIN_GEN_CACHE_DIR") or _xdg("XDG_CACHE_HOME", ".cache")


def user_data_dir() -> Path:
    """Where tables tuned by this user are kept. Not created here."""
    return _xdg("XDG_DATA_HOME", ".local/share")


def _xdg(variable: str, default: str) -> Path:
    base = os.environ.get(variable, "")
    if os.path.isabs(base):  # the XDG specification: a relative path is to be ignored
        return Path(base) / "marlin_gen"
    try:
        return Path.home() / default / "marlin_gen"
    except RuntimeError:  # no HOME, and no entry in passwd: a container's arbitrary user
        raise FileNotFoundError(f"this user has no home folder; set HOME, or {variable} to an absolute path") from None


def nvcc() -> Path | None:
    """The explicitly set nvcc."""
    return _folder("MARLIN_GEN_NVCC")


def compiler() -> str:
    """One of ``COMPILERS``."""
    return _choice("MARLIN_GEN_COMPILER", COMPILERS, "auto")


def table_dir() -> Path | None:
    """The dispatch table's folder to use instead of the user-tuned ones, before the shipped ones."""
    return _folder("MARLIN_GEN_TABLE")


def forced_plan() -> str | None:
    """A ``Plan.key`` to use for every problem."""
    return _text("MARLIN_GEN_CONFIG")


def override_dir() -> Path | None:
    """Where hand-edited kernels lie, as <spec.key>.cu."""
    return _folder("MARLIN_GEN_OVERRIDE_DIR")


def dump_dir() -> Path | None:
    """Where to copy every compiled kernel for inspection."""
    return _folder("MARLIN_GEN_DUMP_DIR")


def lineinfo() -> bool:
    """Whether kernels carry line numbers."""
    return _flag("MARLIN_GEN_LINEINFO", "0")


def dependent_launches() -> bool:
    """Whether the op's launches may be dependent (``Launcher.run_with``): 3 to 20 % behind one another."""
    return _flag("MARLIN_GEN_DEPENDENT", "1")


def launcher() -> str:
    """One of ``LAUNCHERS``."""
    return _choice("MARLIN_GEN_LAUNCHER", LAUNCHERS, "auto")


def _flag(name: str, default: str) -> bool:
    return _choice(name, ("0", "1", "false", "true", "no", "yes"), default) in ("1", "true", "yes")


def log_level() -> str:
    """One of ``LOG_LEVELS``."""
    return _choice("MARLIN_GEN_LOG", LOG_LEVELS, "warning")


def cuda_home() -> Path | None:
    """The toolkit folder that CUDA_HOME, or else CUDA_PATH, names."""
    value = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    return Path(value) if value else None


def which(program: str) -> Path | None:
    """The program that PATH finds."""
    found = shutil.which(program, path=os.environ.get("PATH", os.defpath))
    return Path(found) if found else None


def child_environment(**changes: str) -> dict[str, str]:
    """The environment for a compiler: ours, without the variables by which nvcc takes flags that no cache key sees."""
    hidden = ("NVCC_PREPEND_FLAGS", "NVCC_APPEND_FLAGS")
    return {name: value for name, value in os.environ.items() if name not in hidden} | changes


def templates_dir() -> Path:
    """The folder of ``*.cu.jinja`` and ``include/marlin_gen/*.cuh``."""
    return _resource("templates")


def tuned_dir() -> Path:
    """The folder of the shipped dispatch tables, one folder per GPU."""
    return _resource("tuned")


def ptx_dir() -> Path:
    """The folder of the kernels that ship as PTX."""
    return _resource("ptx")


def native_dir() -> Path:
    """The folder of the native launcher's sources, and of the library where it came built."""
    return Path(__file__).resolve().parent / "csrc"


def _resource(name: str) -> Path:
    """``marlin_gen/_<name>`` in an installed wheel, ``<name>`` beside the package in a checkout or editable install."""
    package = Path(__file__).resolve().parent
    for folder in (package / f"_{name}", package.parent / name):
        if folder.is_dir():
            return folder
    raise FileNotFoundError(
        f"marlin_gen's {name} folder is neither in {package} nor beside it; reinstall the package,"
        " or run from a full checkout"
    )
