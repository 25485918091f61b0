"""What orders the wgmma family's defaults where nothing was tuned: an estimate of what the busiest SM does.

Fitted to the recordings of an H100 and an H200 in all formats that they have, to ten shapes tuned apart and to 73
problems of 33 to 256 tokens on an H100: from the best of all defaults 0.3 % in the mean over m >= 32, 12 % at worst (8
bits: 0.7 %, and 25 % in one cell), and nearly the same with each constant 2 % off.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from marlin_gen.config import KernelConfig
from marlin_gen.formats import weight_format
from marlin_gen.problem import Problem


class Costs(NamedTuple):
    """Of weights of one number of bits. A tile costs its features by tokens by k, each of these adding to it."""

    decoding: float  # tokens
    scaling: tuple[float, float]  # deferred: times the tokens, and tokens
    one: float  # times as much for 64 features as for half of 128
    two: float  # the same with two rings
    three: tuple[float, float]  # for a third of 192: of up to 64 tokens, and of more
    pair: float  # times as long for each of two blocks on an SM
    ends: float  # k for what comes before and after the main loop
    cluster: float  # k for adding up what a cluster has
    stripes: float  # times what a block's stripe holds
    parts: float  # k for each part of a tile between stripes


COSTS = {
    4: Costs(43, (1.9, 50), 1.4, 1.2, (0.9, 0.97), 1.44, 370, 340, 1.25, 700),
    8: Costs(34, (2.3, 34), 1.39, 1.07, (0.89, 0.96), 2.3, 160, 960, 1.11, 1280),
}


def work(config: KernelConfig, problem: Problem, num_tiles: int, num_sms: int) -> float:
    """In multiply-adds, as far as that orders configs; ``num_tiles``: of the output."""
    c, costs = config, COSTS[weight_format(problem.weight_format).bits]
    tokens = c.block_m + costs.decoding
    if c.dequant == "deferred":
        tokens = costs.scaling[0] * c.block_m + costs.scaling[1]
    slower = {64: costs.two if c.a_stages else costs.one, 192: costs.three[c.block_m > 64]}.get(c.block_n, 1.0)
    tile = c.block_n * tokens * problem.k * slower * (costs.pair if c.blocks_per_sm > 1 else 1)
    sums = c.block_n * c.block_m
    waves = num_tiles / (num_sms * c.blocks_per_sm // c.cluster_size)
    if c.partition == "striped":
        return waves * tile * costs.stripes + costs.parts * sums * max(1, 1 / waves)
    if c.partition == "clusterk":
        return math.ceil(waves) * (tile / c.cluster_size + costs.cluster * sums)
    return math.ceil(waves) * (tile + costs.ends * sums)
