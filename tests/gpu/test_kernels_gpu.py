"""Every kernel that users get: right numbers, exact weights, equal bits on every launch, nothing written elsewhere."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import cache

import pytest
import shipped
import torch

from marlin_gen.config import KernelSpec, Plan
from marlin_gen.families import FAMILIES
from marlin_gen.launch import Kernel, Launcher
from marlin_gen.layout import PackedWeight
from marlin_gen.operands import Shape
from marlin_gen.problem import Problem
from marlin_gen.reference import dequantize, errors

pytestmark = pytest.mark.gpu

# Little work and awkward sizes: half-empty feature tiles, row blocks that no block_n divides, a k that leaves warps
# without a share, one that wraps every ring, and more tiles than an H100 has room for.
SHAPES = [(192, 512), (320, 1024), (64, 7168), (2112, 2048)]
TOKENS = [1, 7, 17, 100, 1000]
LAUNCHES = 20
GUARD = 4096  # bytes on either side of what a kernel may write
GUARD_BYTE = 0x5A

every_spec = pytest.mark.parametrize("spec", shipped.specs(), ids=lambda spec: spec.key)


@cache
def operands(n: int, k: int, weight_format: str, act_dtype: str) -> Shape:
    """Shared by all kernels: random weights, and per m activations with their fp32 reference."""
    return Shape(n, k, weight_format, act_dtype, torch.device("cuda", torch.cuda.current_device()), l2_bytes=0)


def cases(spec: KernelSpec, shapes: list[tuple[int, int]], tokens: list[int]) -> Iterator[tuple[Plan, Problem]]:
    """The legal problems, in both the simplest and the widest tile order."""
    family = FAMILIES.of(spec.config)
    for n, k in shapes:
        for m in tokens:
            problem = Problem(n, k, m, spec.weight_format, spec.act_dtype)
            if family.reject_problem(spec.config, problem) is None:
                for raster in sorted({1, family.rasters(spec.config, problem)[-1]}):
                    yield Plan(spec.config, raster), problem


def guarded(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A copy of ``values`` and the memory around it, bytes, the guards at both ends."""
    size = values.numel() * values.element_size()
    memory = torch.full((size + 2 * GUARD,), GUARD_BYTE, dtype=torch.uint8, device="cuda")
    inside = memory[GUARD : GUARD + size].view(values.dtype).view(values.shape)
    return inside.copy_(values), memory


def intact(memory: torch.Tensor) -> bool:
    return bool((memory[:GUARD] == GUARD_BYTE).all() & (memory[-GUARD:] == GUARD_BYTE).all())


