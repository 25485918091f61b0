"""Mixed products from several threads and streams for as long as one likes; memory and results are watched.

    python tools/soak.py --seconds 3600 --csv soak.csv [--threads 4] [--device cuda]

Every thread has a stream, and takes products at random: shapes, token counts, formats, with and without a bias. A
sample of the results is compared, bit for bit, with the first result of the same product, which is held to the fp32
reference. Once every ten seconds, or a tenth of the time, a row says how many products there were and what memory of
the process and of the device is in use. Exits with 1 if a result was wrong, or memory grew after the first fifth of
the time by more than is allowed below.
"""

from __future__ import annotations

import argparse
import random
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import marlin_gen  # noqa: E402
from marlin_gen import csv_rows  # noqa: E402
from marlin_gen.formats import DTYPES, FORMATS, dtype  # noqa: E402
from marlin_gen.layout import PackedWeight  # noqa: E402
from marlin_gen.operands import random_weight  # noqa: E402
from marlin_gen.problem import Problem  # noqa: E402
from marlin_gen.reference import errors, gemm_reference  # noqa: E402

KINDS = (
    ("u4b8g128", "f16"), ("u4b8g128", "bf16"), ("u4zg64", "f16"), ("u4mg32", "bf16"), ("u8b128g128", "f16"),
    ("e4m3g128", "bf16"),
)  # fmt: skip
CUDA_SHAPES = ((4096, 4096), (6144, 4096), (4096, 14336), (192, 384), (28672, 4096))
CPU_SHAPES = ((64, 128), (192, 384), (128, 640))
TOKENS = (1, 2, 7, 16, 33, 64, 100, 256, 500)
END_SECONDS = 30.0  # for the last products
CHECK_ONE_IN = 16  # results compared; comparing waits for the stream
HOST_GROWTH_MB, DEVICE_GROWTH_MB = 64.0, 32.0  # allowed after the first fifth of the time


@dataclass(frozen=True, eq=False)
class Product:
    """One product and what it gave the first time."""

    a: torch.Tensor
    packed: PackedWeight
    bias: torch.Tensor | None
    expected: torch.Tensor


@dataclass(frozen=True)
class Row:
    """A line of the CSV."""

    seconds: float
    products: int
    checked: int
    wrong: int
    host_mb: float  # resident memory of the process
    device_mb: float  # in use on the device, by anyone


def problems(device: torch.device) -> Iterator[Problem]:
    shapes = CUDA_SHAPES if device.type == "cuda" else CPU_SHAPES
    for i, (n, k) in enumerate(shapes):
        for name, act in KINDS:
            for m in TOKENS[i % 2 :: 2]:
                yield Problem(n, k, m, name, act)


def compile_kernels(device: torch.device) -> int:
    """All that no table ships, at once; one by one, as products ask for them, they would take minutes. How many."""
    from marlin_gen.compile import compile_all
    from marlin_gen.render import render
    from marlin_gen.serve import Server

    choices = [next(Server.of(device).dispatcher.choose(problem)) for problem in problems(device)]
    missing = {choice.spec for choice in choices if choice.kernel is None}
    compile_all([render(spec) for spec in sorted(missing, key=lambda spec: spec.key)])
    return len(missing)


def products(device: torch.device) -> list[Product]:
    """Made once; a ValueError if a first result is not that of the reference."""
    made = []
    generator = torch.Generator(device).manual_seed(0)
    for (n, k, name, act), group in groupby(problems(device), lambda p: (p.n, p.k, p.weight_format, p.act_dtype)):
        number = getattr(torch, DTYPES[act].torch_name)
        codes, scales = random_weight(n, k, FORMATS[name], number, device, generator)
        packed = marlin_gen.pack(codes, scales, name)
        for m in (problem.m for problem in group):
            a = torch.randn(m, k, device=device, generator=generator).to(number)
            bias = torch.randn(n, device=device, generator=generator).to(number) if m % 2 else None
            c = marlin_gen.gemm(a, packed, bias)
            reference = gemm_reference(a, codes, scales, name, bias)
            error = max(errors(c, reference, float(reference.norm())))
            if not error < dtype(act).error_limit:
                raise ValueError(f"{n}x{k} m={m} {name} {act}: relative error {error:.1e} before the soak began")
            made.append(Product(a, packed, bias, c))
    if device.type == "cuda":
        torch.cuda.synchronize()  # the threads' streams do not wait for this one
        torch.cuda.empty_cache()  # what references took would stay this stream's
    return made


