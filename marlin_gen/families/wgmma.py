"""The wgmma family: TMA-fed warpgroups with the decoded weights as register operand (sm_90a). Best from m = 16 up."""

from __future__ import annotations

from typing import Any

from marlin_gen.arch import Arch, Gpu
from marlin_gen.config import KernelConfig, KernelSpec, Plan
from marlin_gen.families.base import LaunchShape, fitted, reciprocal, reject_format
from marlin_gen.families.wgmma_work import work
from marlin_gen.formats import WeightFormat, weight_format
from marlin_gen.problem import Problem

WARPGROUP = 128  # threads
MAX_CONSUMERS = 4  # warpgroups; more leave each too few registers
TOKEN_TILES = (8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256)  # written out in ptx/wgmma.cuh
SLAB_K = 64  # k of one 128-byte swizzled row of activations, and of one packed weight tile
ADDRESS_REGISTERS = 38  # beside sums and fragments: addresses, loop counters, barriers (seen in ptxas reports)
DEFERRED_ADDRESS_REGISTERS = 20  # as it compiles without spills
OPERANDS = ("a_map", "a_tail_map", "c_map", "weight", "scales", "bias", "partials", "locks")


# Good without a table: winners of the recordings that between them cover them.
_DEFAULTS = tuple(
    KernelConfig("wgmma", m, n, k, n // 16, warps_k, stages, blocks, cluster, partition, dequant, *a_stages)
    for dequant, m, n, k, warps_k, stages, blocks, cluster, partition, *a_stages in (
        ("exact", 32, 64, 128, 3, 12, 1, 1, "tiles"),
        ("exact", 32, 64, 128, 3, 12, 1, 2, "clusterk"),
        ("exact", 32, 64, 128, 3, 12, 1, 4, "clusterk"),
        ("exact", 32, 64, 256, 1, 4, 2, 1, "tiles"),
        ("exact", 32, 128, 256, 1, 5, 1, 1, "striped"),
        ("exact", 32, 192, 128, 1, 7, 1, 2, "clusterk"),
        ("exact", 64, 64, 128, 2, 10, 1, 1, "tiles"),
        ("exact", 64, 64, 256, 1, 5, 1, 2, "clusterk"),
        ("exact", 64, 64, 256, 1, 5, 1, 4, "clusterk"),
        ("exact", 64, 64, 256, 2, 8, 1, 1, "tiles", 4),
        ("exact", 64, 128, 256, 1, 4, 1, 1, "tiles"),
        ("exact", 64, 128, 256, 1, 4, 1, 1, "striped"),
        ("exact", 64, 192, 128, 1, 6, 1, 1, "striped"),
        ("exact", 64, 192, 128, 1, 6, 1, 2, "clusterk"),
        ("exact", 64, 192, 128, 1, 6, 1, 4, "clusterk"),
        ("exact", 128, 64, 128, 2, 6, 1, 2, "clusterk", 4),
        ("exact", 128, 64, 128, 2, 8, 1, 1, "tiles", 4),
        ("exact", 128, 128, 128, 1, 4, 1, 1, "tiles"),
        ("exact", 128, 128, 128, 1, 4, 1, 1, "striped"),
        ("exact", 128, 128, 128, 1, 4, 1, 2, "clusterk"),
        ("exact", 128, 192, 64, 1, 6, 1, 1, "tiles"),
        ("exact", 128, 192, 64, 1, 5, 1, 2, "clusterk"),
        ("exact", 256, 128, 64, 1, 6, 1, 1, "tiles", 3),
        ("deferred", 16, 64, 128, 4, 16, 1, 1, "tiles"),
        ("deferred", 16, 64, 128, 4, 16, 1, 2, "clusterk"),
        ("deferred", 16, 64, 256, 1, 6, 2, 1, "striped"),
    )
)
_ANY_K = KernelConfig("wgmma", 64, 64, 64, 4, 1, 12, 1, 1, "tiles", "exact")  # serves every k of the layout


class WgmmaFamily:
    name = "wgmma"
    summary = "TMA-fed warpgroups, weights decoded into the register operand of wgmma (Hopper)"

    def axes(self, arch: Arch) -> dict[str, tuple[Any, ...]]:
        return {
            "block_m": TOKEN_TILES,
            "block_n": (64, 128, 192, 256),
            "block_k": (64, 128, 256),
            "warps_n": (4, 8, 12, 16),
            "warps_k": (1, 2, 3, 4),
            "num_stages": (2, 3, 4, 5, 6, 7, 8, 10, 12, 16),
            "blocks_per_sm": (1, 2, 3),
            "cluster_size": (1, 2, 4),
            "partition": ("tiles", "clusterk", "striped"),
            "dequant": ("exact", "deferred"),
            "a_stages": (0, 2, 3, 4, 6, 8),
        }

    def reject_reason(self, config: KernelConfig, fmt: WeightFormat, arch: Arch) -> str | None:
        c = config
        if not arch.has_wgmma:
            return f"wgmma needs sm_90a, not {arch.name}"
        if c.warps_n % 4 or c.block_n != 16 * c.warps_n:
            return f"block_n={c.block_n} is not 64 rows for each warpgroup of warps_n={c.warps_n} warps"
        if c.warps_n // 4 * c.warps_k > MAX_CONSUMERS:
            return f"warps_n={c.warps_n} by warps_k={c.warps_k} are more than {MAX_CONSUMERS} consumer warpgroups"
        if c.block_m not in TOKEN_TILES:
            return f"block_m={c.block_m} is not one of the token tiles {TOKEN_TILES}"
        if c.block_k not in (64, 128, 256):
            return f"block_k={c.block_k} is not 64, 128 or 256"
        if reason := reject_format(fmt, c.dequant):
            return reason
        if (c.cluster_size > 1) != (c.partition == "clusterk"):
            return f"cluster_size={c.cluster_size} does not go with partition={c.partition}: clusters exist to split k"
        if c.block_m % (8 * c.cluster_size):
            return f"block_m={c.block_m} is not 8 tokens for each of the cluster's {c.cluster_size} blocks"
        for name, stages in (("num_stages", c.num_stages), ("a_stages", c.a_stages or c.num_stages)):
            if stages < 2 * c.warps_k:
                return f"{name}={stages} is less than two for each of warps_k={c.warps_k} warpgroups along k"
            if stages % c.warps_k:
                # A stage that goes round has phases that one of them never sees: its parity wait may pass too early.
                return f"{name}={stages} is not a multiple of warps_k={c.warps_k}: each stage has one warpgroup"
        if c.num_stages <= c.a_stages:
            return f"num_stages={c.num_stages} is not more than a_stages={c.a_stages}: no reason for two rings"
        if (self.smem_bytes(c, fmt) + arch.smem_reserved) * c.blocks_per_sm > arch.smem_per_sm:
            return (
                f"{c.blocks_per_sm} blocks of {self.smem_bytes(c, fmt)} bytes of shared memory do not fit the"
                f" {arch.smem_per_sm} bytes of an SM"
            )
        if self.threads(c) * c.blocks_per_sm > arch.max_threads_per_sm:
            return (
                f"{c.blocks_per_sm} blocks of {self.threads(c)} threads are more than {arch.max_threads_per_sm} per SM"
            )
        needed = c.block_m // 2 + c.block_k // 2
        if c.dequant == "deferred":  # the sums of each group of a stage, and two stages' scales
            groups = -(-c.block_k // fmt.group_size)
            needed += groups * (c.block_m // 2 + 4) + DEFERRED_ADDRESS_REGISTERS
        else:
            needed += ADDRESS_REGISTERS
        if needed > self.consumer_registers(c, arch):
            return f"about {needed} registers are needed, a consumer has {self.consumer_registers(c, arch)}"
        return None

    def reject_problem(self, config: KernelConfig, problem: Problem) -> str | None:
        if problem.k % config.block_k:
            return f"k={problem.k} is not a multiple of block_k={config.block_k}"
        if problem.k // config.block_k < config.cluster_size:
            return f"k={problem.k} has fewer blocks of block_k={config.block_k} than cluster_size={config.cluster_size}"
        if self.num_tiles(config, problem) * (problem.k // config.block_k) >= 2**30:  # int32 in the kernel
            return f"m={problem.m} is too large"
        if problem.n * problem.k * weight_format(problem.weight_format).bits >= 1 << 39:  # offsets in 16 bytes, uint32
            return f"n={problem.n} by k={problem.k} are 64 GiB of weights or more"
        return None

    def default(self, problem: Problem, gpu: Gpu) -> Plan:
        """Of the default configs that can serve the problem, the one with the least estimated work per SM."""
        configs = self.defaults(gpu.arch, weight_format(problem.weight_format)) or (*_DEFAULTS, _ANY_K)
        usable = [c for c in configs if self.reject_problem(c, problem) is None]
        # Two tiles for up to 128 tokens at most; what serves every k only where nothing else does.
        fit = [c for c in usable if c.block_m * 2 >= min(problem.m, 128) and (c != _ANY_K or problem.k % 128)]
        config = min(fit or usable or [_ANY_K], key=lambda c: self.work(c, problem, gpu))
        return Plan(config, 1 if problem.m <= config.block_m else 8)

    def work(self, config: KernelConfig, problem: Problem, gpu: Gpu) -> float:
        """What the busiest SM does, in multiply-adds, as far as that orders configs."""
        return work(config, problem, self.num_tiles(config, problem), gpu.num_sms)

    def defaults(self, arch: Arch, fmt: WeightFormat) -> tuple[KernelConfig, ...]:
        return fitted(self, (*_DEFAULTS, _ANY_K), fmt, arch)

    def rasters(self, config: KernelConfig, problem: Problem) -> tuple[int, ...]:
        tiles_m, tiles_n = -(-problem.m // config.block_m), -(-problem.n // config.block_n)
        if tiles_m == 1:
            return (1,)
        orders = (8,) if problem.m <= 256 else (4, 8, 16, 32)
        return tuple(r for r in orders if r < tiles_n) or (1 << (tiles_n - 1).bit_length(),)

    def threads(self, config: KernelConfig) -> int:
        return WARPGROUP * (1 + config.warps_n // 4 * config.warps_k)

    def smem_bytes(self, config: KernelConfig, fmt: WeightFormat) -> int:
        c, row_tiles = config, config.block_n // 64
        groups = -(-c.block_k // fmt.group_size)
        weights = 64 * c.block_k * fmt.bits // 8 + groups * 64 * fmt.scale_bytes
        rings = (c.a_stages or c.num_stages) * c.block_m * c.block_k * 2 + c.num_stages * row_tiles * weights
        rings = -(-rings // 1024) * 1024
        output = row_tiles * c.block_m // c.cluster_size * 128
        sums = row_tiles * c.block_m * 64 * 4
        exchanged = sums * (c.warps_k - 1) + sums * (c.cluster_size - 1) // c.cluster_size
        barriers = 2 * (c.num_stages + c.a_stages) + (2 * row_tiles if c.cluster_size > 1 else 0)
        return rings + output + exchanged + barriers * 8

    def resident_blocks(self, config: KernelConfig, fmt: WeightFormat, arch: Arch) -> int:
        """Each takes its share of the registers at launch, so no more fit."""
        return config.blocks_per_sm

    def max_registers(self, config: KernelConfig, arch: Arch) -> int:
        """At launch, before setmaxnreg moves them from the producer to the consumers."""
        per_thread = arch.registers_per_sm // (self.threads(config) * config.blocks_per_sm)
        return min(per_thread // 8 * 8, arch.max_registers_per_thread)

    def producer_registers(self, config: KernelConfig, arch: Arch) -> int:
        """40, which its addresses need; where registers are scarce the most that costs the consumers none."""
        if self.threads(config) * config.blocks_per_sm <= 512:
            return 40
        return max(p for p in (24, 32, 40) if self._left(config, arch, p) == self._left(config, arch, 24))

    def consumer_registers(self, config: KernelConfig, arch: Arch) -> int:
        """What is left for each consumer of what the block was launched with; asking for more would hang."""
        return self._left(config, arch, self.producer_registers(config, arch))

    def _left(self, config: KernelConfig, arch: Arch, producer: int) -> int:
        groups = self.threads(config) // WARPGROUP
        pool = self.max_registers(config, arch) // 8 * 8 * groups - producer
        return min(pool // (groups - 1) // 8 * 8, 240)

    def template_values(self, spec: KernelSpec) -> dict[str, Any]:
        return {
            "producer_registers": self.producer_registers(spec.config, spec.arch_row),
            "consumer_registers": self.consumer_registers(spec.config, spec.arch_row),
        }

    def num_tiles(self, config: KernelConfig, problem: Problem) -> int:
        return -(-problem.m // config.block_m) * -(-problem.n // config.block_n)

    def launch_shape(self, plan: Plan, problem: Problem, num_sms: int, max_clusters: int) -> LaunchShape:
        c = plan.config
        tiles, k_blocks, striped = self.num_tiles(c, problem), problem.k // c.block_k, c.partition == "striped"
        grid = min(tiles * k_blocks if striped else tiles, max_clusters) * c.cluster_size
        stripes = _stripes(tiles, k_blocks, grid) if striped else (0, 0)
        log_raster = (plan.raster - 1).bit_length()  # the kernel walks the next power of two
        return LaunchShape(
            grid=grid,
            threads=self.threads(c),
            smem_bytes=self.smem_bytes(c, weight_format(problem.weight_format)),
            cluster=c.cluster_size,
            operands=OPERANDS,
            scalars=(
                problem.m, problem.n, problem.k, log_raster, *stripes,
                *reciprocal(-(-problem.m // c.block_m)), *reciprocal(k_blocks),
            ),
            a_box=(c.block_m, SLAB_K),
            a_tail_rows=(problem.m - 1) % c.block_m + 1,
            c_box=(c.block_m // c.cluster_size, 64),
            partials_bytes=grid * c.block_m * c.block_n * 4 if striped else 0,
            num_locks=grid if striped else 0,
        )


def _stripes(tiles: int, k_blocks: int, blocks: int) -> tuple[int, int]:
    """How many tiles are shared out in stripes, one a block, and how many k blocks a stripe has.

    They are those that fill no wave of whole tiles, and one wave more: then a block that must wait for sums of others
    does so when theirs are long there.
    """
    striped = tiles - max(tiles // blocks - 1, 0) * blocks
    return striped, -(-striped * k_blocks // blocks)


WGMMA = WgmmaFamily()
