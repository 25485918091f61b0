"""Collects every wheel that an install of marlin_gen needs, for a machine without a network. See AIR_GAPPED.md.

    python tools/collect_wheels.py --out wheels --extras tune,nvrtc --python 3.11 --platform x86_64

Run it in a checkout, on a machine with a network. It builds marlin_gen's own wheel, downloads those of its dependencies
with pip, has pip resolve an install from the folder alone, and writes SHA256SUMS and the command to install with.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import platform
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SUMS = "SHA256SUMS"
# Wheels of older C libraries run on newer ones: from the newest that is asked for down.
GLIBC_MINORS = range(12, 40)
LEGACY = {17: "manylinux2014", 12: "manylinux2010", 5: "manylinux1"}


def parse_arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line. Exits with 2 and a message that names the word that is wrong."""
    here = f"{sys.version_info.major}.{sys.version_info.minor}"
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("wheels"), help="folder to fill (default: wheels)")
    parser.add_argument("--extras", default="", help="extras of marlin_gen, as tune,nvrtc; serving needs none")
    parser.add_argument("--python", default=here, help=f"Python of the other machine (default: {here}, this one's)")
    parser.add_argument("--platform", default=platform.machine(), help="x86_64 or aarch64 (default: this machine's)")
    parser.add_argument("--glibc", default="2.28", help="C library of the other machine, at least (default: 2.28)")
    parser.add_argument("--torch", default="", help="the torch to collect, as 2.13.0 (default: the newest that fits)")
    parser.add_argument("--without-torch", action="store_true", help="the other machine has torch already")
    parser.add_argument("--pip", action="append", default=[], help="an option for pip, as --pip=--index-url=...")
    options = parser.parse_args(words)
    if not re.fullmatch(r"3\.\d+", options.python):
        parser.error(f"--python {options.python!r} is not a version; example: 3.11")
    if not re.fullmatch(r"2\.\d+", options.glibc):
        parser.error(f"--glibc {options.glibc!r} is not a version; example: 2.28")
    if options.without_torch and options.torch:
        parser.error("--torch and --without-torch exclude one another")
    return options


def target_options(python: str, machine: str, glibc: str) -> list[str]:
    """pip's words for a machine other than this one: binary wheels only, every tag that it can run."""
    newest = int(glibc.partition(".")[2])
    tags = [f"manylinux_2_{minor}_{machine}" for minor in reversed(GLIBC_MINORS) if minor <= newest]
    tags += [f"{name}_{machine}" for minor, name in LEGACY.items() if minor <= newest] + [f"linux_{machine}"]
    abi = f"cp{python.replace('.', '')}"
    words = ["--only-binary=:all:", f"--python-version={python}", "--implementation=cp"]
    return words + [f"--abi={name}" for name in (abi, "abi3", "none")] + [f"--platform={tag}" for tag in tags]


def pip(*words: str, **environment: str) -> str:
    """Run this interpreter's pip; its output is shown as it comes. Ends the program with pip's own message."""
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", *words]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=os.environ | environment)
    if done.returncode:
        sys.exit(f"{done.stdout}pip {words[0]} failed; what it said is above")
    return done.stdout


def build_wheel(out: Path, machine: str) -> Path:
    """marlin_gen's own wheel, from this checkout. For another kind of machine its launcher comes as sources only."""
    without = {} if machine == platform.machine() else {"HATCH_BUILD_NO_HOOKS": "true"}
    pip("wheel", "-q", "--no-deps", "--wheel-dir", str(out), str(ROOT), **without)
    return max(out.glob("marlin_gen-*.whl"), key=lambda path: path.stat().st_mtime)


def requirements(wheel: Path, extras: Sequence[str]) -> list[str]:
    """What the wheel's metadata asks for with these extras, extras of its own resolved. Ends the program for others."""
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        metadata = archive.read(name).decode()
    known = re.findall(r"^Provides-Extra: (.+)$", metadata, re.MULTILINE)
    if wrong := [extra for extra in extras if extra not in known]:
        sys.exit(f"--extras {','.join(wrong)}: unknown; known: {', '.join(known)}")
    wanted, found = list(extras), []
    lines = re.findall(r"^Requires-Dist: (.+)$", metadata, re.MULTILINE)
    for extra in wanted:  # grows while it is walked, by extras that name extras
        for line in lines:
            requirement, _, marker = line.partition(";")
            if re.search(rf"extra == ['\"]{re.escape(extra)}['\"]", marker):
                own = re.match(r"marlin[-_]gen\[([^\]]+)\]", requirement.strip())
                wanted += [name.strip() for name in own[1].split(",") if name.strip() not in wanted] if own else []
                found += [] if own else [requirement.strip()]
    return [line for line in lines if "extra ==" not in line] + found


def main(words: Sequence[str] | None = None) -> int:
    options = parse_arguments(words)
    options.out.mkdir(parents=True, exist_ok=True)
    extras = [extra.strip() for extra in options.extras.split(",") if extra.strip()]
    wheel = build_wheel(options.out, options.platform)
    wanted = requirements(wheel, extras)
    if options.without_torch:
        wanted = [line for line in wanted if not re.match(r"torch\b", line)]
    elif options.torch:
        wanted.append(f"torch=={options.torch}")
    if f"{sys.version_info.major}.{sys.version_info.minor}" != options.python:
        print(f"note: conditions on the Python version are judged by this one; better run this with {options.python}")
    target = target_options(options.python, options.platform, options.glibc)
    print(f"collecting {', '.join(wanted) or 'nothing more'} into {options.out}", flush=True)
    if wanted:
        print(pip("download", *target, "--dest", str(options.out), "--progress-bar=off", *options.pip, *wanted), end="")
    # The proof: pip finds everything in the folder alone. For another machine it resolves only into a --target, and
    # install, unlike download, holds Requires-Python against the Python that it runs on.
    name = f"marlin_gen[{','.join(extras)}]" if extras else "marlin_gen"
    proved = wanted if options.without_torch else [name]
    with tempfile.TemporaryDirectory() as empty:
        alone = ["--no-index", f"--find-links={options.out}", "--dry-run", f"--target={empty}"]
        if proved:
            pip("install", "-q", "--ignore-requires-python", *alone, *target, *proved)
    wheels = sorted(options.out.glob("*.whl"))
    sums = [f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}\n" for path in wheels]
    (options.out / SUMS).write_text("".join(sums))
    total = sum(path.stat().st_size for path in wheels)
    print(f"{len(wheels)} wheels, {total / 1e6:.1f} MB, sums in {options.out / SUMS}. On the other machine:")
    print(f"  cd {options.out.name} && sha256sum -c {SUMS} && pip install --no-index --find-links . '{name}'")
    return 0


if __name__ == "__main__":
    sys.exit(main())
