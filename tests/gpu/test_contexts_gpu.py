"""The op on a GPU in the contexts PyTorch puts it in: compiled, exported, differentiated, copied, and very large."""

from __future__ import annotations

import copy
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_op_gpu import activations, checked, weight
from torch._dynamo.testing import CompileCounterWithBackend

import marlin_gen
from marlin_gen.formats import DTYPES
from marlin_gen.reference import dequantize, gemm_reference

pytestmark = pytest.mark.gpu
ERROR_LIMIT = DTYPES["f16"].error_limit
WATCHDOG_S = 240.0  # Inductor's first compilation, and matrices of 4 GiB


def error_of(c: torch.Tensor, reference: torch.Tensor) -> float:
    return ((c.float() - reference).norm() / reference.norm()).item()


def test_opcheck_with_a_bias():
    _, _, packed = weight(256, 512)
    operands = (activations(17, 512).requires_grad_(), packed.weight, packed.scales, activations(256))
    torch.library.opcheck(torch.ops.marlin_gen.gemm.default, operands)


@pytest.mark.parametrize("m", [1, 17, 64, 1000])
def test_a_bias_is_added(m):
    codes, scales, packed = weight(4096, 4096)
    a, bias = activations(m, 4096), activations(4096)
    reference = gemm_reference(a, codes, scales) + bias.float()
    for _ in range(3):
        assert error_of(marlin_gen.gemm(a, packed, bias), reference) < ERROR_LIMIT
    assert torch.equal(marlin_gen.gemm(a, packed), checked(a, packed)), "and left out"


def test_inference_mode():
    _, _, packed = weight(4096, 4096)
    a = activations(16, 4096)
    expected = checked(a, packed)
    with torch.inference_mode():
        assert torch.equal(marlin_gen.gemm(a, packed), expected)
        assert torch.equal(marlin_gen.gemm(a.clone(), packed), expected)
        assert marlin_gen.gemm(a, packed).is_inference()


def test_gradients_eager_and_compiled():
    codes, scales, packed = weight(256, 512)
    grad = activations(8, 256)
    for f in (marlin_gen.gemm, torch.compile(marlin_gen.gemm, fullgraph=True, backend="aot_eager")):
        a, bias = activations(8, 512).requires_grad_(), activations(256).requires_grad_()
        f(a, packed, bias).backward(grad)
        assert error_of(a.grad, grad.float() @ dequantize(codes, scales).float()) < 1e-3
        assert error_of(bias.grad, grad.float().sum(0)) < 1e-3


def test_compiled_for_any_m_at_most_three_times():
    """For the first m, for any m, and for m = 1, which torch takes apart."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("inductor")
    layer = marlin_gen.QuantLinear.from_packed(weight(4096, 4096)[2])
    compiled = torch.compile(layer, fullgraph=True, backend=counter)
    for m in (5, 1, 7, 16, 17, 64, 100, 2, 3, 333, 1000):
        a = activations(m, 4096)
        assert torch.equal(compiled(a), layer(a)), m
    assert counter.frame_count <= 3


def test_compiled_with_cuda_graphs():
    layer = torch.nn.Sequential(*(marlin_gen.QuantLinear.from_packed(weight(4096, 4096)[2]) for _ in range(3)))
    compiled = torch.compile(layer, fullgraph=True, mode="reduce-overhead")
    for m in (1, 64):
        for _ in range(4):  # warm-up, recording, replays
            a = activations(m, 4096) * 0.05
            assert torch.equal(compiled(a), layer(a)), m


AHEAD_OF_TIME = """
import faulthandler, sys, torch
faulthandler.enable()
torch.manual_seed(0)
layer = torch.nn.Linear(4096, 4096).cuda()
if sys.argv[2] == "ours":
    import marlin_gen
    layer = marlin_gen.QuantLinear.from_float(layer)
layer = layer.half()
example, a = (torch.randn(m, 4096, device="cuda").half() for m in (4, 77))
program = torch.export.export(layer, (example,), dynamic_shapes=({0: torch.export.Dim("rows", min=2, max=4096)},))
assert torch.equal(program.module()(a), layer(a)), "exported"
print("exported", flush=True)
path = torch._inductor.aoti_compile_and_package(program, package_path=sys.argv[1])
print("packaged", flush=True)
loaded = torch._inductor.aoti_load_package(path)
print("loaded", flush=True)
assert torch.equal(loaded(a), layer(a)), "ran"
print("ran", flush=True)
"""


def ahead_of_time(layer: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """In a process of its own: with torch 2.11 on a GPU, ours ended in a segmentation fault behind "packaged"."""
    command = [sys.executable, "-c", AHEAD_OF_TIME, str(folder / f"{layer}.pt2"), layer]
    return subprocess.run(command, capture_output=True, text=True, timeout=180)


@pytest.mark.skipif(shutil.which("g++") is None, reason="AOTInductor needs a C++ compiler")
def test_exported_and_compiled_ahead_of_time(tmp_path: Path):
    steps = ["exported", "packaged", "loaded", "ran"]
    done = ahead_of_time("ours", tmp_path)
    if done.returncode < 0 and ahead_of_time("torch's", tmp_path).returncode < 0:
        pytest.skip(f"AOTInductor of torch {torch.__version__} crashes here with torch's own nn.Linear too")
    assert done.stdout.split() == steps, f"exit status {done.returncode}: {done.stderr[-2000:]}"


def test_copies_and_pickles_of_modules_and_weights():
    _, _, packed = weight(4096, 4096)
    layer, a = marlin_gen.QuantLinear.from_packed(packed), activations(16, 4096)
    expected = checked(a, packed)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(other(a), expected) and other.weight.data_ptr() != packed.weight.data_ptr()
    for other in (copy.deepcopy(packed), pickle.loads(pickle.dumps(packed))):
        assert torch.equal(marlin_gen.gemm(a, other), expected)


@pytest.mark.parametrize(("n", "k", "m"), [(64, 8192, 2**18 + 72), (8192, 128, 2**18 + 72)])
def test_more_than_2_to_the_31_elements(n, k, m):
    """Of A or of C: addresses are 64 bits wide everywhere. The first, middle and last rows, against the reference."""
    assert m * max(n, k) > 2**31
    if torch.cuda.mem_get_info()[0] < 12 << 30:
        pytest.skip("needs 12 GiB of free memory")
    codes, scales, packed = weight(n, k)
    a = torch.empty(m, k, dtype=torch.float16, device="cuda").normal_()
    c = torch.full((1,), float("nan"), device="cuda")
    for _ in range(2):  # by Python, then natively
        del c
        c = checked(a, packed)
        for at in (0, m // 2 - 40, 2**18 - 40, m - 72):
            rows = slice(at, at + 72)
            assert error_of(c[rows], gemm_reference(a[rows], codes, scales)) < ERROR_LIMIT, at
    del a, c
    torch.cuda.empty_cache()
