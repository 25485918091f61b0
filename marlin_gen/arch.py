"""Hardware, as rows: compile targets (``Arch``) and the identity of one GPU (``Gpu``)."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass, field
from typing import Any

MIN_CAPABILITY = (8, 0)


@dataclass(frozen=True)
class Arch:
    """A compile target and the limits a kernel for it must respect (CUDA C++ guide, technical specifications)."""

    name: str  # also the compiler's target: code=<name>
    capability: tuple[int, int]
    smem_per_block: int  # largest dynamic shared memory of one block, bytes
    smem_per_sm: int  # bytes; every resident block also costs smem_reserved
    max_threads_per_sm: int
    has_tma: bool  # bulk tensor copies, mbarriers with transaction counts, thread block clusters
    has_wgmma: bool

    smem_reserved: int = 1024  # bytes the driver keeps per resident block
    registers_per_sm: int = 65536
    max_registers_per_thread: int = 255

    @property
    def is_ptx(self) -> bool:
        """Whether kernels are PTX, text that the driver compiles for the GPU as it loads them."""
        return self.name.startswith("compute_")


PTX_ARCH = "compute_80"

ARCHS = {
    a.name: a
    for a in (
        # Any GPU from 8.0 on, those of tomorrow included: the least that one of them has.
        Arch(PTX_ARCH, (8, 0), 99 << 10, 100 << 10, 1536, has_tma=False, has_wgmma=False),
        Arch("sm_80", (8, 0), 163 << 10, 164 << 10, 2048, has_tma=False, has_wgmma=False),
        Arch("sm_86", (8, 6), 99 << 10, 100 << 10, 1536, has_tma=False, has_wgmma=False),
        Arch("sm_89", (8, 9), 99 << 10, 100 << 10, 1536, has_tma=False, has_wgmma=False),
        Arch("sm_90a", (9, 0), 227 << 10, 228 << 10, 2048, has_tma=True, has_wgmma=True),
    )
}


def arch_for(capability: tuple[int, int]) -> Arch:
    """The compile target whose code runs on a GPU of this compute capability."""
    if tuple(capability) < MIN_CAPABILITY:
        raise ValueError(
            f"compute capability {capability[0]}.{capability[1]} is too old: marlin_gen needs a GPU of 8.0 or newer"
            " (mma.sync m16n8k16 with cp.async)"
        )
    natives = [a for a in ARCHS.values() if not a.is_ptx and a.capability <= tuple(capability)]
    exact = [a for a in natives if a.capability == tuple(capability)]
    # Plain sm_8x code runs on every later 8.x; the code of another major, or of an "a" target, on no other GPU.
    older = [a for a in natives if a.capability[0] == capability[0] and not a.name.endswith("a")]
    return max(exact or older, key=lambda a: a.capability, default=ARCHS[PTX_ARCH])


@dataclass(frozen=True)
class Gpu:
    """What makes two GPUs interchangeable for a tuned table. The name is metadata: names get rebranded."""

    capability: tuple[int, int]
    num_sms: int
    l2_bytes: int
    smem_per_sm: int  # bytes
    bandwidth_gbs: int  # theoretical DRAM bandwidth: memory clock x bus width x 2
    name: str = field(default="", compare=False)

    # Bandwidths within this factor are one class: boards of one product differ by a few percent.
    BANDWIDTH_CLASS = 1.1

    @property
    def arch(self) -> Arch:
        return arch_for(self.capability)

    @property
    def slug(self) -> str:
        """Folder name of its table, chip first: ``h100-132sm-3352gbs``."""
        chip = re.search(r"\b(?:[A-Z]{1,3}\d{1,4}|RTX \w+)", self.name.replace("NVIDIA ", ""))
        stem = chip.group(0).lower().replace(" ", "") if chip else f"sm{self.capability[0]}{self.capability[1]}"
        return f"{stem}-{self.num_sms}sm-{self.bandwidth_gbs}gbs"

    def same_class(self, other: Gpu) -> bool:
        """Whether a table measured on ``other`` may serve this GPU without a mark."""
        ratio = self.bandwidth_gbs / max(other.bandwidth_gbs, 1)
        return (
            self.related(other)
            and self.l2_bytes == other.l2_bytes
            and self.smem_per_sm == other.smem_per_sm
            and 1 / self.BANDWIDTH_CLASS < ratio < self.BANDWIDTH_CLASS
        )

    def related(self, other: Gpu) -> bool:
        """Whether the two differ by their memory at most, so that each one's rows may serve the other, with a mark."""
        return tuple(self.capability) == tuple(other.capability) and self.num_sms == other.num_sms

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "capability": list(self.capability)}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Gpu:
        return cls(**{**data, "capability": tuple(data["capability"])})
