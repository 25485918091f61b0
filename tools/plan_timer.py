"""Questions of the kind "how much longer does this plan take than that one?", answered on one device."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from marlin_gen.cli.bench import artifacts_of
from marlin_gen.cli.console import note
from marlin_gen.config import KernelSpec, Plan
from marlin_gen.dispatch import Choice, Dispatcher
from marlin_gen.measurement import Job, Measurement, Measurer
from marlin_gen.problem import Problem
from marlin_gen.table import DispatchTable

FINALISTS = 3  # of more plans, those that a quick timing finds fastest


@dataclass(frozen=True)
class Question:
    """How much longer does the best of ``plans`` take on ``problem`` than ``other_plan`` on ``other``?"""

    problem: Problem
    plans: Sequence[Plan]
    other: Problem  # interleaved where it is the same problem, else timed right after
    other_plan: Plan
    tried: int = 0  # kernels timed to find the other plan


class Timer:
    """Times the plans that are asked about; the kernels that ``tables`` lack are compiled first."""

    def __init__(self, measurer: Measurer, tables: list[DispatchTable], asked: list[Question], scratch: Path) -> None:
        self.measurer = measurer
        # A cubin runs on every GPU of its target, whichever one its table was measured on.
        finder = Dispatcher(measurer.gpu, [replace(table, gpu=measurer.gpu) for table in tables])
        specs = {self.spec(q.problem, plan): plan for q in asked for plan in q.plans}
        specs |= {self.spec(q.other, q.other_plan): q.other_plan for q in asked}
        choices = [Choice(plan, spec, "", finder.locate(spec)) for spec, plan in specs.items()]
        self.compiled = sum(choice.kernel is None for choice in choices)
        note(f"{len(choices)} kernels, {self.compiled} to compile")
        self.artifacts = artifacts_of(choices, finder, scratch)

    def spec(self, problem: Problem, plan: Plan) -> KernelSpec:
        return KernelSpec(plan.config, problem.weight_format, problem.act_dtype, self.measurer.gpu.arch.name)

    def finals(self, problem: Problem, plans: Iterable[Plan]) -> dict[Plan, float]:
        """Microseconds of each, interleaved; those that fail are left out."""
        entries = [(self.artifacts[self.spec(problem, plan)], plan) for plan in dict.fromkeys(plans)]
        return _times(self.measurer.finals(problem, entries))

    def answer(self, q: Question) -> tuple[Plan, float, float] | None:
        """The best plan, its microseconds and those of the other; None where there is no time of one of them."""
        plans, same = q.plans, q.other == q.problem
        if len(plans) > FINALISTS:
            jobs = [Job(self.artifacts[self.spec(q.problem, plan)], (plan,), q.problem) for plan in plans]
            quick = _times(self.measurer.screen(jobs))
            plans = sorted(quick, key=quick.__getitem__)[:FINALISTS]
        us = self.finals(q.problem, [*plans, q.other_plan] if same else plans)
        other_us = us if same else self.finals(q.other, [q.other_plan])
        best = min((plan for plan in plans if plan in us), key=us.__getitem__, default=None)
        return (best, us[best], other_us[q.other_plan]) if best and q.other_plan in other_us else None


def _times(rows: Iterable[Measurement]) -> dict[Plan, float]:
    found = list(rows)
    for row in (row for row in found if not row.ok):
        note(f"failed: {row.problem} {row.plan.key}: {row.status} {row.detail}".rstrip())
    return {row.plan: row.us for row in found if row.ok and row.us}
