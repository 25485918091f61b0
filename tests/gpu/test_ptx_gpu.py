"""The kernels that ship as PTX, on whatever GPU is here: the driver compiles them, and their numbers are right."""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import pytest
import torch

import marlin_gen
from marlin_gen import first_use, serve, toolchain
from marlin_gen.dispatch import Dispatcher
from marlin_gen.formats import DTYPES, FORMATS
from marlin_gen.launch import Launcher
from marlin_gen.operands import random_weight
from marlin_gen.problem import Problem
from marlin_gen.reference import gemm_reference
from marlin_gen.serve import Server, ServeWarning
from marlin_gen.shipped_ptx import shipped_ptx

pytestmark = pytest.mark.gpu
WATCHDOG_S = 240.0  # the first to be asked for are compiled by the driver, a second or so each

TOKENS = (1, 3, 7, 9, 15, 17, 31, 33, 63, 65, 127, 200, 513)


@pytest.fixture
def untuned(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """This GPU's server without tables and without a compiler, in place of the real one."""

    def no_compiler() -> None:
        raise toolchain.ToolchainError("no compiler, says the test")

    monkeypatch.setattr(first_use, "find_toolchain", no_compiler)
    launcher = Launcher.for_device(torch.cuda.current_device())
    made = Server(launcher.device_index, launcher, Dispatcher(launcher.gpu, [], ptx=shipped_ptx()))
    real = Server.of(torch.device("cuda"))
    native = real._native
    if native:
        made.launch_natively(native)
    monkeypatch.setattr(serve, "_server", lambda index: made)
    yield made
    if native:  # what it learned is of the kernels of this test
        real.launch_natively(native)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("act_dtype", DTYPES)
def test_every_format_and_number_of_tokens(untuned, name, act_dtype):
    n, k = 320, 1024 + (64 if FORMATS[name].group_size <= 64 else 128)
    dtype = getattr(torch, DTYPES[act_dtype].torch_name)
    codes, scales = random_weight(n, k, FORMATS[name], dtype, "cuda")
    packed = marlin_gen.pack(codes, scales, name)
    bias = torch.randn(n, device="cuda").to(dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ServeWarning)
        for m in TOKENS:
            a = torch.randn(m, k, device="cuda").to(dtype)
            torch.full((m, n), float("nan"), dtype=dtype, device="cuda")  # where the output is about to lie
            c = marlin_gen.gemm(a, packed)
            reference = gemm_reference(a, codes, scales, name)
            error = ((c.float() - reference).norm() / reference.norm()).item()
            assert error < DTYPES[act_dtype].error_limit, m
            assert torch.equal(marlin_gen.gemm(a, packed), c), "the next launch, native where there is one"
            with_bias = gemm_reference(a, codes, scales, name, bias)
            error = ((marlin_gen.gemm(a, packed, bias).float() - with_bias).norm() / with_bias.norm()).item()
            assert error < DTYPES[act_dtype].error_limit, m
            choice = untuned.choice(Problem(n, k, m, name, act_dtype))
            assert choice.spec.arch == "compute_80" and choice.kernel.image


@pytest.mark.parametrize(("n", "k"), [(64, 128), (4096, 4096), (28672, 4096)])
def test_every_size_of_tile(untuned, n, k):
    """Few rows and many: both heights of a block are chosen, with one pass and several."""
    codes, scales = random_weight(n, k, FORMATS["u4b8g128"], torch.float16, "cuda")
    packed = marlin_gen.pack(codes, scales)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ServeWarning)
        for m in (1, 16, 24, 100):
            a = torch.randn(m, k, device="cuda").half()
            reference = gemm_reference(a, codes, scales)
            error = ((marlin_gen.gemm(a, packed).float() - reference).norm() / reference.norm()).item()
            assert error < DTYPES["f16"].error_limit, m


def test_every_kernel_is_loaded_by_the_driver(untuned):
    from marlin_gen.config import KernelSpec

    for name in FORMATS:
        for key, kernel in shipped_ptx().kernels(name).items():
            spec = KernelSpec.from_key(key)
            loaded = untuned.launcher.load(shipped_ptx().path(name), kernel.symbol, spec, kernel.image)
            assert loaded.max_clusters >= untuned.launcher.gpu.num_sms, key


def test_one_warning_says_what_to_run(untuned):
    codes, scales = random_weight(64, 128, FORMATS["u4b8g128"], torch.float16, "cuda")
    packed = marlin_gen.pack(codes, scales)
    with pytest.warns(ServeWarning) as caught:
        for m in (1, 2, 40):
            marlin_gen.gemm(torch.randn(m, 128, device="cuda").half(), packed)
    if not untuned.launcher.gpu.arch.is_ptx:
        (said,) = [str(warning.message) for warning in caught if warning.category is ServeWarning]
        assert "marlin-gen tune --shapes 64x128" in said
