"""A recording in place of a GPU: the same search, the same kernels, times from the log of a real one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from marlin_gen import env
from marlin_gen.config import Plan
from marlin_gen.formats import kind_suffix
from marlin_gen.measurement import Artifact, Baseline, Job, Measurement, Stretch
from marlin_gen.problem import Problem
from marlin_gen.record import Recording, load_recording

FILE_NAME = "recording.jsonl.gz"


class ReplayMeasurer:
    """Implements ``Measurer``. A pair that was never recorded yields no measurement."""

    def __init__(self, recording: Recording) -> None:
        self.recording = recording
        self.gpu = recording.gpu
        self._screen = {(m.plan, m.problem): m for m in recording.measurements}
        self._finals = {(m.plan, m.problem): m for m in recording.finals}

    def screen(self, jobs: Sequence[Job]) -> Iterator[Measurement]:
        for job in jobs:
            for plan in job.plans:
                row = self._screen.get((plan, job.problem))
                if row is not None:
                    yield row

    def finals(self, problem: Problem, entries: Sequence[tuple[Artifact, Plan]]) -> list[Measurement]:
        """The re-timed values of those that have one; only where none has, the first timings of all.

        Never both: first timings are taken on a cooler GPU, so a plan that was not re-timed would win by that alone.
        """
        pairs = [(plan, problem) for _, plan in entries]
        times = self._screen if self._finals.keys().isdisjoint(pairs) else self._finals
        return [times[pair] for pair in pairs if pair in times]

    def compare(
        self, problem: Problem, entries: Sequence[tuple[Artifact, Plan]]
    ) -> tuple[Baseline, list[Measurement]]:
        (baseline,) = self.baselines([problem])
        return baseline, self.finals(problem, entries)

    def baselines(self, problems: Sequence[Problem]) -> Iterator[Baseline]:
        for problem in problems:
            if problem not in self.recording.baselines:
                kinds = sorted({p.kind for p in self.recording.baselines})
                kind = problem.kind
                if kind not in kinds:
                    raise ValueError(
                        f"the recording has nothing of {' '.join(kind)}; it has {', '.join(map(' '.join, kinds))}:"
                        " ask for one of them, or tune on a GPU"
                    )
                known = sorted(p for p in self.recording.baselines if p.kind == kind)
                tokens = ", ".join(str(p.m) for p in known if (p.n, p.k) == (problem.n, problem.k))
                shapes = ", ".join(dict.fromkeys(f"{p.n}x{p.k}" for p in known))
                raise ValueError(
                    f"the recording has no n={problem.n} k={problem.k} m={problem.m}; it has"
                    f" {f'of that shape m = {tokens}' if tokens else f'the shapes {shapes}'}: ask for one of them, or"
                    " tune on a GPU"
                )
            yield self.recording.baselines[problem]

    def sustain(
        self, problem: Problem, entry: tuple[Artifact, Plan] | None, seconds: float
    ) -> Iterator[Stretch]:
        raise ValueError("a recording has no sustained runs; --sustained needs a GPU")

    def close(self) -> None:
        return None


def recording_name(weight_format: str, act_dtype: str) -> str:
    """The file of one kind's recorded trials beside the table: each kind has its own, so tuning one keeps the others'.

    The default kind's is ``FILE_NAME``.
    """
    return f"recording{kind_suffix(weight_format, act_dtype)}.jsonl.gz"


def shipped_recordings() -> dict[str, Path]:
    """GPU slug -> file, for every recording of the default kind that ships in ``tuned/``."""
    return {path.parent.name: path for path in sorted(env.tuned_dir().glob(f"*/{FILE_NAME}"))}


def find_recording(name: str) -> Recording:
    """The recording that ``--device replay:NAME`` means: a slug, the start of one ("h100"), or a file.

    A slug's is that of all its kinds, read as one.
    """
    if Path(name).is_file():
        return load_recording(Path(name))
    shipped: dict[str, list[Path]] = {}
    for path in sorted(env.tuned_dir().glob("*/recording*.jsonl.gz")):
        shipped.setdefault(path.parent.name, []).append(path)
    matches = [paths for slug, paths in shipped.items() if slug == name or slug.startswith(f"{name}-")]
    if len(matches) != 1:
        known = ", ".join(shipped) or "none ship with this version"
        raise ValueError(f"no single recording is called {name!r}; known: {known}; a path to a recording works too")
    first, *others = map(load_recording, sorted(matches[0], key=lambda path: (path.name != FILE_NAME, path.name)))
    for other in others:
        first.versions_of |= {p.kind: other.versions for p in other.baselines}
        first.measurements += other.measurements
        first.finals += other.finals
        first.baselines |= other.baselines
        first.artifacts |= other.artifacts
    return first
