"""QuantLinear: numbers, checkpoints, and the layout version they carry."""

from __future__ import annotations

import collections
import copy

import pytest
import torch
from torch import nn

import marlin_gen
from marlin_gen import QuantLinear
from marlin_gen.formats import FORMATS


def linear(k: int = 256, n: int = 128, bias: bool = False) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(k, n, bias=bias)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(256,), (5, 256), (2, 3, 256), (0, 256)])
def test_forward(bias, shape):
    source = linear(bias=bias)
    layer = QuantLinear.from_float(source)
    x = torch.randn(*shape).half()
    packed = marlin_gen.pack(*marlin_gen.quantize(source.weight.detach()))
    expected = marlin_gen.gemm(x, packed, source.bias.detach().half() if bias else None)
    assert torch.equal(layer(x), expected)
    assert layer(x).shape == (*shape[:-1], 128)


@pytest.mark.parametrize("weight_format", sorted(FORMATS))
def test_close_to_the_float_layer_in_every_format(weight_format):
    source = linear(bias=True)
    x = torch.randn(64, 256)
    exact = source(x)
    layer = QuantLinear.from_float(source, weight_format)
    assert (layer(x.half()).float() - exact).norm() / exact.norm() < 0.12


def test_lifts_survive_a_change_of_type_and_a_new_layer_has_ones():
    """Kernels divide by them: they must be powers of two whatever became of the layer."""
    tiny = linear()
    tiny.weight.data[:64] *= 2.0**-18
    for layer in (QuantLinear.from_float(tiny.bfloat16()), QuantLinear.from_float(tiny), QuantLinear(256, 128)):
        for dtype in (torch.float16, torch.bfloat16):
            found = layer.to(dtype).scales[:, -1].double()
            assert bool((found == 2.0 ** found.log2().round()).all()) and bool(found.isfinite().all())
    assert bool((layer.scales[:, -1] == 1).all()) and not layer(torch.randn(2, 256).bfloat16()).any()


