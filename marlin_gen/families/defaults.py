"""What runs without a table: which family, and every kernel that may come of it."""

from __future__ import annotations

import math
from collections.abc import Iterable

from marlin_gen.arch import ARCHS, PTX_ARCH, Arch, Gpu
from marlin_gen.config import KernelConfig, KernelSpec, Plan
from marlin_gen.families import FAMILIES
from marlin_gen.families.mma import MMA
from marlin_gen.families.wgmma import WGMMA
from marlin_gen.formats import weight_format
from marlin_gen.problem import Problem


def default_plan(problem: Problem, gpu: Gpu) -> Plan:
    """What runs untuned: mma up to 8 tokens or without wgmma, wgmma from 65 on, else what seems to take less."""
    if problem.m <= 8 or not gpu.arch.has_wgmma:
        return MMA.default(problem, gpu)
    if problem.m <= 16:
        ready = [c for c in WGMMA.defaults(gpu.arch, weight_format(problem.weight_format)) if c.block_m == 16]
        rivals = (c for c in ready if c.dequant == "deferred" and not WGMMA.reject_problem(c, problem))
        return Plan(min((MMA.default(problem, gpu).config, *rivals), key=lambda c: _work_at_sixteen(c, problem, gpu)))
    wgmma = WGMMA.default(problem, gpu)
    usable = WGMMA.reject_problem(wgmma.config, problem) is None
    if usable and problem.m > 64:
        return wgmma
    mma = MMA.default(problem, gpu)
    return wgmma if usable and not _mma_is_sooner(mma.config, wgmma.config, problem, gpu) else mma


# In multiply-adds of wgmma: mma's k of a row block, each of its sums, and its head start by bits of a weight. In the
# 85 cells of 17 to 64 tokens where both were timed the one chosen is 0.2 % from the better, 4 % at worst.
_MMA_K, _MMA_SUM, _MMA_HEAD = 855, 5000, {4: 4e6, 8: 1e6}


def _mma_is_sooner(mma: KernelConfig, wgmma: KernelConfig, problem: Problem, gpu: Gpu) -> bool:
    share, fmt = MMA.share(mma, problem, gpu), weight_format(problem.weight_format)
    by_mma = _MMA_K * (share.computed + share.passes) * MMA.cost(mma) * problem.k
    by_mma *= 1.4 if fmt.offset == "floats" else 1  # see wgmma_work.py
    by_mma += _MMA_SUM * share.passes * mma.block_m * mma.block_n
    return by_mma < WGMMA.work(wgmma, problem, gpu) + _MMA_HEAD[fmt.bits]


SAVES = 0.96  # of what another plan is estimated to take, from 33 tokens on; less gains nothing for sure


def estimate(plan: Plan, problem: Problem, gpu: Gpu) -> float:
    """In work of the busiest SM: of plans for 16 tokens from 9 on, above 16 of the wgmma family's. NaN of others, so
    neither more nor less than anything."""
    config = plan.config
    if problem.m <= 16:
        return _work_at_sixteen(config, problem, gpu) if problem.m > 8 and config.block_m == 16 else math.nan
    return WGMMA.work(config, problem, gpu) if config.family == WGMMA.name else math.nan


def fits_better(plan: Plan, other: Plan, problem: Problem, gpu: Gpu) -> bool:
    """Whether ``plan`` is estimated to take less than ``other``, most of whose last tile may be empty.

    78 problems of 48 to 896 tokens on an H100, served by rows of the next power of two, took 1.205 times the best in
    the mean; with defaults that fit better 1.139, at worst 5 % more than without.
    """
    return estimate(plan, problem, gpu) < (SAVES if problem.m > 16 else 1) * estimate(other, problem, gpu)


# By partition: what a row block costs beside one of the mma family, how much of the memory's bandwidth is lost, and
# what it costs to add up a split tile, in k of a row block for each block that has a part.
_WGMMA_COSTS = {"tiles": (1.04, 1.0, 0), "clusterk": (1.04, 1.15, 1500), "striped": (1.05, 1.1, 4500)}


def _work_at_sixteen(config: KernelConfig, problem: Problem, gpu: Gpu) -> float:
    """What the busiest SM does at 9 to 16 tokens, in row blocks: 16 features by k in the mma family's time.

    The longer of multiplying and of waiting for memory. Fitted to 18 shapes on an H100 and an H200, timed with 14
    configs each: an SM multiplies 30 bytes of 4-bit weights a ns.
    """
    share, bits = problem.n / 16 / gpu.num_sms, weight_format(problem.weight_format).bits
    from_memory = share * bits / 4 * 30 * gpu.num_sms / (0.93 * gpu.bandwidth_gbs)
    if config.family == MMA.name:
        return max(MMA.share(config, problem, gpu).computed * MMA.cost(config), from_memory)
    multiplying, waiting, adding = _WGMMA_COSTS[config.partition]
    multiplying *= (0.95 if config.block_n > 64 else 1) * (1.1 if config.dequant == "exact" else 1)
    tiles, slots = problem.n / config.block_n, gpu.num_sms * config.blocks_per_sm
    if config.partition == "striped":
        row_blocks, parts = share, slots / tiles
    else:
        parts = config.cluster_size
        row_blocks = config.block_n / 16 / parts * math.ceil(tiles * parts / slots) * config.blocks_per_sm
    return max(multiplying * row_blocks, waiting * from_memory) + adding * parts / problem.k


def default_specs(arch: Arch, kinds: Iterable[tuple[str, str]]) -> list[KernelSpec]:
    """Every kernel that a default may be, for these pairs of a weight format and an activation type."""
    return [
        KernelSpec(config, fmt, dtype, arch.name)
        for fmt, dtype in kinds
        for family in FAMILIES.rows.values()
        for config in family.defaults(arch, weight_format(fmt))
    ]


def ptx_plan(problem: Problem, gpu: Gpu) -> Plan:
    """What runs where no binary of the GPU's own is to be had: a kernel for ``PTX_ARCH``, which only mma makes."""
    return MMA.default(problem, gpu, ARCHS[PTX_ARCH])
