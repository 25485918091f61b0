"""The kernel families by name. Adding one: a module here, a template beside, and a row."""

from __future__ import annotations

from marlin_gen.arch import Gpu
from marlin_gen.config import Plan
from marlin_gen.families.base import Registry
from marlin_gen.families.mma import MMA
from marlin_gen.families.wgmma import WGMMA
from marlin_gen.problem import Problem

FAMILIES = Registry({"mma": MMA, "wgmma": WGMMA})


def default_plan(problem: Problem, gpu: Gpu) -> Plan:
    """What runs without a table: wgmma where the GPU has it and m > 16, mma elsewhere."""
    wgmma = WGMMA.default(problem, gpu)
    usable = gpu.arch.has_wgmma and WGMMA.reject_problem(wgmma.config, problem) is None
    return wgmma if usable and problem.m > 16 else MMA.default(problem, gpu)
