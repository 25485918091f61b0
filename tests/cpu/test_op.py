"""torch.ops.marlin_gen.gemm without a GPU: numbers, registration, tracing, gradients, and what bad operands get."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import pytest
import torch

import marlin_gen
from marlin_gen.formats import FORMATS, LAYOUT_VERSION
from marlin_gen.layout import SCALE_DTYPES, pack
from marlin_gen.nn import QuantLinear
from marlin_gen.operands import random_weight
from marlin_gen.reference import dequantize, gemm_reference


def weight(n: int = 128, k: int = 256, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 16, (n, k), dtype=torch.uint8, generator=generator)
    scales = (torch.rand(n, k // 128, generator=generator) * 0.02 + 0.005).half()
    return codes, scales


CODES, SCALES = weight()
PACKED = pack(CODES, SCALES)


def activations(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1)).half()


@pytest.mark.parametrize("shape", [(256,), (1, 256), (7, 256), (2, 3, 256), (0, 256), (2, 0, 256), (1, 1, 1, 256)])
def test_gemm_is_the_reference_for_any_leading_dimensions(shape):
    a = activations(*shape)
    c = marlin_gen.gemm(a, PACKED)
    assert c.shape == (*shape[:-1], 128) and c.dtype == torch.float16 and c.is_contiguous()
    assert torch.equal(c, gemm_reference(a, CODES, SCALES).half())


def test_identity_activations_decode_the_weight_bit_for_bit():
    assert torch.equal(marlin_gen.gemm(torch.eye(256).half(), PACKED).T, dequantize(CODES, SCALES))


@pytest.mark.parametrize("stride", ["transposed", "sliced", "offset", "expanded"])
def test_strides_do_not_matter(stride):
    a = {
        "transposed": activations(256, 5).T,
        "sliced": activations(5, 512)[:, ::2],
        "offset": activations(5 * 256 + 1)[1:].view(5, 256),
        "expanded": activations(1, 256).expand(5, 256),
    }[stride]
    assert torch.equal(marlin_gen.gemm(a, PACKED), marlin_gen.gemm(a.contiguous(), PACKED))


def test_the_whole_path_from_a_float_weight():
    dense = torch.randn(192, 384, generator=torch.Generator().manual_seed(2)) * 0.02
    packed = marlin_gen.pack(*marlin_gen.quantize(dense))
    a = activations(9, 384)
    error = (marlin_gen.gemm(a, packed).float() - a.float() @ dense.T).norm() / (a.float() @ dense.T).norm()
    assert error < 0.12, "4-bit quantisation of a normal weight"


@pytest.mark.parametrize("shape", [(3, 256), (2, 3, 256), (0, 256)])
@pytest.mark.parametrize("requires_grad", [False, True])
def test_opcheck(shape, requires_grad):
    a = activations(*shape).requires_grad_(requires_grad)
    torch.library.opcheck(torch.ops.marlin_gen.gemm.default, (a, PACKED.weight, PACKED.scales))


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("dtype", SCALE_DTYPES)
def test_every_format_in_both_types_with_a_bias(name, dtype):
    codes, scales = random_weight(64, 256, FORMATS[name], dtype, generator=torch.Generator().manual_seed(3))
    a, bias = activations(5, 256).to(dtype), activations(64).to(dtype)
    c = marlin_gen.gemm(a, pack(codes, scales, name), bias)
    assert c.dtype == dtype
    assert torch.equal(c, gemm_reference(a, codes, scales, name, bias).to(dtype))
    assert not torch.equal(c, marlin_gen.gemm(a, pack(codes, scales, name)))


def test_gradients_with_a_bias():
    a, bias = activations(6, 256).requires_grad_(), activations(128).requires_grad_()
    operands = (a, PACKED.weight, PACKED.scales, bias)
    torch.library.opcheck(torch.ops.marlin_gen.gemm.default, operands)
    grad = activations(6, 128)
    marlin_gen.gemm(a, PACKED, bias).backward(grad)
    assert torch.allclose(bias.grad.float(), grad.float().sum(0), rtol=1e-2, atol=1e-2) and a.grad is not None


def test_gradient_of_activations():
    a = activations(6, 256).requires_grad_()
    grad = activations(6, 128)
    marlin_gen.gemm(a, PACKED).backward(grad)
    expected = grad.float() @ dequantize(CODES, SCALES).float()
    assert (a.grad.float() - expected).norm() / expected.norm() < 1e-3


def test_scales_have_no_gradient():
    scales = PACKED.scales.clone().requires_grad_()
    c = torch.ops.marlin_gen.gemm(activations(2, 256), PACKED.weight, scales)
    with pytest.raises(NotImplementedError, match=r"no gradient for scales; call scales.requires_grad_\(False\)"):
        c.sum().backward()


@pytest.mark.parametrize("order", [None, torch.arange(255, -1, -1)])
def test_forward_mode_is_refused_and_not_zero(order):
    """torch gives an op of torch.library no tangent at all: jvp would be zeros."""
    packed, a = replace(PACKED, order=order), activations(3, 256)
    for way in (
        lambda: torch.func.jvp(lambda x: marlin_gen.gemm(x, packed), (a,), (a,)),
        lambda: torch.func.jacfwd(lambda x: marlin_gen.gemm(x, packed))(a[0]),
        lambda: torch.func.jvp(lambda bias: marlin_gen.gemm(a, packed, bias), (a[0, :128],), (a[1, :128],)),
    ):
        with pytest.raises(NotImplementedError, match="no forward-mode derivative"):
            way()
    with torch.autograd.forward_ad.dual_level():  # of something else
        assert torch.equal(marlin_gen.gemm(a, packed), marlin_gen.gemm(a[:, order] if order is not None else a, PACKED))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_fullgraph_gives_the_eager_result(dynamic):
    def layer(a):
        return torch.nn.functional.silu(marlin_gen.gemm(a * 2, PACKED)) + 1

    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for m in (5, 9, 1):
        a = activations(m, 256)
        assert torch.equal(compiled(a), layer(a))


def test_meta_tensors_give_shapes_only():
    a = torch.empty(3, 5, 256, dtype=torch.float16, device="meta")
    c = torch.ops.marlin_gen.gemm(a, PACKED.weight.to("meta"), PACKED.scales.to("meta"))
    assert c.device.type == "meta" and c.shape == (3, 5, 128)


def test_export():
    class Layer(torch.nn.Module):
        def forward(self, a, weight, scales):
            return torch.ops.marlin_gen.gemm(a, weight, scales)

    rows = torch.export.Dim("rows", min=2, max=4096)
    operands = (activations(4, 256), PACKED.weight, PACKED.scales)
    program = torch.export.export(Layer(), operands, dynamic_shapes=({0: rows}, None, None))
    a = activations(11, 256)
    assert torch.equal(program.module()(a, *operands[1:]), marlin_gen.gemm(a, PACKED))


def test_a_traced_graph_names_the_layout_of_its_weight():
    """What caches and saved programs are told apart by, of other releases."""
    program = torch.export.export(QuantLinear.from_packed(PACKED), (activations(4, 256),))
    (call,) = (node for node in program.graph.nodes if node.target is torch.ops.marlin_gen.gemm.default)
    assert LAYOUT_VERSION in (*call.args, *call.kwargs.values())


def test_a_graph_of_before_fp8_words_is_refused_for_them_alone():
    """It has no layout_version, which was its default."""
    codes, scales = random_weight(128, 256, FORMATS["e4m3g128"], torch.bfloat16)
    fp8, a = pack(codes, scales, "e4m3g128"), torch.ones(2, 256, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="layout_version=2 is not 3; pack the original weight again"):
        torch.ops.marlin_gen.gemm(a, fp8.weight, fp8.scales, None, "e4m3g128")
    assert torch.equal(
        torch.ops.marlin_gen.gemm(a, fp8.weight, fp8.scales, None, "e4m3g128", LAYOUT_VERSION), marlin_gen.gemm(a, fp8)
    )
    a = activations(2, 256)
    assert torch.equal(torch.ops.marlin_gen.gemm(a, PACKED.weight, PACKED.scales), marlin_gen.gemm(a, PACKED))


BAD = {
    "activation dtype": (lambda o: o.update(a=o["a"].float()), TypeError, r"a is torch.float32; .* a.half\(\)"),
    "bfloat16": (lambda o: o.update(a=o["a"].bfloat16()), TypeError, r"a is torch.bfloat16 .* torch.float16; convert"),
    "bias": (lambda o: o.update(bias=SCALES[:, 0][:64]), ValueError, r"bias is torch.float16 \[64\] .* \[128\]"),
    "bias dtype": (lambda o: o.update(bias=torch.zeros(128)), ValueError, r"bias is torch.float32 .* torch.float16"),
    "k mismatch": (lambda o: o.update(a=o["a"][:, :128]), ValueError, r"a has shape \[2, 128\]; .* k=256"),
    "scalar": (lambda o: o.update(a=o["a"][0, 0]), ValueError, r"a has shape \[\]; .* k=256"),
    "weight dtype": (
        lambda o: o.update(weight=o["weight"].long()),
        ValueError,
        r"weight is torch.int64 .* torch.int32",
    ),
    "weight not packed": (
        lambda o: o.update(weight=CODES.int()),
        ValueError,
        r"\[128, 256\]; the packed layout of u4b8g128 is .*512",
    ),
    "scales dtype": (lambda o: o.update(scales=o["scales"].float()), ValueError, r"torch.float32 .* torch.float16"),
    "scales not packed": (lambda o: o.update(scales=SCALES), ValueError, r"\[128, 2\]; .*n=128, k=256.* \[2, 3, 64\]"),
    "layout version": (
        lambda o: o.update(layout_version=1),
        ValueError,
        "layout_version=1 is not 3; pack the original",
    ),
    "weight format": (
        lambda o: o.update(weight_format="u3"),
        ValueError,
        "unknown weight format 'u3'; known: .*u4b8g128",
    ),
    "device": (lambda o: o.update(weight=o["weight"].to("meta")), ValueError, r"weight on meta.*packed.to\(a.device\)"),
    "strided weight": (
        lambda o: o.update(weight=o["weight"].transpose(0, 1).contiguous().transpose(0, 1)),
        ValueError,
        r"must be contiguous.*\.contiguous\(\)",
    ),
}


@pytest.mark.parametrize("order", [None, torch.arange(256)])
def test_what_is_no_tensor_or_packed_weight_is_a_sentence(order):
    a, packed = activations(2, 256), replace(PACKED, order=order)
    takes = "marlin_gen.gemm takes a Tensor and a PackedWeight of marlin_gen.pack"
    with pytest.raises(TypeError, match=f"a is a ndarray and packed a PackedWeight; {takes}"):
        marlin_gen.gemm(a.numpy(), packed)
    with pytest.raises(TypeError, match=f"a is a Tensor and packed a tuple; {takes}"):
        marlin_gen.gemm(a, (PACKED.weight, PACKED.scales))


@pytest.mark.parametrize("case", BAD)
def test_bad_operands_get_an_error_that_names_value_and_fix(case):
    change, error, message = BAD[case]
    operands = {"a": activations(2, 256), "weight": PACKED.weight, "scales": PACKED.scales}
    change(operands)
    with pytest.raises(error, match=message):
        torch.ops.marlin_gen.gemm(**operands)


@pytest.mark.parametrize(
    "imports",
    [
        "import torch, marlin_gen",
        "import marlin_gen, torch",
        "import marlin_gen; from marlin_gen import QuantLinear; import torch",
        "import marlin_gen.layout, torch",
        "import marlin_gen, importlib.util; importlib.util.find_spec('torch'); import torch",
    ],
)
def test_importing_both_registers_the_op(imports):
    code = f"{imports}; print(torch.ops.marlin_gen.gemm.default._schema.name)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "marlin_gen::gemm", done.stderr


def test_importing_the_package_does_not_import_torch():
    code = (
        "import sys, marlin_gen, marlin_gen.table, marlin_gen.dispatch\n"
        "print([name for name in ('torch', 'optuna', 'jinja2') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_public_names():
    for name in marlin_gen.__all__:
        assert getattr(marlin_gen, name) is not None
        assert name in dir(marlin_gen)
    with pytest.raises(AttributeError, match=r"no attribute 'gem'; public names: .*gemm"):
        _ = marlin_gen.gem
