"""Where the study of a tune lies, and what makes two tunes the same one."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

from marlin_gen import env
from marlin_gen.cli.console import note
from marlin_gen.measurement import Measurer
from marlin_gen.problem import Problem
from marlin_gen.record import lock
from marlin_gen.replay import ReplayMeasurer
from marlin_gen.toolchain import find_toolchain


@dataclass(frozen=True)
class Study:
    """A folder that holds everything a tune has learnt: ``kill -9`` and the same command goes on from here."""

    folder: Path

    @property
    def log(self) -> Path:
        return self.folder / "trials.jsonl"

    @property
    def journal(self) -> Path:
        return self.folder / "optuna.journal"


def open_study(
    measurer: Measurer,
    problems: Sequence[Problem],
    seed: int,
    versions: Mapping[str, str],
    folder: Path | None,
    fresh: bool,
) -> Study:
    """The study of exactly this work, in ``folder`` or where such studies are kept; emptied first if ``fresh``."""
    if folder is None:
        kind = "replay-" if isinstance(measurer, ReplayMeasurer) else ""
        name = f"{kind}{measurer.gpu.slug}-{_digest([[vars(p) for p in problems], seed, dict(versions)])}"
        folder = env.user_data_dir() / "studies" / name
    study = Study(folder)
    if fresh and folder.is_dir():
        with open(study.log, "ab") as log:
            lock(log, study.log)  # or a running tune would lose what it has learnt
            for path in (study.log, study.journal):
                path.unlink(missing_ok=True)
    elif study.log.exists():
        note(f"going on with the study in {folder} (--fresh starts anew)")
    return study


def recorded(problems: Sequence[Problem], measurer: Measurer) -> list[Problem]:
    """Without the m that a replay lacks at shapes of which it has others; its error explains what it has nothing of."""
    if not isinstance(measurer, ReplayMeasurer):
        return list(problems)
    known = measurer.recording.baselines.keys()
    shapes = {replace(problem, m=0) for problem in known}
    found = [problem for problem in problems if problem in known or replace(problem, m=0) not in shapes]
    if len(found) < len(problems):
        note(f"the recording has {len(found)} of these {len(problems)} problems; other m of its shapes are left out")
    return found


def versions_of(measurer: Measurer) -> dict[str, str]:
    """What makes measured times incomparable when it changes."""
    compiler = find_toolchain()
    found = {"templates": templates_digest(), "compiler": f"{compiler.name} {compiler.version}"}
    if folder := env.override_dir():
        found["overrides"] = _digest([[path.name, path.read_text("utf-8")] for path in sorted(folder.glob("*.cu"))])
    if isinstance(measurer, ReplayMeasurer):
        recorded = measurer.recording
        return {**found, "recording": _digest([recorded.versions, sorted(recorded.versions_of.items())])}
    import torch

    return {**found, "torch": torch.__version__}


def provenance(measurer: Measurer, kind: tuple[str, str]) -> dict[str, Any]:
    """When and with what a table was made. A replay's is that of its recording of this kind, and says so."""
    run: dict[str, Any] = {"date": datetime.now(timezone.utc).date().isoformat(), "marlin_gen": _version()}
    if isinstance(measurer, ReplayMeasurer):
        return {**run, "replay": True, **measurer.recording.versions_of.get(kind, measurer.recording.versions)}
    from marlin_gen.driver import driver_version
    from marlin_gen.nvml import Card

    release = Card(0).driver_version()  # one driver for all cards
    driver = f"{release} (CUDA {driver_version()})" if release else f"CUDA {driver_version()}"
    return {**run, **versions_of(measurer), "driver": driver}


def templates_digest() -> str:
    """A digest of every template and header."""
    folder = env.templates_dir()
    files = sorted(path for path in folder.rglob("*") if path.suffix in (".jinja", ".cuh"))
    return _digest([[str(path.relative_to(folder)), path.read_text()] for path in files])


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:12]


def _version() -> str:
    try:
        return metadata.version("marlin_gen")
    except metadata.PackageNotFoundError:
        return "checkout"
