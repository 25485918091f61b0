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
    """What runs without a table: mma for few tokens and where the GPU has no wgmma, wgmma elsewhere.

    Few are 16; 32 where tiles of 64 features, each by a cluster of two, leave a third of the SMs idle and k is short
    (4096x4096 on an H100, where they do not: 7.0 us against 6.7); 64 where they leave 3 of 4 idle (1024x8192: 7.7
    against 8.4). From 9 to 16 tokens it is the one that is estimated to take less.
    """
    wgmma = WGMMA.default(problem, gpu)
    usable = gpu.arch.has_wgmma and WGMMA.reject_problem(wgmma.config, problem) is None
    tiles = problem.n // 64
    few = 64 if tiles * 8 <= gpu.num_sms else 32 if tiles * 3 <= gpu.num_sms and problem.k <= 4096 else 16
    if usable and problem.m > few:
        return wgmma
    mma = MMA.default(problem, gpu)
    if not usable or not 8 < problem.m <= 16:
        return mma
    ready = WGMMA.defaults(gpu.arch, weight_format(problem.weight_format))
    rivals = [c for c in ready if c.block_m == 16 and c.dequant == "deferred" and not WGMMA.reject_problem(c, problem)]
    return min([mma, *map(Plan, rivals)], key=lambda plan: _work_at_sixteen(plan.config, problem, gpu))


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
