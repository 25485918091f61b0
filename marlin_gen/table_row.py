"""The entries of a dispatch table: the plan that won one problem, and the compiled kernel it needs."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Collection, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

from marlin_gen.arch import Gpu
from marlin_gen.config import KernelConfig, KernelSpec, Plan
from marlin_gen.families import FAMILIES
from marlin_gen.families.defaults import default_specs
from marlin_gen.measurement import Artifact, Baseline, Measurement
from marlin_gen.problem import Problem

T = TypeVar("T")
_WHOLE = 1 << 53  # above it a float is not every whole number
_MAX_SIZE = (1 << 31) - 1  # kernels take sizes as int32
_FORMS = {"symbol": re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,255}"), "sha256": re.compile(r"[0-9a-f]{64}")}


class FieldError(ValueError):
    """A field of a table is missing or wrong; the message names it."""


def take(data: Any, name: str, kind: type[T]) -> T:
    """``data[name]``, checked to be a ``kind``; a FieldError that names it otherwise. Whole numbers count as floats."""
    if not isinstance(data, dict):
        raise FieldError(f"{data!r:.60} is not an object")
    value = data.get(name)
    if kind is float and type(value) is int and abs(value) < _WHOLE:
        value = float(value)
    if type(value) is not kind or (isinstance(value, float) and not math.isfinite(value)):
        raise FieldError(f"{name}={value!r:.60} is not a {kind.__name__}" if name in data else f"{name} is missing")
    return value


def size(data: Any, name: str) -> int:
    """``data[name]``, a whole number that an int32 holds, not negative; a FieldError that names it otherwise."""
    value = take(data, name, int)
    if not 0 <= value <= _MAX_SIZE:
        raise FieldError(f"{name}={value!r:.60} is not one of 0 to {_MAX_SIZE}")
    return value


def check_form(kind: str, value: str) -> None:
    """A FieldError unless ``value`` is written as a "symbol" or a "sha256" is."""
    if not _FORMS[kind].fullmatch(value):
        raise FieldError(f"{kind}={value!r:.80} is not one")


@dataclass(frozen=True)
class KernelEntry:
    """A compiled kernel as a table names it; the cubin lies in the file of its kind (``kernel_pack``)."""

    sha256: str  # of the cubin, hex
    symbol: str
    registers: int  # per thread
    smem_bytes: int  # dynamic shared memory per block

    @classmethod
    def of(cls, artifact: Artifact) -> KernelEntry:
        spec = artifact.spec
        smem_bytes = FAMILIES.of(spec.config).smem_bytes(spec.config, spec.format_row)
        sha256 = hashlib.sha256(artifact.cubin.read_bytes()).hexdigest()
        return cls(sha256, artifact.symbol, artifact.registers, smem_bytes)

    def artifact(self, spec: KernelSpec, cubin: bytes, scratch: Path) -> Artifact:
        """As a measurer takes it: a file below ``scratch`` with ``cubin``, which this entry is of."""
        folder = scratch / spec.key
        folder.mkdir(exist_ok=True)
        (folder / "kernel.cubin").write_bytes(cubin)
        return Artifact(spec, self.symbol, folder, self.registers, spill_bytes=0, static_smem_bytes=0)

    def is_of(self, cubin: bytes) -> bool:
        """Whether these are the bytes that were entered."""
        return hashlib.sha256(cubin).hexdigest() == self.sha256

    @classmethod
    def from_json(cls, key: str, data: Any) -> KernelEntry:
        """The kernel of spec ``key``; a ValueError names the first fault."""
        if KernelSpec.from_key(key).key != key:  # as with m08 for m8
            raise FieldError(f"{key!r} is not written as {KernelSpec.from_key(key).key!r}")
        names = (take(data, "sha256", str), take(data, "symbol", str))
        for name in ("sha256", "symbol"):
            check_form(name, data[name])
        return cls(*names, size(data, "registers"), size(data, "smem_bytes"))


@dataclass(frozen=True)
class TableRow:
    """Times are medians in microseconds, ``us_low .. us_high`` the 95 % interval; None where nothing was measured."""

    problem: Problem
    plan: Plan
    us: float
    us_low: float
    us_high: float
    relative_error: float  # against the fp32 reference
    default_plan: Plan | None = None  # what the family would do without a table
    default_us: float | None = None
    cublas_us: float | None = None  # fp16 matmul with the dense weight
    read_floor_us: float | None = None  # a plain read of the packed bytes

    def __post_init__(self) -> None:
        if not 0 < self.us_low <= self.us <= self.us_high:
            raise FieldError(f"us={self.us} does not lie between us_low={self.us_low} and us_high={self.us_high}")
        for name in ("default_us", "cublas_us", "read_floor_us"):
            if (us := getattr(self, name)) is not None and not us > 0:
                raise FieldError(f"{name}={us} is not a time")
        if not 0 <= self.relative_error <= self.problem.error_limit:
            raise FieldError(f"relative_error={self.relative_error} is above {self.problem.error_limit}")
        for plan in (self.plan, self.default_plan):
            if plan:
                FAMILIES.of(plan.config)  # a ValueError names an unknown family

    @classmethod
    def of(cls, winner: Measurement, default: Measurement | None, baseline: Baseline | None) -> TableRow:
        """The row of one problem's finalists. ``winner`` must have been measured and right."""
        if not winner.ok or winner.us is None or winner.relative_error is None:
            raise ValueError(f"{winner.plan.key} has status {winner.status!r} and cannot be a row")
        return cls(
            winner.problem, winner.plan, winner.us, winner.us_low or winner.us, winner.us_high or winner.us,
            winner.relative_error,
            default_plan=default.plan if default else None,
            default_us=default.us if default and default.ok else None,
            cublas_us=baseline.cublas_us if baseline else None,
            read_floor_us=baseline.read_floor_us if baseline else None,
        )  # fmt: skip

    def specs(self, gpu: Gpu) -> list[KernelSpec]:
        """The kernels this row needs on ``gpu``: the plan's, then the default's."""
        p, plans = self.problem, [plan for plan in (self.plan, self.default_plan) if plan]
        return [KernelSpec(plan.config, p.weight_format, p.act_dtype, gpu.arch.name) for plan in plans]

    def to_json(self) -> dict[str, Any]:
        """Named fields in reading order. Times are rounded to a nanosecond."""
        row: dict[str, Any] = {**vars(self.problem), "plan": _plan_to_json(self.plan)}
        row |= {name: round(getattr(self, name), 3) for name in ("us", "us_low", "us_high")}
        row["default_plan"] = _plan_to_json(self.default_plan) if self.default_plan else None
        for name in ("default_us", "cublas_us", "read_floor_us"):
            value = getattr(self, name)
            row[name] = None if value is None else round(value, 3)
        row["relative_error"] = float(f"{self.relative_error:.3g}")
        return row

    @classmethod
    def from_json(cls, data: Any) -> TableRow:
        """The inverse of ``to_json``; a ValueError names the first fault."""
        n, k, m = (size(data, name) for name in ("n", "k", "m"))
        us, low, high, error = (take(data, name, float) for name in ("us", "us_low", "us_high", "relative_error"))
        default_us, cublas_us, read_floor_us = (
            None if data.get(name) is None else take(data, name, float)
            for name in ("default_us", "cublas_us", "read_floor_us")
        )
        return cls(
            Problem(n, k, m, take(data, "weight_format", str), take(data, "act_dtype", str)),
            _plan_from_json(take(data, "plan", dict)), us, low, high, error,
            _plan_from_json(take(data, "default_plan", dict)) if data.get("default_plan") is not None else None,
            default_us, cublas_us, read_floor_us,
        )  # fmt: skip


