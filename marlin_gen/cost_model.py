"""How long a config should take on a problem: arithmetic, not measurement. Numpy, over all configs at once.

Its use is to leave hopeless (config, problem) pairs out and to order the rest; the GPU has the last word. Two layers:
``predict_us`` knows the machine (waves, bandwidth, tensor and ALU rates, latencies); ``Calibrated`` multiplies it by
a correction that is learnt from the measurements so far, so that what the arithmetic leaves out is learnt once and
not anew in each problem.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from marlin_gen.arch import Gpu
from marlin_gen.config import KernelConfig
from marlin_gen.formats import weight_format
from marlin_gen.problem import Problem

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Machine:
    """Rates of one SM per clock, by compute capability (CUDA C++ guide; GPU white papers)."""

    clock_ghz: float
    tensor_flops: float  # dense fp16 with fp32 sums, through the best instruction of the architecture
    mma_sync_share: float  # of that, what mma.sync reaches
    attainable: float  # share of the tensor rate that the best library kernels reach on large problems
    l2_bytes: float = 48.0  # read from L2
    alu_lanes: float = 128.0


MACHINES = {
    (8, 0): Machine(1.41, 2048, 1.0, 0.85, alu_lanes=64.0),
    (8, 6): Machine(1.70, 512, 1.0, 0.90),
    (8, 9): Machine(2.40, 512, 1.0, 0.90),
    (9, 0): Machine(1.755, 4096, 0.62, 0.817),  # 775 TFLOP/s on 132 SMs, the rate cuBLAS reaches
}

LAUNCH_US = 1.6  # of a graph node, and the first bytes from DRAM
BANDWIDTH_SHARE = 0.95  # of the theoretical DRAM bandwidth, reached by a plain read
SATURATING_BYTES = 40e3  # in flight per SM, by Little's law: bandwidth x latency / SMs
DEQUANT_INSTRUCTIONS = {"exact": 13 / 8, "deferred": 5 / 8}  # per weight of a 4-bit format
ISSUE_CLOCKS = 1.9  # clocks per dependent instruction of a warp that has its scheduler to itself
STAGE_CLOCKS = {"mma": 60.0, "wgmma": 260.0}  # waiting for, and releasing, one stage of the ring
FIXUP_US = 1.2  # a tile that blocks share through global memory
CLUSTER_US = 0.5  # two cluster barriers and a sum in distributed shared memory


def machine(gpu: Gpu) -> Machine:
    """The row of this GPU, or of the newest older one."""
    older = [row for row in MACHINES if row <= tuple(gpu.capability)]
    return MACHINES[max(older)] if older else MACHINES[min(MACHINES)]


def attainable_tflops(gpu: Gpu) -> float:
    """The multiplication rate that a roofline uses: what good kernels reach, not the data sheet's peak."""
    rates = machine(gpu)
    return gpu.num_sms * rates.tensor_flops * rates.clock_ghz * rates.attainable / 1e3


def predict_us(configs: Sequence[KernelConfig], problems: Sequence[Problem], gpu: Gpu) -> Array:
    """(configs, problems): predicted microseconds."""
    columns = _Columns(configs)
    return np.stack([_predict(columns, problem, gpu) for problem in problems], axis=1)


class _Columns:
    """The fields of many configs as arrays."""

    def __init__(self, configs: Sequence[KernelConfig]) -> None:
        def column(name: str) -> Array:
            return np.array([getattr(c, name) for c in configs], dtype=np.float64)

        self.block_m, self.block_n, self.block_k = column("block_m"), column("block_n"), column("block_k")
        self.warps_n, self.warps_k = column("warps_n"), column("warps_k")
        self.stages, self.blocks_per_sm = column("num_stages"), column("blocks_per_sm")
        self.cluster = column("cluster_size")
        self.is_mma = np.array([c.family == "mma" for c in configs])
        self.striped = np.array([c.partition == "striped" for c in configs])
        self.clusterk = np.array([c.partition == "clusterk" for c in configs])
        self.deferred = np.array([c.dequant == "deferred" for c in configs])


