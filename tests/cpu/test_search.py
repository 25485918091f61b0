"""The search: nothing measured twice, failures are rows, the same seed gives the same search, a kill loses nothing."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import optuna
import pytest
import synthetic
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState

from marlin_gen.compile import CompileFailure
from marlin_gen.config import KernelConfig, KernelSpec, Plan
from marlin_gen.families.defaults import default_plan
from marlin_gen.measurement import Artifact, Job, Measurement
from marlin_gen.problem import Problem
from marlin_gen.record import Recording, load_recording
from marlin_gen.replay import ReplayMeasurer
from marlin_gen.search import Progress, SearchResult, TuneOptions, tune
from marlin_gen.search.finals import FINALS_MARGIN
from marlin_gen.search.pipeline import Result
from marlin_gen.search.study import Journal, Samplers
from marlin_gen.space import candidates_of

CELLS = synthetic.problems(((4096, 4096), (4096, 14336)), (1, 16, 128, 1024))
ROOT = Path(__file__).parents[2]
OPTIONS = TuneOptions(trials=60, batch_size=8, patience=99)


@pytest.fixture(scope="module")
def recording() -> Recording:
    return synthetic.recording(CELLS, 120)


class Counting(ReplayMeasurer):
    """A replay that remembers what it was asked, and may break off."""

    def __init__(self, recording: Recording, stop_after: int | None = None) -> None:
        super().__init__(recording)
        self.asked: Counter[tuple[Plan, Problem]] = Counter()
        self.finals_asked: list[tuple[Problem, list[Plan]]] = []
        self._stop_after = stop_after

    def screen(self, jobs: Sequence[Job]) -> Iterator[Measurement]:
        for job in jobs:
            self.asked.update((plan, job.problem) for plan in job.plans)
        if self._stop_after is not None and self.asked.total() > self._stop_after:
            raise KeyboardInterrupt
        yield from super().screen(jobs)

    def finals(self, problem: Problem, entries: Sequence[tuple[Artifact, Plan]]) -> list[Measurement]:
        self.finals_asked.append((problem, [plan for _, plan in entries]))
        return super().finals(problem, entries)


def run(recording: Recording, folder: Path, measurer: ReplayMeasurer | None = None, **more: object) -> SearchResult:
    usual = {"options": OPTIONS, "candidates": recording.configs(), "build": synthetic.build}
    arguments = {"study_path": folder / "study", **usual, **more}
    return tune(CELLS, measurer or ReplayMeasurer(recording), folder / "log", **arguments)  # type: ignore[arg-type]


def winners(result: SearchResult) -> dict[Problem, tuple[str, float | None]]:
    return {cell.problem: (cell.winner.plan.key, cell.winner.us) for cell in result.cells}


def trials_of(path: Path) -> list[optuna.trial.FrozenTrial]:
    storage = optuna.storages.JournalStorage(JournalFileBackend(str(path)))
    (name,) = optuna.get_all_study_names(storage)
    return optuna.load_study(study_name=name, storage=storage).trials


def test_measures_nothing_twice_and_solves_every_problem(recording: Recording, tmp_path: Path) -> None:
    measurer = Counting(recording)
    result = run(recording, tmp_path, measurer)
    assert max(measurer.asked.values()) == 1
    assert [cell.problem for cell in result.cells] == CELLS and not result.unsolved
    assert result.candidates == 60 and result.stopped == "trials"
    configs = [p.config for batch in load_recording(tmp_path / "log").batches for p in batch]
    assert len(configs) == len(set(configs)) == 60


def test_all_is_logged_and_shown_in_the_journal(recording: Recording, tmp_path: Path) -> None:
    measurer = Counting(recording)
    result = run(recording, tmp_path, measurer)
    log = load_recording(tmp_path / "log")
    known = {(m.plan, m.problem) for m in recording.measurements}
    assert {(m.plan, m.problem) for m in log.measurements} == measurer.asked.keys() & known
    assert len(log.done) == 60 and set(log.baselines) == set(CELLS)
    trials = trials_of(tmp_path / "study")
    assert {t.user_attrs["config"] for t in trials} == {c.key for c in log.done}
    for trial in trials:
        status = trial.user_attrs["status"]
        assert trial.state == (TrialState.COMPLETE if status == "ok" else TrialState.PRUNED)
        assert status == log.done[KernelConfig.from_key(trial.user_attrs["config"])]
        assert trial.params["block_m"] == KernelConfig.from_key(trial.user_attrs["config"]).block_m
    assert result.pairs == len(log.measurements)


def test_never_loses_to_the_default(recording: Recording, tmp_path: Path) -> None:
    """What would run without a table is always timed, and against the best wherever it has a chance."""
    measurer = Counting(recording)
    result = run(recording, tmp_path, measurer)
    rounds = dict(measurer.finals_asked)
    screened = {(m.plan, m.problem): m for m in recording.measurements}
    for cell in result.cells:
        default = default_plan(cell.problem, synthetic.H100)
        assert measurer.asked[default, cell.problem] == 1
        assert cell.default is not None and cell.default.plan == default and cell.winner.us is not None
        best = min(screened[plan, cell.problem].us or 0 for plan in rounds[cell.problem])
        near = (screened[default, cell.problem].us or 0) <= FINALS_MARGIN * best
        assert (default in rounds[cell.problem]) == near
        assert cell.winner.us == min(row.us for row in cell.finals if row.us)
        assert cell.speedup is not None and cell.speedup >= 1


def test_slow_plans_stay_out_of_the_finals_but_not_out_of_the_result(recording: Recording, tmp_path: Path) -> None:
    """A default 10x slower would make a power-limited GPU slow for whoever is timed beside it."""
    cell = CELLS[-2]
    default = default_plan(cell, synthetic.H100)
    slowed = replace(recording, measurements=[
        replace(m, us=10 * m.us) if m.us and m.problem == cell and m.plan.config == default.config else m
        for m in recording.measurements
    ])  # fmt: skip
    measurer = Counting(slowed)
    result = run(slowed, tmp_path, measurer)
    plans = dict(measurer.finals_asked)[cell]
    assert len(plans) >= 2 and default not in plans
    times = {m.plan: m.us or 0 for m in slowed.measurements if m.problem == cell}
    assert max(times[plan] for plan in plans) <= FINALS_MARGIN * min(times[plan] for plan in plans)
    found = next(c for c in result.cells if c.problem == cell)
    assert found.default and found.default.us == times[default] and found.speedup and found.speedup > 5


def test_same_seed_same_search_other_seed_another(recording: Recording, tmp_path: Path) -> None:
    logs = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        run(recording, tmp_path / name, options=replace(OPTIONS, seed=seed))
        logs.append(load_recording(tmp_path / name / "log"))
    assert logs[0].batches == logs[1].batches and logs[0].measurements == logs[1].measurements
    assert logs[0].batches != logs[2].batches


def test_a_wrong_kernel_serves_nobody(recording: Recording, tmp_path: Path) -> None:
    """One wrong answer anywhere disqualifies the config everywhere, and its other problems are not even timed."""
    there = [m for m in recording.measurements if m.ok and m.problem == CELLS[-1]]
    culprit = min(there, key=lambda m: m.us or 0).plan.config
    tampered = replace(recording, measurements=[
        replace(m, status="wrong", us=None) if m.plan.config == culprit and m.problem == CELLS[-1] else m
        for m in recording.measurements
    ])  # fmt: skip
    result = run(tampered, tmp_path, options=replace(OPTIONS, trials=120))
    assert result.candidates == len(tampered.configs())
    assert culprit not in {row.plan.config for cell in result.cells for row in (cell.winner, *cell.finals)}
    log = load_recording(tmp_path / "log")
    assert log.done[culprit] == "wrong"
    assert [m.status for m in log.measurements if m.plan.config == culprit][-1] == "wrong", "went on timing it"


def test_failures_of_every_kind_are_rows(recording: Recording, tmp_path: Path) -> None:
    odd = {c.key: i for i, c in enumerate(recording.configs()[20:32])}

    def build(specs: Sequence[KernelSpec], on_done: object) -> None:
        for spec in specs:
            kind = odd.get(spec.config.key, 9)
            result: Result
            if kind < 4:
                result = CompileFailure(spec, "error: no such thing", "log")
            else:
                (artifact,) = _built(spec)
                result = replace(artifact, spill_bytes=8) if kind < 8 else artifact
            on_done(result)  # type: ignore[operator]

    result = run(recording, tmp_path, options=replace(OPTIONS, trials=120), build=build)
    assert result.failures["compile"] == 4 and result.failures["resources"] == 4
    log = load_recording(tmp_path / "log")
    rows = [m for m in log.measurements if m.status in ("compile", "resources")]
    assert len(rows) == 8 and all(m.detail and m.us is None for m in rows)
    assert {"no such thing" in m.detail or "spills 8 bytes" in m.detail for m in rows} == {True}


def _built(spec: KernelSpec) -> list[Artifact]:
    found: list[Artifact] = []
    synthetic.build([spec], found.append)  # type: ignore[arg-type]
    return found


def test_interrupt_keeps_what_was_found_and_resumes_to_the_same_end(recording: Recording, tmp_path: Path) -> None:
    whole = run(recording, tmp_path / "whole")
    first = Counting(recording, stop_after=50)
    broken = run(recording, tmp_path / "broken", first)
    assert broken.interrupted and 0 < broken.candidates < 60
    assert broken.cells and all(cell.winner.us for cell in broken.cells)
    second = Counting(recording)
    resumed = run(recording, tmp_path / "broken", second)
    asked_first = {pair for pair in first.asked if pair != list(first.asked)[-1]}  # the last one had no answer
    assert not asked_first & set(second.asked) & {(m.plan, m.problem) for m in recording.measurements}
    assert winners(resumed) == winners(whole) and resumed.candidates == whole.candidates == 60
    assert load_recording(tmp_path / "broken/log").measurements == load_recording(tmp_path / "whole/log").measurements


def test_an_interrupted_tune_does_not_wait_for_kernels_that_nobody_will_time(
    recording: Recording, tmp_path: Path
) -> None:
    """Those of an earlier session's winners are asked for anew, behind two batches that are under way."""
    run(recording, tmp_path, Counting(recording, stop_after=50))
    cached = set(load_recording(tmp_path / "log").artifacts)
    compiled: list[str] = []

    def build(specs: Sequence[KernelSpec], on_done: Callable[[Result], None]) -> None:
        for spec in specs:
            if spec.key not in cached:
                time.sleep(0.05)
                compiled.append(spec.key)
            synthetic.build([spec], on_done)

    stopped = run(recording, tmp_path, Counting(recording, stop_after=0), build=build)
    assert stopped.interrupted and stopped.cells and stopped.artifacts
    assert len(compiled) < 8


