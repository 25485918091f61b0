"""How long a config should take on a problem: arithmetic, not measurement. Numpy, over all configs at once.

Its use is to leave hopeless (config, problem) pairs out and to order the rest; the GPU has the last word. It knows
the machine (waves, bandwidth, tensor and ALU rates, latencies); what it leaves out, ``search.calibrated`` learns.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from marlin_gen.arch import Arch, Gpu
from marlin_gen.config import KernelConfig
from marlin_gen.families import FAMILIES
from marlin_gen.families.row_share import WAITING_K
from marlin_gen.formats import WeightFormat, weight_format
from marlin_gen.problem import Problem

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Machine:
    """Rates of one SM per clock, by compute capability (CUDA C++ guide; GPU white papers)."""

    clock_ghz: float
    tensor_flops: float  # dense fp16 with fp32 sums, through the best instruction of the architecture
    mma_sync_share: float  # of that, what mma.sync reaches
    attainable: float  # share of the tensor rate that the best library kernels reach on large problems
    alu_lanes: float = 128.0


MACHINES = {
    (8, 0): Machine(1.41, 2048, 0.9, 0.85, alu_lanes=64.0),
    (8, 6): Machine(1.70, 512, 0.9, 0.90),
    (8, 9): Machine(2.40, 512, 0.9, 0.90),
    (9, 0): Machine(1.755, 4096, 0.52, 0.817),  # 775 TFLOP/s on 132 SMs: near the best of cuBLAS at rest
}


@dataclass(frozen=True)
class Costs:
    """What the kernels cost beside the machine's rates: one set for all problems, configs and GPUs.

    Fitted as ``tools/fit_cost_model.py`` does to 1190 mma configs at 18 problems and to the wgmma family's timings of a
    tune on an H100 and on an H200 (tools/FACTS.md); calm_bytes and crowding were chosen and the rest fitted to them.
    Within 1.1 of the best the standard deviation of log(predicted / measured) is 0.036, on the H200 0.044.
    """

    launch_us: float = 1.72  # of a graph node, the first bytes from DRAM and the last store
    bandwidth_share: float = 1.0  # of the theoretical DRAM bandwidth
    latency_us: float = 0.5  # from asking for a stage until it is there
    calm_bytes: float = 49152.0  # of weights that an SM may have asked for at a time
    crowding: float = 0.035  # share of the bandwidth that is lost for each doubling beyond: DRAM has so many pages open
    l2_bytes: float = 103.0  # a clock and SM; the activations that several blocks share
    wgmma_share: float = 0.973  # of the tensor rate
    wgmma_tokens: float = 31.0  # an instruction of fewer tokens is not quicker: its weights come from registers
    exact_alu: float = 2.65  # instructions per weight
    lifted_alu: float = 1.9  # exact in the wgmma family where rows have lifts (9.6 of 13 with their share of a group's)
    whole_alu: float = 1.68  # deferred, as its instructions count beside exact ones (9 of 13)
    scaling_alu: float = 0.99  # deferred: per weight and 128 tokens, once a group of 128 or, in the mma family, 64 k
    overlap_loss: float = 0.554  # share of the shorter of dequantisation and multiplication that is not hidden
    compute_norm: float = 1.9
    body_norm: float = 3.86
    mma_stage: float = 242.0  # clocks of a warp: waiting for one stage of its ring, loading fragments
    wgmma_stage: float = 379.0  # clocks of a warpgroup: waiting for one stage, and releasing it
    mma_finish: float = 982.0  # clocks after a pass: barriers and stores
    mma_finish_each: float = 0.0864  # clocks per sum of each warp along k
    wgmma_sum_each: float = 0.155  # clocks per sum of each further warpgroup along k
    mma_cluster: float = 1000.0  # clocks: two cluster barriers with their fences, and the longer launch
    wgmma_cluster: float = 1510.0  # clocks: the longer launch; its barriers need no fences
    cluster_each: float = 0.091  # clocks per sum in distributed shared memory
    fixup: float = 3790.0  # clocks: the tiles that a block shares with its neighbours, and waiting for them
    fixup_each: float = 0.335  # clocks per sum through global memory


COSTS = Costs()


def machine(gpu: Gpu) -> Machine:
    """The row of this GPU, or of the newest older one."""
    older = [row for row in MACHINES if row <= tuple(gpu.capability)]
    return MACHINES[max(older)] if older else MACHINES[min(MACHINES)]


def attainable_tflops(gpu: Gpu) -> float:
    """The multiplication rate that a roofline uses: what good kernels reach, not the data sheet's peak."""
    rates = machine(gpu)
    return gpu.num_sms * rates.tensor_flops * rates.clock_ghz * rates.attainable / 1e3


