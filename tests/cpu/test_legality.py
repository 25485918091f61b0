"""Conformance of every kernel family: what is legal fits the hardware, what is not says why, defaults are legal.

Parametrised over the registries: a new family, architecture or format is tested by existing.
"""

from __future__ import annotations

import random
from dataclasses import fields, replace
from functools import cache
from itertools import islice

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from tables import A100, H100, H200

from marlin_gen.arch import ARCHS
from marlin_gen.config import KernelConfig, Plan
from marlin_gen.families import FAMILIES
from marlin_gen.families.base import OPERANDS, reciprocal
from marlin_gen.families.defaults import default_plan
from marlin_gen.formats import FORMATS
from marlin_gen.problem import Problem

FIELDS = [f.name for f in fields(KernelConfig) if f.name != "family"]
GPUS = [H100, H200, A100, replace(A100, capability=(8, 6)), replace(A100, capability=(8, 9))]
CASES = [(f, a, w) for f in sorted(FAMILIES.rows) for a in sorted(ARCHS) for w in sorted(FORMATS)]
PROBLEMS = [
    Problem(n, k, m) for n, k in ((64, 128), (4096, 4096), (6144, 4096), (4096, 14336)) for m in (1, 7, 100, 4096)
]


@cache
def sample(family_name: str, arch_name: str, fmt_name: str, wanted: int = 300) -> tuple[tuple[KernelConfig, ...], int]:
    """(legal configs, number drawn): random points of the axes, the same ones every time."""
    family, arch, fmt = FAMILIES.rows[family_name], ARCHS[arch_name], FORMATS[fmt_name]
    axes = family.axes(arch)
    rng = random.Random(f"{family_name} {arch_name} {fmt_name}")
    drawn = [KernelConfig(family_name, *(rng.choice(axes[name]) for name in FIELDS)) for _ in range(40_000)]
    legal = (config for config in drawn if family.reject_reason(config, fmt, arch) is None)
    return tuple(islice(legal, wanted)), len(drawn)