SLOW_TUNE = """
import sys, time
from pathlib import Path
sys.path.insert(0, {tests!r})
import test_search, synthetic
from marlin_gen.record import load_recording
recording = load_recording(Path({recording!r}))
class Slow(test_search.Counting):
    def screen(self, jobs):
        time.sleep(0.01)
        yield from super().screen(jobs)
test_search.run(recording, Path({folder!r}), Slow(recording))
"""


def test_kill_9_loses_nothing(recording: Recording, tmp_path: Path) -> None:
    """Really killed, three times at different points; then resumed: the log is that of an undisturbed search."""
    file = synthetic.save(recording, tmp_path / "recording.jsonl.gz")
    folder, log = tmp_path / "killed", tmp_path / "killed" / "log"
    script = SLOW_TUNE.format(tests=str(ROOT / "tests/cpu"), recording=str(file), folder=str(folder))
    for lines in (30, 90, 200):
        process = subprocess.Popen([sys.executable, "-c", script], cwd=ROOT)
        deadline = time.monotonic() + 120
        while not log.exists() or log.read_bytes().count(b"\n") < lines:
            assert process.poll() is None, "ended before it could be killed"
            assert time.monotonic() < deadline
            time.sleep(0.005)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    before = load_recording(log).measurements
    assert before
    measurer = Counting(recording)
    resumed = run(recording, folder, measurer)
    assert not {(m.plan, m.problem) for m in before} & set(measurer.asked), "measured twice"
    whole = run(recording, tmp_path / "whole")
    assert winners(resumed) == winners(whole)
    assert load_recording(log).measurements == load_recording(tmp_path / "whole" / "log").measurements
    trials = trials_of(folder / "study")
    assert Counter(t.state.is_finished() for t in trials) == {True: 60}
    assert len({t.user_attrs["config"] for t in trials}) == 60
    rerun = Counting(recording)
    assert winners(run(recording, folder, rerun)) == winners(whole)
    assert not rerun.asked and not rerun.finals_asked, "a finished tune has nothing left to time"


