"""Tune: find the best plan for every problem on one GPU, or on a recording of one."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from marlin_gen.arch import Gpu
from marlin_gen.config import KernelConfig, KernelSpec, Plan
from marlin_gen.families import FAMILIES
from marlin_gen.families.defaults import default_plan
from marlin_gen.formats import weight_format
from marlin_gen.measurement import Measurer
from marlin_gen.problem import Problem
from marlin_gen.record import MeasurementLog
from marlin_gen.search.events import CellResult, Progress, SearchResult, TuneOptions
from marlin_gen.search.finals import final_rounds, needed_artifacts, results
from marlin_gen.search.pipeline import Build, CompileAhead, build_with_ninja
from marlin_gen.search.study import Journal
from marlin_gen.search.tuner import Tuner
from marlin_gen.space import ConfigSpace, candidates_of

__all__ = ["CellResult", "Progress", "SearchResult", "TuneOptions", "build_with_ninja", "tune"]


def tune(
    problems: Sequence[Problem],
    measurer: Measurer,
    log_path: Path,
    *,
    study_path: Path | None = None,
    options: TuneOptions | None = None,
    candidates: Sequence[KernelConfig] | None = None,
    winners_elsewhere: Mapping[Problem, Sequence[Plan]] | None = None,
    build: Build | None = None,
    versions: Mapping[str, str] | None = None,
    on_progress: Callable[[Progress], None] | None = None,
) -> SearchResult:
    """Search until ``options`` say stop, then time the finalists. Resumes whatever ``log_path`` holds.

    ``study_path``: the Optuna journal to keep for watching. ``candidates``: search these only (default: the whole
    legal space; a replay passes ``recording.configs()``). ``winners_elsewhere``: each problem's plans in tables of any
    GPU of the architecture, tried early, and timed for it whatever the cost model thinks. ``build``: how specs become
    artifacts (default: ninja on all cores). ``versions``: what else makes old times incomparable, such as the
    templates' digest; a log made with others is refused.

    Ctrl-C ends the search and returns what was found; the log is resumable, as after a kill. Raises ValueError for
    problems that cannot be tuned together and for a log of another GPU or of other problems, OSError naming the file
    when the disk is full.
    """
    started = time.monotonic()
    options, elsewhere = options or TuneOptions(), winners_elsewhere or {}
    problems = check_problems(problems)
    gpu, first = measurer.gpu, problems[0]
    fmt = weight_format(first.weight_format)
    if candidates is not None:  # a recording may hold what is not legal any more
        candidates = [c for c in candidates if FAMILIES.of(c).reject_reason(c, fmt, gpu.arch) is None]
    space = candidates_of(candidates or ConfigSpace(gpu.arch, fmt, FAMILIES).enumerate())

    def spec_of(config: KernelConfig) -> KernelSpec:
        return KernelSpec(config, first.weight_format, first.act_dtype, gpu.arch.name)

    log = MeasurementLog(log_path, gpu, dict(versions or {}))
    build = build or build_with_ninja()
    ahead = CompileAhead(spec_of, build)
    try:
        known, asked = log.recording.baselines.keys(), set(problems)
        if not known <= asked or (log.recording.done and known != asked):  # candidates are done for those only
            raise ValueError(f"{log_path} is of a tune of other problems; name another study, or start it afresh")
        journal = Journal(study_path, space) if study_path else None
        seeds = {
            "default": _defaults(problems, gpu),
            "winner elsewhere": [plan.config for plans in elsewhere.values() for plan in plans],
            "other default": [c for family in FAMILIES.rows.values() for c in family.defaults(gpu.arch, fmt)],
        }
        tuner = Tuner(problems, space, measurer, log, journal, ahead, seeds, elsewhere, options, on_progress, started)
        rounds = {}
        try:
            stopped = tuner.search()
            rounds = final_rounds(tuner)
        except KeyboardInterrupt:
            stopped = "interrupted"
            ahead.close()  # what is on its way nobody waits for; the kernels found so far come from the cache
            tuner.ahead = ahead = CompileAhead(spec_of, build)
        cells = results(tuner, rounds)
        solved = {cell.problem for cell in cells}
        return SearchResult(
            gpu=gpu,
            cells=tuple(cells),
            unsolved=tuple(problem for problem in problems if problem not in solved),
            artifacts={artifact.spec: artifact for artifact in needed_artifacts(tuner, cells)},
            failures=tuner.trials.failures(),
            candidates=tuner.done,
            pairs=len(log.recording.measurements),
            resumed=bool(tuner.earlier),
            seconds=time.monotonic() - started,
            stopped=stopped,
        )
    finally:
        ahead.close()
        log.close()


def check_problems(problems: Sequence[Problem]) -> list[Problem]:
    """Sorted, without repeats; ValueError unless they can share kernels and have something to time."""
    unique = sorted(set(problems))
    if not unique:
        raise ValueError("no problems to tune; name at least one shape and one number of tokens")
    if empty := [p for p in unique if p.m == 0]:
        raise ValueError(f"m=0 (n={empty[0].n} k={empty[0].k}) has nothing to time; ask for m of 1 or more")
    kinds = {p.kind for p in unique}
    if len(kinds) > 1:
        raise ValueError(f"problems of {len(kinds)} formats in one tune: {sorted(kinds)}; tune each by itself")
    return unique


def _defaults(problems: Sequence[Problem], gpu: Gpu) -> list[KernelConfig]:
    """What would run without a table, then every family's default of every problem."""
    plans = [default_plan(problem, gpu) for problem in problems]
    plans += [family.default(problem, gpu) for problem in problems for family in FAMILIES.rows.values()]
    return list(dict.fromkeys(plan.config for plan in plans))