def every_zero(weight_format: str, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes, and scales that both types hold with all zero points, or other offsets, from 0 to 16."""
    fmt = FORMATS[weight_format]
    codes = torch.randint(0, fmt.codes, (128, 256), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    if fmt.offset == "floats":
        codes[codes & 0x7F == 0x7F] = 0  # NaN, which pack refuses
    scales = (1 + torch.arange(128 * (256 // fmt.group_size)).view(128, -1) % 7) / 64
    zeros = torch.arange(scales.numel()).view_as(scales) % 17
    return codes, (torch.stack([scales, zeros], -1) if fmt.has_offsets else scales).to(dtype)


def through_a_state_dict(layer: QuantLinear, dtype: torch.dtype) -> QuantLinear:
    other = nn.Sequential(QuantLinear(256, 128, weight_format=layer.weight_format)).to(dtype)
    state = nn.Sequential(layer).state_dict()
    other.load_state_dict(state)
    assert state["0.scales"].data_ptr() == layer.scales.data_ptr(), "a caller's dict is left as it was"
    return other[0]


CHANGES = {
    "to": lambda layer, dtype: layer.to(dtype),
    "to device": lambda layer, dtype: layer.to("cpu", dtype),
    "in a model": lambda layer, dtype: nn.Sequential(layer).to(dtype)[0],
    "by float32": lambda layer, dtype: layer.float().to(dtype),
    "copied": lambda layer, dtype: copy.deepcopy(layer).to(dtype),
    "loaded": through_a_state_dict,
    "loaded of float32": lambda layer, dtype: through_a_state_dict(layer.float(), dtype),
    "loaded in float32": lambda layer, dtype: through_a_state_dict(layer, torch.float32).to(dtype),
}


@pytest.mark.parametrize("weight_format", sorted(FORMATS))
@pytest.mark.parametrize("way", CHANGES)
@pytest.mark.parametrize("types", [(torch.float16, torch.bfloat16), (torch.bfloat16, torch.float16)], ids=str)
def test_a_change_of_type_keeps_the_weight(weight_format, way, types):
    """Zero points are encoded otherwise in each type: a plain cast of them makes another weight."""
    own, other = (marlin_gen.pack(*every_zero(weight_format, dtype), weight_format) for dtype in types)
    changed = CHANGES[way](QuantLinear.from_packed(own), types[1])
    assert torch.equal(changed.weight, other.weight) and torch.equal(changed.scales, other.scales)
    x = torch.randn(3, 256).to(types[1])
    assert torch.equal(changed(x), QuantLinear.from_packed(other)(x))
    assert torch.equal(CHANGES[way](changed, types[0]).scales, own.scales), "and back"


@pytest.mark.parametrize("weight_format", sorted(FORMATS))
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_layer_in_float32_unpacks_to_what_it_was_packed_of(weight_format, dtype):
    codes, scales = every_zero(weight_format, dtype)
    layer = QuantLinear.from_packed(marlin_gen.pack(codes, scales, weight_format)).float()
    found = marlin_gen.unpack(layer.packed)
    assert torch.equal(found[0], codes) and torch.equal(found[1], scales.float())


def test_assigning_takes_the_type_of_what_is_assigned():
    state = QuantLinear.from_float(linear().bfloat16(), "u4zg64").state_dict()
    layer = QuantLinear(256, 128, weight_format="u4zg64")
    layer.load_state_dict(state, assign=True)
    assert layer.scales.dtype == torch.bfloat16 and torch.equal(layer.scales, state["scales"])


def test_a_new_layer_of_another_type_is_zero_and_other_sizes_are_refused_as_ever():
    layer = QuantLinear(256, 128, weight_format="u4zg64").bfloat16().half()
    assert not layer(torch.randn(2, 256).half()).any()
    state = {**layer.bfloat16().state_dict(), "scales": torch.zeros(3)}
    with pytest.raises(RuntimeError, match="size mismatch for scales"):
        QuantLinear(256, 128, weight_format="u4zg64").load_state_dict(state)


@pytest.mark.parametrize("weight_format", ["u4b8g128", "u4zg32"])
def test_gradient_of_the_activations(weight_format):
    layer = QuantLinear.from_float(linear(), weight_format)
    dense = layer(torch.eye(256).half()).T.double()  # the weight, as the layer sees it
    x = torch.randn(3, 256).half().requires_grad_()
    grad = torch.randn(3, 128).half()
    layer(x).backward(grad)
    expected = grad.double() @ dense
    assert (x.grad.double() - expected).norm() / expected.norm() < 1e-3


@pytest.mark.parametrize("weight_format", ["u4b8g128", "u4zg64"])
@pytest.mark.parametrize("bias", [False, True])
def test_state_dict_round_trip(bias, weight_format, tmp_path):
    layer = QuantLinear.from_float(linear(bias=bias), weight_format)
    torch.save(layer.state_dict(), tmp_path / "layer.pt")
    other = QuantLinear(256, 128, bias=bias, weight_format=weight_format)
    other.load_state_dict(torch.load(tmp_path / "layer.pt", weights_only=True))
    x = torch.randn(3, 256).half()
    assert torch.equal(other(x), layer(x))
    assert all(isinstance(value, torch.Tensor) for value in layer.state_dict().values()), (
        "safetensors holds tensors only"
    )


def test_a_checkpoint_of_another_layout_is_refused_and_nothing_is_loaded():
    layer = nn.Sequential(QuantLinear(256, 128))
    state = nn.Sequential(QuantLinear.from_float(linear())).state_dict()
    state["0.layout_version"] = torch.tensor(7, dtype=torch.int32)
    with pytest.raises(RuntimeError, match=r"0.weight: layout_version=7 is not 3; pack the original weight again"):
        layer.load_state_dict(state)
    assert not layer[0].weight.any()


def test_a_checkpoint_of_another_format_is_refused_and_nothing_is_loaded(tmp_path):
    """u4z, u4f and u4m have the same shapes."""
    state = nn.Sequential(QuantLinear.from_float(linear(), "u4zg128")).state_dict()
    torch.save(state, tmp_path / "layer.pt")
    for found in (state, torch.load(tmp_path / "layer.pt", weights_only=True)):
        layer = nn.Sequential(QuantLinear(256, 128, weight_format="u4mg128"))
        with pytest.raises(RuntimeError, match=r"0.weight is u4zg128, not u4mg128: make the layer with 'u4zg128'"):
            layer.load_state_dict(found)
        assert not layer[0].weight.any()
    same = nn.Sequential(QuantLinear(256, 128, weight_format="u4zg128"))
    for older in (dict(state), collections.OrderedDict(state)):  # without metadata, as of safetensors
        same.load_state_dict(older)
        assert torch.equal(same[0].weight, state["0.weight"])
    assert same.state_dict(destination={}).keys() == state.keys()


def test_a_checkpoint_without_a_version_is_refused():
    state = QuantLinear.from_float(linear()).state_dict()
    del state["layout_version"]
    with pytest.raises(RuntimeError, match=r'Missing key.*"layout_version"'):
        QuantLinear(256, 128).load_state_dict(state)


def test_loading_onto_meta_with_assign():
    state = QuantLinear.from_float(linear()).state_dict()
    layer = QuantLinear(256, 128, device="meta")
    layer.load_state_dict(state, assign=True)
    x = torch.randn(3, 256).half()
    assert torch.equal(layer(x), QuantLinear.from_float(linear())(x))


def test_a_state_dict_on_meta_is_assigned_as_of_any_module():
    """Of ranks that are sent their tensors later."""
    layer = QuantLinear.from_float(linear(bias=True))
    assert not any(layer.load_state_dict(QuantLinear(256, 128, True, device="meta").state_dict(), assign=True))
    assert layer.weight.is_meta and layer.layout_version.is_meta


def test_from_packed_shares_memory_and_checks():
    packed = marlin_gen.pack(*marlin_gen.quantize(linear().weight.detach()))
    layer = QuantLinear.from_packed(packed)
    assert layer.weight.data_ptr() == packed.weight.data_ptr()
    assert (layer.in_features, layer.out_features) == (256, 128)
    with pytest.raises(ValueError, match=r"bias has shape \[64\]; out_features=128"):
        QuantLinear.from_packed(packed, torch.zeros(64))


@pytest.mark.parametrize(
    ("k", "n", "message"),
    [(256, 100, r"n=100 .* n=128"), (100, 128, r"k=100 .* k=128"), (192, 128, "group_size=128 does not divide k=192")],
)
def test_sizes_the_layout_cannot_hold(k, n, message):
    with pytest.raises(ValueError, match=message):
        QuantLinear(k, n)
    with pytest.raises(ValueError, match=message):
        QuantLinear.from_float(linear(k, n))


def test_unknown_format():
    with pytest.raises(ValueError, match="unknown weight format 'u3'"):
        QuantLinear(256, 128, weight_format="u3")


def test_repr_and_copy():
    layer = QuantLinear.from_float(linear(bias=True))
    shown = "in_features=256, out_features=128, bias=True, weight_format=u4b8g128, dtype=float16"
    assert repr(layer) == f"QuantLinear({shown})"
    x = torch.randn(3, 256).half()
    assert torch.equal(copy.deepcopy(layer)(x), layer(x))


def test_compile_fullgraph():
    model = nn.Sequential(
        QuantLinear.from_float(linear()), nn.SiLU(), QuantLinear.from_float(linear(128, 64, bias=True))
    )
    x = torch.randn(3, 256).half()
    assert torch.equal(torch.compile(model, fullgraph=True, backend="aot_eager")(x), model(x))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("compiled", [False, True])
def test_under_autocast_activations_of_any_type_are_taken(dtype, compiled):
    """As by nn.Linear; of LayerNorm they are float32 there. y is of the layer's type, whatever autocast's is."""
    layer = QuantLinear.from_float(linear(bias=True).to(dtype))
    call = torch.compile(layer, fullgraph=True, backend="aot_eager") if compiled else layer
    x = torch.randn(3, 256)
    for given in (x, x.half(), x.bfloat16()):
        expected = layer(given.to(dtype))
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(call(given), expected)
    with torch.autocast("cpu", torch.bfloat16):
        call(x.requires_grad_()).float().sum().backward()
        assert x.grad.dtype == torch.float32 and x.grad.any()
    with pytest.raises(TypeError, match=r"a is torch.float32; marlin_gen.gemm takes"):
        layer(x)
    for other in (torch.zeros(3, 256, dtype=torch.int64), torch.zeros(3, 256).double()):
        with torch.autocast("cpu", torch.bfloat16), pytest.raises(TypeError, match=r"marlin_gen.gemm takes"):
            layer(other)
    with pytest.raises(TypeError, match=r"a is torch.float32; marlin_gen.gemm takes"):
        layer.to("meta")(x.to("meta"))


def test_gradient_reaches_the_input():
    layer = QuantLinear.from_float(linear(bias=True))
    x = torch.randn(3, 256).half().requires_grad_()
    layer(x).sum().backward()
    assert x.grad is not None and x.grad.abs().sum() > 0
    assert not any(parameter.requires_grad for parameter in layer.parameters())
