"""The last round: per problem the best few and the defaults, timed against each other; the winner is the row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from marlin_gen.config import KernelConfig, Plan
from marlin_gen.dispatch import Dispatcher
from marlin_gen.families import FAMILIES
from marlin_gen.measurement import Artifact, Measurement
from marlin_gen.problem import Problem
from marlin_gen.search.events import CellResult
from marlin_gen.search.tuner import Tuner


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
        default = default_plan(tuner, problem)
        timed = {row.plan: row for row in ranked}
        fallback = tuner.trials.by_pair.get((default, problem)) if not finals else None
        cells.append(
            CellResult(
                problem,
                min(ranked, key=lambda row: (row.us, row.plan.key)),
                timed.get(default, fallback),
                tuner.baselines[problem],
                tuple(finals),
            )
        )
    return cells


def default_plan(tuner: Tuner, problem: Problem) -> Plan:
    """What dispatch would run without any table."""
    return next(choice.plan for choice in Dispatcher(tuner.measurer.gpu, ()).choose(problem))


def needed_artifacts(tuner: Tuner, cells: Sequence[CellResult]) -> list[Artifact]:
    """The kernels of every winner and default."""
    configs = dict.fromkeys(row.plan.config for cell in cells for row in (cell.winner, cell.default) if row)
    tuner.ahead.submit(list(configs))
    return [artifact for config in configs if (artifact := tuner.ahead.usable(config)[0])]


def _finalists(tuner: Tuner, problem: Problem) -> list[Plan]:
    """The best few, one plan per config, and every family's default that worked."""
    ranked = tuner.trials.ranked(problem)
    plans = [row.plan for row in ranked[: tuner.options.finalists]]
    for family in FAMILIES.rows.values():
        plan = family.default(problem, tuner.measurer.gpu)
        row = tuner.trials.by_pair.get((plan, problem))
        if row is not None and row.ok and not _is_out(tuner, plan.config):
            plans.append(plan)
    return list(dict.fromkeys(plans))


def _is_out(tuner: Tuner, config: KernelConfig) -> bool:
    return config in tuner.trials.out
