"""What a tune is told, tells while it runs, and returns."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from marlin_gen.arch import Gpu
from marlin_gen.config import KernelSpec
from marlin_gen.measurement import Artifact, Baseline, Measurement
from marlin_gen.problem import Problem


@dataclass(frozen=True)
class TuneOptions:
    """How long and how widely to search."""

    trials: int = 500  # candidates compiled and timed, at most; the defaults always are, whatever the limits
    budget_s: float | None = None  # wall-clock seconds for everything, the finals included; None: no limit
    seed: int = 0
    batch_size: int = 24  # candidates compiled while as many are timed
    finalists: int = 4  # per problem, re-timed against each other and the default
    patience: int = 12  # batches without progress on any problem before the search ends early
    gate: float = 1.5  # a pair predicted to take longer than this many times the problem's best is not timed
    finals_share: float = 0.2  # of budget_s, kept for the finals

    def __post_init__(self) -> None:
        for name in ("trials", "batch_size", "finalists", "patience"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} is not a positive whole number")
        if self.budget_s is not None and self.budget_s <= 0:
            raise ValueError(f"budget_s={self.budget_s} is not a positive number of seconds")


@dataclass(frozen=True)
class Progress:
    """The state of a running tune, for whoever draws it."""

    phase: str  # "baselines", "search", "finals"
    done: int  # problems, candidates, problems
    total: int
    best_us: Mapping[Problem, float]  # problems without a valid time are absent
    fractions: Mapping[Problem, float]  # of the roofline, 1 is the roofline
    failures: Mapping[str, int]  # configs that failed, by status
    pairs: int  # (plan, problem) pairs timed so far, earlier sessions included
    seconds_left: float  # an estimate


@dataclass(frozen=True)
class CellResult:
    """What a tune found for one problem."""

    problem: Problem
    winner: Measurement
    default: Measurement | None  # the plan that would run without a table, timed against the winner
    baseline: Baseline
    finals: tuple[Measurement, ...] = ()  # everyone timed in the last round; empty if it was not reached

    @property
    def speedup(self) -> float | None:
        """Default time over tuned time."""
        return self.default.us / self.winner.us if self.default and self.default.us and self.winner.us else None


@dataclass(frozen=True)
class SearchResult:
    """Everything a table is built from."""

    gpu: Gpu
    cells: tuple[CellResult, ...]  # sorted by problem
    unsolved: tuple[Problem, ...]  # no candidate worked
    artifacts: Mapping[KernelSpec, Artifact]  # every winner and default
    failures: Mapping[str, int]
    candidates: int  # tried, earlier sessions included
    pairs: int
    resumed: bool  # whether there were any
    seconds: float  # of this session
    stopped: str  # why the search ended: "trials", "budget", "no progress", "space exhausted", "interrupted"

    @property
    def interrupted(self) -> bool:
        return self.stopped == "interrupted"
