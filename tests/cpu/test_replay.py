"""Replay: the search finds within 2 % of the recording's best with a tenth of its evaluations, or 18 a problem.

An evaluation is one timing asked for: a plan on a problem, recorded or not. A recording is sparse, because the tune
that made it did not time its configs where they promised nothing; asking for such a pair costs and answers nothing.
The best of a problem is its least time in the recording's screening, and what was found is judged by its screening
time too: the finals were timed at other temperatures, and only among few. As in a tune, the winners of related GPUs'
tables are tried early; those of the recording's own GPU are not.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import synthetic

from marlin_gen.config import KernelSpec, Plan
from marlin_gen.dispatch import known_winners
from marlin_gen.installed import find_tables
from marlin_gen.measurement import Artifact, Job, Measurement
from marlin_gen.problem import Problem
from marlin_gen.record import Recording, load_recording
from marlin_gen.replay import ReplayMeasurer, find_recording, shipped_recordings
from marlin_gen.search import TuneOptions, tune

SEEDS = (0, 1, 2)


@pytest.fixture(scope="module", params=shipped_recordings())
def recording(request: pytest.FixtureRequest) -> Recording:
    return load_recording(shipped_recordings()[request.param])


def made_up(world: int) -> Recording:
    return synthetic.recording(synthetic.problems(), 480, world)


def best_us(recording: Recording) -> dict[Problem, float]:
    """The least recorded time of each problem, among kernels that never failed."""
    failed = {m.plan.config for m in recording.measurements if m.status not in ("ok", "launch")}
    best: dict[Problem, float] = {}
    for m in recording.measurements:
        if m.ok and m.us and m.plan.config not in failed:
            best[m.problem] = min(best.get(m.problem, math.inf), m.us)
    return best


class Limited(ReplayMeasurer):
    """A replay that answers so many timings, then breaks the search off."""

    def __init__(self, recording: Recording, limit: int) -> None:
        super().__init__(recording)
        self.left = limit

    def screen(self, jobs: Sequence[Job]) -> Iterator[Measurement]:
        for job in jobs:
            if len(job.plans) > self.left:
                raise KeyboardInterrupt
            self.left -= len(job.plans)
            yield from super().screen([job])


def losses(recording: Recording, log: Path, seed: int, each: int = 12, least: int = 0) -> list[float]:
    """Of each problem, what the search finds over the best; with a tenth of the configs, or ``least``, and a tenth of
    the timings, or ``each`` for every problem."""
    configs, best = recording.configs(), best_us(recording)
    screened = {(m.plan, m.problem): m.us for m in recording.measurements}
    limit = max(len(recording.measurements) // 10, each * len(best))  # of a short tune a tenth is too few to choose
    trials = max(len(configs) // 10, least)
    measurer = Limited(replace(recording, finals=[]), limit)
    result = tune(
        sorted(best), measurer, log, candidates=configs, build=synthetic.build,
        winners_elsewhere=known_winners(recording.gpu, find_tables(), sorted(best), own=False),
        options=TuneOptions(trials=trials, batch_size=4, patience=99, seed=seed),
    )  # fmt: skip
    assert result.candidates <= trials
    assert not result.unsolved
    ratios = {c.problem: (screened[c.winner.plan, c.problem] or math.inf) / best[c.problem] for c in result.cells}
    worst = max(ratios, key=ratios.__getitem__)
    print(f"seed {seed}: {mean(ratios.values()):.4f}, {result.candidates} kernels, {ratios[worst]:.3f} at {worst}")
    return list(ratios.values())


def mean(ratios: Iterable[float]) -> float:
    """Geometric."""
    return statistics.geometric_mean(ratios)


def test_finds_within_two_percent_with_a_tenth_of_the_evaluations(recording: Recording, tmp_path: Path) -> None:
    """The geometric mean over problems, for every seed. Half of them lie between powers of two, where no default is
    good: they take more than twelve timings, and a kernel each."""
    least = len(best_us(recording))
    for seed in SEEDS:
        assert mean(losses(recording, tmp_path / f"log{seed}", seed, each=18, least=least)) <= 1.02, seed


def test_a_made_up_world_may_be_an_unlucky_draw_but_eighteen_together_are_not(tmp_path: Path) -> None:
    """Fields have effects there that no cost model knows: a world is at 1.006 to 1.03, with one seed one is at 1.046.

    A world is 480 configs drawn around the defaults, so it is another with other defaults.
    """
    worlds = [made_up(world) for world in range(6)]
    found = [losses(w, tmp_path / f"log{i}-{seed}", seed) for i, w in enumerate(worlds) for seed in SEEDS]
    assert mean(ratio for ratios in found for ratio in ratios) <= 1.022


def test_never_mixes_finals_with_first_timings() -> None:
    """A plan that was not re-timed must not win because the others were re-timed on a hot GPU."""
    (cell,) = synthetic.problems(((4096, 4096),), (64,))
    found = synthetic.recording([cell], 40, failures=0)
    rows = sorted((m for m in found.measurements if m.us), key=lambda m: m.us or 0)[:3]
    found.finals += [replace(m, us=1.1 * (m.us or 0)) for m in rows[:2]]
    measurer = ReplayMeasurer(found)
    entries = [
        (synthetic.recorded_artifact(found, KernelSpec(m.plan.config, "u4b8g128", "f16", "sm_90a")), m.plan)
        for m in rows
    ]
    assert measurer.finals(cell, entries) == found.finals
    assert measurer.finals(cell, entries[2:]) == rows[2:]


def test_answers_only_what_was_recorded() -> None:
    cells = synthetic.problems(((4096, 4096),), (1, 64))
    found = synthetic.recording(cells, 40)
    row = next(m for m in found.measurements if m.ok)
    artifact = synthetic.recorded_artifact(found, KernelSpec(row.plan.config, "u4b8g128", "f16", "sm_90a"))
    assert isinstance(artifact, Artifact) and artifact.registers == 64
    measurer = ReplayMeasurer(found)
    unknown = Plan(row.plan.config, 977)
    assert list(measurer.screen([Job(artifact, (unknown, row.plan), row.problem)])) == [row]
    assert measurer.finals(row.problem, [(artifact, row.plan), (artifact, unknown)]) == [row]
    assert next(iter(measurer.baselines(cells))).problem == cells[0]
    with pytest.raises(ValueError, match="no n=64 k=128 m=1; it has the shapes 4096x4096"):
        list(measurer.baselines([Problem(64, 128, 1)]))
    with pytest.raises(ValueError, match="no n=4096 k=4096 m=3; it has of that shape m = 1, 64: ask for one"):
        list(measurer.baselines([Problem(4096, 4096, 3)]))


def test_finds_recordings_by_name_or_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = synthetic.recording(synthetic.problems(((4096, 4096),), (1,)), 10, failures=0)
    folder = tmp_path / found.gpu.slug
    folder.mkdir()
    path = synthetic.save(found, folder / "recording.jsonl.gz")
    monkeypatch.setattr("marlin_gen.env.tuned_dir", lambda: tmp_path)
    for name in ("h100", found.gpu.slug, str(path)):
        assert find_recording(name).measurements == found.measurements
    with pytest.raises(ValueError, match="no single recording is called 'h2'; known: h100-132sm"):
        find_recording("h2")
