"""CPU time of one eager call, on a GPU: marlin_gen.gemm by both launchers beside torch.nn.functional.linear.

    python tools/overhead.py --csv overhead.csv

Short batches of calls are timed on the CPU's clock, the GPU is waited for between them, and batches of all variants
take turns: the median batch is what a call costs when nothing is waited for. The look-up alone is timed inside the
library.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

import marlin_gen
from marlin_gen import csv_rows, cuda_op, native, op
from marlin_gen.problem import Problem

CALLS = 100  # of a batch: the launch queue holds ten times as many


@dataclass(frozen=True)
class Row:
    """A line of the CSV: microseconds of one call, the median batch and its deciles."""

    n: int
    k: int
    m: int
    mode: str  # grad or inference
    call: str
    median_us: float
    low_us: float
    high_us: float
    over_linear: float


@contextlib.contextmanager
def python_launcher() -> Iterator[None]:
    """What MARLIN_GEN_LAUNCHER=python does, for a while."""
    direct, short = cuda_op.direct, op._direct
    cuda_op.direct, op._direct = (lambda: None), None
    try:
        yield
    finally:
        cuda_op.direct, op._direct = direct, short


def batch_us(call: Callable[[], object]) -> float:
    torch.cuda.synchronize()
    began = time.perf_counter_ns()
    for _ in range(CALLS):
        call()
    spent = time.perf_counter_ns() - began
    torch.cuda.synchronize()
    return spent / CALLS / 1e3


Variant = tuple[Callable[[], object], Callable[[], contextlib.AbstractContextManager[None]]]


def variants(n: int, k: int, m: int) -> dict[str, Variant]:
    """Name -> the call, and what holds while it is timed."""
    weight = torch.randn(n, k, device="cuda", dtype=torch.float16)
    packed = marlin_gen.pack(*marlin_gen.quantize(weight))
    a = torch.randn(m, k, device="cuda", dtype=torch.float16)
    operands = (a, packed.weight, packed.scales, None, packed.weight_format, packed.layout_version)
    found: dict[str, Variant] = {
        "torch.nn.functional.linear": (lambda: torch.nn.functional.linear(a, weight), contextlib.nullcontext),
        "marlin_gen.gemm, Python launcher": (lambda: marlin_gen.gemm(a, packed), python_launcher),
    }
    if native.library():
        found["marlin_gen.gemm, native launcher"] = (lambda: marlin_gen.gemm(a, packed), contextlib.nullcontext)
        found["torch.ops.marlin_gen.gemm, native launcher"] = (
            lambda: torch.ops.marlin_gen.gemm.default(*operands), contextlib.nullcontext
        )  # fmt: skip
        linear = torch.nn.Linear(k, n, bias=False, device="cuda", dtype=torch.float16).requires_grad_(False)
        layer = marlin_gen.QuantLinear.from_packed(packed)
        found["torch.nn.Linear"] = (lambda: linear(a), contextlib.nullcontext)
        found["marlin_gen.QuantLinear, native launcher"] = (lambda: layer(a), contextlib.nullcontext)
    found["torch.empty of the output"] = (
        lambda: torch.empty(m, n, device="cuda", dtype=torch.float16), contextlib.nullcontext
    )  # fmt: skip
    return found


def measure(n: int, k: int, m: int, rounds: int) -> list[Row]:
    rows = []
    for mode in (contextlib.nullcontext, torch.inference_mode):
        made = variants(n, k, m)
        times: dict[str, list[float]] = {name: [] for name in made}
        with mode():
            for i in range(rounds + 3):  # the first load, compile, and warm up
                for name, (call, held) in made.items():
                    with held():
                        spent = batch_us(call)
                    if i >= 3:
                        times[name].append(spent)
        linear = statistics.median(times["torch.nn.functional.linear"])
        for name, spent in times.items():
            deciles = statistics.quantiles(spent, n=10)
            median = statistics.median(spent)
            where = "inference" if mode is torch.inference_mode else "grad"
            rows.append(Row(n, k, m, where, name, median, deciles[0], deciles[-1], median / linear))
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", default="4096x4096", help="n x k of the layer")
    parser.add_argument("--tokens", default="1,16")
    parser.add_argument("--rounds", type=int, default=60, help="batches of 100 calls for each variant")
    parser.add_argument("--csv", type=Path)
    arguments = parser.parse_args()
    n, k = map(int, arguments.shape.split("x"))
    rows: list[Row] = []
    for m in map(int, arguments.tokens.split(",")):
        rows += measure(n, k, m, arguments.rounds)
        if arguments.csv:
            csv_rows.write(arguments.csv, Row, rows, digits=5)
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, Python {sys.version.split()[0]}; n={n} k={k}")
    for row in rows:
        print(
            f"m={row.m:<3} {row.mode:<9} {row.call:<43} {row.median_us:6.2f} us"
            f" ({row.low_us:.2f}-{row.high_us:.2f})  {row.over_linear:.2f} of linear"
        )
    found = native.library()
    for m in map(int, arguments.tokens.split(",")) if found else ():
        print(f"m={m:<3} look-up {found.lookup_ns(Problem(n, k, m), torch.cuda.current_device()):.0f} ns")
    if not found:
        print("no native launcher: see MARLIN_GEN_LOG=info")
    return 0


if __name__ == "__main__":
    sys.exit(main())
