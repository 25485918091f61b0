"""What the pictures show, computed from the measurements: pure functions, no drawing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from marlin_gen.arch import Gpu
from marlin_gen.bench import BenchRow
from marlin_gen.config import KernelConfig
from marlin_gen.formats import dtype
from marlin_gen.models import LayerShape, layer_shapes, presets
from marlin_gen.problem import Problem
from marlin_gen.record import Recording
from marlin_gen.sustained import SustainedRow

BLOCK_TOKENS = 16  # m of the transformer-block picture: a served batch of this many sequences


def ideal_speedup(problem: Problem, gpu: Gpu, tflops: float) -> float:
    """fp16's lower bound over ours, both from arithmetic.

    Each bound is the longer of moving weights and activations at the theoretical bandwidth and of 2mnk at ``tflops``:
    the ratio of the bytes at small m, 1 once both are bound by the multiplications.
    """
    dense_bytes = problem.n * problem.k * dtype(problem.act_dtype).bytes

    def bound_us(weight_bytes: int) -> float:
        moving_us = (weight_bytes + problem.activation_bytes) / (gpu.bandwidth_gbs * 1e3)
        return problem.roofline_us(moving_us, tflops)

    return bound_us(dense_bytes) / bound_us(problem.weight_bytes)


@dataclass(frozen=True)
class Layer:
    """One linear layer of a transformer block, in microseconds."""

    name: str  # "qkv_proj"
    us: float
    cublas_us: float  # fp16


@dataclass(frozen=True)
class Block:
    """The linear layers of one decoder layer, in the order they run; ``models`` share the shapes."""

    models: tuple[str, ...]
    layers: tuple[Layer, ...]

    @property
    def us(self) -> float:
        return sum(layer.us for layer in self.layers)

    @property
    def cublas_us(self) -> float:
        return sum(layer.cublas_us for layer in self.layers)


def transformer_blocks(rows: Sequence[BenchRow], m: int = BLOCK_TOKENS) -> list[Block]:
    """One ``Block`` per preset (on one GPU) whose four layers are all among ``rows`` at ``m``, quickest first."""
    measured = {(row.n, row.k): row for row in rows if row.m == m}
    models: dict[tuple[LayerShape, ...], list[str]] = {}
    for model, config in presets().items():
        if "shapes" in config:  # a list of matrices, not a transformer
            continue
        shapes = layer_shapes(config)
        if all((n, k) in measured for _, n, k in shapes):
            models.setdefault(tuple(shapes), []).append(model)
    blocks = [
        Block(
            tuple(names),
            tuple(
                Layer(name, measured[n, k].us, measured[n, k].cublas_us)
                for joined, n, k in shapes
                for name in joined.split("+")  # layers of equal shapes, each of which runs
            ),
        )
        for shapes, names in models.items()
    ]
    return sorted(blocks, key=lambda block: block.us)


@dataclass(frozen=True)
class Progress:
    """A search, candidate by candidate."""

    fractions: tuple[float, ...]  # after candidate i + 1: mean over problems of roofline / best time so far
    problems: int
    outcomes: tuple[tuple[str, int], ...]  # status of the candidates and how many, most frequent first


def search_progress(recording: Recording, tflops: float) -> Progress:
    """Best so far against candidates tried. A problem without a time yet counts as 0; failures add nothing."""
    problems = [p for p in recording.problems() if p in recording.baselines]
    roofline_us = {p: p.roofline_us(recording.baselines[p].read_floor_us, tflops) for p in problems}
    status = {config: recording.done.get(config, "ok") for config in recording.configs()}
    reached: dict[KernelConfig, dict[Problem, float]] = {config: {} for config in status}
    for row in recording.measurements:
        if row.ok and row.us and status[row.plan.config] == "ok" and row.problem in roofline_us:
            own = reached[row.plan.config]
            own[row.problem] = max(own.get(row.problem, 0.0), roofline_us[row.problem] / row.us)
    best = dict.fromkeys(problems, 0.0)
    fractions = []
    for own in reached.values():  # in order of first trial
        for problem, fraction in own.items():
            best[problem] = max(best[problem], fraction)
        fractions.append(sum(best.values()) / max(len(best), 1))
    return Progress(tuple(fractions), len(problems), tuple(Counter(status.values()).most_common()))


def sustained_runs(rows: Sequence[SustainedRow]) -> dict[str, list[SustainedRow]]:
    """The rows by kernel (a plan's key, or cublas), in order of first appearance."""
    runs: dict[str, list[SustainedRow]] = {}
    for row in rows:
        runs.setdefault(row.kernel, []).append(row)
    return runs