def _predict(c: _Columns, problem: Problem, gpu: Gpu) -> Array:
    """(configs,): microseconds of one problem."""
    rates, fmt = machine(gpu), weight_format(problem.weight_format)
    token_tiles = np.ceil(max(problem.m, 1) / c.block_m)
    owners = np.floor(gpu.num_sms * c.blocks_per_sm / c.cluster)  # blocks, or clusters, resident at once
    k = np.where(c.clusterk, problem.k / c.cluster, problem.k)  # of one block

    # Rows x tokens that the busiest block computes. The mma family deals out rows in units of 16 and walks its range
    # in passes of block_n; the wgmma family deals out whole tiles.
    row_share = np.ceil(problem.n / 16 / owners) * 16
    passes = np.ceil(row_share / c.block_n) * token_tiles
    tiles = np.ceil(problem.n / c.block_n) * token_tiles
    units = np.where(c.clusterk, owners, owners * np.where(c.cluster > 1, c.cluster, 1))
    rounds = np.where(c.is_mma, passes, np.where(c.striped, np.maximum(tiles / units, 1e-9), np.ceil(tiles / units)))
    ranges = np.ceil(problem.n / row_share)
    busy = np.minimum(np.where(c.is_mma, ranges, tiles), units) * np.where(c.clusterk, c.cluster, 1)
    busy = np.where(c.striped, gpu.num_sms * c.blocks_per_sm, busy)
    per_sm = np.minimum(np.maximum(busy / gpu.num_sms, 1.0), c.blocks_per_sm)  # blocks that share the busiest SM

    weights = rounds * c.block_n * k  # of the busiest block, dequantised again for each token tile
    tensor_rate = rates.tensor_flops * np.where(c.is_mma, rates.mma_sync_share, 1.0)
    small = np.where(c.is_mma, 8.0, 16.0)  # an instruction of fewer tokens is not quicker
    tensor = 2 * weights * np.maximum(c.block_m, small) / tensor_rate
    instructions = np.where(c.deferred, DEQUANT_INSTRUCTIONS["deferred"], DEQUANT_INSTRUCTIONS["exact"])
    correction = np.where(c.deferred, 2.5 * c.block_m / 128, 0.0)  # per weight: two FFMAs per sum and group of 128
    alu = weights * (instructions + correction + 0.25) / rates.alu_lanes
    traffic = weights * (fmt.bits / 8) + rounds * c.block_m * k * 2
    l2 = traffic / rates.l2_bytes

    # Throughput: what all blocks of an SM ask of its units. Latency: what one warp (mma) or warpgroup of four warps,
    # one per scheduler (wgmma), must do in sequence; a warpgroup's multiplications run while it dequantises.
    groups = np.maximum(c.warps_n * c.warps_k / np.where(c.is_mma, 1.0, 4.0), 1.0)
    lanes = np.where(c.is_mma, rates.alu_lanes / 4, rates.alu_lanes)
    steps = rounds * k / c.block_k / c.warps_k
    chain_alu = weights / groups * (instructions + correction + 0.25) / lanes * ISSUE_CLOCKS
    chain_tensor = tensor / groups * np.where(c.is_mma, 4.0, 0.25)
    chain = chain_alu + chain_tensor + steps * np.where(c.is_mma, STAGE_CLOCKS["mma"], STAGE_CLOCKS["wgmma"])
    issued = alu + 0.35 * np.minimum(alu, tensor)
    clocks = np.maximum(np.maximum(tensor / 0.93, issued), l2) * per_sm
    compute_us = np.maximum(clocks, chain) / rates.clock_ghz / 1e3

    # Memory: the bytes from DRAM, at the bandwidth that the busy blocks can keep in flight. Each warp along k of the
    # mma family has a ring of its own.
    rings = np.where(c.is_mma, c.warps_k, 1.0)
    in_flight = per_sm * (c.stages - 0.5) * rings * (c.block_n * c.block_k * fmt.bits / 8)
    share = np.minimum(busy / gpu.num_sms, 1.0) * np.minimum(in_flight / SATURATING_BYTES, 1.0)
    padded = np.where(c.is_mma, passes / token_tiles * c.block_n * ranges / problem.n, 1.0)
    dram = problem.weight_bytes * (1 + 0.5 * (padded - 1)) + problem.activation_bytes
    memory_us = dram / (gpu.bandwidth_gbs * 1e3 * BANDWIDTH_SHARE) / np.maximum(share, 1e-3)

    body = np.maximum(memory_us, compute_us) + 0.2 * np.minimum(memory_us, compute_us)
    reduce_us = np.where(c.is_mma, groups * c.block_m * c.block_n * rounds / 64e3 / rates.clock_ghz, 0.0)
    store_us = 0.3 + c.block_m * c.block_n / 1.5e5
    extra = np.where(c.striped, FIXUP_US * (tiles % units > 0) + 0.4, 0.0) + np.where(c.clusterk, CLUSTER_US, 0.0)
    us: Array = LAUNCH_US + body + reduce_us + store_us + extra
    return us