class Soak:
    """The threads, and what they have counted."""

    def __init__(self, device: torch.device, threads: int) -> None:
        self.device, self.products = device, products(device)
        self.done, self.checked, self.wrong = [0] * threads, [0] * threads, [0] * threads
        self.errors: list[str] = []
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._work, args=(i,), daemon=True) for i in range(threads)]

    def _work(self, index: int) -> None:
        try:
            chooser = random.Random(index)
            stream = torch.cuda.Stream() if self.device.type == "cuda" else None
            with torch.cuda.stream(stream) if stream else nullcontext(), torch.inference_mode(index % 2 == 1):
                while not self._stop.is_set():
                    one = chooser.choice(self.products)
                    c = marlin_gen.gemm(one.a, one.packed, one.bias)
                    if chooser.randrange(CHECK_ONE_IN) == 0:
                        self.checked[index] += 1
                        self.wrong[index] += not torch.equal(c, one.expected)
                    self.done[index] += 1
        except Exception as error:
            self.errors.append(f"thread {index}: {type(error).__name__}: {error}")

    def rows(self, seconds: float) -> Iterator[Row]:
        """Run for ``seconds``; a row now and then, the last at the end."""
        began, every = time.monotonic(), min(10.0, seconds / 10)
        for thread in self._threads:
            thread.start()
        while (spent := time.monotonic() - began) < seconds and not self.errors:
            time.sleep(min(every, max(seconds - spent, 0.0)))
            yield self._row(time.monotonic() - began)
        self._stop.set()
        for index, thread in enumerate(self._threads):
            thread.join(END_SECONDS)
            if thread.is_alive():
                self.errors.append(
                    f"thread {index}: no end after {END_SECONDS:.0f} s: a kernel hangs, or a lock is held"
                )
        yield self._row(time.monotonic() - began)

    def _row(self, spent: float) -> Row:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        free, total = torch.cuda.mem_get_info() if self.device.type == "cuda" else (0, 0)
        return Row(spent, sum(self.done), sum(self.checked), sum(self.wrong), pages * 4096 / 1e6, (total - free) / 1e6)


def faults(rows: list[Row], errors: list[str]) -> list[str]:
    """What is wrong, as sentences."""
    settled = next(row for row in rows if row.seconds >= rows[-1].seconds / 5)
    host, device = rows[-1].host_mb - settled.host_mb, rows[-1].device_mb - settled.device_mb
    found = list(errors)
    if rows[-1].wrong:
        found.append(f"{rows[-1].wrong} of {rows[-1].checked} results differ from the first of their product")
    if not rows[-1].checked:
        found.append("no result was checked: run it for longer")
    if host > HOST_GROWTH_MB:
        found.append(f"host memory grew by {host:.0f} MB, {HOST_GROWTH_MB:.0f} are allowed")
    if device > DEVICE_GROWTH_MB:
        growth = f"device memory grew by {device:.0f} MB, {DEVICE_GROWTH_MB:.0f} are allowed"
        found.append(f"{growth}; all processes count, so that no other may use this GPU meanwhile")
    return found


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--threads", type=int, default=4)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--csv", type=Path, required=True)
    options = parser.parse_args(arguments)
    device, began = torch.device(options.device), time.monotonic()
    compiled = compile_kernels(device) if device.type == "cuda" else 0
    soak, rows = Soak(device, options.threads), []
    spent = time.monotonic() - began
    print(f"{len(soak.products)} products, {compiled} kernels compiled: {spent:.0f} s before the soak", flush=True)
    for row in soak.rows(options.seconds):
        rows.append(row)
        print(", ".join(f"{key} {value:.0f}" for key, value in asdict(row).items()), flush=True)
        csv_rows.write(options.csv, Row, rows, digits=6)
    found = faults(rows, soak.errors)
    print("\n".join(found) or f"{rows[-1].products} products, {rows[-1].checked} checked, none wrong, no leak")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
