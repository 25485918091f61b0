"""tools/chain.py without a GPU: what its chains compute and in which order, its weights, its workspaces, its file."""

from __future__ import annotations

import math
import sys
from types import SimpleNamespace

import pytest
import torch
from load_tool import load_tool

from marlin_gen import csv_rows
from marlin_gen.layout import pack, unpack
from marlin_gen.problem import Problem
from marlin_gen.reference import dequantize, dequantized_matmul
from marlin_gen.timing import Spread

CPU = torch.device("cpu")
# As llama's, small: hidden 128, q 128 of qkv 256, intermediate 384.
SHAPES = {"qkv_proj": (256, 128), "o_proj": (128, 128), "gate_up_proj": (768, 128), "down_proj": (128, 384)}
LAYERS = 3


@pytest.fixture(scope="module")
def chain():
    yield load_tool("chain")
    del sys.modules["chain"]


@pytest.fixture
def weights(chain):
    torch.manual_seed(1)
    return [{name: chain.random_weight(n, k, CPU) for name, (n, k) in SHAPES.items()} for _ in range(LAYERS)]


def problems(m):
    return {name: Problem(n, k, m) for name, (n, k) in SHAPES.items()}


def walked(walk, linear, x):
    for block in range(LAYERS):
        x = walk(linear, problems(len(x)), block, x)
    return x


def as_served(weights, partials_bytes=0):
    """A launcher that computes with the packed weight and remembers its launches, and the kernels it is asked for."""
    launches = []

    def run_with(kernel, plan, problem, a, weight, scales, out, partials, locks, bias=None, *, dependent):
        assert a.is_contiguous() and a.shape == (problem.m, problem.k) and out.shape == (problem.m, problem.n)
        launches.append((problem, weight, partials, locks, dependent))
        packed = next(w for block in weights for w in block.values() if w.weight is weight and w.scales is scales)
        dequantized_matmul(a, packed, bias, out)

    kernel = SimpleNamespace(shape=lambda *_: (SimpleNamespace(partials_bytes=partials_bytes, num_locks=5), None))
    launcher = SimpleNamespace(run_with=run_with, gpu=SimpleNamespace(num_sms=132))

    def kernels(m):
        return {name: (kernel, name, problem) for name, problem in problems(m).items()}

    return launcher, kernels, launches


def test_the_projections_of_a_model_are_those_of_its_config(chain):
    found = chain.projections("llama-3.1-8b", 16)
    assert [(name, p.n, p.k, p.m) for name, p in found.items()] == [
        ("qkv_proj", 6144, 4096, 16), ("o_proj", 4096, 4096, 16),
        ("gate_up_proj", 28672, 4096, 16), ("down_proj", 4096, 14336, 16),
    ]  # fmt: skip
    with pytest.raises(ValueError, match="no hidden_size"):
        chain.projections("tiny", 1)


def test_projections_of_equal_shape_are_each_there(chain, tmp_path):
    """One kv head for each head and an intermediate size of 1.5 x hidden: qkv and gate_up have one shape."""
    config = '{"hidden_size": 512, "intermediate_size": 768, "num_attention_heads": 4, "num_key_value_heads": 4}'
    (tmp_path / "config.json").write_text(config)
    found = chain.projections(str(tmp_path), 1)
    assert [(p.n, p.k) for p in found.values()] == [(1536, 512), (512, 512), (1536, 512), (512, 768)]
    assert tuple(found) == chain.PROJECTIONS


def test_the_weights_must_exceed_the_cache(chain):
    problems = chain.projections("llama-3.1-8b", 1)
    block = (6144 * 4096 + 4096 * 4096 + 28672 * 4096 + 4096 * 14336) * (4 + 16 / 128) / 8
    said = chain.rotation(problems, 8, 50_000_000)
    assert f"{8 * block / 1e6:.0f} MB" in said and f"{8 * block / 50e6:.1f} x L2" in said
    with pytest.raises(ValueError, match="use --layers 3 or more"):
        chain.rotation(problems, 2, 50_000_000)
    chain.rotation(problems, 3, 50_000_000)


def test_a_random_weight_is_a_packed_one_that_keeps_the_size_of_activations(chain):
    weight = chain.random_weight(512, 1024, CPU)
    codes, scales = unpack(weight)
    assert (int(codes.min()), int(codes.max())) == (1, 15)
    again = pack(codes, scales)
    assert torch.equal(again.weight, weight.weight) and torch.equal(again.scales, weight.scales)
    out = torch.randn(64, 1024) @ dequantize(codes, scales).float().T
    assert float(out.square().mean().sqrt()) == pytest.approx(1, rel=0.05)
    assert abs(float(out.mean())) < 0.05


