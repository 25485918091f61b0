"""The kernel families by name. Adding one: a module here, a template beside, and a row."""

from __future__ import annotations

from marlin_gen.arch import ARCHS, PTX_ARCH, Gpu
from marlin_gen.config import Plan
from marlin_gen.families.base import Registry
from marlin_gen.families.mma import MMA
from marlin_gen.families.wgmma import WGMMA
from marlin_gen.problem import Problem

FAMILIES = Registry({"mma": MMA, "wgmma": WGMMA})


def default_plan(problem: Problem, gpu: Gpu) -> Plan:
    """What runs without a table: mma for few tokens and where the GPU has no wgmma, wgmma elsewhere.

    Few are 16; and 32 where tiles of 64 features leave half of the SMs idle and k is too short to split over a cluster
    (n = k = 4096 on an H100: 6.6 us against 8.0).
    """
    wgmma = WGMMA.default(problem, gpu)
    usable = gpu.arch.has_wgmma and WGMMA.reject_problem(wgmma.config, problem) is None
    is_small = problem.n // 64 * 2 <= gpu.num_sms and problem.k <= 4096
    return wgmma if usable and problem.m > (32 if is_small else 16) else MMA.default(problem, gpu)


def ptx_plan(problem: Problem, gpu: Gpu) -> Plan:
    """What runs where no binary of the GPU's own is to be had: a kernel for ``PTX_ARCH``, which only mma makes."""
    return MMA.default(problem, gpu, ARCHS[PTX_ARCH])
