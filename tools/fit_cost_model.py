"""Fit the constants of the cost model: ``python tools/fit_cost_model.py tuned/*/recording.jsonl.gz``.

Coordinate descent on the logarithms of the constants, a Huber loss on log(predicted / measured). Each problem weighs
the same, and pairs near their problem's best more: they are what the search must tell apart; several recordings weigh
the same too. Prints each one's error before and after, by regime, where the winners rank in the whole space, and the
constants to put into ``Costs``.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from marlin_gen.cost_model import COSTS, Columns, Costs, Sizes, predict, predict_us
from marlin_gen.families import FAMILIES
from marlin_gen.formats import weight_format
from marlin_gen.record import Recording, load_recording
from marlin_gen.space import ConfigSpace

SWEEPS = 30
LARGEST_ERROR = 0.15  # beyond it the loss grows linearly
# Shares, and exponents beyond which the data does not say anything.
LIMITS = {
    "bandwidth_share": (0.85, 1.0),
    "wgmma_share": (0.8, 1.0),
    "overlap_loss": (0.01, 1.0),
    "compute_norm": (1.5, 8.0),
    "body_norm": (1.5, 8.0),
    "launch_us": (1.2, 2.6),
    "l2_bytes": (30.0, 128.0),
}
REGIMES = ((1, 8), (16, 16), (32, 64), (128, 256), (512, 1 << 30))


class Pairs:
    """The best recorded time of every (config, problem) pair, as arrays."""

    def __init__(self, recording: Recording) -> None:
        best: dict[tuple[object, object], float] = {}
        for row in recording.measurements:
            if row.ok and row.us:
                pair = row.plan.config, row.problem
                best[pair] = min(best.get(pair, row.us), row.us)
        self.configs, self.problems = [c for c, _ in best], [p for _, p in best]
        self.us = np.array(list(best.values()))
        self.sizes, self.gpu = Sizes(self.problems), recording.gpu
        self.columns = Columns(self.configs, weight_format(self.problems[0].weight_format), self.gpu.arch)
        names = sorted(set(self.problems))
        index = np.array([names.index(p) for p in self.problems])
        least = np.array([self.us[index == j].min() for j in range(len(names))])
        self.relative = self.us / least[index]
        self.weight = np.where(self.relative < 1.15, 3.0, np.where(self.relative < 1.5, 1.5, 0.7))
        for j in range(len(names)):
            self.weight[index == j] /= self.weight[index == j].sum()
        self.winners = {p: min((i for i in np.flatnonzero(index == j)), key=lambda i: self.us[i])
                        for j, p in enumerate(names)}  # fmt: skip

    def errors(self, costs: Costs) -> np.ndarray:
        return np.log(predict(self.columns, self.sizes, self.gpu, costs) / self.us)

    def loss(self, costs: Costs) -> float:
        error = np.abs(self.errors(costs))
        huber = np.where(error < LARGEST_ERROR, error**2, LARGEST_ERROR * (2 * error - LARGEST_ERROR))
        return float((self.weight * huber).sum() / self.weight.sum())


def fit(recordings: Sequence[Pairs], costs: Costs) -> Costs:
    """The costs at which no single constant can be changed for the better."""

    def total(tried: Costs) -> float:
        return sum(pairs.loss(tried) for pairs in recordings)

    least, steps = total(costs), dict.fromkeys(asdict(costs), 0.3)
    for _ in range(SWEEPS):
        for name in steps:
            low, high = LIMITS.get(name, (0.0, np.inf))
            for sign in (1, -1):
                value = getattr(costs, name) * np.exp(sign * steps[name])
                tried = replace(costs, **{name: float(value)})
                if low <= value <= high and (loss := total(tried)) < least:
                    costs, least, steps[name] = tried, loss, min(steps[name] * 1.3, 0.6)
                    break
            else:
                steps[name] *= 0.6
    return costs


def report(pairs: Pairs, costs: Costs) -> None:
    errors, near = pairs.errors(costs), pairs.relative < 1.3
    print(f"all {errors.std():.3f}; within 1.3 of the best {errors[near].std():.3f}, mean {errors[near].mean():+.3f}")
    for family in sorted(FAMILIES.rows):
        for low, high in REGIMES:
            there = np.array([c.family == family and low <= p.m <= high
                              for c, p in zip(pairs.configs, pairs.problems, strict=True)])  # fmt: skip
            if there.any():
                one = errors[there]
                regime = f"m {low:4}-{min(high, 4096):4}"
                print(f"  {family} {regime}: {there.sum():5} pairs, {one.std():.3f}, {one.mean():+.3f}")
    problems = list(pairs.winners)
    space = ConfigSpace(pairs.gpu.arch, weight_format(problems[0].weight_format), FAMILIES).enumerate()
    predicted = predict_us(space, problems, pairs.gpu, costs)
    own = predict(pairs.columns, pairs.sizes, pairs.gpu, costs)
    ranks = [int((predicted[:, j] < own[pairs.winners[p]]).sum()) for j, p in enumerate(problems)]
    behind = [own[pairs.winners[p]] / predicted[:, j].min() for j, p in enumerate(problems)]
    print(f"rank of the winners among {len(space)}: median {np.median(ranks):.0f}, largest {max(ranks)};"
          f" behind the favourite by at most {max(behind):.2f}")  # fmt: skip


def main() -> None:
    recordings = [Pairs(load_recording(Path(path))) for path in sys.argv[1:]]
    costs = fit(recordings, COSTS)
    for path, pairs in zip(sys.argv[1:], recordings, strict=True):
        print(f"{path}: {len(pairs.us)} pairs. Standard deviation of log(predicted / measured)\nbefore: ", end="")
        report(pairs, COSTS)
        print("after: ", end="")
        report(pairs, costs)
    for name, value in asdict(costs).items():
        print(f"    {name}: float = {value:.3g}")


if __name__ == "__main__":
    main()
