"""The measurement log: everything a tune has learnt, appended line by line, so that ``kill -9`` loses nothing.

JSON lines. The first is a header; each other line has a ``kind``: "measurement" (one plan on one problem), "final"
(the same, re-timed against its rivals), "baseline", "artifact", "batch" (what was proposed) or "candidate" (a config
that is done with). Unknown kinds are skipped, so a newer log can be read. A recording is a finished log, compressed.
"""

from __future__ import annotations

import fcntl
import gzip
import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from io import RawIOBase
from pathlib import Path
from typing import IO, Any

from marlin_gen import whole_files
from marlin_gen.arch import Gpu
from marlin_gen.config import KernelConfig
from marlin_gen.measurement import PROTOCOL, Artifact, Baseline, Measurement
from marlin_gen.problem import Problem
from marlin_gen.whole_files import naming

SCHEMA = 1
MAX_BYTES = 1 << 30  # of a recording, unpacked: four million measurements


@dataclass(frozen=True)
class Proposal:
    """A config to try, and why: which source named it, for which problem (None: for all)."""

    config: KernelConfig
    source: str
    problem: Problem | None = None

    def to_json(self) -> dict[str, Any]:
        return {"config": self.config.key, "source": self.source, **(vars(self.problem) if self.problem else {})}

    @classmethod
    def from_json(cls, row: dict[str, Any]) -> Proposal:
        problem = _problem(row) if "n" in row else None
        return cls(KernelConfig.from_key(row["config"]), row["source"], problem)


def _problem(row: dict[str, Any]) -> Problem:
    return Problem(row["n"], row["k"], row["m"], row["weight_format"], row["act_dtype"])


@dataclass
class Recording:
    """The content of a log: the shape x plan matrix of times of one GPU, and how it came about."""

    gpu: Gpu
    versions: dict[str, str] = field(default_factory=dict)
    protocol: str = PROTOCOL
    measurements: list[Measurement] = field(default_factory=list)
    finals: list[Measurement] = field(default_factory=list)
    baselines: dict[Problem, Baseline] = field(default_factory=dict)
    artifacts: dict[str, dict[str, int]] = field(default_factory=dict)  # spec key -> registers, spill_bytes, ...
    batches: list[list[Proposal]] = field(default_factory=list)
    done: dict[KernelConfig, str] = field(default_factory=dict)  # config -> status
    versions_of: dict[tuple[str, str], dict[str, str]] = field(default_factory=dict)  # of kinds read from other files

    def configs(self, kind: tuple[str, str] | None = None) -> list[KernelConfig]:
        """Every config that was tried (``kind``: for this weight format and activation type), by first trial."""
        rows = (m for m in self.measurements if kind in (None, m.problem.kind))
        return list(dict.fromkeys(m.plan.config for m in rows))

    def problems(self) -> list[Problem]:
        return sorted({m.problem for m in self.measurements})

    def kernels_tried(self) -> Counter[Problem]:
        """How many configs were timed for each problem."""
        return Counter(problem for problem, _ in {(m.problem, m.plan.config) for m in self.measurements})


class MeasurementLog:
    """The one open log of a running tune: append-only, one writer at a time, torn tail cut off on opening.

    ``recording`` is what is in it at any time. Every write raises an OSError that names the file when it does not fit.
    """

    def __init__(self, path: Path, gpu: Gpu, versions: dict[str, str] | None = None) -> None:
        """Open or continue ``path``. ValueError if it belongs to another GPU, protocol or writer."""
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        with naming(path):
            # Unbuffered: a line that did not fit on the disk must not be tried again on closing.
            self._file: RawIOBase = open(path, "a+b", buffering=0)  # noqa: SIM115 - held until close
        try:
            lock(self._file, path)
            cut_torn_tail(self._file)
            self.recording = self._resume(gpu, versions or {})
        except BaseException:
            self._file.close()
            raise

    def _resume(self, gpu: Gpu, versions: dict[str, str]) -> Recording:
        self._file.seek(0)
        lines = self._file.read().splitlines()
        if not lines:
            self._append(
                {"kind": "header", "schema": SCHEMA, "gpu": gpu.to_json(), "protocol": PROTOCOL, "versions": versions}
            )
            return Recording(gpu, versions)
        found = _parse(lines, self.path)
        if not gpu.same_class(found.gpu):
            raise ValueError(
                f"{self.path} was measured on {found.gpu.slug}, this is {gpu.slug}; name another log, or remove it"
            )
        for name, ours, theirs in (
            ("protocol", PROTOCOL, found.protocol),
            *((name, ours, found.versions.get(name)) for name, ours in versions.items() if name in found.versions),
        ):
            if ours != theirs:
                raise ValueError(
                    f"{self.path} was measured with {name} {theirs!r}, this is {ours!r}: the times cannot be compared;"
                    " remove the log to start afresh, or name another"
                )
        return found

    def measurement(self, row: Measurement) -> None:
        self._append({"kind": "measurement", **row.to_json()})
        self.recording.measurements.append(row)

    def final(self, row: Measurement) -> None:
        self._append({"kind": "final", **row.to_json()})
        self.recording.finals.append(row)

    def baseline(self, row: Baseline) -> None:
        times = {"read_floor_us": row.read_floor_us, "cublas_us": row.cublas_us}
        self._append({"kind": "baseline", **vars(row.problem), **times})
        self.recording.baselines[row.problem] = row

    def artifact(self, row: Artifact) -> None:
        numbers = {name: getattr(row, name) for name in ("registers", "spill_bytes", "static_smem_bytes")}
        self._append({"kind": "artifact", "spec": row.spec.key, **numbers})
        self.recording.artifacts[row.spec.key] = numbers

    def batch(self, proposals: Sequence[Proposal]) -> None:
        """What the search decided to try next; a resumed tune takes up the same batch."""
        self._append({"kind": "batch", "proposals": [p.to_json() for p in proposals]}, sync=True)
        self.recording.batches.append(list(proposals))

    def candidate(self, config: KernelConfig, status: str) -> None:
        """This config is done with: all its measurements are above this line, and on the disk."""
        self._append({"kind": "candidate", "config": config.key, "status": status}, sync=True)
        self.recording.done[config] = status

    def close(self) -> None:
        self._file.close()

    def _append(self, row: dict[str, Any], *, sync: bool = False) -> None:
        with naming(self.path):
            line = json.dumps(row, separators=(",", ":")).encode() + b"\n"
            while line:  # a nearly full disk takes part of a line, and refuses the rest
                line = line[self._file.write(line) or 0 :]
            if sync:
                os.fsync(self._file.fileno())