FULL_DISK_TUNE = """
import resource, sys
from pathlib import Path
sys.path.insert(0, {tests!r})
import test_search
from marlin_gen.record import load_recording
recording = load_recording(Path({recording!r}))
resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, resource.RLIM_INFINITY))
try:
    test_search.run(recording, Path({folder!r}), **{arguments})
except OSError as error:
    print(error)
"""


@pytest.mark.parametrize("full", ["log", "study"])
def test_full_disk_is_told_and_the_tune_goes_on_later(recording: Recording, tmp_path: Path, full: str) -> None:
    """The log, or the study (which is larger, so it is left out to see the log fail), outgrows what the disk takes."""
    file = synthetic.save(recording, tmp_path / "recording.jsonl.gz")
    folder = tmp_path / "full"
    limit = 20_000 if full == "log" else 60_000  # bytes a file
    script = FULL_DISK_TUNE.format(
        tests=str(ROOT / "tests/cpu"), recording=str(file), limit=limit, folder=str(folder),
        arguments={"study_path": None} if full == "log" else {},
    )  # fmt: skip
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "free some space and run the same command again" in done.stdout and str(folder / full) in done.stdout
    before = load_recording(folder / "log").measurements
    assert before
    measurer = Counting(recording)
    resumed = run(recording, folder, measurer)
    assert not {(m.plan, m.problem) for m in before} & set(measurer.asked)
    assert winners(resumed) == winners(run(recording, tmp_path / "whole"))


