"""The last round: per problem the best few and the default, timed against each other; the winner is the row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from marlin_gen.config import Plan
from marlin_gen.families.defaults import default_plan
from marlin_gen.measurement import Artifact, Measurement
from marlin_gen.problem import Problem
from marlin_gen.search.events import CellResult
from marlin_gen.search.tuner import Tuner

# A plan slower than this many times the best has nothing to win, and where power limits the clock it would slow down
# whoever is timed next to it.
FINALS_MARGIN = 1.5


def final_rounds(tuner: Tuner) -> dict[Problem, list[Measurement]]:
    """Re-time the finalists of every problem, interleaved. A round that the log holds already is not run again."""
    entries = {problem: _finalists(tuner, problem) for problem in tuner.problems}
    tuner.ahead.submit(list(dict.fromkeys(plan.config for plans in entries.values() for plan in plans)))
    recorded: dict[Problem, dict[Plan, Measurement]] = {}
    for row in tuner.log.recording.finals:
        recorded.setdefault(row.problem, {})[row.plan] = row
    rounds: dict[Problem, list[Measurement]] = {}
    for number, (problem, plans) in enumerate(entries.items(), 1):
        earlier = recorded.get(problem, {})
        if plans and set(plans) <= earlier.keys():
            rounds[problem] = [earlier[plan] for plan in plans]
        elif plans:
            usable = [(artifact, plan) for plan in plans if (artifact := tuner.ahead.usable(plan.config)[0])]
            rounds[problem] = tuner.measurer.finals(problem, usable)
            for row in rounds[problem]:
                tuner.log.final(row)
        tuner.report("finals", number, len(entries))
    return rounds


def results(tuner: Tuner, rounds: Mapping[Problem, Sequence[Measurement]]) -> list[CellResult]:
    """The winner of each problem that has one: by the finals, or by the first timing where they were not reached."""
    # A kernel that failed in any final, after it had passed before, is not to be trusted anywhere.
    unfit = set(tuner.trials.out) | {
        row.plan.config for rows in rounds.values() for row in rows if not row.ok and row.status != "launch"
    }
    cells = []
    for problem in tuner.problems:
        finals = [row for row in rounds.get(problem, ()) if row.ok and row.us and row.plan.config not in unfit]
        ranked = finals or [row for row in tuner.trials.ranked(problem) if row.plan.config not in unfit]
        if not ranked or problem not in tuner.baselines:
            continue
        default = default_plan(problem, tuner.measurer.gpu)
        screened = tuner.trials.by_pair.get((default, problem))
        if screened is not None:
            # A time from outside the finals is compared with one from inside only where it kept its plan out of them.
            limit = FINALS_MARGIN * float(tuner.trials.best_us[tuner.trials.column[problem]])
            comparable = not finals or (screened.us or 0.0) > limit
            if not screened.ok or default.config in unfit or not comparable:
                screened = None
        cells.append(
            CellResult(
                problem,
                min(ranked, key=lambda row: (row.us, row.plan.key)),
                next((row for row in ranked if row.plan == default), screened),
                tuner.baselines[problem],
                tuple(finals),
            )
        )
    return cells


def needed_artifacts(tuner: Tuner, cells: Sequence[CellResult]) -> list[Artifact]:
    """The kernels of every winner and default."""
    configs = dict.fromkeys(row.plan.config for cell in cells for row in (cell.winner, cell.default) if row)
    tuner.ahead.submit(list(configs))
    return [artifact for config in configs if (artifact := tuner.ahead.usable(config)[0])]


def _finalists(tuner: Tuner, problem: Problem) -> list[Plan]:
    """The best few, one plan per config, and what would run without a table; all near enough to the best to win."""
    ranked = tuner.trials.ranked(problem)
    if not ranked:
        return []
    default = tuner.trials.by_pair.get((default_plan(problem, tuner.measurer.gpu), problem))
    entries = ranked[: tuner.options.finalists]
    if default is not None and default.ok and default.plan.config not in tuner.trials.out:
        entries.append(default)
    limit = FINALS_MARGIN * (ranked[0].us or 0.0)
    return list(dict.fromkeys(row.plan for row in entries if row.us and row.us <= limit))
