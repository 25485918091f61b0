"""What a kernel family is: the whole extension surface for a new kind of kernel."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any, Protocol

from marlin_gen.arch import Arch, Gpu
from marlin_gen.config import KernelConfig, KernelSpec, Plan
from marlin_gen.formats import WeightFormat
from marlin_gen.problem import Problem

# What a launch passes to a kernel, and how: OPERANDS, scalars, tensor maps, workspace. A prebuilt kernel takes its
# arguments as they were when it was compiled, so tables of another version are not used. A new order is a new number.
# 2: a tensor map for the last token tile, and a bias. 3: a dependent kernel waits before it reads activations. 4: the
# host cuts the stripes, each of which has one lock. 5: clusters have a smaller inbox, so less shared memory. 6: the
# wgmma family divides by reciprocals.
LAUNCH_VERSION = 6


@dataclass(frozen=True)
class LaunchShape:
    """How one plan is launched on one problem: everything but the pointers.

    Kernel arguments are ``operands`` in order, then ``scalars`` as int32 in order, then whether the launch is dependent
    (``Launcher.run_with``).
    """

    grid: int  # blocks
    threads: int  # per block
    smem_bytes: int  # dynamic shared memory per block
    cluster: int
    operands: tuple[str, ...]  # of OPERANDS
    scalars: tuple[int, ...]
    a_box: tuple[int, int] = (0, 0)  # (tokens, k) of one TMA box of A, if "a_map" is an operand
    a_tail_rows: int = 0  # tokens of a box of "a_tail_map": those of the last token tile
    c_box: tuple[int, int] = (0, 0)  # (tokens, features) of one TMA box of C, if "c_map" is an operand
    partials_bytes: int = 0  # fp32 scratch for split tiles; contents need not survive or be zeroed
    num_locks: int = 0  # int32 words, zero before the launch and zero again after it

    def map_of(self, operand: str) -> tuple[str, tuple[int, int]] | None:
        """Of a tensor-map operand the matrix, "a" or "c", and the (rows, columns) of its box; None of a pointer."""
        return {
            "a_map": ("a", self.a_box),
            "a_tail_map": ("a", (self.a_tail_rows, self.a_box[1])),
            "c_map": ("c", self.c_box),
        }.get(operand)


# Names a kernel's pointer arguments may have. *_map are 128-byte CUtensorMap values (128-byte swizzle), the others
# device pointers; "bias" is null where there is none.
OPERANDS = ("a_map", "a_tail_map", "c_map", "a", "c", "weight", "scales", "bias", "partials", "locks")


def reciprocal(divisor: int) -> tuple[int, int]:
    """(multiplier, shift): a // divisor == a * multiplier >> shift for 0 <= a < 2**31, by which kernels divide.

    The multiplier is below 2**32; as an int32, like all scalars, it may be negative.
    """
    shift = 31 + (divisor - 1).bit_length()
    multiplier = -(-(1 << shift) // divisor)
    return multiplier - (multiplier >> 31 << 32), shift


class KernelFamily(Protocol):
    """One template and what the host must know about it. Pure: no torch, no driver."""

    name: str  # template stem, kernel symbol prefix, KernelConfig.family
    summary: str  # one line for people

    def axes(self, arch: Arch) -> dict[str, tuple[Any, ...]]:
        """Candidate values per KernelConfig field (all but ``family``), in their natural order."""
        ...

    def reject_reason(self, config: KernelConfig, fmt: WeightFormat, arch: Arch) -> str | None:
        """The only statement of legality of a binary: None, or a sentence that names the value that is wrong."""
        ...

    def reject_problem(self, config: KernelConfig, problem: Problem) -> str | None:
        """Why this binary cannot serve this problem, as a sentence; None when it can."""
        ...

    def default(self, problem: Problem, gpu: Gpu) -> Plan:
        """A good plan without a table."""
        ...

    def defaults(self, arch: Arch, fmt: WeightFormat) -> tuple[KernelConfig, ...]:
        """Every config that ``default`` may return: they are seeds of a search and ship prebuilt."""
        ...

    def rasters(self, config: KernelConfig, problem: Problem) -> tuple[int, ...]:
        """Tile orders worth timing on this problem; (1,) where the order cannot matter."""
        ...

    def threads(self, config: KernelConfig) -> int: ...

    def smem_bytes(self, config: KernelConfig, fmt: WeightFormat) -> int:
        """Dynamic shared memory of one block; the kernel static_asserts the same number."""
        ...

    def resident_blocks(self, config: KernelConfig, fmt: WeightFormat, arch: Arch) -> int:
        """How many blocks an SM should hold at once; the driver knows it only of a compiled kernel."""
        ...

    def max_registers(self, config: KernelConfig, arch: Arch) -> int:
        """Registers per thread at launch that leave room for ``blocks_per_sm`` blocks."""
        ...

    def template_values(self, spec: KernelSpec) -> dict[str, Any]:
        """What the template prints beside the config: host numbers to assert, lists to unroll."""
        ...

    def launch_shape(self, plan: Plan, problem: Problem, num_sms: int, max_clusters: int) -> LaunchShape:
        """Grid and scalars. ``max_clusters`` is how many clusters (blocks, if cluster_size is 1) fit at once."""
        ...


@cache  # a look-up without a table asks for each problem
def fitted(
    family: KernelFamily, configs: tuple[KernelConfig, ...], fmt: WeightFormat, arch: Arch
) -> tuple[KernelConfig, ...]:
    """The configs with as many stages as a format allows, up to their own; those that it never allows are left out."""
    found = []
    for config in configs:
        fewer = (replace(config, num_stages=stages) for stages in range(config.num_stages, 1, -1))
        if legal := next((c for c in fewer if family.reject_reason(c, fmt, arch) is None), None):
            found.append(legal)
    return tuple(dict.fromkeys(found))


def reject_format(fmt: WeightFormat, dequant: str) -> str | None:
    """Why no family decodes this format this way, as a sentence; None when they do."""
    # A packed word quad is 64 k: it lies in one group, or holds two.
    if fmt.group_size % 64 and fmt.group_size != 32:
        return f"weight format {fmt.name} is not in groups of 32 or of a multiple of 64"
    if dequant == "deferred" and (fmt.group_size % 64 or fmt.offset in ("fractions", "minima")):
        return (
            f"dequant=deferred scales sums of exact numbers, of 64 k and more; {fmt.name} has finer groups, or"
            " offsets with fractions"
        )
    return None


@dataclass(frozen=True)
class Registry:
    """The families by name."""

    rows: dict[str, KernelFamily] = field(default_factory=dict)

    def of(self, config: KernelConfig) -> KernelFamily:
        if config.family not in self.rows:
            raise ValueError(f"unknown kernel family {config.family!r}; known: {', '.join(sorted(self.rows))}")
        return self.rows[config.family]