def test_a_log_of_other_problems_is_refused(recording: Recording, tmp_path: Path) -> None:
    """Its candidates are done, so that none would be timed for these."""
    run(recording, tmp_path)
    for others in (CELLS[:-1], CELLS[-1:]):
        with pytest.raises(ValueError, match="log is of a tune of other problems; name another study"):
            tune(others, ReplayMeasurer(recording), tmp_path / "log", options=OPTIONS, build=synthetic.build)
    assert run(recording, tmp_path).cells


def test_a_log_of_more_problems_is_refused_before_it_is_written_to(recording: Recording, tmp_path: Path) -> None:
    """Stopped before its first candidate it was once taken up with fewer problems, and what they cost refused later."""
    assert run(recording, tmp_path, Counting(recording, stop_after=0)).interrupted
    with pytest.raises(ValueError, match="log is of a tune of other problems; name another study"):
        tune(CELLS[:2], Counting(recording), tmp_path / "log", options=OPTIONS, build=synthetic.build)
    assert not load_recording(tmp_path / "log").done


def test_stops_within_its_budget(recording: Recording, tmp_path: Path) -> None:
    class Slow(Counting):
        def screen(self, jobs: Sequence[Job]) -> Iterator[Measurement]:
            time.sleep(0.1)
            yield from super().screen(jobs)

    started = time.monotonic()
    result = run(recording, tmp_path, Slow(recording), options=replace(OPTIONS, budget_s=3.0))
    assert time.monotonic() - started < 4.5
    assert result.stopped == "budget" and 0 < result.candidates < 60
    assert all(cell.finals for cell in result.cells), "the finals are part of the budget"


@pytest.mark.parametrize(
    ("stopped", "limit"),
    [("budget", {"budget_s": 1e-3}), ("trials", {"trials": 1}), ("no progress", {"batch_size": 1, "patience": 1})],
)
def test_limits_that_are_too_short_still_try_every_default_and_nothing_else(
    recording: Recording, tmp_path: Path, stopped: str, limit: dict[str, float]
) -> None:
    """Each problem's own: a time of the first one's would do for a row, but might be slower than no table."""
    first = default_plan(CELLS[0], synthetic.H100).config
    slowed = replace(recording, measurements=[
        replace(m, us=9 * m.us) if m.us and m.plan.config != first else m for m in recording.measurements
    ])  # fmt: skip
    measurer, events = Counting(slowed), list[Progress]()
    options = replace(OPTIONS, **limit)  # type: ignore[arg-type]
    result = run(slowed, tmp_path, measurer, options=options, on_progress=events.append)
    assert result.stopped == stopped and not result.unsolved
    for cell in result.cells:
        assert measurer.asked[default_plan(cell.problem, synthetic.H100), cell.problem] == 1
        assert cell.default and cell.speedup and cell.speedup >= 1
    sources = [p.source for batch in load_recording(tmp_path / "log").batches for p in batch]
    assert result.candidates == sources.count("default")
    assert all(e.done <= e.total for e in events)


def test_gives_up_without_progress_and_when_the_space_is_exhausted(recording: Recording, tmp_path: Path) -> None:
    few = recording.configs()[:20]
    result = run(recording, tmp_path / "a", candidates=few)
    assert result.stopped == "space exhausted" and result.candidates == 20
    result = run(recording, tmp_path / "b", options=replace(OPTIONS, trials=120, batch_size=4, patience=2))
    assert result.stopped == "no progress" and result.candidates < 120


def test_tells_its_progress(recording: Recording, tmp_path: Path) -> None:
    events: list[Progress] = []
    run(recording, tmp_path, on_progress=events.append)
    assert [e.phase for e in events if e.done == e.total][-1] == "finals"
    assert {e.phase for e in events} == {"baselines", "search", "finals"}
    search = [e for e in events if e.phase == "search"]
    assert [e.done for e in search] == list(range(1, 61)) and search[-1].total == 60
    assert all(0 < f < 1.2 for f in search[-1].fractions.values()) and set(search[-1].best_us) == set(CELLS)
    for before, after in pairwise(search):
        if before.failures == after.failures:  # a disqualified config takes its times with it
            assert all(after.best_us[p] <= us for p, us in before.best_us.items())