def _plan_to_json(plan: Plan) -> dict[str, Any]:
    config = asdict(plan.config)
    if not plan.config.a_stages:  # as tables were written before there was the field
        del config["a_stages"]
    return {**config, "raster": plan.raster}


def _plan_from_json(data: dict[str, Any]) -> Plan:
    take(data, "family", str)
    for name in data:
        if name not in ("family", "partition", "dequant"):
            size(data, name)
    try:
        config = KernelConfig(**{name: value for name, value in data.items() if name != "raster"})
    except TypeError as error:
        raise FieldError(f"plan: {error}") from None
    raster = size(data, "raster")
    if raster < 1:
        raise FieldError(f"raster={raster} is not a positive whole number")
    return Plan(config, raster)


def defaults_beside(gpu: Gpu, rows: Iterable[TableRow]) -> list[KernelSpec]:
    """What shapes that these rows lack may be served with: every default of the numbers that the rows are for."""
    return default_specs(gpu.arch, sorted({row.problem.kind for row in rows}))


def named_kernels(gpu: Gpu, rows: Collection[TableRow]) -> set[str]:
    """The spec keys that a look-up among these rows may name: theirs, and the defaults beside them."""
    return {spec.key for row in rows for spec in row.specs(gpu)} | {spec.key for spec in defaults_beside(gpu, rows)}


def chosen_rows(old: Iterable[TableRow], newer: Iterable[TableRow], prefer: str) -> dict[Problem, TableRow]:
    """One row of each problem; of two ``prefer`` says which: the "newer", the "older" or the "faster"."""
    rows = {row.problem: row for row in old}
    for row in newer:
        known = rows.get(row.problem)
        if known is None or prefer == "newer" or (prefer == "faster" and row.us < known.us):
            rows[row.problem] = row
    return rows