@pytest.mark.parametrize(("family", "arch", "fmt"), CASES)
def test_legal_configs_fit_the_hardware(family, arch, fmt):
    configs, _ = sample(family, arch, fmt)
    family, arch, fmt = FAMILIES.rows[family], ARCHS[arch], FORMATS[fmt]
    if family.name == "wgmma" and not arch.has_wgmma:
        assert not configs
        return
    assert len(configs) > 40, "the axes should mostly miss nothing but combinations"
    for config in configs:
        threads, smem = family.threads(config), family.smem_bytes(config, fmt)
        assert threads % 32 == 0 and 32 <= threads <= 1024, config.key
        assert 0 < smem <= arch.smem_per_block, config.key
        blocks_fit = min(arch.smem_per_sm // (smem + arch.smem_reserved), arch.max_threads_per_sm // threads, 16)
        assert blocks_fit >= config.blocks_per_sm, config.key
        registers = family.max_registers(config, arch)
        assert 24 <= registers <= arch.max_registers_per_thread, config.key
        assert registers * threads * config.blocks_per_sm <= arch.registers_per_sm, config.key


@pytest.mark.parametrize(("family", "arch", "fmt"), CASES)
def test_a_rejection_is_a_sentence_that_names_a_value(family, arch, fmt):
    row = FAMILIES.rows[family]
    axes = row.axes(ARCHS[arch])
    rng = random.Random(0)
    reasons = set()
    for _ in range(3000):
        config = KernelConfig(family, *(rng.choice(axes[name]) for name in FIELDS))
        reason = row.reject_reason(config, FORMATS[fmt], ARCHS[arch])
        assert reason is None or any(character.isdigit() for character in reason) or "=" in reason, reason
        reasons.add(reason)
    assert len(reasons) > 1 or not ARCHS[arch].has_wgmma


@pytest.mark.parametrize(("family", "arch"), sorted({(f, a) for f, a, _ in CASES}))
def test_axes_cover_every_field_once_and_in_order(family, arch):
    axes = FAMILIES.rows[family].axes(ARCHS[arch])
    assert set(axes) == set(FIELDS)
    for name, values in axes.items():
        assert len(set(values)) == len(values) > 0, name
        if isinstance(values[0], int):
            assert list(values) == sorted(values), name


@pytest.mark.parametrize(("family", "arch", "fmt"), CASES)
def test_one_step_off_legal_is_judged_without_an_error(family, arch, fmt):
    """A search steps to neighbours: every answer is None or a sentence, never an exception."""
    row, arch_row, fmt_row = FAMILIES.rows[family], ARCHS[arch], FORMATS[fmt]
    for config in sample(family, arch, fmt)[0][:40]:
        for name, values in row.axes(arch_row).items():
            for value in values:
                reason = row.reject_reason(replace(config, **{name: value}), fmt_row, arch_row)
                assert reason is None or isinstance(reason, str)


@pytest.mark.parametrize("family", sorted(FAMILIES.rows))
@pytest.mark.parametrize("gpu", GPUS, ids=lambda gpu: f"sm_{gpu.capability[0]}{gpu.capability[1]}")
@pytest.mark.parametrize("fmt", sorted(FORMATS))
def test_defaults_are_legal_and_listed(family, gpu, fmt):
    row = FAMILIES.rows[family]
    if row.name == "wgmma" and not gpu.arch.has_wgmma:
        assert not list(row.defaults(gpu.arch, FORMATS[fmt]))
        return
    listed = list(row.defaults(gpu.arch, FORMATS[fmt]))
    assert listed and len(set(listed)) == len(listed)
    for config in listed:
        assert row.reject_reason(config, FORMATS[fmt], gpu.arch) is None, config.key
    for problem in PROBLEMS:
        problem = replace(problem, weight_format=fmt)
        plan = row.default(problem, gpu)
        assert plan.config in listed, f"{plan.key} would not ship prebuilt"


@pytest.mark.parametrize("gpu", GPUS, ids=lambda gpu: f"sm_{gpu.capability[0]}{gpu.capability[1]}")
def test_the_default_plan_serves_every_problem(gpu):
    for problem in [*PROBLEMS, Problem(64, 128, 1), Problem(128256, 4096, 3), Problem(64, 64 * 45 * 2, 17)]:
        plan = default_plan(problem, gpu)
        family = FAMILIES.of(plan.config)
        assert family.reject_reason(plan.config, FORMATS[problem.weight_format], gpu.arch) is None
        assert family.reject_problem(plan.config, problem) is None


@pytest.mark.parametrize(("family", "arch", "fmt"), CASES)
def test_launch_shapes_are_launchable(family, arch, fmt):
    row, num_sms = FAMILIES.rows[family], 132
    for config in sample(family, arch, fmt)[0][:60]:
        for problem in PROBLEMS:
            problem = replace(problem, weight_format=fmt)
            if row.reject_problem(config, problem):
                continue
            max_clusters = num_sms * config.blocks_per_sm // config.cluster_size
            for raster in row.rasters(config, problem):
                shape = row.launch_shape(Plan(config, raster), problem, num_sms, max_clusters)
                assert shape.grid > 0 and shape.grid % shape.cluster == 0, config.key
                assert shape.cluster == config.cluster_size
                assert (shape.threads, shape.smem_bytes) == (row.threads(config), row.smem_bytes(config, FORMATS[fmt]))
                assert set(shape.operands) <= set(OPERANDS)
                assert all(-(2**31) <= scalar < 2**31 for scalar in shape.scalars), "int32 arguments"
                if config.partition == "striped":
                    assert shape.grid <= max_clusters * config.cluster_size, "blocks that wait must all be resident"
                for box in (shape.a_box, shape.c_box):
                    assert all(side <= 256 for side in box), "a TMA box has at most 256 elements a side"


def test_an_unknown_family_lists_the_known_ones():
    with pytest.raises(ValueError, match="unknown kernel family 'simt'; known: mma, wgmma"):
        FAMILIES.of(KernelConfig("simt", *[1] * 8, "tiles", "exact"))


def test_warpgroups_along_k_never_share_a_stage():
    """Else a parity wait can be two phases off and pass at once, on copies that have not landed."""
    uneven = KernelConfig.from_key("wgmma-m8n64k64-w4x2-s5-b1-c1-tiles-exact")
    reason = FAMILIES.of(uneven).reject_reason(uneven, FORMATS["u4b8g128"], ARCHS["sm_90a"])
    assert reason is not None and reason.startswith("num_stages=5 is not a multiple of warps_k=2")
    even = replace(uneven, num_stages=6)
    assert FAMILIES.of(even).reject_reason(even, FORMATS["u4b8g128"], ARCHS["sm_90a"]) is None


@pytest.mark.parametrize("group_size", [8, 16, 48, 96])
@pytest.mark.parametrize("family", sorted(FAMILIES.rows))
def test_groups_that_no_kernel_decodes_are_refused(family, group_size):
    fmt = replace(FORMATS["u4b8g32"], name="odd", group_size=group_size)
    row, arch = FAMILIES.rows[family], ARCHS["sm_90a"]
    for config in row.defaults(arch, FORMATS["u4b8g32"]):
        config = replace(config, dequant="exact")
        assert row.reject_reason(config, FORMATS["u4b8g32"], arch) is None
        reason = row.reject_reason(config, fmt, arch)
        assert reason == "weight format odd is not in groups of 32 or of a multiple of 64"


@given(st.integers(1, 2**31 - 1), st.integers(0, 2**31 - 1))
@example(1, 2**31 - 1)
@example(2**31 - 1, 2**31 - 1)
@example(2**31 - 1, 2**31 - 2)
@example(3, 2**31 - 2)
def test_a_reciprocal_divides_exactly(divisor, a):
    multiplier, shift = reciprocal(divisor)
    assert -(2**31) <= multiplier < 2**31 and 31 <= shift <= 62  # an int32, and a shift of the 64-bit product
    assert (a * (multiplier % 2**32)) >> shift == a // divisor


@pytest.mark.parametrize("config", FAMILIES.rows["wgmma"].defaults(ARCHS["sm_90a"], FORMATS["u4b8g128"]))
def test_rasters_are_powers_of_two(config):
    """The kernel shifts by them; a plan with another is walked as with the next."""
    family = FAMILIES.rows["wgmma"]
    for n, m in ((64, 300), (192, 1000), (448, 4096), (28672, 4096)):
        problem = Problem(n, config.block_k * 8, m)
        rasters = family.rasters(config, problem)
        assert rasters and all(r & (r - 1) == 0 for r in rasters)
        shapes = [family.launch_shape(Plan(config, r), problem, 132, 132) for r in (3, 4)]
        assert shapes[0] == shapes[1]
