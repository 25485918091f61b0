"""The kernel families by name. Adding one: a module here, a template beside, and a row."""

from __future__ import annotations

from collections.abc import Iterable

from marlin_gen.arch import ARCHS, PTX_ARCH, Arch, Gpu
from marlin_gen.config import KernelSpec, Plan
from marlin_gen.families.base import Registry
from marlin_gen.families.mma import MMA
from marlin_gen.families.wgmma import WGMMA
from marlin_gen.formats import weight_format
from marlin_gen.problem import Problem

FAMILIES = Registry({"mma": MMA, "wgmma": WGMMA})


def default_plan(problem: Problem, gpu: Gpu) -> Plan:
    """What runs without a table: mma for few tokens and where the GPU has no wgmma, wgmma elsewhere.

    Few are 16; 32 where tiles of 64 features, each by a cluster of two, leave a third of the SMs idle and k is short
    (4096x4096 on an H100, where they do not: 7.0 us against 6.7); 64 where they leave 3 of 4 idle (1024x8192: 7.7
    against 8.4).
    """
    wgmma = WGMMA.default(problem, gpu)
    usable = gpu.arch.has_wgmma and WGMMA.reject_problem(wgmma.config, problem) is None
    tiles = problem.n // 64
    few = 64 if tiles * 8 <= gpu.num_sms else 32 if tiles * 3 <= gpu.num_sms and problem.k <= 4096 else 16
    return wgmma if usable and problem.m > few else MMA.default(problem, gpu)


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
