"""The cost model's predictions, corrected by what was measured so far, and what they promise.

What the arithmetic leaves out is learnt once, over all problems, and not anew in each.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from marlin_gen.problem import Problem

Array = NDArray[np.float64]


@dataclass
class Calibrated:
    """``predict_us`` times a learnt correction: log(measured / predicted) = config image x W x problem image.

    One ridge regression over all pairs measured so far. A problem learns from its neighbours' measurements, and a
    config from its neighbours'. With no measurements the correction is 1.
    """

    prior_us: Array  # (configs, problems)
    config_image: Array  # (configs, p)
    problem_image: Array  # (problems, q)
    us: Array  # (configs, problems), the current prediction
    best_us: Array  # (problems,), its least values
    spread: Array  # (problems,): root mean square of log(measured / predicted), among each problem's best
    is_fitted: bool = False

    RIDGE: ClassVar[float] = 1.0
    NEEDED: ClassVar[int] = 24  # fewer measured pairs say too little
    UNFITTED_MARGIN: ClassVar[float] = 1.2  # the arithmetic by itself errs more
    FIRST_SPREAD: ClassVar[float] = 0.25
    NEAR: ClassVar[float] = 1.3  # times the best; the rest need not be told apart
    POOL: ClassVar[float] = 8.0  # timings of a problem that weigh as much as those of all
    LEAST_GATE: ClassVar[float] = 1.1  # timings that are quick to take have errors of their own
    HOPELESS: ClassVar[float] = -4.0  # spreads: what is won so far out is less than 1e-4 of one
    GATE_SPREADS: ClassVar[float] = 3.0  # a pair predicted that much slower than the best is best once in 700 times

    @classmethod
    def start(cls, features: NDArray[np.floating], problems: Sequence[Problem], prior_us: Array) -> Calibrated:
        """``features``: (configs, columns) of numbers in which near configs are near."""
        raw = np.asarray(features, dtype=np.float64)
        spread = raw.std(axis=0)
        scaled = (raw - raw.mean(axis=0))[:, spread > 0] / spread[spread > 0]
        levels = [(column[:, None] == np.unique(column)) * 1.0 for column in raw.T if 2 < len(np.unique(column)) < 32]
        config_image = np.hstack([np.ones((len(raw), 1)), scaled, *levels])
        sizes = np.log2([[max(p.m, 1), p.n, p.k] for p in problems]).reshape(-1, 3)
        sizes = (sizes - sizes.mean(axis=0)) / np.maximum(sizes.std(axis=0), 1.0)
        problem_image = np.hstack([np.ones((len(sizes), 1)), sizes, sizes[:, :1] ** 2])
        spread = np.full(len(problems), cls.FIRST_SPREAD)
        return cls(prior_us, config_image, problem_image, prior_us, prior_us.min(axis=0), spread)

    def gate(self, steady: float) -> Array:
        """(problems,): how many times the best a prediction may be before it counts as hopeless.

        Wider than ``steady`` before anything is learnt; later no wider than the error of the predictions warrants.
        """
        if not self.is_fitted:
            return np.full(len(self.spread), steady * self.UNFITTED_MARGIN)
        warranted: Array = np.minimum(steady, np.maximum(np.exp(self.GATE_SPREADS * self.spread), self.LEAST_GATE))
        return warranted

    def fit(self, measured_us: Array) -> None:
        """``measured_us``: (configs, problems), NaN where nothing was measured."""
        rows, cols = np.nonzero(np.isfinite(measured_us))
        if len(rows) < self.NEEDED:
            return
        target = np.log(measured_us[rows, cols] / self.prior_us[rows, cols])
        image = (self.config_image[rows][:, :, None] * self.problem_image[cols][:, None, :]).reshape(len(rows), -1)
        normal = image.T @ image + self.RIDGE * np.eye(image.shape[1])
        weights = np.linalg.solve(normal, image.T @ target).reshape(self.config_image.shape[1], -1)
        correction = self.config_image @ weights @ self.problem_image.T
        # A correction beyond what was ever seen is extrapolation.
        low, high = target.min(), target.max()
        self.us = self.prior_us * np.exp(np.clip(correction, low, high))
        self.best_us = self.us.min(axis=0)
        self.spread = self._spread(measured_us)
        self.is_fitted = True

    def _spread(self, measured_us: Array) -> Array:
        """(problems,): the error where it matters, near the best; a problem with few timings has that of all."""
        near = measured_us <= self.NEAR * np.fmin.reduce(measured_us, axis=0, initial=np.inf)
        squares = np.where(near, np.log(measured_us / self.us) ** 2, 0.0)
        count, total = near.sum(axis=0), squares.sum(axis=0)
        pooled = (total + self.POOL * total.sum() / max(count.sum(), 1)) / (count + self.POOL)
        # Seen through data it was fitted to, the error looks smaller than it is.
        spread: Array = np.maximum(1.3 * np.sqrt(pooled), 0.02)
        return spread

    def expected_gain(self, rows: NDArray[np.integer], best_us: Array, floor_us: Array) -> Array:
        """(rows,): by how much each config is expected to lower the sum over problems of log(best time).

        No gain leads below ``floor_us``: where the best is near the roofline there is little to win.
        """
        time = np.log(self.us[rows])
        gain = self._shortfall(np.log(best_us) - time) - self._shortfall(np.log(np.minimum(floor_us, best_us)) - time)
        total: Array = gain.sum(axis=1)
        return total

    def _shortfall(self, margin: Array) -> Array:
        """The mean of max(margin - error, 0) for a normal error of standard deviation ``spread``."""
        all_z = margin / self.spread
        mean: Array = np.zeros_like(all_z)
        hopeful = all_z > self.HOPELESS  # one pair in twenty, and the rest of this is what a proposal takes
        z = all_z[hopeful]
        density = np.exp(-0.5 * z * z) / np.sqrt(2 * np.pi)
        below = 0.5 * (1 + np.tanh(np.sqrt(2 / np.pi) * (z + 0.044715 * z**3)))  # the normal distribution function
        mean[hopeful] = np.maximum(z * below + density, 0)
        return mean * self.spread