def lock(log: IO[bytes] | RawIOBase, path: Path) -> None:
    """Keep an open log to this process until it is closed; a ValueError while another writes it."""
    try:
        fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ValueError(f"{path} is being written by another tune; wait for it to end, or name another log") from None


def cut_torn_tail(file: RawIOBase) -> None:
    """Drop what follows the last newline: a line that a kill or a full disk left half written."""
    file.seek(0)
    content = file.read()
    if content and not content.endswith(b"\n"):
        file.truncate(content.rfind(b"\n") + 1)
    file.seek(0, os.SEEK_END)


def load_recording(path: Path) -> Recording:
    """Read a log or a packed recording; ValueError naming the file if it is neither."""
    try:
        content = whole_files.read_unpacked(path, MAX_BYTES)
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot read the recording {path}: {error}") from error
    return _parse(content.splitlines(), path)


def lines_of_others(recording: Path, versions: dict[str, str], problems: Iterable[Problem]) -> bytes:
    """What a recording, if there is one, has of other problems than these; a ValueError if it is of other versions."""
    lines = whole_files.read_unpacked(recording, MAX_BYTES).splitlines(keepends=True) if recording.exists() else []
    others = set((found := _parse(lines, recording)).baselines) - set(problems) if lines else set()
    if others and (found.versions, found.protocol) != (versions, PROTOCOL):
        raise ValueError(f"{recording} has {len(others)} problems that this tune does not time, of other versions: move"
                         " it away, or tune without --record")  # fmt: skip
    rows = zip(lines[1:], _rows(lines[1:], recording), strict=False) if others else ()
    return b"".join(line for line, row in rows if (_problem(row) in others if "n" in row else row["kind"] != "batch"))


def pack(log: Path, recording: Path, others: bytes = b"") -> None:
    """Compress a log, behind its first line the lines ``others``; byte for byte the same for equal logs; atomic."""
    head, *own = (raw := log.read_bytes())[: raw.rfind(b"\n") + 1].splitlines(keepends=True)
    known = set(own)
    content = b"".join([head, *(line for line in others.splitlines(keepends=True) if line not in known), *own])
    _parse(content.splitlines(), log)
    recording.parent.mkdir(parents=True, exist_ok=True)
    with naming(recording):
        whole_files.write(recording, gzip.compress(content, compresslevel=9, mtime=0))


def _parse(lines: list[bytes], path: Path) -> Recording:
    rows = list(_rows(lines, path))
    head = rows[0] if rows else None
    if not isinstance(head, dict) or (head.get("kind"), head.get("schema")) != ("header", SCHEMA):
        raise ValueError(f"{path} is not a measurement log of schema {SCHEMA}; remove it, or name another")
    try:
        found = Recording(Gpu.from_json(head["gpu"]), dict(head["versions"]), head["protocol"])
        for row in rows[1:]:
            _take(row, found)
    except (AttributeError, KeyError, TypeError, ValueError) as error:  # JSON, but not ours
        raise ValueError(f"{path} is damaged, or of another version ({error!r}); remove it, or name another") from error
    return found


def _take(row: dict[str, Any], found: Recording) -> None:
    match row["kind"]:
        case "measurement" | "final" as kind:
            (found.finals if kind == "final" else found.measurements).append(Measurement.from_json(row))
        case "baseline":
            problem = _problem(row)
            found.baselines[problem] = Baseline(problem, row["read_floor_us"], row["cublas_us"])
        case "artifact":
            found.artifacts[row["spec"]] = {k: v for k, v in row.items() if k not in ("kind", "spec")}
        case "batch":
            found.batches.append([Proposal.from_json(p) for p in row["proposals"]])
        case "candidate":
            found.done[KernelConfig.from_key(row["config"])] = row["status"]


def _rows(lines: list[bytes], path: Path) -> Iterator[dict[str, Any]]:
    for number, line in enumerate(lines, 1):
        try:
            yield json.loads(line)
        except (ValueError, RecursionError) as error:
            if number == len(lines):  # torn by a kill: everything before it counts
                return
            raise ValueError(f"{path}, line {number} is damaged ({error}); remove that line and run again") from error