@dataclass
class Calibrated:
    """``predict_us`` times a learnt correction: log(measured / predicted) = config image x W x problem image.

    One ridge regression over all pairs measured so far. A problem learns from its neighbours' measurements, and a
    config from its neighbours'. With no measurements the correction is 1.
    """

    prior_us: Array  # (configs, problems)
    config_image: Array  # (configs, p)
    problem_image: Array  # (problems, q)
    us: Array  # (configs, problems), the current prediction
    best_us: Array  # (problems,), its least values
    spread: float = 0.25  # standard deviation of log(measured / predicted)
    is_fitted: bool = False

    RIDGE: ClassVar[float] = 1.0
    NEEDED: ClassVar[int] = 24  # fewer measured pairs say too little
    UNFITTED_MARGIN: ClassVar[float] = 1.35  # the bare arithmetic has ranked winners up to 1.8x behind its favourite

    @classmethod
    def start(cls, features: NDArray[np.floating], problems: Sequence[Problem], prior_us: Array) -> Calibrated:
        """``features``: (configs, columns) of numbers in which near configs are near."""
        raw = np.asarray(features, dtype=np.float64)
        spread = raw.std(axis=0)
        scaled = (raw - raw.mean(axis=0))[:, spread > 0] / spread[spread > 0]
        levels = [(column[:, None] == np.unique(column)) * 1.0 for column in raw.T if 2 < len(np.unique(column)) < 32]
        config_image = np.hstack([np.ones((len(raw), 1)), scaled, *levels])
        sizes = np.log2([[max(p.m, 1), p.n, p.k] for p in problems]).reshape(-1, 3)
        sizes = (sizes - sizes.mean(axis=0)) / np.maximum(sizes.std(axis=0), 1.0)
        problem_image = np.hstack([np.ones((len(sizes), 1)), sizes, sizes[:, :1] ** 2])
        return cls(prior_us, config_image, problem_image, prior_us, prior_us.min(axis=0))

    def gate(self, steady: float) -> float:
        """How many times the best a prediction may be before it counts as hopeless; wider before anything is learnt."""
        return steady * (1.0 if self.is_fitted else self.UNFITTED_MARGIN)

    def fit(self, measured_us: Array) -> None:
        """``measured_us``: (configs, problems), NaN where nothing was measured."""
        rows, cols = np.nonzero(np.isfinite(measured_us))
        if len(rows) < self.NEEDED:
            return
        target = np.log(measured_us[rows, cols] / self.prior_us[rows, cols])
        image = (self.config_image[rows][:, :, None] * self.problem_image[cols][:, None, :]).reshape(len(rows), -1)
        normal = image.T @ image + self.RIDGE * np.eye(image.shape[1])
        weights = np.linalg.solve(normal, image.T @ target).reshape(self.config_image.shape[1], -1)
        correction = self.config_image @ weights @ self.problem_image.T
        # A correction beyond what was ever seen is extrapolation.
        low, high = target.min(), target.max()
        self.us = self.prior_us * np.exp(np.clip(correction, low, high))
        self.best_us = self.us.min(axis=0)
        # Seen through data it was fitted to, the error looks smaller than it is.
        self.spread = max(1.3 * float(np.log(measured_us[rows, cols] / self.us[rows, cols]).std()), 0.02)
        self.is_fitted = True

    def expected_gain(self, rows: NDArray[np.integer], best_us: Array) -> Array:
        """(rows,): by how much each config is expected to lower the sum over problems of log(best time)."""
        z = (np.log(best_us) - np.log(self.us[rows])) / self.spread
        density = np.exp(-0.5 * z * z) / np.sqrt(2 * np.pi)
        below = 0.5 * (1 + np.tanh(np.sqrt(2 / np.pi) * (z + 0.044715 * z**3)))  # the normal distribution function
        gain: Array = (self.spread * np.maximum(z * below + density, 0)).sum(axis=1)
        return gain
