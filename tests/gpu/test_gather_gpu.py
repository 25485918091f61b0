"""Activations in act-order on a GPU: bit for bit ``index_select``, whether eager, compiled, captured or in grads."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import marlin_gen
from marlin_gen import gather
from marlin_gen.formats import FORMATS
from marlin_gen.layout import PackedWeight
from marlin_gen.operands import random_weight

pytestmark = pytest.mark.gpu
DTYPES = [torch.float16, torch.bfloat16]


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.int16)


def activations(m: int, k: int, dtype: torch.dtype) -> torch.Tensor:
    """Any 16 bits, NaN among them."""
    return torch.randint(-(1 << 15), 1 << 15, (m, k), device="cuda").short().view(dtype)


def ours(a: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """By the kernel, or the test fails; over NaN."""
    torch.full(a.shape, float("nan"), dtype=a.dtype, device="cuda")
    out = gather._gather(torch.cuda.current_device()).run(a, order)
    assert out is not None, "the kernel does not load"
    return out


def act_order(n: int, k: int, dtype: torch.dtype = torch.float16) -> PackedWeight:
    codes, scales = random_weight(n, k, FORMATS["u4b8g128"], dtype, "cuda")
    return replace(marlin_gen.pack(codes, scales), order=torch.randperm(k, device="cuda"))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("k", [64, 1088, 4096, 14336, 53248])
@pytest.mark.parametrize("m", [1, 3, 17, 63, 64, 65, 129, 1000, 4097])
def test_bit_for_bit(m, k, dtype):
    a, order = activations(m, k, dtype), torch.randperm(k, device="cuda")
    assert torch.equal(bits(ours(a, order)), bits(a.index_select(-1, order)))


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_and_columns_may_lie_anywhere(dtype):
    order, wide = torch.randperm(1024, device="cuda"), activations(9, 3000, dtype)
    for a in (
        wide[:, 3:1027], wide[:, 10:2058:2], activations(1024, 9, dtype).T, activations(1, 1024, dtype).expand(9, 1024),
        activations(6, 1024, dtype).view(2, 3, 1024).transpose(0, 1), wide[0, :1024],
    ):  # fmt: skip
        assert torch.equal(bits(ours(a, order)), bits(a.index_select(-1, order)))


@pytest.mark.parametrize("m", [1, 5, 40, 300])
def test_a_product_is_that_of_the_gathered_activations(m):
    packed = act_order(320, 1152)
    a = torch.randn(m, 1152, device="cuda").half()
    assert torch.equal(marlin_gen.gemm(a, packed), marlin_gen.gemm(a[:, packed.order], replace(packed, order=None)))


def test_compiled_captured_and_differentiated():
    packed = act_order(256, 1024)
    a = torch.randn(7, 1024, device="cuda").half()
    expected = marlin_gen.gemm(a, packed)
    with torch.no_grad():
        compiled = torch.compile(lambda x: marlin_gen.gemm(x, packed), fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(a), expected)

    static, graph = torch.zeros_like(a), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = marlin_gen.gemm(static, packed)
    for _ in range(2):
        static.copy_(a)
        graph.replay()
        assert torch.equal(captured, expected)
        static.zero_()

    leaf, other = a.clone().requires_grad_(), a.clone().requires_grad_()
    marlin_gen.gemm(leaf, packed).sum().backward()
    marlin_gen.gemm(other.index_select(-1, packed.order), replace(packed, order=None)).sum().backward()
    assert torch.equal(leaf.grad, other.grad)


def test_on_a_stream_of_its_own_and_from_a_new_thread():
    from concurrent.futures import ThreadPoolExecutor

    a, order = activations(33, 4096, torch.float16), torch.randperm(4096, device="cuda")
    expected, stream = a.index_select(-1, order), torch.cuda.Stream()
    torch.cuda.synchronize()

    def work() -> torch.Tensor:
        with torch.cuda.stream(stream):
            out = ours(a, order)
        stream.synchronize()
        return out

    with ThreadPoolExecutor(1) as pool:
        assert torch.equal(bits(pool.submit(work).result()), bits(expected))
    assert torch.equal(bits(work()), bits(expected))


def test_an_order_that_names_no_feature_gives_nan():
    order = torch.arange(64, device="cuda")
    order[5] = 64
    out = ours(torch.ones(3, 64, device="cuda").half(), order)
    assert out.isnan().nonzero()[:, 1].tolist() == [5, 5, 5]


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one CUDA device")
def test_on_another_device_than_the_current_one():
    a, order = activations(3, 256, torch.float16).to("cuda:1"), torch.randperm(256, device="cuda:1")
    assert torch.equal(bits(torch.ops.marlin_gen.gather_no_grad(a, order)), bits(a.index_select(-1, order)))
