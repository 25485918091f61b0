"""What orders the wgmma family's defaults where nothing was tuned: an estimate of what the busiest SM does.

Fitted to the recordings of an H100 and an H200 in all formats, to ten shapes tuned apart and to 298 problems of 17 to
256 tokens, most of models' layers: of those the choice is 0.6 % from the best of 15 to 31 configs, 7 % at worst.
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
    narrow: float  # times as much for 64 features as for half of 128
    rings: float  # the same with two rings
    halves: tuple[float, float]  # the same with two warpgroups along k and stages of 128: and more for each 8192 of k
    thirds: float  # the same with three
    wide: tuple[float, float]  # for a third of 192: of up to 64 tokens, and of more
    pair: float  # times as long for each of two blocks on an SM
    ends: float  # k for what comes before and after the main loop
    cluster: tuple[float, float]  # k for adding up what a cluster has, and more for each of its tiles but the first
    stripes: float  # times what a block's stripe holds
    parts: float  # k for each part of a tile between stripes


COSTS = {
    4: Costs(43.5, (1.9, 100), 1.1, 1.09, (0.948, 0.155), 1.07, (0.98, 0.935), 1.67, 490, (585, 1350), 1.17, 795),
    8: Costs(79.5, (1.9, 100), 1.15, 1.03, (0.89, 0.15), 1.0, (0.816, 0.911), 1.36, 310, (1020, 1160), 1.15, 1000),
}


# What small tiles of large products read again and again takes. In 86 problems of 512 and 1024 tokens on both GPUs, 4
# and 8 bits, the choice among the defaults was 3.3 % from the best of 18 to 42 configs, worst 31 %, and is 1.9, 12 %.
AGAIN = 1.08
NARROW_STRIPES = 1.1  # of 64 features; without it they seemed 6 % (4 bits) to 30 % (fp8) too good, in 195 timings


def _slower(c: KernelConfig, costs: Costs, k: int) -> float:
    """Times as long as tiles of 128 features take for as many of them."""
    if c.block_n != 64:
        return costs.wide[c.block_m > 64] if c.block_n == 192 else 1.0
    if c.block_k == 128 and c.warps_k == 2 and not c.a_stages:
        return costs.halves[0] + costs.halves[1] * k / 8192
    return costs.rings if c.a_stages else costs.thirds if c.warps_k == 3 else costs.narrow


def work(config: KernelConfig, problem: Problem, num_tiles: int, num_sms: int) -> float:
    """In multiply-adds, as far as that orders configs; ``num_tiles``: of the output."""
    c, fmt = config, weight_format(problem.weight_format)
    costs = COSTS[fmt.bits]
    tokens = c.block_m + costs.decoding * (1.7 if fmt.offset == "floats" else 1)  # 11 to 19 instructions, not 8
    if c.dequant == "deferred":
        tokens = costs.scaling[0] * c.block_m + costs.scaling[1]
    tile = c.block_n * tokens * problem.k * _slower(c, costs, problem.k) * (costs.pair if c.blocks_per_sm > 1 else 1)
    tile *= AGAIN ** ((c.block_n == 64) + (c.block_m <= 64)) if problem.m > 256 else 1
    sums = c.block_n * c.block_m
    # Of four SMs a GPC has only whole clusters: 30 of 132 SMs, not 33.
    slots = num_sms // 4 * 10 // 11 if c.cluster_size == 4 else num_sms * c.blocks_per_sm // c.cluster_size
    waves = num_tiles / max(1, slots)
    if c.partition == "striped":
        narrow = NARROW_STRIPES if c.block_n == 64 else 1
        return narrow * (waves * tile * costs.stripes + costs.parts * sums * max(1, 1 / waves))
    if c.partition == "clusterk":
        return math.ceil(waves) * (tile / c.cluster_size + sum(costs.cluster) * sums) - costs.cluster[1] * sums
    return math.ceil(waves) * (tile + costs.ends * sums)
