"""The search itself: propose a batch, compile it while the one before is timed, learn, repeat; then the finals.

Everything learnt is appended to the measurement log before it is used. A killed tune is resumed by running the same
search again with the log as its memory: batches are taken from it as they were proposed, measurements are looked up
before they are made, so the search arrives where it stopped and goes on as if nothing had happened.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from marlin_gen.config import KernelConfig, Plan
from marlin_gen.cost_model import attainable_tflops, predict_us
from marlin_gen.families import FAMILIES
from marlin_gen.families.defaults import default_plan
from marlin_gen.measurement import Artifact, Baseline, Job, Measurement, Measurer
from marlin_gen.problem import Problem
from marlin_gen.record import MeasurementLog, Proposal
from marlin_gen.search.calibrated import Calibrated
from marlin_gen.search.events import Progress, TuneOptions
from marlin_gen.search.pipeline import CompileAhead
from marlin_gen.search.proposals import Proposer
from marlin_gen.search.study import Journal, Samplers
from marlin_gen.search.trials import Trials
from marlin_gen.space import Candidates

REFUSALS = 2  # launches refused before a candidate is given up
RASTER_MARGIN = 1.04  # other tile orders are timed only for configs within this of the problem's best


class Tuner:
    """One search on one measurer. ``search`` first, then ``finals.final_rounds`` reads its state."""

    def __init__(
        self, problems: Sequence[Problem], candidates: Candidates, measurer: Measurer, log: MeasurementLog,
        journal: Journal | None, ahead: CompileAhead, seeds: Mapping[str, Sequence[KernelConfig]],
        elsewhere: Mapping[Problem, Sequence[Plan]], options: TuneOptions,
        on_progress: Callable[[Progress], None] | None, started: float,
    ) -> None:  # fmt: skip
        # What runs without a table is tried whatever the limits: no row may be slower than it would be without tuning.
        self._owed = {candidates.configs[i] for i in candidates.within(seeds["default"])}
        self.options = replace(options, trials=max(options.trials, len(self._owed)))
        self.problems, self.candidates = problems, candidates
        self.measurer, self.log, self.journal, self.ahead = measurer, log, journal, ahead
        self.baselines: dict[Problem, Baseline] = {}
        self.trials = Trials(candidates, problems)
        self.samplers = Samplers(candidates, problems, options.seed)
        predicted_us = predict_us(candidates.configs, problems, measurer.gpu)
        self.model = Calibrated.start(candidates.features, problems, predicted_us)
        self.done = 0  # candidates
        self._seeds = seeds
        self._known = {(row.plan, row.problem): row for row in log.recording.measurements}
        self.earlier: dict[KernelConfig, list[Measurement]] = {}
        for row in log.recording.measurements:
            self.earlier.setdefault(row.plan.config, []).append(row)
        self._on_progress, self._started = on_progress, started
        self._searching_since = time.monotonic()
        # What runs without a table, or won in another, is timed there, whatever the model thinks.
        expected = {p: (*elsewhere.get(p, ()), default_plan(p, measurer.gpu)) for p in problems}
        self._expected = {p: {plan.config: plan for plan in plans} for p, plans in expected.items()}

    def search(self) -> str:
        """Run until a limit is reached; returns which. KeyboardInterrupt passes through, with all state kept."""
        self._take_baselines()
        roofline_us = np.array([self.roofline_us(problem) for problem in self.problems])
        proposer = Proposer(self.trials, self.model, self.samplers, roofline_us, self.options.gate)
        for source, configs in self._seeds.items():
            proposer.seed(configs, source)
        self._searching_since = time.monotonic()
        done = self.log.recording.done
        recorded = deque(self.log.recording.batches)
        if self.journal:
            self.journal.reap([p.config for batch in recorded for p in batch])
        queue: deque[Sequence[Proposal]] = deque()
        stopped, idle, promised = "trials", 0, 0  # promised: candidates in all batches so far
        while True:
            # Two batches under way: one compiles while the other is timed. Those of an earlier session come first, in
            # the same order of choosing and timing, so that the proposer goes through the same states.
            while len(queue) < 2 and (recorded or promised < self.options.trials):
                if recorded:
                    batch = [p for p in recorded.popleft() if p.config in self.candidates.index]
                    proposer.take(batch)
                else:
                    batch = proposer.batch(min(self.options.batch_size, self.options.trials - promised))
                    if not batch:
                        stopped = "space exhausted"
                        break
                    self.log.batch(batch)
                self._start([p.config for p in batch if p.config not in done])
                queue.append(batch)
                promised += len(batch)
            if not queue:
                return stopped
            for proposal in queue.popleft():
                if self._out_of_time() and not self._owed:
                    return "budget"
                self._try(proposal.config)
            idle = 0 if proposer.close_batch() else idle + 1
            self.model.fit(self.trials.us)
            if idle >= self.options.patience and not self._owed:
                return "no progress"

    def _start(self, configs: Sequence[KernelConfig]) -> None:
        self.ahead.submit(configs)
        if self.journal:
            self.journal.start(configs)

    def _take_baselines(self) -> None:
        self.baselines = {p: b for p, b in self.log.recording.baselines.items() if p in self.trials.column}
        missing = [problem for problem in self.problems if problem not in self.baselines]
        self.report("baselines", len(self.baselines), len(self.problems))
        for baseline in self.measurer.baselines(missing):
            self.log.baseline(baseline)
            self.baselines[baseline.problem] = baseline
            self.report("baselines", len(self.baselines), len(self.problems))

    def _try(self, config: KernelConfig) -> None:
        """Compile and time one candidate wherever it may matter, and tell everyone."""
        self._owed.discard(config)
        was_done = self.log.recording.done.get(config)
        rows = self._recorded(config) if was_done else self._timed(config)
        measured = list(rows)
        status = self.trials.out.get(config) or ("ok" if any(row.ok for row in measured) else "launch")
        if not measured:
            status = "skipped"
        for j, problem in enumerate(self.problems):
            us = self.trials.us[self.candidates.index[config], j]
            if np.isfinite(us):
                self.samplers.add(problem, config, float(us))
            elif status not in ("ok", "skipped"):
                self.samplers.add(problem, config, None)
        if not was_done:
            self.log.candidate(config, status)
        if self.journal:
            self._publish(config, status)
        self.done += 1
        self.report("search", self.done, self.options.trials)

    def _recorded(self, config: KernelConfig) -> Iterator[Measurement]:
        """The measurements of an earlier session."""
        for row in self.earlier.get(config, ()):
            if row.problem in self.trials.column:
                self.trials.add(row)
                yield row

    def _timed(self, config: KernelConfig) -> Iterator[Measurement]:
        """Time one candidate, most promising problem first, dropping problems as it turns out slower than predicted."""
        artifact, status, reason = self.ahead.usable(config)
        order = self._promise(config).argsort(kind="stable")
        if artifact is None:
            failure = Measurement(self.problems[order[0]], Plan(config), status, detail=reason[:300])
            self._keep(failure)
            yield failure
            return
        self.log.artifact(artifact)
        refused, is_first = 0, True
        for j in order:
            problem = self.problems[j]
            plans = self._plans(config, problem)
            expected = self._expected[problem].get(config)
            # One timing at least: next to the compilation it costs nothing, and it corrects a model too sure of itself.
            worthwhile = is_first or expected or self._promise(config)[j] <= self.model.gate(self.options.gate)[j]
            if not plans or not worthwhile:
                continue
            is_first = False
            first = expected or plans[len(plans) // 2]
            for plan in (first, *(p for p in plans if p != first)):
                row = self._time(artifact, plan, problem)
                if row is not None:
                    yield row
                refused += row is not None and row.status == "launch"
                if config in self.trials.out or refused >= REFUSALS:
                    return
                i = self.candidates.index[config]
                if not self.trials.us[i, j] <= RASTER_MARGIN * self.trials.best_us[j]:
                    break

    def _plans(self, config: KernelConfig, problem: Problem) -> list[Plan]:
        family = FAMILIES.of(config)
        if family.reject_problem(config, problem):
            return []
        return [Plan(config, raster) for raster in family.rasters(config, problem)]

    def _promise(self, config: KernelConfig) -> NDArray[np.float64]:
        """(problems,): predicted time over the best known, corrected by how this config did elsewhere so far."""
        i = self.candidates.index[config]
        predicted, measured = self.model.us[i], self.trials.us[i]
        seen = np.isfinite(measured)
        bias = np.log(measured[seen] / predicted[seen]).sum() / (seen.sum() + 1)
        best = np.where(np.isfinite(self.trials.best_us), self.trials.best_us, self.model.best_us)
        promise: NDArray[np.float64] = predicted * np.exp(bias) / best
        return promise

    def _time(self, artifact: Artifact, plan: Plan, problem: Problem) -> Measurement | None:
        """The logged measurement if there is one; else a new one, logged before it is used."""
        row = self._known.get((plan, problem))
        if row is not None:
            self.trials.add(row)
            return row
        for row in self.measurer.screen([Job(artifact, (plan,), problem)]):
            self._keep(row)
        return row

    def _keep(self, row: Measurement) -> None:
        if (row.plan, row.problem) not in self._known:
            self.log.measurement(row)
            self._known[row.plan, row.problem] = row
        self.trials.add(row)

    def _publish(self, config: KernelConfig, status: str) -> None:
        assert self.journal
        us = self.trials.us[self.candidates.index[config]]
        best = [self.roofline_us(p) / t for p, t in zip(self.problems, us, strict=True) if np.isfinite(t)]
        kernel = self.log.recording.artifacts.get(self.ahead.spec_of(config).key, {})
        # Two attributes only: each is a synced write.
        attributes = {"status": status, "kernel": {**kernel, "problems_timed": len(best)}}
        self.journal.finish(config, max(best) if best else None, attributes)

    def roofline_us(self, problem: Problem) -> float:
        return problem.roofline_us(self.baselines[problem].read_floor_us, attainable_tflops(self.measurer.gpu))

    def report(self, phase: str, done: int, total: int) -> None:
        if self._on_progress is None:
            return
        best = {p: float(us) for p, us in zip(self.problems, self.trials.best_us, strict=True) if np.isfinite(us)}
        fractions = {p: self.roofline_us(p) / us for p, us in best.items()}
        failures, pairs = self.trials.failures(), len(self._known)
        self._on_progress(Progress(phase, done, total, best, fractions, failures, pairs, self._seconds_left()))

    def _seconds_left(self) -> float:
        pace = (time.monotonic() - self._searching_since) / max(self.done, 1)
        by_trials = pace * (self.options.trials - self.done)
        if self.options.budget_s is None:
            return by_trials
        return max(min(by_trials, self._started + self.options.budget_s - time.monotonic()), 0.0)

    def _out_of_time(self) -> bool:
        if self.options.budget_s is None:
            return False
        return time.monotonic() - self._started > self.options.budget_s * (1 - self.options.finals_share)
