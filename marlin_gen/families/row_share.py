"""How the mma family shares out the rows of B: how many 16-row blocks one cluster gets."""

from __future__ import annotations

from dataclasses import dataclass

from marlin_gen.config import KernelConfig
from marlin_gen.problem import Problem

ROW_BLOCK = 16  # rows of one mma, the unit in which output features are shared out
# A warp waits for a stage about as long as an SM computes so many k of a row block: 330 clocks beside 0.21. Of 1190
# configs at twelve problems one near the best is slower by it than with as many blocks as fit (tools/FACTS.md).
WAITING_K = 1560


@dataclass(frozen=True, order=True)
class RowShare:
    """One way to share them out, and what it asks of the busiest SM. The least is the best."""

    time: float  # what its blocks compute and wait for, in the time that it computes a row block
    read: int  # row blocks that it reads
    rows: int  # row blocks of one cluster
    computed: float  # row blocks that it computes; adding up a pass costs half of one
    passes: int  # of one block

    @classmethod
    def best(cls, config: KernelConfig, problem: Problem, num_sms: int, max_clusters: int) -> RowShare:
        """Of those that fill 1, 2, ... blocks of every SM, with all clusters resident at once when they can be.

        More blocks wait for memory at the same time; but a range that ends inside a pass computes the whole pass, and
        a block more on some SMs is waited for by all.
        """
        resident = max_clusters * config.cluster_size // num_sms  # blocks of an SM
        full = {blocks * num_sms // config.cluster_size for blocks in range(1, resident + 1)}
        counts = full - {0} | {max_clusters}
        return min(cls._of(clusters, config, problem, num_sms, max_clusters) for clusters in counts)

    @classmethod
    def _of(cls, clusters: int, c: KernelConfig, problem: Problem, num_sms: int, max_clusters: int) -> RowShare:
        row_blocks, token_tiles = problem.n // ROW_BLOCK, -(-max(problem.m, 1) // c.block_m)
        rows = -(-row_blocks // max(clusters // token_tiles, 1))
        grid = -(-row_blocks // rows) * token_tiles
        waves = -(-grid // max_clusters)
        blocks = waves * -(-min(grid, max_clusters) * c.cluster_size // num_sms)
        pass_rows = c.block_n // ROW_BLOCK
        passes = -(-rows // pass_rows)
        computed = blocks * passes * (pass_rows + 0.5)
        waiting = waves * passes * WAITING_K / (c.block_k * c.warps_k)
        return cls(computed + waiting, blocks * rows, rows, computed, waves * passes)
