"""Times the linear layers of decoder blocks as a model runs them: ``python tools/chain.py --model llama-3.1-8b``.

A CUDA graph holds some decoder blocks, each with its own weights, every product feeding the next: "bare", the products
alone, or "block", with the torch kernels that stand between them in a model. It runs with fp16 cuBLAS, and with the
kernels that serving takes from the tables (MARLIN_GEN_TABLE), all launched plainly or all dependent
(``Launcher.run_with``). Needs a GPU of compute capability 9.0 or newer.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from marlin_gen import csv_rows
from marlin_gen.config import Plan
from marlin_gen.formats import DEFAULT_FORMAT, weight_format
from marlin_gen.launch import Kernel, Launcher, LaunchError
from marlin_gen.layout import PackedWeight, lifts, unpack
from marlin_gen.models import layer_shapes, load_config
from marlin_gen.operands import ROTATE_L2S
from marlin_gen.problem import SIZE_UNIT, Problem, words_per_tile
from marlin_gen.reference import dequantize
from marlin_gen.serve import Server
from marlin_gen.timing import Bench, Graph, Spread, interleaved

PROJECTIONS = ("qkv_proj", "o_proj", "gate_up_proj", "down_proj")  # in the order a block runs them
TOKENS = (1, 8, 16, 32, 64, 128)
REPLAYS, CHECK_REPLAYS = 41, 5  # timed, of each graph; before them, with fresh activations each
CUBLAS_LIMIT = 0.03  # relative difference from cuBLAS after all blocks; a product contributes about 5e-4

Problems = dict[str, Problem]  # by projection
Kernels = dict[str, tuple[Kernel, Plan, Problem]]  # by projection
Weights = list[dict[str, PackedWeight]]  # by block and projection
Linear = Callable[[int, str, torch.Tensor], torch.Tensor]  # block, projection, activations [m, k] -> [m, n]
Walk = Callable[[Linear, Problems, int, torch.Tensor], torch.Tensor]  # a block: activations [m, hidden] -> the same
Chain = tuple[Graph, torch.Tensor]  # of all blocks, and the activations that a replay ends with


@dataclass(frozen=True)
class ChainRow:
    """Medians for one decoder block, microseconds."""

    model: str
    chain: str  # of CHAINS
    m: int
    cublas_us: float
    plain_us: float
    dependent_us: float


def projections(model: str, m: int) -> Problems:
    """The four products of one decoder block; a ValueError for a model that is not a dense decoder."""
    config, source = load_config(model)
    shapes = {name: layer for layer in layer_shapes(config, source=source) for name in layer.name.split("+")}
    if missing := [name for name in PROJECTIONS if name not in shapes]:
        raise ValueError(f"{source} has no {missing[0]}: blocks without a gate are not timed here")
    return {name: Problem(shapes[name].n, shapes[name].k, m) for name in PROJECTIONS}


def bare(linear: Linear, problems: Problems, block: int, x: torch.Tensor) -> torch.Tensor:
    """The products alone: each reads the first m * k numbers that the one before wrote, as [m, k] without a copy."""
    for name, p in problems.items():
        x = linear(block, name, x.view(-1)[: p.m * p.k].view(p.m, p.k))
    return x


def decoder_block(linear: Linear, problems: Problems, block: int, x: torch.Tensor) -> torch.Tensor:
    """The products with norms, activation and residuals, each a torch kernel of its own; attention is a copy of q."""
    qkv = linear(block, "qkv_proj", F.rms_norm(x, x.shape[1:]))
    attention = qkv[:, : problems["o_proj"].k] * 1.0  # a kernel, as attention is: clone() may be a memory copy
    x = x + linear(block, "o_proj", attention)
    gate, up = linear(block, "gate_up_proj", F.rms_norm(x, x.shape[1:])).chunk(2, dim=1)
    return x + linear(block, "down_proj", F.silu(gate) * up)


CHAINS: dict[str, Walk] = {"bare": bare, "block": decoder_block}


def random_weight(n: int, k: int, device: torch.device) -> PackedWeight:
    """A packed weight of mean zero (codes 1 .. 15, in any order) under which random activations keep their size."""
    fmt = weight_format(DEFAULT_FORMAT)
    shape = (n // SIZE_UNIT, k // SIZE_UNIT, words_per_tile(fmt) * 4)
    low, high = (torch.randint(1, fmt.codes, shape, device=device, dtype=torch.uint8) for _ in range(2))
    scales = torch.rand(n // SIZE_UNIT, k // fmt.group_size, SIZE_UNIT, device=device) * 0.8 + 0.2
    variance = ((fmt.codes - 1) ** 2 - 1) / 12 * float(scales.square().mean())
    scales = (scales / math.sqrt(k * variance)).half()
    of_rows = lifts(scales.transpose(1, 2).reshape(n, -1)).view(-1, 1, SIZE_UNIT)
    return PackedWeight((high << 4 | low).view(torch.int32), torch.cat([scales, of_rows], 1), fmt.name)


def rotation(problems: Problems, layers: int, l2_bytes: int) -> str:
    """A line that says how far the weights exceed the L2 cache; a ValueError when they may stay in it."""
    block = sum(problem.weight_bytes for problem in problems.values())
    said = f"{layers} blocks: {layers * block / 1e6:.0f} MB of packed weights, {layers * block / l2_bytes:.1f} x L2"
    if layers * block < ROTATE_L2S * l2_bytes:
        raise ValueError(f"{said}, too few; use --layers {math.ceil(ROTATE_L2S * l2_bytes / block)} or more")
    return said


def cublas(packed: Weights) -> Linear:
    """torch.matmul with the same weights, dense in fp16."""
    dense = [{name: dequantize(*unpack(weight)).T for name, weight in block.items()} for block in packed]
    return lambda block, name, a: torch.matmul(a, dense[block][name])


def served(device: torch.device, problems: Problems) -> Kernels:
    """What serves each product; a ValueError when one has no kernel."""
    steps = {name: Server.of(device).step(problem) for name, problem in problems.items()}
    found = {name: (s.kernel, s.choice.plan, s.problem) for name, s in steps.items() if s.kernel and s.choice}
    if missing := sorted(steps.keys() - found.keys()):
        raise ValueError(f"no kernel for {', '.join(missing)}: tune them, or install a compiler")
    return found


def packed_linear(launcher: Launcher, kernels: Kernels, weights: Weights, dependent: bool) -> Linear:
    """Our kernels. Each product of each block has partials and locks of its own, zeroed here, before any capture."""

    def scratch(name: str, weight: torch.Tensor) -> list[torch.Tensor]:
        shape, _ = kernels[name][0].shape(*kernels[name][1:], launcher.gpu.num_sms)
        return [weight.new_zeros(max(words, 1)) for words in (shape.partials_bytes // 4, shape.num_locks)]

    workspaces = [{name: scratch(name, packed.weight) for name, packed in block.items()} for block in weights]

    def linear(block: int, name: str, a: torch.Tensor) -> torch.Tensor:
        b, out = weights[block][name], a.new_empty(len(a), kernels[name][2].n)
        launcher.run_with(*kernels[name], a, b.weight, b.scales, out, *workspaces[block][name], dependent=dependent)
        return out

    return linear


def captured(walk: Walk, linear: Linear, problems: Problems, layers: int, inputs: torch.Tensor, bench: Bench) -> Chain:
    ends = [inputs]

    def call(block: int) -> None:
        ends[0] = walk(linear, problems, block, ends[0] if block else inputs)

    bench.stream.synchronize()  # weights and locks are written before the first launch, on another stream, reads them
    return Graph(call, layers, bench.stream), ends[0]


def check(chains: Sequence[Chain], inputs: torch.Tensor) -> None:
    """ValueError unless plain launches are finite and near cuBLAS, and dependent ones equal to them, bit for bit."""
    for _ in range(CHECK_REPLAYS):
        inputs.normal_()
        for graph, out in chains:
            out.fill_(math.nan)
            graph.enqueue()
        expected, plain, dependent = (out for _, out in chains)
        error = float((plain.float() - expected.float()).norm() / expected.float().norm())
        if not error < CUBLAS_LIMIT:  # also for NaN
            raise ValueError(f"plain launches: relative difference {error:.1e} from cuBLAS")
        if differ := int((plain != dependent).sum()):
            raise ValueError(f"{differ} of {plain.numel()} values of dependent launches differ from plain ones")


def compare(walk: Walk, problems: Problems, packed: Weights, dense: Linear, bench: Bench) -> list[Spread]:
    """Microseconds a block of cuBLAS, plain and dependent launches. ValueError when their results disagree."""
    kernels, first = served(bench.device, problems), problems[PROJECTIONS[0]]
    inputs = torch.empty(first.m, first.k, device=bench.device, dtype=torch.float16).normal_()
    linears = [dense, *(packed_linear(bench.launcher, kernels, packed, dependent) for dependent in (False, True))]
    chains = [captured(walk, linear, problems, len(packed), inputs, bench) for linear in linears]
    check(chains, inputs)
    return [spread for spread in interleaved([graph for graph, _ in chains], REPLAYS) if spread]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="llama-3.1-8b", help="a preset, or a Hugging Face config.json")
    parser.add_argument("--layers", type=int, default=8, help="decoder blocks in a graph (default: 8)")
    parser.add_argument("--out", type=Path, default=Path("chain.csv"), help="default: chain.csv")
    options = parser.parse_args()
    bench, one = Bench(0), projections(options.model, 1)
    print(options.model, rotation(one, options.layers, bench.launcher.gpu.l2_bytes), sep=", ", flush=True)
    packed = [{name: random_weight(p.n, p.k, bench.device) for name, p in one.items()} for _ in range(options.layers)]
    dense, rows = cublas(packed), []
    print("us a block [95 % interval of the median]: cuBLAS, plain, dependent; plain / dependent", flush=True)
    for (chain, walk), m in product(CHAINS.items(), TOKENS):
        try:
            spreads = compare(walk, projections(options.model, m), packed, dense, bench)
        except (LaunchError, ValueError) as error:
            print(f"{chain:5} m={m:<4} failed: {error}", flush=True)
            continue
        rows.append(ChainRow(options.model, chain, m, *(spread.us for spread in spreads)))
        cells = "".join(f"{s.us:9.2f} [{s.low:.2f}, {s.high:.2f}]" for s in spreads)
        print(f"{chain:5} m={m:<4}{cells}{spreads[1].us / spreads[2].us:8.3f}", flush=True)
        csv_rows.write(options.out, ChainRow, rows, 5)
    return int(len(rows) < len(CHAINS) * len(TOKENS))


if __name__ == "__main__":
    sys.exit(main())
