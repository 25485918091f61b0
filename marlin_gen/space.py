"""The search space: every legal config of an architecture, and what "near" means in it. Pure; no torch."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from itertools import product
from typing import Any

import numpy as np
from numpy.typing import NDArray

from marlin_gen.arch import Arch
from marlin_gen.config import KernelConfig
from marlin_gen.families.base import KernelFamily, Registry
from marlin_gen.formats import WeightFormat

FIELDS = tuple(f.name for f in fields(KernelConfig))
NUMBERS = tuple(f.name for f in fields(KernelConfig) if f.type == "int")
WORDS = tuple(name for name in FIELDS if name not in NUMBERS)

# How far apart two values of a field are: one octave of a number, or another word, counts this much. The family
# decides what the other fields mean, so it outweighs them; a wrong token tile costs more time than a ring one deeper.
WEIGHTS = {"family": 6.0, "partition": 2.0, "block_m": 2.0, "block_n": 1.5}

# Along these a config only ever needs more of the machine: what is illegal at one value is illegal at all greater ones,
# but for a ring too short to work, of which the reason begins with its value. Skipping that way makes it 10x quicker.
MONOTONE = ("num_stages", "blocks_per_sm")


@dataclass(frozen=True)
class ConfigSpace:
    """Every config that the families can build for one architecture and one weight format."""

    arch: Arch
    fmt: WeightFormat
    families: Registry

    def enumerate(self) -> list[KernelConfig]:
        """All legal configs, families by name, each in the order of its axes; equal inputs give equal lists."""
        key = (self.arch, self.fmt, *((name, id(family)) for name, family in sorted(self.families.rows.items())))
        if key not in _ENUMERATED:
            rows = sorted(self.families.rows.items())
            _ENUMERATED[key] = tuple(config for _, family in rows for config in self._of(family))
        return list(_ENUMERATED[key])

    def _of(self, family: KernelFamily) -> Iterator[KernelConfig]:
        axes = family.axes(self.arch)
        if unknown := set(axes) ^ set(FIELDS[1:]):
            raise ValueError(f"family {family.name!r} must list an axis for each field but family; differs: {unknown}")
        listed = set()
        for config in self._product(family.name, axes, family):
            listed.add(config)
            yield config
        # A default may lie off the axes (a row count made for one shape); it is a legal candidate all the same.
        for config in family.defaults(self.arch, self.fmt):
            if config not in listed and family.reject_reason(config, self.fmt, self.arch) is None:
                listed.add(config)
                yield config

    def _product(self, name: str, axes: Mapping[str, tuple[Any, ...]], family: KernelFamily) -> Iterator[KernelConfig]:
        """The legal part of the product of the axes, without walking what lies beyond a rejection along MONOTONE."""
        outer = [field for field in FIELDS[1:] if field not in MONOTONE]
        for values in product(*(axes[field] for field in outer)):
            fixed = dict(zip(outer, values, strict=True))
            for blocks in sorted(axes["blocks_per_sm"]):
                any_legal = False
                for stages in sorted(axes["num_stages"]):
                    config = KernelConfig(name, **fixed, blocks_per_sm=blocks, num_stages=stages)
                    reason = family.reject_reason(config, self.fmt, self.arch)
                    if reason is None:
                        any_legal = True
                        yield config
                    elif not reason.startswith("num_stages="):  # not a ring that is too short, so deeper is no better
                        break
                if not any_legal:
                    break


_ENUMERATED: dict[tuple[Any, ...], tuple[KernelConfig, ...]] = {}  # a process asks for the same space many times


@dataclass(frozen=True, eq=False)
class Candidates:
    """A fixed list of configs with a numeric image of each, so that nearness is one array expression."""

    configs: tuple[KernelConfig, ...]

    def __len__(self) -> int:
        return len(self.configs)

    @cached_property
    def index(self) -> dict[KernelConfig, int]:
        return {config: i for i, config in enumerate(self.configs)}

    @cached_property
    def choices(self) -> dict[str, tuple[Any, ...]]:
        """The values of each field that occur, sorted."""
        return {name: tuple(sorted({getattr(c, name) for c in self.configs})) for name in FIELDS}

    @cached_property
    def features(self) -> NDArray[np.float32]:
        """(configs, columns): the logarithm of each number and one 0/1 column per word, all scaled by WEIGHTS."""
        return np.array([self._image(vars(config)) for config in self.configs], dtype=np.float32)

    def _image(self, values: Mapping[str, Any]) -> list[float]:
        values = {**values, "a_stages": values["a_stages"] or values["num_stages"]}
        numbers = [math.log2(values[name]) * WEIGHTS.get(name, 1.0) for name in NUMBERS]
        # Two words that differ differ in two columns, hence the half.
        words = [
            0.5 * WEIGHTS.get(name, 1.0) * (values[name] == word) for name in WORDS for word in self.choices[name]
        ]
        return numbers + words

    def distances(self, values: Mapping[str, Any]) -> NDArray[np.float32]:
        """(configs,): the weighted L1 distance of each candidate from the given field values."""
        image = np.array(self._image(values), dtype=np.float32)
        found: NDArray[np.float32] = np.abs(self.features - image).sum(axis=1)
        return found

    def nearest(self, values: Mapping[str, Any], free: NDArray[np.bool_], cost: NDArray[np.floating]) -> int:
        """The free candidate nearest to ``values`` (which need not be legal); of equals the one of least cost."""
        open_ = np.flatnonzero(free)
        distance = self.distances(values)[open_]
        ties = open_[distance <= distance.min() + 1e-4]
        return int(ties[np.argmin(cost[ties])])

    def within(self, configs: Iterable[KernelConfig]) -> list[int]:
        """The indices of those configs that are candidates, in the order given."""
        return [self.index[c] for c in configs if c in self.index]


def candidates_of(configs: Sequence[KernelConfig]) -> Candidates:
    """Candidates without repeats, order kept."""
    return Candidates(tuple(dict.fromkeys(configs)))
