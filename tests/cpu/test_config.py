"""Keys: what is printed reads back as the same value; what is not a key says so."""

from __future__ import annotations

import re
from dataclasses import fields, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from marlin_gen.arch import ARCHS
from marlin_gen.config import DEQUANTS, PARTITIONS, KernelConfig, KernelSpec, Plan
from marlin_gen.formats import DTYPES, FORMATS

NUMBER = st.integers(1, 100_000)
CONFIGS = st.builds(
    KernelConfig,
    st.from_regex(r"[a-z]+", fullmatch=True),
    *[NUMBER] * 8,
    st.sampled_from(PARTITIONS),
    st.sampled_from(DEQUANTS),
)
PLANS = st.builds(Plan, CONFIGS, NUMBER)
SPECS = st.builds(KernelSpec, CONFIGS, *(st.sampled_from(sorted(rows)) for rows in (FORMATS, DTYPES, ARCHS)))
EXAMPLE = KernelConfig("wgmma", 64, 64, 256, 4, 1, 5, 1, 1, "tiles", "exact")


@given(CONFIGS)
def test_config_key_round_trip(config):
    assert KernelConfig.from_key(config.key) == config


@given(PLANS)
def test_plan_key_round_trip(plan):
    assert Plan.from_key(plan.key) == plan


@given(SPECS)
def test_spec_key_round_trip(spec):
    assert KernelSpec.from_key(spec.key) == spec
    assert re.fullmatch(r"[A-Za-z0-9_-]+", spec.key), "a file name"
    assert (spec.format_row.name, spec.dtype_row.name, spec.arch_row.name) == (
        spec.weight_format, spec.act_dtype, spec.arch,
    )  # fmt: skip


@given(CONFIGS, st.sampled_from([f.name for f in fields(KernelConfig) if f.type == "int"]))
def test_every_field_shows_in_the_key(config, name):
    assert replace(config, **{name: getattr(config, name) + 1}).key != config.key


@pytest.mark.parametrize("key", ["", "wgmma", EXAMPLE.key + "-", EXAMPLE.key.upper(), "x" + EXAMPLE.key + "-r2"])
def test_what_is_not_a_config_key(key):
    with pytest.raises(ValueError, match=r"not a kernel config key: .*; example: wgmma-m64"):
        KernelConfig.from_key(key)


@pytest.mark.parametrize("key", ["", EXAMPLE.key, EXAMPLE.key + "-r0", EXAMPLE.key + "-rx", EXAMPLE.key + "-r-1"])
def test_what_is_not_a_plan_key(key):
    with pytest.raises(ValueError, match=r"not a plan key: .*; example: .*-r8"):
        Plan.from_key(key)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"partition": "diagonal"}, "partition='diagonal' is not one of"),
        ({"dequant": "later"}, "dequant='later' is not one of"),
        ({"block_m": 0}, "block_m=0 is not a positive whole number"),
        ({"num_stages": 2.5}, "num_stages=2.5 is not a positive whole number"),
        ({"cluster_size": "2"}, "cluster_size='2' is not a positive whole number"),
    ],
)
def test_config_is_checked_when_built(change, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        replace(EXAMPLE, **change)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("u3", "f16", "sm_90a"), "weight_format='u3' is not one of"),
        (("u4b8g128", "f64", "sm_90a"), "act_dtype='f64' is not one of"),
        (("u4b8g128", "f16", "sm_75"), "arch='sm_75' is not one of"),
    ],
)
def test_spec_is_checked_when_built(arguments, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        KernelSpec(EXAMPLE, *arguments)
