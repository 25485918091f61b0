"""The mma family: few tokens, on sm_80 and newer. See templates/mma.cu.jinja for how the kernel works."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from marlin_gen.arch import Arch, Gpu
from marlin_gen.config import KernelConfig, KernelSpec, Plan
from marlin_gen.families.base import LaunchShape, fitted, reject_format
from marlin_gen.families.row_share import ROW_BLOCK, RowShare
from marlin_gen.formats import FORMATS, WeightFormat
from marlin_gen.problem import Problem

SLICE_K = 64  # k of a packed tile
TOKEN_TILES = (8, 16, 24, 32, 48, 64)
MAX_WARPS = 16
MAX_BLOCKS = 32  # that any SM holds
MAX_SCALE_BYTES = 512  # of a warp's rows in a pass and group: every lane copies at most 16
STAGES = (2, 10)
EXACT = 1.5  # times as long to multiply where each weight is scaled: the choice for groups of 32 is good from 1.4 on
SUMS_BYTES = 48 << 10  # the buffer in which warps add up their sums is halved until it is no larger


def _ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def _row_blocks(config: KernelConfig) -> int:
    """16-row blocks of one warp in one pass."""
    return config.block_n // (ROW_BLOCK * config.warps_n)


def _config(m: int, n: int, warps: int, stages: int, dequant: str, k: int = 64, blocks: int = 1) -> KernelConfig:
    return KernelConfig("mma", m, n, k, 1, warps, stages, blocks, 1, "tiles", dequant)


# Configs that need no table: on sm_90 those of which the best is near the best of 86 (up to 8 tokens) or 411, over 25
# and 18 shapes on two GPUs (tests/cpu/test_defaults.py); elsewhere fitted to the smaller shared memory by the same
# reasoning: one to five row blocks so that some multiple of one fits every n, many warps for few rows, deep rings.
_DEFAULTS = {
    "sm_90a": (
        _config(8, 32, 8, 4, "deferred", k=128), _config(8, 48, 8, 3, "deferred", k=128),
        _config(8, 16, 8, 3, "deferred", k=256), _config(8, 32, 4, 3, "deferred", k=128, blocks=2),
        _config(8, 16, 4, 5, "deferred", k=128, blocks=2), _config(8, 112, 4, 2, "deferred", blocks=4),
        _config(16, 16, 8, 3, "deferred", k=128), _config(16, 32, 8, 3, "deferred", k=128),
        _config(16, 48, 8, 3, "deferred", k=128), _config(16, 80, 8, 2, "deferred", k=128),
        _config(32, 32, 8, 2, "exact", k=128), _config(64, 64, 8, 2, "exact"),
    ),
    "sm_80": (
        _config(8, 32, 16, 4, "deferred"), _config(8, 48, 8, 4, "deferred"), _config(8, 64, 8, 4, "deferred"),
        _config(16, 32, 8, 4, "deferred"), _config(16, 64, 8, 3, "deferred"),
        _config(32, 64, 4, 4, "exact"), _config(64, 64, 4, 3, "exact"),
    ),
    "sm_86": (
        _config(8, 32, 8, 4, "deferred"), _config(8, 64, 4, 4, "deferred"),
        _config(16, 32, 8, 3, "deferred"), _config(16, 64, 4, 4, "deferred"),
        _config(32, 64, 4, 2, "exact"), _config(64, 64, 2, 3, "exact"),
    ),
}  # fmt: skip
_DEFAULTS["sm_89"] = _DEFAULTS["sm_86"]
_DEFAULTS["compute_80"] = _DEFAULTS["sm_86"]  # they fit into the least shared memory of any GPU


class MmaFamily:
    """``mma.sync`` with a cp.async ring per warp; a cluster owns whole rows and all of k."""

    name = "mma"
    summary = "mma.sync, a ring per warp, k split between warps: few tokens, sm_80 and newer"

    def axes(self, arch: Arch) -> dict[str, tuple[Any, ...]]:
        """Candidate values per KernelConfig field."""
        return {
            "block_m": TOKEN_TILES,
            "block_n": (16, 32, 48, 64, 80, 96, 112, 128, 160, 192, 224, 256),
            "block_k": (64, 128, 256),
            "warps_n": (1, 2, 4),
            "warps_k": (1, 2, 4, 8, 16),
            "num_stages": (2, 3, 4, 5, 6, 8, 10),
            "blocks_per_sm": (1, 2, 3, 4),
            "cluster_size": (1, 2, 4) if arch.has_tma else (1,),
            "partition": ("tiles", "clusterk") if arch.has_tma else ("tiles",),
            "dequant": ("exact", "deferred"),
            "a_stages": (0,),
        }

    def reject_reason(self, config: KernelConfig, fmt: WeightFormat, arch: Arch) -> str | None:
        """None, or why this binary cannot be built or run. Cheap checks first: a search asks for every candidate."""
        c = config
        if c.partition == "striped":
            return "partition='striped' is not made by the mma family, whose clusters own whole rows; use 'tiles'"
        if (c.partition == "clusterk") != (c.cluster_size > 1):
            needed = "1 block" if c.partition == "tiles" else "2 or more blocks"
            return f"partition={c.partition!r} needs {needed} to a cluster, not cluster_size={c.cluster_size}"
        if c.cluster_size not in (1, 2, 4):
            return f"cluster_size={c.cluster_size} is not 1, 2 or 4"
        if c.cluster_size > 1 and not arch.has_tma:
            return f"cluster_size={c.cluster_size} needs thread block clusters; {arch.name} has none, sm_90 has"
        if (warps := c.warps_n * c.warps_k) > MAX_WARPS:
            return f"warps_n={c.warps_n} x warps_k={c.warps_k} is {warps} warps; a block has at most {MAX_WARPS}"
        if (threads := 32 * warps * c.blocks_per_sm) > arch.max_threads_per_sm:
            return (
                f"blocks_per_sm={c.blocks_per_sm} of {warps} warps is {threads} threads;"
                f" an SM of {arch.name} runs at most {arch.max_threads_per_sm}"
            )
        if c.block_n % (ROW_BLOCK * c.warps_n):
            return f"block_n={c.block_n} is not a multiple of {ROW_BLOCK} rows x warps_n={c.warps_n}"
        rows = c.block_n // c.warps_n
        if c.block_m not in TOKEN_TILES:
            return f"block_m={c.block_m} is not one of {TOKEN_TILES}"
        if not STAGES[0] <= c.num_stages <= STAGES[1]:
            return f"num_stages={c.num_stages} is not between {STAGES[0]} and {STAGES[1]}"
        if c.a_stages:
            return f"a_stages={c.a_stages}: the mma family has one ring for weights and activations; use 0"
        if reason := reject_format(fmt, c.dequant):
            return reason
        if rows * fmt.scale_bytes > MAX_SCALE_BYTES:
            most = MAX_SCALE_BYTES // fmt.scale_bytes
            return f"block_n={c.block_n} over warps_n={c.warps_n} is {rows} rows a warp; at most {most} for {fmt.name}"
        if c.block_k % SLICE_K or (c.block_k % fmt.group_size and fmt.group_size % c.block_k):
            return (
                f"block_k={c.block_k} is not a multiple of {SLICE_K} that divides group_size={fmt.group_size},"
                " or that it divides"
            )
        return self._resource_reason(c, fmt, arch)

    def _resource_reason(self, c: KernelConfig, fmt: WeightFormat, arch: Arch) -> str | None:
        """The part of ``reject_reason`` that says what does not fit on an SM."""
        if (needed := self._registers(c)) > (limit := self.max_registers(c, arch)):
            return (
                f"block_m={c.block_m} x block_n={c.block_n} over {c.warps_n} x {c.warps_k} warps needs about {needed}"
                f" registers per thread; blocks_per_sm={c.blocks_per_sm} leaves {limit}"
            )
        smem = self.smem_bytes(c, fmt)
        if smem > arch.smem_per_block:
            return f"needs {smem} bytes of shared memory; a block of {arch.name} has at most {arch.smem_per_block}"
        if (total := c.blocks_per_sm * (smem + arch.smem_reserved)) > arch.smem_per_sm:
            return (
                f"blocks_per_sm={c.blocks_per_sm} needs {total} bytes of shared memory;"
                f" an SM of {arch.name} has {arch.smem_per_sm}"
            )
        return None

    def reject_problem(self, config: KernelConfig, problem: Problem) -> str | None:
        """Any m and n of the layout is served; an empty product has nothing to launch, and offsets in k are 32 bits."""
        if problem.k >= 1 << 24:
            return f"k={problem.k} is too large"
        return None if problem.m > 0 else "m=0 has no tokens, so there is nothing to launch"

    def default(self, problem: Problem, gpu: Gpu, arch: Arch | None = None) -> Plan:
        """The config that is estimated to take the least; ``arch``: whose configs, where not the GPU's own."""
        target, fmt = arch or gpu.arch, FORMATS[problem.weight_format]
        loading = 1.08 * problem.weight_bytes / (gpu.bandwidth_gbs * 0.221)  # in k of a row block: 221 ps of an SM

        def work(config: KernelConfig) -> float:
            share, cost = self.share(config, problem, gpu), self.cost(config)
            if problem.m > 8 or fmt.bits != 4 or target.name != "sm_90a":  # by what the busiest SM does
                return (share.computed + share.passes) * cost
            # The longer of both all but hides the other; then the last pass is added up. Of 25 shapes on two GPUs.
            decoding = EXACT if config.dequant == "exact" else 1
            multiplying = (decoding * share.computed * problem.k + 2000 * share.passes) * cost
            return math.pow(multiplying**8 + loading**8, 1 / 8) + 60 * config.block_n

        return Plan(min(self.defaults(target, fmt), key=work))

    def share(self, config: KernelConfig, problem: Problem, gpu: Gpu) -> RowShare:
        """How a launch will share out the rows, if the estimate of the blocks that an SM holds is right."""
        resident = self.resident_blocks(config, FORMATS[problem.weight_format], gpu.arch)
        return RowShare.best(config, problem, gpu.num_sms, resident * gpu.num_sms // config.cluster_size)

    @staticmethod
    def cost(config: KernelConfig) -> float:
        """Of a row block, beside one by 16 tokens: the weights cost as much as 24 tokens."""
        return (24 + config.block_m) / (24 + 16)

    def defaults(self, arch: Arch, fmt: WeightFormat) -> tuple[KernelConfig, ...]:
        """Every config that ``default`` may return."""
        configs = _DEFAULTS[arch.name]
        if reject_format(fmt, "deferred"):
            configs = tuple(replace(c, dequant="exact") for c in configs)
        return fitted(self, configs, fmt, arch)

    def rasters(self, config: KernelConfig, problem: Problem) -> tuple[int, ...]:
        """The order is fixed: clusters that share rows are neighbours."""
        return (1,)

    def threads(self, config: KernelConfig) -> int:
        return 32 * config.warps_n * config.warps_k

    def smem_bytes(self, config: KernelConfig, fmt: WeightFormat) -> int:
        """The rings of all warps and the buffer in which they add up their sums; each part a multiple of 128."""
        c = config
        slices = c.block_k // SLICE_K
        rows = _row_blocks(c)
        scales = -(-_ceil_div(c.block_k, fmt.group_size) * rows * 16 * fmt.scale_bytes // 128) * 128
        stage = slices * (rows * 128 * fmt.bits + c.block_m * 128) + scales
        row_bytes = c.warps_k * (c.block_n + 4) * 4  # fp32 sums of one token, padded against bank conflicts
        tokens = c.block_m
        while tokens % 16 == 0 and row_bytes * tokens > SUMS_BYTES:
            tokens //= 2
        return c.warps_n * c.warps_k * c.num_stages * stage + _ceil_div(row_bytes * tokens, 128) * 128

    def resident_blocks(self, config: KernelConfig, fmt: WeightFormat, arch: Arch) -> int:
        """As many as shared memory, threads and registers allow, the registers by an estimate."""
        threads = self.threads(config)
        registers = _ceil_div(min(self._registers(config), self.max_registers(config, arch)), 8) * 8
        return max(1, min(
            arch.smem_per_sm // (self.smem_bytes(config, fmt) + arch.smem_reserved),
            arch.max_threads_per_sm // threads, arch.registers_per_sm // (registers * threads), MAX_BLOCKS,
        ))  # fmt: skip

    def max_registers(self, config: KernelConfig, arch: Arch) -> int:
        """Registers are given out in units of 8 per thread."""
        per_thread = arch.registers_per_sm // (self.threads(config) * config.blocks_per_sm)
        return min(per_thread // 8 * 8, arch.max_registers_per_thread)

    def template_values(self, spec: KernelSpec) -> dict[str, Any]:
        return {}

    def launch_shape(self, plan: Plan, problem: Problem, num_sms: int, max_clusters: int) -> LaunchShape:
        """One cluster per range of row blocks and token tile, as ``RowShare`` cuts them."""
        config = plan.config
        rows = RowShare.best(config, problem, num_sms, max_clusters).rows
        ranges = _ceil_div(problem.n // ROW_BLOCK, rows)
        return LaunchShape(
            grid=ranges * _ceil_div(problem.m, config.block_m) * config.cluster_size,
            threads=self.threads(config),
            smem_bytes=self.smem_bytes(config, FORMATS[problem.weight_format]),
            cluster=config.cluster_size,
            operands=("a", "c", "weight", "scales", "bias"),
            scalars=(problem.m, problem.n, problem.k, rows),
        )

    @staticmethod
    def _registers(config: KernelConfig) -> int:
        """An estimate that rejects what spills: accumulators, a slice of activations, row addresses, the rest."""
        tokens = config.block_m
        row_blocks = _row_blocks(config)
        estimate = row_blocks * tokens // 2 + tokens + 3 * row_blocks + 46
        if config.dequant == "deferred":  # also the sums of one row block, and scales; as it compiles without spills
            estimate += tokens + row_blocks + 7
        return estimate


MMA = MmaFamily()
