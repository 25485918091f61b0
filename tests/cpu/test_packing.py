"""A checkpoint's weight in the packed layout: the same numbers bit for bit, or a reason that names the tensor."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from marlin_gen.checkpoints.packing import to_packed
from marlin_gen.checkpoints.quantized import QuantizedWeight
from marlin_gen.layout import unpack
from marlin_gen.nn import QuantLinear
from marlin_gen.reference import dequantize

N = 128


def weight(k: int, group_size: int, dtype: torch.dtype = torch.float16, zeros: bool = False) -> QuantizedWeight:
    generator = torch.Generator().manual_seed(k + group_size)
    codes = torch.randint(0, 16, (N, k), generator=generator, dtype=torch.uint8)
    scales = (torch.rand(N, k // group_size, generator=generator) * 0.02 + 0.005).to(dtype)
    points = torch.randint(0, 17, scales.shape, generator=generator, dtype=torch.uint8) if zeros else None
    return QuantizedWeight(codes, scales, bits=4, group_size=group_size, zeros=points)


@pytest.mark.parametrize(
    ("k", "group_size", "size"),
    [(384, 128, 128), (576, 64, 64), (576, 32, 32), (512, 256, 128), (576, 576, 64), (640, 640, 128), (576, 96, 32)],
)
@pytest.mark.parametrize(("zeros", "codes"), [(False, "u4b8"), (True, "u4z")])
def test_packs_every_weight_exactly(k, group_size, size, zeros, codes):
    given = weight(k, group_size, zeros=zeros)
    packed = to_packed(given)
    assert packed.weight_format == f"{codes}g{size}"
    # f16(code - zero) * scale rounds once, as the exact product rounded to f16 does.
    assert torch.equal(dequantize(*unpack(packed), packed.weight_format), given.dequantize().half())


def test_a_layer_answers_like_the_dense_weight():
    given = weight(576, 576)
    layer = QuantLinear.from_quantized(given, bias=torch.arange(N) / 8)
    x = torch.randn(3, 576, generator=torch.Generator().manual_seed(1)).half()
    expected = x.double() @ given.dequantize().T + torch.arange(N) / 8
    assert (layer(x).double() - expected).norm() / expected.norm() < 1e-3
    assert layer.extra_repr() == "in_features=576, out_features=128, bias=True, weight_format=u4b8g64, dtype=float16"


def test_the_type_is_that_of_the_scales_or_the_one_asked_for():
    given = weight(256, 128, torch.bfloat16)
    assert to_packed(given).dtype == torch.bfloat16
    assert torch.equal(unpack(to_packed(given))[1].float(), given.scales.float())
    half = to_packed(given, dtype=torch.float16)  # bf16 scales of this size fit f16
    assert half.dtype == torch.float16 and torch.equal(unpack(half)[1].float(), given.scales.float())
    rounded = to_packed(weight(256, 128), dtype=torch.bfloat16)
    assert torch.equal(unpack(rounded)[1], weight(256, 128).scales.bfloat16())


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"bits": 8, "minima": torch.zeros(N, 2)}, "q_proj has 8-bit codes with minima; the kernels read .*4 bits"),
        ({"bits": 3}, "q_proj has 3-bit codes with constant"),
        ({"zeros": torch.full((N, 2), 7.51)}, "q_proj has zeros in torch.float32 that torch.float16 does not hold"),
        ({"scales": torch.full((N, 2), 0.1)}, r"scales in torch.float32 .* hold, off by up to 2\.4e-05; give dtype"),
        ({"scales": torch.full((N, 2), 1e6)}, "off by up to inf"),
    ],
    ids=lambda value: value if isinstance(value, str) else next(iter(value)),
)
def test_refuses_what_no_format_holds(change, says):
    with pytest.raises(ValueError, match=says):
        to_packed(replace(weight(256, 128), **change), "q_proj")


def test_a_layer_in_act_order(tmp_path):
    """Exact, through its state dict into a layer that knows of no order, on rows but not on columns of a shard."""
    given = replace(weight(256, 64), order=torch.randperm(256, generator=torch.Generator().manual_seed(2)))
    layer = QuantLinear.from_quantized(given)
    found = layer(torch.eye(256).half()).T
    assert torch.equal(found, given.dequantize().half())
    torch.save(layer.state_dict(), tmp_path / "layer.pt")
    other = QuantLinear(256, N, weight_format="u4b8g64")
    other.load_state_dict(torch.load(tmp_path / "layer.pt", weights_only=True))
    x = torch.randn(3, 256).half()
    assert torch.equal(other(x), layer(x)) and torch.equal(other.order, given.order)
    assert torch.equal(torch.cat([layer.shard(rank, 2, "rows")(x) for rank in range(2)], -1), layer(x))
    with pytest.raises(ValueError, match="shard it by rows, not by columns"):
        layer.shard(0, 2, "columns")
    ordered = QuantLinear(256, N, weight_format="u4b8g64", has_order=True)
    with pytest.raises(RuntimeError, match="order"):
        ordered.load_state_dict({key: value for key, value in layer.state_dict().items() if key != "order"})


def test_refuses_groups_that_nothing_divides():
    with pytest.raises(ValueError, match="q_proj has group_size=16, which none of 128, 64, 32 divides"):
        to_packed(weight(256, 16), "q_proj")
