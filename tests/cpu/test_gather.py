"""Activations in act-order: the kernel, run on the CPU, and the op around it."""

from __future__ import annotations

import ctypes
import subprocess
from dataclasses import replace

import emulation
import pytest
import torch
from emulation import needs_gxx

import marlin_gen
from marlin_gen import env, gather
from marlin_gen.formats import FORMATS
from marlin_gen.operands import random_weight

GUARD = 64  # elements before and after the output


@pytest.fixture(scope="module")
def kernel(tmp_path_factory):
    """templates/gather.cu by g++. Arguments: a, out, order, strides of a's rows and columns, m, rows of a block."""
    folder = tmp_path_factory.mktemp("gather")
    entry = """
extern "C" char const* emulate(emulator::Request const* request, u16 const* a, u16* out, u64 const* order,
                               u64 row_stride, u64 column_stride, int m, int k, int rows) {
  auto const kernel = [=](emulator::Operands const&) {
    gather(a, out, order, row_stride, column_stride, m, k, rows);
  };
  return emulator::run(*request, kernel);
}
"""
    text = '#include "emulator.h"\n' + (env.templates_dir() / "gather.cu").read_text() + entry
    (folder / "gather.cpp").write_text(text)
    includes = ["-I", str(emulation.EMULATOR), "-I", str(env.templates_dir() / "include")]
    flags = ["-std=c++17", "-O1", "-g", "-fno-exceptions", "-w", "-fPIC", "-shared"]
    command = ["g++", *flags, *includes, "-o", str(folder / "gather.so"), str(folder / "gather.cpp")]
    built = subprocess.run(command, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr[:4000]
    function = ctypes.CDLL(str(folder / "gather.so")).emulate
    function.restype = ctypes.c_char_p
    pointer, stride = ctypes.c_void_p, ctypes.c_uint64
    function.argtypes = (pointer, pointer, pointer, pointer, stride, stride, *(ctypes.c_int,) * 3)

    def run(a: torch.Tensor, order: torch.Tensor, rows: int | None = None) -> torch.Tensor:
        m, k = a.shape
        rows = rows or gather.rows_per_block(m)
        blocks = -(-(k // 8) // gather.THREADS) * -(-m // rows)
        guarded = torch.full((m * k + 2 * GUARD,), 0x7E5A, dtype=torch.int16)
        out = guarded[GUARD:-GUARD]
        request = emulation._Request(grid=blocks, threads=gather.THREADS, cluster=1, resident=blocks, registers=64)
        fault = function(
            ctypes.addressof(request), a.data_ptr(), out.data_ptr(), order.data_ptr(), *a.stride(), m, k, rows
        )
        assert fault is None, fault
        assert bool((guarded[:GUARD] == 0x7E5A).all()) and bool((guarded[-GUARD:] == 0x7E5A).all()), "wrote around"
        return out.view(a.dtype).view(m, k)

    return run


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.int16)


def activations(m: int, k: int, dtype: torch.dtype = torch.float16) -> torch.Tensor:
    """Any 16 bits, NaN among them."""
    return torch.randint(-(1 << 15), 1 << 15, (m, k), generator=torch.Generator().manual_seed(m)).short().view(dtype)


@needs_gxx
@pytest.mark.parametrize("m", [1, 3, 17, 130])
@pytest.mark.parametrize("k", [64, 1024, 1088, 2112])
def test_the_kernel_is_index_select_bit_for_bit(kernel, m, k):
    order = torch.randperm(k, generator=torch.Generator().manual_seed(k))
    for dtype in (torch.float16, torch.bfloat16):
        a = activations(m, k, dtype)
        for rows in (None, 1, 3, 16):
            assert torch.equal(bits(kernel(a, order, rows)), bits(a.index_select(-1, order)))


@needs_gxx
def test_rows_and_columns_may_lie_anywhere(kernel):
    order = torch.randperm(128, generator=torch.Generator().manual_seed(0))
    wide = activations(5, 300)
    for a in (wide[:, 3:131], wide[:, 10:266:2], activations(128, 5).T, activations(1, 128).expand(5, 128)):
        assert torch.equal(bits(kernel(a, order)), bits(a.index_select(-1, order)))


@needs_gxx
def test_an_order_that_names_no_feature_gives_nan_and_reads_nothing_else(kernel):
    order = torch.arange(64)
    order[[3, 8, 63]] = torch.tensor([64, -1, 1 << 62])
    out = kernel(torch.ones(2, 64).half(), order)
    assert torch.equal(out.isnan()[0].nonzero().flatten(), torch.tensor([3, 8, 63]))
    assert torch.equal(out.isnan()[0], out.isnan()[1]) and int(out[0].nansum()) == 61


def test_no_row_is_left_out():
    for m in (1, 2, 63, 64, 127, 128, 1000, 4096, 100_000):
        rows = gather.rows_per_block(m)
        assert 1 <= rows <= gather.MAX_ROWS and gather.grid(m, 4096) * rows >= 4 * m
    assert (
        f"kThreads = {gather.THREADS}, kColumns = {gather.COLUMNS};" in (env.templates_dir() / "gather.cu").read_text()
    )


# The op.

K = 256
ORDER = torch.randperm(K, generator=torch.Generator().manual_seed(0))
CODES, SCALES = random_weight(64, K, FORMATS["u4b8g128"], torch.float16, generator=torch.Generator().manual_seed(1))
PACKED = replace(marlin_gen.pack(CODES, SCALES), order=ORDER)


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(2)).half()


@pytest.mark.parametrize("name", ["gather", "gather_no_grad"])
@pytest.mark.parametrize("shape", [(K,), (1, K), (3, 2, K), (0, K)])
def test_the_op_is_index_select(name, shape):
    a = normal(*shape)
    out = getattr(torch.ops.marlin_gen, name)(a, ORDER)
    assert torch.equal(out, a.index_select(-1, ORDER)) and out.is_contiguous()


@pytest.mark.parametrize("requires_grad", [False, True])
def test_opcheck(requires_grad):
    torch.library.opcheck(torch.ops.marlin_gen.gather.default, (normal(3, K).requires_grad_(requires_grad), ORDER))
    torch.library.opcheck(torch.ops.marlin_gen.gather.default, (normal(K, 3).T.requires_grad_(requires_grad), ORDER))


def test_the_gradient_goes_back_where_features_came_from():
    a, grad = normal(2, 3, K).requires_grad_(), normal(2, 3, K)
    order = ORDER.clone()
    order[0] = order[1]  # one that is read twice
    torch.ops.marlin_gen.gather(a, order).backward(grad)
    expected = normal(2, 3, K).requires_grad_()
    expected.index_select(-1, order).backward(grad)
    assert torch.equal(a.grad, expected.grad)


def test_a_product_in_act_order_with_gradients_and_compiled():
    plain = replace(PACKED, order=None)
    a = normal(5, K)
    expected = marlin_gen.gemm(a[:, ORDER], plain)
    assert torch.equal(marlin_gen.gemm(a, PACKED), expected)
    with torch.no_grad():
        compiled = torch.compile(lambda x: marlin_gen.gemm(x * 1, PACKED), fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(a), expected)
    ours, theirs = a.clone().requires_grad_(), a.clone().requires_grad_()
    compiled(ours).sum().backward()
    marlin_gen.gemm(theirs[:, ORDER], plain).sum().backward()
    assert torch.equal(ours.grad, theirs.grad)
    eager = a.clone().requires_grad_()
    marlin_gen.gemm(eager, PACKED).sum().backward()
    assert torch.equal(eager.grad, theirs.grad)


@pytest.mark.parametrize(
    ("a", "order", "message"),
    [
        (normal(2, 128), ORDER, r"a has shape \[2, 128\]; its last dimension must be k=256"),
        (normal(2, K), ORDER.int(), "order is torch.int32"),
        (normal(2, K), ORDER[None], r"order is torch.int64 \[1, 256\]"),
        (normal(2, K), ORDER.to("meta"), "move a and the packed weight to one device"),
    ],
)
def test_what_does_not_fit_is_named(a, order, message):
    with pytest.raises(ValueError, match=message):
        torch.ops.marlin_gen.gather_no_grad(a, order)