def launched(spec: KernelSpec, plan: Plan, problem: Problem, a: torch.Tensor) -> torch.Tensor:
    """One launch into a poisoned output; asserts that nothing else was written and that the locks are zero again."""
    launcher = Launcher.for_device(torch.cuda.current_device())
    kernel = shipped.kernel(spec)
    packed = operands(problem.n, problem.k, spec.weight_format, spec.act_dtype).packed[0]
    shape, _ = kernel.shape(plan, problem, launcher.gpu.num_sms)
    poison = torch.full((problem.m, problem.n), math.nan, dtype=a.dtype, device="cuda")
    scratch = torch.full((max(shape.partials_bytes // 4, 1),), math.nan, dtype=torch.float32, device="cuda")
    out, around_out = guarded(poison)
    partials, around_partials = guarded(scratch)
    locks, around_locks = guarded(torch.zeros(max(shape.num_locks, 1), dtype=torch.int32, device="cuda"))
    launcher.run_with(kernel, plan, problem, a, packed.weight, packed.scales, out, partials, locks)
    where = f"{plan.key} on {problem}"
    assert intact(around_out), f"{where} wrote outside its output"
    assert intact(around_partials), f"{where} wrote outside its partial sums"
    assert intact(around_locks), f"{where} wrote outside its locks"
    assert not locks.any(), f"{where} left locks behind: {locks.tolist()}"
    return out


@every_spec
def test_against_the_fp32_reference(spec):
    wrong, legal = [], 0
    for plan, problem in cases(spec, SHAPES, TOKENS):
        a, reference, norm = operands(problem.n, problem.k, spec.weight_format, spec.act_dtype).cell(problem.m)
        error = max(errors(launched(spec, plan, problem, a), reference, norm))
        legal += 1
        if not error < problem.error_limit:  # also for NaN, which is what an unwritten output holds
            wrong.append(f"n={problem.n} k={problem.k} m={problem.m} raster={plan.raster}: error {error:.2e}")
    assert legal, f"no problem of {SHAPES} is legal for {spec.key}"
    assert not wrong, "\n".join(wrong)


@every_spec
def test_identity_activations_decode_the_weight_bit_for_bit(spec):
    for n, k in [(192, 512), (320, 1024)]:
        shape = operands(n, k, spec.weight_format, spec.act_dtype)
        identity = torch.eye(k, device="cuda", dtype=shape.dtype)
        expected = dequantize(shape.codes, shape.scales, spec.weight_format, shape.dtype)
        for plan, problem in cases(spec, [(n, k)], [k]):
            found = launched(spec, plan, problem, identity).T
            differ = int((found != expected).sum())  # NaN differs too
            assert differ == 0, f"{plan.key}: {differ} of {n * k} weights differ"


@every_spec
def test_every_launch_gives_the_same_bits(spec):
    """On the launcher's own workspace, as in serving, and with another problem in between."""
    launcher, kernel = Launcher.for_device(torch.cuda.current_device()), shipped.kernel(spec)
    between_plan, between = next(cases(spec, [(320, 1024)], [33]))
    other = operands(between.n, between.k, spec.weight_format, spec.act_dtype)
    other_out = torch.empty(between.m, between.n, dtype=other.dtype, device="cuda")
    for plan, problem in cases(spec, [(2112, 2048), (64, 7168)], [1, 17, 300]):
        shape = operands(problem.n, problem.k, spec.weight_format, spec.act_dtype)
        packed, a = shape.packed[0], shape.cell(problem.m)[0]
        outs = torch.full((LAUNCHES, problem.m, problem.n), math.nan, dtype=shape.dtype, device="cuda")
        for i, out in enumerate(outs):
            launcher.run(kernel, plan, problem, a, packed.weight, packed.scales, out)
            if i % 3 == 0:
                weight, scales = other.packed[0].weight, other.packed[0].scales
                launcher.run(kernel, between_plan, between, other.cell(between.m)[0], weight, scales, other_out)
        assert not outs[0].isnan().any(), f"{plan.key} on {problem} leaves output unwritten"
        bits = outs.view(torch.int16)
        differ = (bits != bits[0]).flatten(1).any(1).nonzero().flatten().tolist()
        assert not differ, f"{plan.key} on {problem}: launches {differ} differ from the first"


@every_spec
def test_a_chain_of_dependent_launches_gives_the_bits_of_plain_ones(spec):
    """Each reads what the one before it wrote, and all of them write to two buffers in turn."""
    launcher, kernel = Launcher.for_device(torch.cuda.current_device()), shipped.kernel(spec)
    if not launcher.gpu.arch.has_tma:
        pytest.skip("dependent launches need sm_90")
    n = k = 2048
    shape = operands(n, k, spec.weight_format, spec.act_dtype)
    packed = shape.packed[0]
    for plan, problem in cases(spec, [(n, k)], [5, 80]):
        a = shape.cell(problem.m)[0] / 64
        plain = end_of_chain(launcher, kernel, plan, problem, a, packed, dependent=False)
        assert plain.view(a.dtype).isfinite().all(), f"{plan.key}: the chain overflows, so it proves nothing"
        for _ in range(LAUNCHES // 4):
            found = end_of_chain(launcher, kernel, plan, problem, a, packed, dependent=True)
            assert torch.equal(found, plain), f"{plan.key} on {problem}"


def end_of_chain(
    launcher: Launcher, kernel: Kernel, plan: Plan, problem: Problem, a: torch.Tensor, packed: PackedWeight,
    dependent: bool,
) -> torch.Tensor:  # fmt: skip
    """The bits of the fifth product, each of the one before it."""
    shape, _ = kernel.shape(plan, problem, launcher.gpu.num_sms)
    partials = torch.empty(max(shape.partials_bytes, 1), dtype=torch.uint8, device="cuda")
    locks = torch.zeros(max(shape.num_locks, 1), dtype=torch.int32, device="cuda")
    buffers = [torch.full((problem.m, problem.n), math.nan, dtype=a.dtype, device="cuda") for _ in range(2)]
    source = a
    for i in range(5):
        launcher.run_with(
            kernel, plan, problem, source, packed.weight, packed.scales, buffers[i % 2], partials, locks,
            dependent=dependent,
        )  # fmt: skip
        source = buffers[i % 2]
    return source.view(torch.int16)
