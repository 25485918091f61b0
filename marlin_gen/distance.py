"""How far one shape is from another, for a plan that was the winner of one of them: step 3 of dispatch.py's rule."""

from __future__ import annotations

import math

from marlin_gen.config import Plan
from marlin_gen.problem import Problem
from marlin_gen.table_row import TableRow


def distance(problem: Problem, row: TableRow, num_sms: int) -> float:
    """How far a row's shape is from the problem's, in octaves, for this row's plan: see the rule."""
    there = row.problem
    lost = wave_fill(row.plan, there, num_sms) / wave_fill(row.plan, problem, num_sms)
    return abs(math.log2(problem.n / there.n)) + abs(math.log2(problem.k / there.k)) + max(0.0, math.log2(lost))


def wave_fill(plan: Plan, problem: Problem, num_sms: int) -> float:
    """Busy over all block slots of the waves a problem takes, in (0, 1]; 1 for striped, which has no tail."""
    config = plan.config
    if config.partition == "striped":
        return 1.0
    tiles = -(-problem.n // config.block_n) * -(-max(problem.m, 1) // config.block_m)
    blocks = tiles * (config.cluster_size if config.partition == "clusterk" else 1)
    slots = num_sms * config.blocks_per_sm
    return blocks / (-(-blocks // slots) * slots)
