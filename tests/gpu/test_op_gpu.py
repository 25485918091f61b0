"""The op on a GPU: numbers for any m, and one result whether eager, compiled, captured, or on another stream."""

from __future__ import annotations

import warnings
from dataclasses import replace
from functools import cache

import pytest
import torch

import marlin_gen
from marlin_gen.formats import DTYPES, FORMATS, WeightFormat
from marlin_gen.layout import PackedWeight
from marlin_gen.operands import random_weight
from marlin_gen.problem import Problem
from marlin_gen.reference import dequantize, gemm_reference
from marlin_gen.table import TableWarning

pytestmark = pytest.mark.gpu

SHAPES = [(4096, 4096), (6144, 4096), (64, 128), (192, 384), (4096, 14336)]
TOKENS = [1, 7, 17, 100, 1000]


@cache
def weight(n: int, k: int) -> tuple[torch.Tensor, torch.Tensor, PackedWeight]:
    """Codes, scales and the packed weight; no test writes to them."""
    codes = torch.randint(0, 16, (n, k), dtype=torch.uint8, device="cuda")
    scales = (torch.rand(n, k // 128, device="cuda") * 0.02 + 0.005).half()
    return codes, scales, marlin_gen.pack(codes, scales)


def activations(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, device="cuda").half()


def poison(shape: torch.Size) -> None:
    """Leave NaN where the caching allocator is about to put the output."""
    torch.full(shape, float("nan"), dtype=torch.float16, device="cuda")


def checked(a: torch.Tensor, packed: PackedWeight) -> torch.Tensor:
    """The op's result; any fallback to a slower way, which warns, fails the test."""
    from marlin_gen.serve import ServeWarning

    poison(torch.Size((*a.shape[:-1], packed.n)))
    with warnings.catch_warnings():
        for category in (ServeWarning, TableWarning):
            warnings.simplefilter("error", category)
        return marlin_gen.gemm(a, packed)


@pytest.mark.parametrize("m", TOKENS)
@pytest.mark.parametrize(("n", "k"), SHAPES)
def test_against_the_fp32_reference(n, k, m):
    from marlin_gen.serve import Server

    codes, scales, packed = weight(n, k)
    a = activations(m, k)
    c = checked(a, packed)
    reference = gemm_reference(a, codes, scales)
    error = ((c.float() - reference).norm() / reference.norm()).item()
    assert error < DTYPES["f16"].error_limit
    choice = Server.of(a.device).choice(Problem(n, k, m))
    assert choice is not None, "a kernel ran, not the dense fallback"
    assert torch.equal(checked(a, packed), c), f"{choice.key} does not repeat bit for bit"


@pytest.mark.parametrize("shape", [(0, 4096), (2, 0, 4096)])
def test_no_tokens(shape):
    _, _, packed = weight(4096, 4096)
    c = marlin_gen.gemm(activations(*shape), packed)
    assert c.shape == (*shape[:-1], 4096) and c.device.type == "cuda"


def test_identity_decodes_the_weight_bit_for_bit():
    codes, scales, packed = weight(512, 1024)
    c = checked(torch.eye(1024, device="cuda").half(), packed)
    assert torch.equal(c.T, dequantize(codes, scales))


def unrounded(codes: torch.Tensor, scales: torch.Tensor, fmt: WeightFormat) -> torch.Tensor:
    """The weight [n, k] in f64."""
    scales = scales.double().view(codes.shape[0], -1, fmt.scale_values).repeat_interleave(fmt.group_size, dim=1)
    if fmt.offset == "minima":
        return codes * scales[..., 0] + scales[..., 1]
    numbers = codes.view(torch.float8_e4m3fn) if fmt.offset == "floats" else codes
    return (numbers.double() - (scales[..., 1] if fmt.has_offsets else fmt.zero_point)) * scales[..., 0]


@pytest.mark.parametrize("m", [1, 5, 40, 300])
@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("act_dtype", DTYPES)
def test_every_format_is_as_exact_as_cublas_on_its_dequantised_weight(act_dtype, name, m):
    """k of 1024 + 64 where groups allow it, so that no kernel's tiles fit by luck; also with a bias."""
    n, k = 320, 1024 + (64 if FORMATS[name].group_size <= 64 else 128)
    dtype = getattr(torch, DTYPES[act_dtype].torch_name)
    codes, scales = random_weight(n, k, FORMATS[name], dtype, "cuda")
    packed = marlin_gen.pack(codes, scales, name)
    a = activations(m, k).to(dtype)
    bias = activations(n).to(dtype)
    dense = dequantize(codes, scales, name)
    # Not the rounded weight: kernels that scale the sums afterwards never round it, and are closer to this than cuBLAS.
    exact = a.double() @ unrounded(codes, scales, FORMATS[name]).T

    def error(c: torch.Tensor, of: torch.Tensor) -> float:
        return ((c.double() - of).norm() / of.norm()).item()

    assert error(marlin_gen.gemm(a, packed), exact) <= 1.2 * error(a @ dense.T, exact)
    with_bias = exact + bias.double()
    assert error(marlin_gen.gemm(a, packed, bias), with_bias) <= 1.2 * error(torch.addmm(bias, a, dense.T), with_bias)


@pytest.mark.parametrize("m", [1, 16, 40, 300])
@pytest.mark.parametrize("act_dtype", DTYPES)
@pytest.mark.parametrize("name", ["u4b8g128", "u4b8g32", "u8b128g64"])
def test_rows_of_any_scale_are_each_as_exact_as_cublas(name, act_dtype, m):
    """Lifts differ by 2^18, and a row's groups by up to 2^7."""
    dtype, fmt = getattr(torch, DTYPES[act_dtype].torch_name), FORMATS[name]
    codes = torch.randint(0, fmt.codes, (320, 1024), dtype=torch.uint8, device="cuda")
    of_rows = 2.0 ** torch.linspace(-8 - fmt.bits, 10 - fmt.bits, 320, device="cuda")
    of_rows = of_rows[torch.randperm(320, device="cuda")]
    of_groups = 2.0 ** -torch.randint(0, 8, (320, 1024 // fmt.group_size), device="cuda")
    scales = (of_rows[:, None] * of_groups * (1 + torch.rand_like(of_groups) / 2)).to(dtype)
    a = activations(m, 1024).to(dtype) / 64
    c, b = marlin_gen.gemm(a, marlin_gen.pack(codes, scales, name)), unrounded(codes, scales, fmt)
    size = a.double().norm() * b.norm(dim=1) / 32  # of a column of the result, as it is to be expected
    error = (c.double() - a.double() @ b.T).norm(dim=0) / size
    cublas = ((a @ dequantize(codes, scales, name).T).double() - a.double() @ b.T).norm(dim=0) / size
    assert error.max() < 4 * DTYPES[act_dtype].error_limit and error.norm() <= 1.2 * cublas.norm()


@pytest.mark.parametrize("m", [3, 40])
@pytest.mark.parametrize("act_dtype", DTYPES)
def test_outliers_denormals_and_infinities_come_out_as_of_the_dequantised_matmul(act_dtype, m):
    dtype = getattr(torch, DTYPES[act_dtype].torch_name)
    codes, scales = random_weight(192, 384, FORMATS["u4b8g128"], dtype, "cuda")
    packed, dense = marlin_gen.pack(codes, scales), dequantize(codes, scales)
    a = activations(m, 384).to(dtype)
    a[0] *= 1000
    a[1] = torch.finfo(dtype).tiny / 2
    a[2, ::2] = 0
    c, exact = marlin_gen.gemm(a, packed), a.double() @ unrounded(codes, scales, FORMATS["u4b8g128"]).T
    error, cublas = (c.double() - exact).norm(dim=1), ((a @ dense.T).double() - exact).norm(dim=1)
    assert bool((error <= 1.2 * cublas + 1e-6).all()), (error / cublas).max()

    others = [i for i in range(m) if i != 2]
    for value in (float("inf"), float("-inf"), float("nan")):
        special = a.clone()
        special[2, 7] = value
        found, right = marlin_gen.gemm(special, packed), special @ dense.T
        assert torch.equal(found[2].isfinite(), right[2].isfinite())
        assert torch.equal(found[others], c[others]), "it reached other tokens"


def test_bf16_does_not_overflow_where_fp32_sums_do_not():
    codes, scales = random_weight(192, 384, FORMATS["u4b8g128"], torch.bfloat16, "cuda")
    for m in (1, 40):
        a = torch.full((m, 384), 1e34, device="cuda", dtype=torch.bfloat16)
        assert marlin_gen.gemm(a, marlin_gen.pack(codes, scales)).isfinite().all()


def test_pack_on_the_gpu_is_pack_on_the_cpu():
    codes, scales, packed = weight(192, 384)
    other = marlin_gen.pack(codes.cpu(), scales.cpu()).to("cuda")
    assert torch.equal(packed.weight, other.weight) and torch.equal(packed.scales, other.scales)


def test_leading_dimensions_strides_and_alignment():
    _, _, packed = weight(4096, 4096)
    a = activations(6, 4096)
    expected = checked(a, packed)
    assert torch.equal(checked(a.view(2, 3, 4096), packed), expected.view(2, 3, 4096))
    assert torch.equal(checked(a.T.contiguous().T, packed), expected)
    assert torch.equal(checked(activations_at_offset(a), packed), expected)
    assert torch.equal(checked(a[0], packed), checked(a[:1], packed)[0])


def activations_at_offset(a: torch.Tensor) -> torch.Tensor:
    """The same values at an address that is not 16-byte aligned."""
    store = torch.empty(a.numel() + 1, dtype=a.dtype, device=a.device)[1:].view_as(a)
    assert store.data_ptr() % 16
    return store.copy_(a)


def test_opcheck():
    _, _, packed = weight(256, 512)
    operands = (activations(17, 512).requires_grad_(), packed.weight, packed.scales)
    torch.library.opcheck(torch.ops.marlin_gen.gemm.default, operands)


def test_compiled_fullgraph_gives_the_eager_result_bit_for_bit():
    """Compiled for the first m alone, for any m from the second on: two compilations, and both kinds of graph."""
    layer = marlin_gen.QuantLinear.from_packed(weight(4096, 4096)[2])
    compiled = torch.compile(layer, fullgraph=True)
    for m in (1, 8, 64, 512):
        a = activations(m, 4096)
        assert torch.equal(compiled(a), layer(a)), f"m={m}"


@pytest.mark.parametrize("m", [1, 8, 64, 512])
@pytest.mark.parametrize(("n", "k"), [(4096, 4096), (4096, 14336)])
def test_captured_graph_gives_the_eager_result_bit_for_bit(n, k, m):
    _, _, packed = weight(n, k)
    a = activations(m, k)
    expected = checked(a, packed)  # also loads the kernel, which a capture must not
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        c = marlin_gen.gemm(a, packed)
    for _ in range(3):
        c.fill_(float("nan"))
        graph.replay()
        assert torch.equal(c, expected)
    fresh = activations(m, k)
    a.copy_(fresh)
    graph.replay()
    assert torch.equal(c, checked(fresh, packed)), "a graph reads its inputs anew"


def test_streams_at_once_do_not_disturb_each_other():
    _, _, packed = weight(4096, 14336)
    inputs = [activations(64, 14336) for _ in range(4)]
    expected = [checked(a, packed) for a in inputs]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in inputs]
    results: list[list[torch.Tensor]] = [[] for _ in inputs]
    for _ in range(20):
        for stream, a, found in zip(streams, inputs, results, strict=True):
            with torch.cuda.stream(stream):
                found.append(marlin_gen.gemm(a, packed))
    torch.cuda.synchronize()
    for found, right in zip(results, expected, strict=True):
        assert all(torch.equal(c, right) for c in found)


def test_a_weight_changed_in_place_is_the_one_that_is_read():
    """Dependent launches start while the kernel before them still runs, which writes what they read, and read the first
    of their weights sooner still: also behind another product, which lets them, while weights were written before that.
    """
    packs = [marlin_gen.pack(*weight(4096, 4096)[:2]), marlin_gen.pack(*(t.flip(0) for t in weight(4096, 4096)[:2]))]
    a = activations(8, 4096)
    expected = [marlin_gen.gemm(a, packed) for packed in packs]
    live = PackedWeight(packs[0].weight.clone(), packs[0].scales.clone(), packs[0].weight_format)
    for i in range(40):
        live.weight.copy_(packs[i % 2].weight)
        live.scales.copy_(packs[i % 2].scales)
        for _ in range(i // 2 % 3):
            marlin_gen.gemm(a, packs[0])
        assert torch.equal(marlin_gen.gemm(a, live), expected[i % 2])


def test_gradient():
    codes, scales, packed = weight(256, 512)
    a = activations(8, 512).requires_grad_()
    grad = activations(8, 256)
    marlin_gen.gemm(a, packed).backward(grad)
    expected = grad.float() @ dequantize(codes, scales).float()
    assert (a.grad.float() - expected).norm() / expected.norm() < 1e-3


def test_operands_on_two_devices():
    _, _, packed = weight(64, 128)
    with pytest.raises(ValueError, match=r"a is on cpu, weight on cuda:0.*packed.to\(a.device\)"):
        torch.ops.marlin_gen.gemm(torch.zeros(1, 128).half(), packed.weight, packed.scales)


def test_misaligned_weight():
    _, _, packed = weight(64, 128)
    shifted = torch.empty(packed.weight.numel() + 1, dtype=torch.int32, device="cuda")[1:].view_as(packed.weight)
    with pytest.raises(ValueError, match="must be 16-byte aligned; clone"):
        marlin_gen.gemm(activations(1, 128), replace(packed, weight=shifted.copy_(packed.weight)))


class FreshServer:
    """A server with its own tables, so that what a test breaks stays its own."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from marlin_gen import serve

        made = serve.new_server(torch.cuda.current_device())
        monkeypatch.setattr(serve, "_server", lambda device_index: made)
        self.server = made


def test_without_a_kernel_the_answer_is_still_right_with_one_warning(monkeypatch, tmp_path):
    from marlin_gen import first_use, toolchain
    from marlin_gen.serve import ServeWarning

    def no_compiler() -> None:
        raise toolchain.ToolchainError("no compiler, says the test")

    monkeypatch.setattr(first_use, "find_toolchain", no_compiler)
    server = FreshServer(monkeypatch).server
    server.dispatcher.tables.clear()
    server.dispatcher.ptx = None
    codes, scales, packed = weight(256, 512)
    a = activations(8, 512)
    with pytest.warns(ServeWarning, match=r"no kernel for n=256, k=512, m=8 on .*marlin-gen tune") as caught:
        first = marlin_gen.gemm(a, packed)
        assert torch.equal(marlin_gen.gemm(a, packed), first)
    assert len(caught) == 1
    reference = gemm_reference(a, codes, scales)
    assert (first.float() - reference).norm() / reference.norm() < DTYPES["f16"].error_limit


def test_a_cubin_that_does_not_load_is_passed_over_with_one_warning(monkeypatch, tmp_path):
    """A cubin that has the hash its table names, and yet is none."""
    from marlin_gen.dispatch import Choice, KernelLocation
    from marlin_gen.serve import ServeWarning

    server = FreshServer(monkeypatch).server
    problem = Problem(256, 512, 8)
    good = next(choice for choice in server.dispatcher.choose(problem))
    (tmp_path / "broken.cubin").write_bytes(b"\x7fELF but no more")
    other = replace(good.plan.config, num_stages=good.plan.config.num_stages + 1)
    broken = Choice(
        replace(good.plan, config=other),
        replace(good.spec, config=other),
        "exact",
        KernelLocation(tmp_path / "broken.cubin", "kernel"),
    )
    monkeypatch.setattr(server.dispatcher, "choose", lambda asked: iter([broken, good]))
    _, _, packed = weight(256, 512)
    with pytest.warns(ServeWarning, match=r"broken.cubin does not load .* using the next candidate"):
        marlin_gen.gemm(activations(8, 512), packed)
    assert server.choice(problem) == good