def test_winners_elsewhere_are_tried_in_the_first_batches(recording: Recording, tmp_path: Path) -> None:
    plan = Plan(recording.configs()[-1])
    run(recording, tmp_path, winners_elsewhere={CELLS[0]: [plan]}, options=replace(OPTIONS, trials=30))
    proposals = [p for batch in load_recording(tmp_path / "log").batches for p in batch]
    assert [p.source for p in proposals if p.config == plan.config] == ["winner elsewhere"]


def test_winners_elsewhere_are_timed_for_their_problem_however_poor_they_seem(
    recording: Recording, tmp_path: Path
) -> None:
    for name in ("alone", "with it"):
        (tmp_path / name).mkdir()
    run(recording, tmp_path / "alone")
    was = {(m.plan.config, m.problem) for m in load_recording(tmp_path / "alone/log").measurements}
    tried = {config for config, _ in was}
    skipped = [m for m in recording.measurements if m.ok and m.plan.config in tried]
    poorest = max((m for m in skipped if (m.plan.config, m.problem) not in was), key=lambda m: m.us or 0)
    run(recording, tmp_path / "with it", winners_elsewhere={poorest.problem: [poorest.plan]})
    rows = load_recording(tmp_path / "with it/log").measurements
    assert poorest.plan in {m.plan for m in rows if m.problem == poorest.problem}


@pytest.mark.parametrize(
    ("problems", "said"),
    [([], "no problems to tune"), ([Problem(4096, 4096, 0)], "m=0 .* has nothing to time")],
)
def test_refuses_what_cannot_be_tuned(
    recording: Recording, tmp_path: Path, problems: list[Problem], said: str
) -> None:
    with pytest.raises(ValueError, match=said):
        tune(problems, ReplayMeasurer(recording), tmp_path / "log")


def test_a_broken_compiler_ends_the_tune_with_its_own_words(recording: Recording, tmp_path: Path) -> None:
    def build(specs: Sequence[KernelSpec], on_done: object) -> None:
        raise OSError(28, "cannot use the kernel cache", "/some/cache")

    with pytest.raises(OSError, match="cannot use the kernel cache"):
        run(recording, tmp_path, build=build)


def test_samplers_learn_and_do_not_depend_on_earlier_asks(recording: Recording) -> None:
    candidates = candidates_of(recording.configs())
    told = [m for m in recording.measurements if m.problem == CELLS[0] and m.ok]

    def samplers(asks: int) -> Samplers:
        made = Samplers(candidates, CELLS, seed=3)
        for row in told:
            made.add(row.problem, row.plan.config, row.us)
        for turn in range(asks):
            made.ask(CELLS[0], turn)
        return made

    assert samplers(0).ask(CELLS[0], 5) == samplers(4).ask(CELLS[0], 5)
    us = {row.plan.config: row.us for row in told}
    good = sorted(us, key=lambda c: us[c] or 0)[: len(us) // 4]
    asks = [samplers(0).ask(CELLS[0], turn) for turn in range(12)]
    near = [min(candidates.distances(a)[candidates.within(good)]) for a in asks]
    anywhere = [min(candidates.distances(vars(c))[candidates.within(good)]) for c in candidates.configs]
    assert sum(near) / len(near) < sum(anywhere) / len(anywhere), "proposals are no nearer to good configs than chance"


def test_journal_survives_a_torn_tail_and_reaps_the_lost(recording: Recording, tmp_path: Path) -> None:
    candidates = candidates_of(recording.configs())
    first, second, third = candidates.configs[:3]
    journal = Journal(tmp_path / "study", candidates)
    journal.start([first, second, third])
    journal.finish(first, 0.9, {"status": "ok"})
    with open(tmp_path / "study", "ab") as file:
        file.write(b'{"op_code": 4, "torn')
    again = Journal(tmp_path / "study", candidates)
    assert again.reap([second]) == 1
    again.finish(second, None, {"status": "wrong"})
    again.finish(first, 0.1, {"status": "told twice"})
    states = {t.user_attrs["config"]: t.state for t in trials_of(tmp_path / "study")}
    assert states == {first.key: TrialState.COMPLETE, second.key: TrialState.PRUNED, third.key: TrialState.FAIL}
