"""GPUs, plans and tables that the table and dispatch tests share."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from marlin_gen import kernel_pack
from marlin_gen.arch import Gpu
from marlin_gen.config import KernelConfig, KernelSpec, Plan
from marlin_gen.measurement import Artifact
from marlin_gen.problem import Problem
from marlin_gen.table import FILE_NAME, DispatchTable
from marlin_gen.table_file import seal
from marlin_gen.table_row import TableRow

H100 = Gpu((9, 0), 132, 52428800, 233472, 3352, "NVIDIA H100 80GB HBM3")
H200 = Gpu((9, 0), 132, 52428800, 233472, 4800, "NVIDIA H200")
A100 = Gpu((8, 0), 108, 41943040, 167936, 2039, "NVIDIA A100-SXM4-80GB")


def mma(block_n: int = 32, block_m: int = 8) -> Plan:
    return Plan(KernelConfig("mma", block_m, block_n, 64, 1, 4, 4, 1, 1, "tiles", "exact"))


def wgmma(block_m: int = 64, block_k: int = 128, raster: int = 1) -> Plan:
    return Plan(KernelConfig("wgmma", block_m, 64, block_k, 4, 1, 4, 1, 1, "tiles", "exact"), raster)


def row(n: int, k: int, m: int, plan: Plan, us: float = 10.0, default: Plan | None = None) -> TableRow:
    return TableRow(
        Problem(n, k, m), plan, us, us - 0.1, us + 0.1, 2.1e-4, default, us + 1 if default else None, 20.0, 4.0
    )


def artifact(
    folder: Path, plan: Plan, content: bytes = b"", arch: str = "sm_90a", weight_format: str = "u4b8g128"
) -> Artifact:
    """A stand-in for a compiled kernel: tables never look inside a cubin."""
    spec = KernelSpec(plan.config, weight_format, "f16", arch)
    directory = folder / spec.key
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "kernel.cubin").write_bytes(content or spec.key.encode())
    return Artifact(spec, f"symbol_of_{plan.config.family}", directory, 128, 0, 0)


def pack_of(found: DispatchTable, key: str) -> Path:
    """The file that the table names for this kernel and others of its kind."""
    assert found.folder
    return found.folder / found.packs[kernel_pack.kind_of(key)]


def damage(found: DispatchTable, key: str, content: bytes | None = b"damaged") -> None:
    """Put another cubin in the place of one, or none; the others of its file stay."""
    path = pack_of(found, key)
    cubins = {**kernel_pack.unpacked(path.read_bytes()), key: content}
    path.write_bytes(kernel_pack.pack({k: v for k, v in cubins.items() if v is not None}))


def table(folder: Path, rows: list[TableRow], gpu: Gpu = H100, date: str = "2026-01-01") -> DispatchTable:
    """A table of these rows, written to ``folder`` / its slug with made-up cubins."""
    plans = {plan.config: plan for r in rows for plan in (r.plan, r.default_plan) if plan}
    artifacts = [artifact(folder / "cache", plan, arch=gpu.arch.name) for plan in plans.values()]
    return DispatchTable.build(gpu, rows, artifacts, {"date": date}).write(folder / gpu.slug, artifacts)


def load(folder: Path) -> DispatchTable:
    """Load, with any warning an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = DispatchTable.load(folder)
    assert found is not None
    return found


def edit(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change a table as another program might write it: its own sha256 is right."""
    data = json.loads((folder / FILE_NAME).read_text())
    del data["sha256"]
    change(data)
    (folder / FILE_NAME).write_text(seal(json.dumps(data)[1:]))
