"""What a running search knows: the config x problem matrix of measured times, and which configs are out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from marlin_gen.config import KernelConfig, Plan
from marlin_gen.measurement import Measurement
from marlin_gen.problem import Problem
from marlin_gen.space import Candidates

# A kernel that was wrong or died on one problem must not serve any: the fault may hide elsewhere. A refused launch
# says something about that problem only.
DISQUALIFYING = ("compile", "resources", "wrong", "timeout", "crash")


@dataclass
class Trials:
    """Grows by ``add``; every question the search asks is answered from it."""

    candidates: Candidates
    problems: Sequence[Problem]
    us: NDArray[np.float64] = field(init=False)  # (configs, problems): the best tile order; NaN = not measured
    by_pair: dict[tuple[Plan, Problem], Measurement] = field(default_factory=dict)
    out: dict[KernelConfig, str] = field(default_factory=dict)  # disqualified, and why
    column: dict[Problem, int] = field(init=False)
    best_us: NDArray[np.float64] = field(init=False)  # (problems,): the best so far, infinite where there is none

    def __post_init__(self) -> None:
        self.us = np.full((len(self.candidates), len(self.problems)), np.nan)
        self.column = {problem: j for j, problem in enumerate(self.problems)}
        self.best_us = np.full(len(self.problems), np.inf)

    def add(self, row: Measurement) -> None:
        self.by_pair[row.plan, row.problem] = row
        config = row.plan.config
        i = self.candidates.index[config]
        if row.status in DISQUALIFYING:
            self.out[config] = row.status
            self.us[i] = np.nan
            self.best_us = np.fmin.reduce(self.us, axis=0, initial=np.inf)
        elif row.ok and config not in self.out and row.us is not None:
            j = self.column[row.problem]
            self.us[i, j] = np.fmin(self.us[i, j], row.us)
            self.best_us[j] = min(self.best_us[j], row.us)

    def winner(self, problem: Problem) -> int | None:
        """Index of the best config of a problem."""
        column = self.us[:, self.column[problem]]
        return int(np.nanargmin(column)) if np.isfinite(column).any() else None

    def ranked(self, problem: Problem) -> list[Measurement]:
        """The valid measurements of a problem, best first; one per config, with its best tile order."""
        rows = [
            row for (plan, at), row in self.by_pair.items() if at == problem and row.ok and plan.config not in self.out
        ]
        rows.sort(key=lambda row: (row.us, row.plan.key))
        first_of: dict[KernelConfig, Measurement] = {}
        for row in rows:
            first_of.setdefault(row.plan.config, row)
        return list(first_of.values())

    def failures(self) -> dict[str, int]:
        """How many configs are out, by status."""
        counts: dict[str, int] = {}
        for status in self.out.values():
            counts[status] = counts.get(status, 0) + 1
        return counts
