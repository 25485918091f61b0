"""What to try next. Seeds first; then by turns what the calibrated cost model expects to help most over all problems,
and, for the problem with most to gain, its sampler's proposal and a neighbour of its winner.

Every proposal is snapped to a legal config that was never tried, so no turn is wasted and nothing is measured twice.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from marlin_gen.config import KernelConfig
from marlin_gen.problem import Problem
from marlin_gen.record import Proposal
from marlin_gen.search.calibrated import Calibrated
from marlin_gen.search.study import Samplers
from marlin_gen.search.trials import Trials
from marlin_gen.space import Candidates

SOURCES = ("sampler", "model", "model", "neighbour", "model", "model")  # the turns
SHORTLIST = 400  # of so many configs the expected gain is followed through a batch
NEIGHBOURHOOD = 12  # of so many configs nearest to a winner, the one of least predicted time is tried
IMPROVED = 0.995  # a problem's best must fall below this share of itself to count as progress


class Proposer:
    """Chooses batches. Its choices depend on seed, seeds and what was told, so a resumed search goes on alike."""

    def __init__(
        self, trials: Trials, model: Calibrated, samplers: Samplers, roofline_us: NDArray[np.float64], gate: float
    ) -> None:
        self._trials, self._model, self._samplers, self._gate = trials, model, samplers, gate
        self._candidates: Candidates = trials.candidates
        self._roofline_us = roofline_us
        self._proposed = np.zeros(len(self._candidates), dtype=bool)
        self._asks = np.zeros(len(trials.problems))  # since the problem's best last improved
        self._best_us = trials.best_us.copy()
        self._seeds: list[Proposal] = []
        self._turn = 0

    def seed(self, configs: Iterable[KernelConfig], source: str) -> None:
        """Try these before anything else, in the order of the calls."""
        self._seeds += [Proposal(self._candidates.configs[i], source) for i in self._candidates.within(configs)]

    def take(self, proposals: Sequence[Proposal]) -> None:
        """Note proposals as made: those of ``batch`` below, or of a log."""
        for proposal in proposals:
            self._proposed[self._candidates.index[proposal.config]] = True
            if proposal.problem is not None:
                self._asks[self._trials.column[proposal.problem]] += 1
        self._turn += 1

    def close_batch(self) -> bool:
        """Call when a batch is measured. Whether any problem's best has improved."""
        best_us = self._trials.best_us
        improved = best_us < IMPROVED * self._best_us
        self._asks[improved] = 0
        self._best_us = np.where(improved, best_us, self._best_us)
        return bool(improved.any())

    def batch(self, size: int) -> list[Proposal]:
        """Up to ``size`` configs never proposed before; fewer, or none, when the space is exhausted."""
        fresh = ~self._proposed
        picks: list[Proposal] = []

        def pick(proposal: Proposal) -> None:
            fresh[self._candidates.index[proposal.config]] = False
            picks.append(proposal)

        while self._seeds and len(picks) < size:
            proposal = self._seeds.pop(0)
            if fresh[self._candidates.index[proposal.config]]:
                pick(proposal)
        asks = self._asks.copy()
        favourites = self._favourites(fresh, picks)
        while len(picks) < size and fresh.any():
            turn = self._turn * size + len(picks)
            # Before anything is measured there is nothing to sample from, and no winner to be near.
            source = SOURCES[turn % len(SOURCES)] if self._model.is_fitted else "model"
            if source == "model":
                pick(Proposal(self._candidates.configs[next(favourites)], source))
                continue
            problem = self._neediest(asks)
            asks[self._trials.column[problem]] += 1
            pick(Proposal(self._candidates.configs[self._ask(source, problem, fresh, turn)], source, problem))
        self.take(picks)
        return picks

    def _favourites(self, fresh: NDArray[np.bool_], picks: Sequence[Proposal]) -> Iterator[int]:
        """Fresh configs by expected gain, each judged as if the earlier ones had turned out as predicted."""
        under_way = self._candidates.within(p.config for p in picks)
        pending = self._proposed & ~np.isfinite(self._trials.us).any(axis=1)
        pending[under_way] = True
        best_us = np.minimum(self._best_us, 2 * self._model.best_us)
        best_us = np.minimum(best_us, self._model.us[pending].min(axis=0, initial=np.inf))
        rows = np.flatnonzero(fresh)
        rows = rows[np.argsort(-self._model.expected_gain(rows, best_us, self._roofline_us), kind="stable")[:SHORTLIST]]
        while True:
            rows = rows[fresh[rows]]
            if not len(rows):
                rows = np.flatnonzero(fresh)
            chosen = int(rows[np.argmax(self._model.expected_gain(rows, best_us, self._roofline_us))])
            best_us = np.minimum(best_us, self._model.us[chosen])
            yield chosen

    def _neediest(self, asks: NDArray[np.float64]) -> Problem:
        """The problem with the largest gap to its roofline for the asks it has had: none starves."""
        gap = np.log(np.where(np.isfinite(self._best_us), self._best_us, 10 * self._roofline_us) / self._roofline_us)
        return self._trials.problems[int(np.argmax((np.maximum(gap, 0) + 0.1) / (1 + asks)))]

    def _ask(self, source: str, problem: Problem, fresh: NDArray[np.bool_], turn: int) -> int:
        """Index of a fresh config, promising for the problem if any is."""
        j = self._trials.column[problem]
        predicted = self._model.us[:, j]
        limit = self._model.gate(self._gate)[j] * min(self._trials.best_us[j], self._model.best_us[j])
        promising = fresh & (predicted <= limit)
        if not promising.any():
            promising = fresh
        winner = self._trials.winner(problem)
        if source == "sampler" or winner is None:
            return self._candidates.nearest(self._samplers.ask(problem, turn), promising, predicted)
        distance = self._candidates.distances(vars(self._candidates.configs[winner]))
        near = np.flatnonzero(promising)
        near = near[np.argsort(distance[near], kind="stable")[:NEIGHBOURHOOD]]
        return int(near[np.argmin(predicted[near])])
