"""What is compiled (``KernelConfig``, ``KernelSpec``) and what is chosen per call (``Plan``).

Every value here round-trips through a readable string key: the key is the file name, the table
cell, the log line and the command-line argument.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, fields
from functools import lru_cache
from typing import Any

from marlin_gen.arch import ARCHS, Arch
from marlin_gen.formats import DTYPES, FORMATS, DType, WeightFormat

PARTITIONS = ("tiles", "clusterk", "striped")
DEQUANTS = ("exact", "deferred")


@dataclass(frozen=True, order=True)
class KernelConfig:
    """One point of the search space. Everything here changes the generated code, and nothing else does."""

    family: str  # "mma" or "wgmma": also the template's stem
    block_m: int  # tokens of a block tile
    block_n: int  # output features of a block tile (one pass); rows of the A operand, since the product is transposed
    block_k: int  # k of one pipeline stage
    warps_n: int  # consumer warps side by side along the features
    warps_k: int  # consumer warps (mma) or warpgroups (wgmma) that split k; their sums meet in shared memory
    num_stages: int  # depth of the shared-memory ring
    blocks_per_sm: int  # resident blocks the kernel is compiled for
    cluster_size: int  # blocks of a cluster; 1 = none
    partition: str  # tiles: whole tiles per block; clusterk: a cluster splits k; striped: even k ranges
    dequant: str  # exact: zero point and scale applied in registers; deferred: the scale to the fp32 sums of each group
    a_stages: int = 0  # depth of a ring of their own for activations; 0: they share the stages of weights

    def __post_init__(self) -> None:
        if self.partition not in PARTITIONS:
            raise ValueError(f"partition={self.partition!r} is not one of {PARTITIONS}")
        if self.dequant not in DEQUANTS:
            raise ValueError(f"dequant={self.dequant!r} is not one of {DEQUANTS}")
        for name in _NUMBERS:
            value = getattr(self, name)
            if not isinstance(value, int) or value < (name != "a_stages"):
                raise ValueError(f"{name}={value!r} is not a positive whole number")

    @property
    def key(self) -> str:
        rings = f"s{self.num_stages}a{self.a_stages}" if self.a_stages else f"s{self.num_stages}"
        return (
            f"{self.family}-m{self.block_m}n{self.block_n}k{self.block_k}-w{self.warps_n}x{self.warps_k}"
            f"-{rings}-b{self.blocks_per_sm}-c{self.cluster_size}-{self.partition}-{self.dequant}"
        )

    @classmethod
    @lru_cache(maxsize=1024)  # a table names each several times
    def from_key(cls, key: str) -> KernelConfig:
        found = _CONFIG_KEY.fullmatch(key)
        if not found:
            raise ValueError(f"not a kernel config key: {key!r}; example: {_EXAMPLE}")
        words = found.groupdict("0")
        values: dict[str, Any] = {**words, **{name: int(words[name]) for name in _NUMBERS}}
        return cls(**values)


_NUMBERS = tuple(f.name for f in fields(KernelConfig) if f.type == "int")
_EXAMPLE = "wgmma-m64n64k256-w4x1-s5-b1-c1-tiles-exact"
_CONFIG_KEY = re.compile(
    r"(?P<family>[a-z]+)-m(?P<block_m>\d+)n(?P<block_n>\d+)k(?P<block_k>\d+)-w(?P<warps_n>\d+)x(?P<warps_k>\d+)"
    r"-s(?P<num_stages>\d+)(?:a(?P<a_stages>[1-9]\d*))?-b(?P<blocks_per_sm>\d+)-c(?P<cluster_size>\d+)"
    r"-(?P<partition>[a-z]+)-(?P<dequant>[a-z]+)"
)


@dataclass(frozen=True, order=True)
class Plan:
    """What a table row names: a compiled config and the order in which its tiles are walked (a launch argument)."""

    config: KernelConfig
    raster: int = 1  # feature tiles walked together before the next token tile; 1 = one by one. A power of two

    @property
    def key(self) -> str:
        return f"{self.config.key}-r{self.raster}"

    @classmethod
    def from_key(cls, key: str) -> Plan:
        stem, _, raster = key.rpartition("-r")
        if not raster.isdigit() or int(raster) < 1:
            raise ValueError(f"not a plan key: {key!r}; example: {_EXAMPLE}-r8")
        return cls(KernelConfig.from_key(stem), int(raster))


@dataclass(frozen=True, order=True)
class KernelSpec:
    """The identity of one binary: a config for one weight format, activation type and target."""

    config: KernelConfig
    weight_format: str
    act_dtype: str
    arch: str

    def __post_init__(self) -> None:
        for name, value, rows in (
            ("weight_format", self.weight_format, FORMATS),
            ("act_dtype", self.act_dtype, DTYPES),
            ("arch", self.arch, ARCHS),
        ):
            if value not in rows:
                raise ValueError(f"{name}={value!r} is not one of {', '.join(sorted(rows))}")

    @property
    def key(self) -> str:
        return f"{self.config.key}-{self.weight_format}-{self.act_dtype}-{self.arch}"

    @classmethod
    def from_key(cls, key: str) -> KernelSpec:
        parts = key.rsplit("-", 3)
        if len(parts) != 4:
            raise ValueError(f"not a kernel spec key: {key!r}; example: {_EXAMPLE}-u4b8g128-f16-sm_90a")
        return cls(KernelConfig.from_key(parts[0]), *parts[1:])

    @property
    def format_row(self) -> WeightFormat:
        return FORMATS[self.weight_format]

    @property
    def dtype_row(self) -> DType:
        return DTYPES[self.act_dtype]

    @property
    def arch_row(self) -> Arch:
        return ARCHS[self.arch]