def predict_us(configs: Sequence[KernelConfig], problems: Sequence[Problem], gpu: Gpu, costs: Costs = COSTS) -> Array:
    """(configs, problems): predicted microseconds."""
    columns = Columns(configs, weight_format(problems[0].weight_format), gpu.arch)
    return np.stack([predict(columns, Sizes([problem]), gpu, costs) for problem in problems], axis=1)


class Columns:
    """The fields of configs as arrays, one entry a config, and what the families say of them."""

    def __init__(self, configs: Sequence[KernelConfig], fmt: WeightFormat, arch: Arch) -> None:
        def column(name: str) -> Array:
            return np.array([getattr(c, name) for c in configs], dtype=np.float64)

        self.block_m, self.block_n, self.block_k = column("block_m"), column("block_n"), column("block_k")
        self.warps_n, self.warps_k = column("warps_n"), column("warps_k")
        self.stages = column("num_stages")
        self.resident = np.array([float(FAMILIES.of(c).resident_blocks(c, fmt, arch)) for c in configs])
        # Of two rings the shallower, that of activations, is the one that is waited for.
        self.weight_stages = self.stages
        self.stages = np.where(column("a_stages") > 0, column("a_stages"), self.stages)
        self.cluster = column("cluster_size")
        self.is_mma = np.array([c.family == "mma" for c in configs])
        self.striped = np.array([c.partition == "striped" for c in configs])
        self.clusterk = np.array([c.partition == "clusterk" for c in configs])
        self.deferred = np.array([c.dequant == "deferred" for c in configs])


class Sizes:
    """The sizes of problems as arrays: one for all configs, or as many as configs."""

    def __init__(self, problems: Sequence[Problem]) -> None:
        def column(values: Sequence[float]) -> Array:
            return np.array(values, dtype=np.float64)

        self.m = np.maximum(column([p.m for p in problems]), 1)
        self.n, self.k = column([p.n for p in problems]), column([p.k for p in problems])
        self.dram_bytes = column([p.weight_bytes + p.activation_bytes for p in problems])
        formats = [weight_format(p.weight_format) for p in problems]
        self.bits, self.has_lifts = column([f.bits for f in formats]), np.array([f.has_lifts for f in formats])


