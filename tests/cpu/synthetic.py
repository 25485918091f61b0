"""A made-up GPU recording, for tests of the search on machines that ship none.

The truth is not the tuner's cost model: the machine constants differ, every field value has a hidden effect that
varies with the number of tokens, and every (config, problem) pair an unlearnable one of a few per cent.
"""

from __future__ import annotations

import math
import random
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from marlin_gen import cost_model
from marlin_gen.arch import Gpu
from marlin_gen.config import KernelConfig, KernelSpec, Plan
from marlin_gen.families import FAMILIES
from marlin_gen.formats import FORMATS
from marlin_gen.measurement import Artifact, Baseline, Measurement
from marlin_gen.problem import Problem
from marlin_gen.record import MeasurementLog, Recording, pack
from marlin_gen.search.pipeline import Result
from marlin_gen.space import FIELDS, ConfigSpace

H100 = Gpu((9, 0), 132, 50 << 20, 228 << 10, 3352, "NVIDIA H100 80GB HBM3")
FMT = FORMATS["u4b8g128"]
SHAPES = ((6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336))
TOKENS = tuple(2**i for i in range(13))
OTHER_COSTS = cost_model.Costs(
    launch_us=2.3, latency_us=0.7, exact_alu=3.2, lifted_alu=2.3, mma_stage=450.0, wgmma_stage=170.0, fixup=8000.0
)


def problems(shapes: Sequence[tuple[int, int]] = SHAPES, tokens: Sequence[int] = TOKENS) -> list[Problem]:
    return sorted(Problem(n, k, m) for n, k in shapes for m in tokens)


def uniform(*key: object) -> float:
    """A repeatable number in [-1, 1) for any key."""
    return zlib.crc32(repr(key).encode()) / 2**31 - 1


def true_us(configs: Sequence[KernelConfig], cells: Sequence[Problem], world: int = 0) -> np.ndarray:
    """(configs, problems): the times of a made-up machine."""
    us = cost_model.predict_us(configs, cells, H100, OTHER_COSTS)
    for i, config in enumerate(configs):
        for j, p in enumerate(cells):
            regime = math.log2(max(p.m, 1)) / 12
            effect = sum(
                0.05 * uniform(world, name, getattr(config, name))
                + 0.05 * regime * uniform(world, "m", name, getattr(config, name))
                for name in FIELDS
            )
            us[i, j] *= math.exp(effect + 0.03 * uniform(world, config.key, p))
    return us


def save(found: Recording, path: Path) -> Path:
    """Write a recording as a finished tune leaves it."""
    log = MeasurementLog(path.with_suffix(".log"), found.gpu)
    for baseline in found.baselines.values():
        log.baseline(baseline)
    for row in found.measurements:
        log.measurement(row)
    log.close()
    pack(path.with_suffix(".log"), path)
    return path


def recorded_artifact(recording: Recording, spec: KernelSpec) -> Artifact:
    """An artifact with the recorded numbers and no files: for a replay that skips compiling."""
    numbers = recording.artifacts.get(spec.key, {"registers": 0, "spill_bytes": 0, "static_smem_bytes": 0})
    return Artifact(spec, f"recorded_{spec.config.family}", Path(), **numbers)


def build(specs: Sequence[KernelSpec], on_done: Callable[[Result], None]) -> None:
    """In place of a compiler: artifacts without files."""
    for spec in specs:
        on_done(recorded_artifact(Recording(H100), spec))


def recording(cells: Sequence[Problem], size: int, world: int = 0, failures: int = 5) -> Recording:
    """What a long search leaves: ``size`` configs, each timed where it was within twice the best; a few that failed."""
    rng = random.Random(world)
    space = ConfigSpace(H100.arch, FMT, FAMILIES).enumerate()
    prior = cost_model.predict_us(space, cells, H100)
    defaults = [f.default(p, H100).config for p in cells for f in FAMILIES.rows.values()]
    # As a search does: some of each problem's promising configs, and some that are promising nowhere.
    promising = [space[i] for j in range(len(cells)) for i in rng.sample(list(np.argsort(prior[:, j])[:3000]), 40)]
    rng.shuffle(promising)
    configs = list(dict.fromkeys([*defaults, *promising[: size * 9 // 10], *rng.sample(space, size)]))[:size]
    found = Recording(H100)
    us = true_us(configs, cells, world)
    best = us.min(axis=0)
    for j, p in enumerate(cells):
        found.baselines[p] = Baseline(p, OTHER_COSTS.launch_us + p.weight_bytes / 3.1e6, 4 * float(best[j]))
    failed = set(rng.sample(configs[len(set(defaults)) :], failures))
    for i, config in enumerate(configs):
        spec = KernelSpec(config, FMT.name, "f16", H100.arch.name)
        found.artifacts[spec.key] = {"registers": 64, "spill_bytes": 0, "static_smem_bytes": 0}
        for j, p in enumerate(cells):
            family = FAMILIES.of(config)
            default = family.default(p, H100)
            if (us[i, j] > 2 * best[j] and default.config != config) or family.reject_problem(config, p):
                continue
            rasters = set(family.rasters(config, p)) | ({default.raster} if default.config == config else set())
            for raster in sorted(rasters):
                if config in failed:
                    found.measurements.append(Measurement(p, Plan(config, raster), "wrong", detail="made up"))
                    continue
                time = float(us[i, j]) * (1 + 0.02 * uniform(world, config.key, p, raster))
                row = Measurement(p, Plan(config, raster), "ok", time, time * 0.99, time * 1.01, 2.1e-4)
                found.measurements.append(row)
    return found
