"""The space is exactly the legal part of the product of the axes, in a fixed order; nearness is what it says."""

from __future__ import annotations

import random

import numpy as np
import pytest

from marlin_gen.arch import ARCHS
from marlin_gen.config import KernelConfig
from marlin_gen.families import FAMILIES
from marlin_gen.formats import FORMATS
from marlin_gen.space import FIELDS, ConfigSpace, candidates_of

SPACES = [ConfigSpace(arch, fmt, FAMILIES) for arch in ARCHS.values() for fmt in FORMATS.values()]


@pytest.mark.parametrize("space", SPACES, ids=lambda s: f"{s.arch.name}-{s.fmt.name}")
def test_agrees_with_the_predicate(space: ConfigSpace) -> None:
    """The short cuts of the enumeration leave nothing out and let nothing in; checked on random points of the axes."""
    listed = space.enumerate()
    legal = set(listed)
    assert len(legal) == len(listed), "a config twice"
    rng = random.Random(0)
    for family in FAMILIES.rows.values():
        axes = family.axes(space.arch)
        for _ in range(20000):
            config = KernelConfig(family.name, *(rng.choice(axes[name]) for name in FIELDS[1:]))
            reason = family.reject_reason(config, space.fmt, space.arch)
            assert (config in legal) == (reason is None), f"{config.key}: {reason}"
        for config in rng.sample(listed, 500):
            assert FAMILIES.of(config).reject_reason(config, space.fmt, space.arch) is None


@pytest.mark.parametrize("space", SPACES, ids=lambda s: f"{s.arch.name}-{s.fmt.name}")
def test_holds_every_default(space: ConfigSpace) -> None:
    legal = set(space.enumerate())
    for family in FAMILIES.rows.values():
        for config in family.defaults(space.arch, space.fmt):
            assert config in legal or family.reject_reason(config, space.fmt, space.arch)


def test_has_both_families_on_hopper_and_one_before() -> None:
    fmt = FORMATS["u4b8g128"]
    assert {c.family for c in ConfigSpace(ARCHS["sm_90a"], fmt, FAMILIES).enumerate()} == {"mma", "wgmma"}
    assert {c.family for c in ConfigSpace(ARCHS["sm_80"], fmt, FAMILIES).enumerate()} == {"mma"}


BASE = KernelConfig("wgmma", 64, 64, 256, 4, 1, 5, 1, 1, "tiles", "exact")
DEEPER = KernelConfig("wgmma", 64, 64, 256, 4, 1, 6, 1, 1, "tiles", "exact")
WIDER = KernelConfig("wgmma", 128, 64, 256, 4, 1, 5, 1, 1, "tiles", "exact")
OTHER = KernelConfig("mma", 64, 64, 256, 4, 1, 5, 1, 1, "tiles", "exact")


def test_distance_orders_changes_by_weight() -> None:
    candidates = candidates_of([BASE, DEEPER, WIDER, OTHER, BASE])
    assert len(candidates) == 4
    zero, deeper, wider, other = candidates.distances(vars(BASE))
    assert 0 == zero < deeper < wider < other


def test_nearest_takes_the_cheaper_of_equals_and_only_free_ones() -> None:
    twin = KernelConfig("wgmma", 32, 64, 256, 4, 1, 5, 1, 1, "tiles", "exact")  # one octave from BASE, as WIDER is
    candidates = candidates_of([BASE, WIDER, twin, OTHER])
    cost = np.array([1.0, 3.0, 2.0, 0.5])
    free = np.array([True, True, True, True])
    assert candidates.nearest(vars(BASE), free, cost) == 0
    free[0] = False
    assert candidates.nearest(vars(BASE), free, cost) == 2