def predict(c: Columns, p: Sizes, gpu: Gpu, costs: Costs) -> Array:
    """(pairs,): microseconds of each config on its problem."""
    rates, where = machine(gpu), np.where
    token_tiles = np.ceil(p.m / c.block_m)
    owners = np.floor(gpu.num_sms * c.resident / c.cluster)  # blocks, or clusters, resident at once
    k = where(c.clusterk, p.k / c.cluster, p.k)  # of one block

    # How often the busiest block computes a tile of block_n x block_m. The mma family deals out rows in units of 16
    # and walks its range in passes of block_n; the wgmma family deals out whole tiles, or equal stripes of them.
    passes, grid = _shares(c, p, token_tiles, owners, gpu.num_sms)
    tiles = np.ceil(p.n / c.block_n) * token_tiles
    rounds = where(c.is_mma, passes, where(c.striped, tiles / owners, np.ceil(tiles / owners)))
    busy = where(c.striped, owners, np.minimum(where(c.is_mma, grid, tiles), owners) * c.cluster)
    per_sm = np.clip(np.ceil(busy / gpu.num_sms), 1, c.resident)  # blocks that share the busiest SM

    # Throughput, in clocks of one block: what it asks of the tensor cores, of the ALUs and of L2.
    weights = rounds * c.block_n * k  # dequantised again for each token tile
    tokens = np.maximum(c.block_m, where(c.is_mma, 8.0, costs.wgmma_tokens))
    share = where(c.is_mma, rates.mma_sync_share, costs.wgmma_share)
    tensor = 2 * weights * tokens / (rates.tensor_flops * share)
    deferred = costs.whole_alu + where(c.is_mma, 2.0, 1.0) * costs.scaling_alu * c.block_m / 128
    exact = where(~c.is_mma & p.has_lifts, costs.lifted_alu, costs.exact_alu)
    alu = weights * where(c.deferred, deferred, exact) / rates.alu_lanes
    issued = alu + costs.overlap_loss * np.minimum(alu, tensor)
    loads = weights * (p.bits / 8) + rounds * c.block_m * k * 2 * where(c.is_mma, c.warps_n, 1.0)
    throughput = _worst(costs.compute_norm, tensor, issued, loads / costs.l2_bytes) * per_sm

    # Latency, in clocks: what one warp (mma) or warpgroup (wgmma) does in sequence. All tiles but the last are
    # finished while the ring fills up for the next.
    steps = rounds * k / c.block_k
    own_steps = steps / c.warps_k
    tile = c.block_m * c.block_n
    finish = where(c.is_mma, costs.mma_finish + costs.mma_finish_each * tile * c.warps_k,
                   costs.wgmma_sum_each * tile * (c.warps_k - 1))  # fmt: skip
    cluster = where(c.is_mma, costs.mma_cluster, costs.wgmma_cluster) + costs.cluster_each * tile
    finish = finish + where(c.clusterk, cluster, 0.0)
    stage = where(c.is_mma, costs.mma_stage, costs.wgmma_stage)
    chain = alu * 4 / (c.warps_n * c.warps_k) + own_steps * stage + np.maximum(rounds - 1, 0) * finish

    # Memory: all bytes at the bandwidth of a plain read; and, by Little's law, one ring's worth per latency. Each
    # warp along k of the mma family has a ring of its own.
    clocks_per_us = rates.clock_ghz * 1e3
    asked = c.weight_stages * where(c.is_mma, c.warps_k, 1.0) * c.block_k * c.block_n * p.bits / 8 * per_sm
    crowd = 1 + costs.crowding * np.log2(np.maximum(asked / costs.calm_bytes, 1))
    dram_us = p.dram_bytes * crowd / (gpu.bandwidth_gbs * 1e3 * costs.bandwidth_share)
    ring_us = costs.latency_us * where(c.is_mma, own_steps, steps) / (c.stages - 0.5)
    body_us = _worst(costs.body_norm, dram_us, ring_us, throughput / clocks_per_us, chain / clocks_per_us)
    fixup = where(c.striped, costs.fixup + costs.fixup_each * tile, 0.0)
    us: Array = costs.launch_us + body_us + (finish + fixup) / clocks_per_us
    return us


def _shares(c: Columns, p: Sizes, token_tiles: Array, owners: Array, num_sms: int) -> tuple[Array, Array]:
    """Passes of a block of the mma family, and the number of clusters: ``RowShare.best`` in numpy, but for equals."""
    least = np.full(c.block_n.shape, np.inf)
    best_passes, best_grid = np.zeros_like(least), np.ones_like(least)
    for blocks in range(int(c.resident.max(initial=1)), 0, -1):
        clusters = np.floor(np.minimum(blocks, c.resident) * num_sms / c.cluster)
        rows = np.ceil(np.ceil(p.n / 16) / np.maximum(np.floor(clusters / token_tiles), 1)) * 16
        grid = np.ceil(p.n / rows) * token_tiles
        passes = np.ceil(grid / owners) * np.ceil(rows / c.block_n)
        busiest = np.ceil(np.minimum(grid, owners) * c.cluster / num_sms)
        time = passes * (busiest * (c.block_n / 16 + 0.5) + WAITING_K / (c.block_k * c.warps_k))
        less = time < least
        least = np.where(less, time, least)
        best_passes, best_grid = np.where(less, passes, best_passes), np.where(less, grid, best_grid)
    return best_passes, best_grid


def _worst(norm: float, *times: Array) -> Array:
    """The longest of what goes on at once, and somewhat more where several are nearly as long."""
    total: Array = sum(time**norm for time in times) ** (1 / norm)
    return total
