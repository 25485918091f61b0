"""Runs every shipped kernel under compute-sanitizer, one process a tool, and names the kernels at fault.

    python tools/sanitize.py [--tool memcheck racecheck synccheck] [--table DIR] [--specs KEY ...] [--log DIR]

The tools run side by side. compute-sanitizer comes with the CUDA toolkit, or from PyPI: pip install
nvidia-cuda-sanitizer-api, then its nvidia/cu13/bin on PATH. racecheck follows cp.async.bulk, mbarriers and warpgroup
barriers, but its release notes list false positives with just these, mended up to 2026.3. So a hazard that an older
racecheck reports in a wgmma kernel is real only if a newer one reports it too (the wheel's bin before the toolkit's);
one in an mma kernel, which uses neither, is real in any version.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from dataclasses import dataclass
from pathlib import Path

CASES = Path(__file__).resolve().with_name("sanitize_case.py")
TOOLS = ("memcheck", "racecheck", "synccheck")
TRUSTED = (2026, 3)  # the first version whose racecheck is free of the known false positives
TIMEOUT_S = 240.0
OPTIONS = {
    # Overruns of up to 4 KB hit padding. The cases check every call's status themselves, and loading cuda-bindings
    # asks an older driver for functions that it lacks, which is no fault.
    "memcheck": ("--padding", "4096", "--report-api-errors", "no"),
    "racecheck": (),
    "synccheck": (),
}


@dataclass(frozen=True)
class Report:
    """What one tool found."""

    tool: str
    cases: tuple[str, ...]  # spec keys launched
    faults: dict[str, list[str]]  # by spec key, or "" for what names no kernel: the first line of each report
    text: str  # everything printed

    @property
    def clean(self) -> bool:
        return bool(self.cases) and not self.faults

    def summary(self) -> str:
        """For people: a line a kernel at fault, and one on how to judge an old racecheck."""
        lines = [f"{self.tool}: {len(self.cases)} kernels, {len(self.faults)} at fault"]
        for key, found in sorted(self.faults.items()):
            lines += [f"  {key or '(no kernel)'}: {len(found)} reports", *(f"      {line}" for line in found[:3])]
        return "\n".join(lines)


def parse(tool: str, text: str, returncode: int) -> Report:
    """Reports by kernel, by the symbol they name: the sanitizer is another process, so order means nothing."""
    launched = dict(re.findall(r"^case (\S+) symbol=(\S+)", text, re.MULTILINE))
    by_symbol = {symbol: key for key, symbol in launched.items()}
    finished = set(re.findall(r"^done (\S+)", text, re.MULTILINE))
    faults: dict[str, list[str]] = {}
    for key, reason in re.findall(r"^failed (\S+): (.*)", text, re.MULTILINE):
        faults.setdefault(key, []).append(reason)
    for block in _blocks(text):
        if named := {by_symbol[word] for line in block for word in re.findall(r"\w+", line) if word in by_symbol}:
            for key in named:
                faults.setdefault(key, []).append(" ".join(block[:2]))
    for key in launched.keys() - finished - faults.keys():
        faults[key] = ["did not finish"]
    counts = re.findall(r"(?:ERROR SUMMARY: (\d+) error|RACECHECK SUMMARY: (\d+) hazard)", text)
    if not counts:
        said = [" ".join(block[:2]) for block in _blocks(text)]
        faults[""] = [f"{tool} printed no summary; exit status {returncode}", *said]
    elif any(int(number) for pair in counts for number in pair if number) and not faults:
        faults[""] = [" ".join(block[:2]) for block in _blocks(text)] or ["reports, but none that names a kernel"]
    if returncode and not faults:
        faults[""] = [f"exit status {returncode}"]
    return Report(tool, tuple(launched), faults, text)


def _blocks(text: str) -> list[list[str]]:
    """The sanitizer's reports: runs of its lines between its empty ones."""
    blocks: list[list[str]] = [[]]
    for line in text.splitlines():
        if line.startswith("========="):
            content = line.removeprefix("=========").strip()
            if not content:
                blocks.append([])
            elif not re.match(r"COMPUTE-SANITIZER|(ERROR|RACECHECK) SUMMARY", content):
                blocks[-1].append(content)
    return [block for block in blocks if block]


def find_sanitizer() -> Path | None:
    """The one on PATH, else the toolkit's usual place."""
    found = shutil.which("compute-sanitizer")
    usual = Path("/usr/local/cuda/bin/compute-sanitizer")
    return Path(found) if found else usual if usual.exists() else None


def version_of(sanitizer: Path) -> tuple[int, ...]:
    """Such as (2025, 3, 1)."""
    text = subprocess.run([str(sanitizer), "--version"], capture_output=True, text=True, check=True).stdout
    found = re.search(r"Version (\d+(?:\.\d+)+)", text)
    if not found:
        raise ValueError(f"{sanitizer} --version says {text.strip()!r}, which names no version; give --sanitizer PATH")
    return tuple(map(int, found[1].split(".")))


class Run:
    """One tool over all cases, begun at once in a process group of its own; ``report`` waits for it."""

    def __init__(self, sanitizer: Path, tool: str, arguments: list[str], timeout_s: float = TIMEOUT_S) -> None:
        self.tool = tool
        flags = ["--tool", tool, *OPTIONS[tool], "--show-backtrace", "no", "--print-limit", "1000"]
        self._process = subprocess.Popen(
            [str(sanitizer), *flags, "--error-exitcode", "9", sys.executable, str(CASES), *arguments],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", start_new_session=True,
        )  # fmt: skip
        self._timer = threading.Timer(timeout_s, self.stop)
        self._timer.start()
        self._text: list[str] = []
        self._reader = threading.Thread(target=self._read, daemon=True)  # else a full pipe would hold the process up
        self._reader.start()

    def _read(self) -> None:
        assert self._process.stdout
        self._text.extend(self._process.stdout)

    def stop(self) -> None:
        """Kill the tool with what it runs: a hang must not outlive its time."""
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)

    def report(self) -> Report:
        returncode = self._process.wait()
        self._timer.cancel()
        self._reader.join(10)
        return parse(self.tool, "".join(self._text), returncode)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tool", nargs="*", choices=TOOLS, default=TOOLS)
    parser.add_argument("--table", type=Path)
    parser.add_argument("--specs", nargs="*", default=[], metavar="KEY")
    parser.add_argument("--sanitizer", type=Path, default=find_sanitizer())
    parser.add_argument("--log", type=Path, help="a folder for each tool's whole output")
    options = parser.parse_args()
    if options.sanitizer is None:
        parser.error("no compute-sanitizer; install the CUDA toolkit or nvidia-cuda-sanitizer-api, or give --sanitizer")
    version = version_of(options.sanitizer)
    print(f"compute-sanitizer {'.'.join(map(str, version))}")
    arguments = ["--table", str(options.table)] if options.table else []
    arguments += ["--specs", *options.specs] if options.specs else []
    reports = [run.report() for run in [Run(options.sanitizer, tool, arguments) for tool in options.tool]]
    for report in reports:
        print(report.summary())
        if options.log:
            options.log.mkdir(parents=True, exist_ok=True)
            (options.log / f"{report.tool}.txt").write_text(report.text)
        if report.tool == "racecheck" and not report.clean and version < TRUSTED:
            print(f"  this racecheck is older than {TRUSTED[0]}.{TRUSTED[1]}: check wgmma kernels with a newer one")
    return 0 if all(report.clean for report in reports) else 1


if __name__ == "__main__":
    sys.exit(main())