@pytest.mark.parametrize("m", [1, 5])
@pytest.mark.parametrize("name", ["bare", "block"])
def test_every_product_runs_once_in_order_with_its_own_weight(chain, weights, name, m):
    launcher, kernels, launches = as_served(weights)
    x = torch.randn(m, 128).half()
    found = walked(chain.CHAINS[name], chain.packed_linear(launcher, kernels(m), weights, True), x)
    assert [w.data_ptr() for _, w, *_ in launches] == [w.weight.data_ptr() for block in weights for w in block.values()]
    assert all(dependent for *_, dependent in launches)

    expected = walked(chain.CHAINS[name], chain.cublas(weights), x)
    assert found.shape == x.shape and bool(found.isfinite().all())
    assert float((found.float() - expected.float()).norm() / expected.float().norm()) < chain.CUBLAS_LIMIT
    assert 0.3 < float(found.float().square().mean().sqrt()) < 5  # neither vanishes nor grows


def test_a_decoder_block_is_the_models_arithmetic_around_the_products(chain, weights):
    x, own = torch.randn(3, 128), {name: dequantize(*unpack(w)).float() for name, w in weights[0].items()}

    def norm(values):
        return values / values.square().mean(1, keepdim=True).add(torch.finfo(values.dtype).eps).sqrt()

    after = x + (norm(x) @ own["qkv_proj"].T)[:, :128] @ own["o_proj"].T
    both = norm(after) @ own["gate_up_proj"].T
    gated = both[:, :384] * torch.sigmoid(both[:, :384]) * both[:, 384:]
    expected = after + gated @ own["down_proj"].T
    found = chain.decoder_block(lambda _, name, a: a @ own[name].T, problems(3), 0, x)
    assert torch.allclose(found, expected, atol=1e-4)


def test_striped_kernels_have_a_workspace_at_each_call_site(chain, weights):
    launcher, kernels, launches = as_served(weights, partials_bytes=64)
    linear = chain.packed_linear(launcher, kernels(2), weights, False)
    for _ in range(2):
        walked(chain.bare, linear, torch.randn(2, 128).half())
    first, second = launches[: 4 * LAYERS], launches[4 * LAYERS :]
    assert len({locks.data_ptr() for *_, locks, _ in first}) == len({p.data_ptr() for _, _, p, _, _ in first}) == 12
    assert [locks.data_ptr() for *_, locks, _ in first] == [locks.data_ptr() for *_, locks, _ in second]
    assert all(locks.tolist() == [0] * 5 and partials.nbytes == 64 for _, _, partials, locks, _ in launches)


def replayed(*values):
    """A graph whose replay ends in these values, and where."""
    out = torch.zeros(len(values), dtype=torch.float16)
    return SimpleNamespace(enqueue=lambda: out.copy_(torch.tensor(values))), out


def test_results_that_disagree_are_named(chain):
    x, good, bad = torch.zeros(1, 2), replayed(1.0, 2.0), replayed(1.0, math.nan)
    chain.check([replayed(1.001, 2.0), good, replayed(1.0, 2.0)], x)
    nothing = SimpleNamespace(enqueue=lambda: None), torch.ones(2)  # left over from a run before
    for chains, words in (
        ([good, good, replayed(1.0, 2.002)], "1 of 2 values of dependent"),
        ([good, good, bad], "1 of 2 values of dependent"),
        ([good, replayed(1.0, 2.0), nothing], "2 of 2 values of dependent"),
        ([good, bad, bad], "nan from cuBLAS"),
        ([good, replayed(1.0, math.inf), good], "inf from cuBLAS"),
        ([replayed(1.0, 3.0), good, good], "from cuBLAS"),
    ):
        with pytest.raises(ValueError, match=words):
            chain.check(chains, x)


def test_the_run_writes_a_row_for_each_cell_that_agrees(chain, tmp_path, monkeypatch, capsys):
    def compare(walk, problems, packed, dense, bench):
        assert len(packed) == 4 and problems["o_proj"].k == 128
        if walk is chain.bare and problems["o_proj"].m == 8:
            raise ValueError("they differ")
        return [Spread(us, us - 1, us + 1) for us in (151.25, 52.5, 48.75)]

    out = tmp_path / "chain.csv"
    config = '{"hidden_size": 128, "intermediate_size": 384, "num_attention_heads": 2}'
    (tmp_path / "config.json").write_text(config)
    bench = SimpleNamespace(device=CPU, launcher=SimpleNamespace(gpu=SimpleNamespace(l2_bytes=50_000)))
    monkeypatch.setattr(chain, "Bench", lambda index: bench)
    monkeypatch.setattr(chain, "compare", compare)
    monkeypatch.setattr("sys.argv", ["chain.py", "--model", str(tmp_path), "--layers", "4", "--out", str(out)])
    assert chain.main() == 1
    rows = csv_rows.read(out, chain.ChainRow, "a chain")
    assert [(row.chain, row.m) for row in rows] == [
        (name, m) for name in ("bare", "block") for m in chain.TOKENS if (name, m) != ("bare", 8)
    ]
    assert {(row.cublas_us, row.plain_us, row.dependent_us) for row in rows} == {(151.25, 52.5, 48.75)}
    said = capsys.readouterr().out
    assert "bare  m=8    failed: they differ" in said and "52.50 [51.50, 53.50]" in said and "1.077" in said
