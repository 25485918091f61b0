"""The packed layout against an independent loop over its published tables."""

from __future__ import annotations

import struct

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from marlin_gen import operands
from marlin_gen.formats import DEFAULT_FORMAT, FORMATS, LAYOUT_VERSION, WeightFormat
from marlin_gen.layout import SCALE_DTYPES, PackedWeight, lifts, pack, unpack
from marlin_gen.reference import dequantize, gemm_reference, quantize

# code of a lane -> (row, k) for lane group g and thread t, word for word from the module's tables.
TABLES = {
    4: [
        lambda g, t: (g, 2 * t), lambda g, t: (g + 8, 2 * t),
        lambda g, t: (g, 2 * t + 8), lambda g, t: (g + 8, 2 * t + 8),
        lambda g, t: (g, 2 * t + 1), lambda g, t: (g + 8, 2 * t + 1),
        lambda g, t: (g, 2 * t + 9), lambda g, t: (g + 8, 2 * t + 9),
    ],
    8: [
        lambda g, t: (g, 2 * t), lambda g, t: (g, 2 * t + 1),
        lambda g, t: (g + 8, 2 * t), lambda g, t: (g + 8, 2 * t + 1),
        lambda g, t: (g, 2 * t + 8), lambda g, t: (g, 2 * t + 9),
        lambda g, t: (g + 8, 2 * t + 8), lambda g, t: (g + 8, 2 * t + 9),
    ],
}  # fmt: skip


# What fp8 says of each code; nothing for NaN.
E4M3 = torch.tensor([
    (-1) ** (q >> 7) * ((8 + q % 8) * 2.0 ** ((q >> 3 & 15) - 10) if q >> 3 & 15 else q % 8 * 2.0**-9)
    for q in range(256)
], dtype=torch.float64)  # fmt: skip
E4M3_TEXT = [repr(number) for number in E4M3.tolist()]  # in which zeros differ by their sign


def random_weight(
    n: int, k: int, fmt: WeightFormat, seed: int = 0, dtype: torch.dtype = torch.float16
) -> tuple[torch.Tensor, torch.Tensor]:
    return operands.random_weight(n, k, fmt, dtype, generator=torch.Generator().manual_seed(seed))


def fp8_bytes(x: int, y: int) -> int:
    """The bytes of both words, by what kernels make of them: each half a bf16 number, the code's own over 2^120."""
    x, y = x & 0xFFFFFFFF, y & 0xFFFFFFFF
    part = [word >> 8 * i & 0xFF for word in (x, y) for i in range(4)]
    p = part[1] | part[4] << 8 | part[3] << 16 | part[6] << 24
    found = 0
    for i, register in enumerate((x, y, p ^ x << 4, p ^ (y >> 4 | y << 28))):
        for half in range(2):
            bits = register >> 16 * half & 0x87F0
            number = struct.unpack("<f", struct.pack("<I", bits << 16))[0] * 2.0**120
            (code,) = (q for q in range(256) if E4M3_TEXT[q] == repr(number))
            found |= code << 8 * (2 * i + half)
    return found


@pytest.fixture(params=sorted(FORMATS))
def fmt(request):
    return FORMATS[request.param]


def test_pack_follows_the_tables(fmt):
    n, k = 128, 2 * max(fmt.group_size, 64)
    codes, scales = random_weight(n, k, fmt)
    packed = pack(codes, scales, fmt.name)
    words = packed.weight.flatten().tolist()
    rows = codes.tolist()
    planes = [(0, 1, 2, 3)] if fmt.bits == 4 else [(0, 1), (2, 3)]  # k16 steps of a lane's 16 bytes
    at = 0
    for row0 in range(0, n, 64):
        for k0 in range(0, k, 64):
            for block in range(4):
                for plane in planes:
                    for lane in range(32):
                        for step in plane:
                            value = 0
                            for i, where in enumerate(TABLES[fmt.bits]):
                                r, c = where(lane // 4, lane % 4)
                                value |= rows[row0 + 16 * block + r][k0 + 16 * step + c] << (fmt.bits * i)
                            if fmt.offset == "floats":
                                assert fp8_bytes(words[at], words[at + 1]) == value, (row0, k0, block, lane, step)
                                at += 2
                                continue
                            for _ in range(fmt.bits // 4):
                                assert words[at] & 0xFFFFFFFF == value & 0xFFFFFFFF, (row0, k0, block, lane, step)
                                value, at = value >> 32, at + 1
    assert at == len(words)


def test_scales_of_a_lane_are_adjacent(fmt):
    n, k = 128, 2 * max(fmt.group_size, 64)
    codes, scales = random_weight(n, k, fmt)
    packed = pack(codes, scales, fmt.name)
    for tile in range(n // 64):
        for group in range(k // fmt.group_size):
            for block in range(4):
                for g in range(8):
                    row = tile * 64 + block * 16 + g
                    if fmt.has_offsets:
                        lane = packed.scales[tile, group, block * 32 + 4 * g : block * 32 + 4 * g + 4].tolist()
                        (scale, zero), (scale_8, zero_8) = scales[row, group].tolist(), scales[row + 8, group].tolist()
                        if fmt.offset == "zeros":
                            zero, zero_8 = 1024 + zero, -(64 + zero_8)
                        assert lane == [scale, scale_8, zero, zero_8]
                    else:
                        lane = packed.scales[tile, group, block * 16 + 2 * g : block * 16 + 2 * g + 2].tolist()
                        assert lane == [scales[row, group].item(), scales[row + 8, group].item()]


@pytest.mark.parametrize("dtype", SCALE_DTYPES)
def test_lifts_stand_behind_the_scales_in_their_order(fmt, dtype):
    k = 2 * max(fmt.group_size, 64)
    codes, scales = random_weight(128, k, fmt, dtype=dtype)
    packed = pack(codes, scales, fmt.name)
    assert packed.scales.shape[1] == k // fmt.group_size + fmt.has_lifts == fmt.scale_rows(k)
    if fmt.has_lifts:
        of_rows = lifts(scales)
        largest = scales.float().abs().amax(1) * of_rows.float()
        assert bool(((largest < 16) & ((largest >= 8) | (of_rows == 2**15))).all()) and len(set(of_rows.tolist())) > 1
        for row in range(128):
            place = row % 64 // 16 * 16 + row % 8 * 2 + row % 16 // 8
            assert packed.scales[row // 64, -1, place] == of_rows[row]


@pytest.mark.parametrize("dtype", SCALE_DTYPES)
def test_lifts_are_powers_of_two_for_scales_of_any_size(dtype):
    info = torch.finfo(dtype)
    tiny = info.smallest_normal * info.eps  # subnormal
    odd = float("inf"), float("nan")
    values = [0.0, tiny, info.tiny, 1e-3, 0.7, 1.0, 15.99, 16.0, 300.0, min(info.max, 2.0**99), *odd]
    scales = torch.tensor([[value, 0.0] for value in values] + [[0.01, -0.4]], dtype=dtype)
    found = lifts(scales).double()
    assert torch.equal(lifts(scales).half().to(dtype), lifts(scales)), "a layer may be converted to the other type"
    assert bool((found == 2.0 ** found.log2().round()).all()) and bool(found.isfinite().all())
    assert found[[0, -3, -2]].tolist() == [1, 1, 1]  # nothing, or nothing finite, to lift
    assert (found[-1] * 0.4).item() == pytest.approx(12.8, rel=0.01)
    lifted = found[1:-3] * scales[1:-3, 0].double()
    assert float(lifted.max()) * 2.0 ** (12 if dtype == torch.float16 else 40) <= info.max  # what kernels multiply by


@settings(max_examples=25, deadline=None)
@given(n=st.integers(1, 6), k=st.integers(1, 4), seed=st.integers(0, 2**32 - 1), name=st.sampled_from(sorted(FORMATS)),
       dtype=st.sampled_from(SCALE_DTYPES))  # fmt: skip
def test_unpack_inverts_pack(n, k, seed, name, dtype):
    codes, scales = random_weight(64 * n, max(FORMATS[name].group_size, 64) * k, FORMATS[name], seed, dtype)
    packed = pack(codes, scales, name)
    assert (packed.n, packed.k) == tuple(codes.shape)
    assert packed.nbytes == FORMATS[name].packed_bytes(packed.n, packed.k)
    assert packed.weight.is_contiguous() and packed.scales.is_contiguous()
    back_codes, back_scales = unpack(packed)
    assert torch.equal(back_codes, codes)
    assert torch.equal(back_scales, scales)


def test_pack_takes_views_and_leaves_its_input_alone(fmt):
    k = 2 * max(fmt.group_size, 64)
    codes, scales = random_weight(128, 2 * k, fmt)
    half = codes[:64, :k].contiguous(), scales[:64, : k // fmt.group_size].contiguous()
    before = codes.clone()
    view = pack(codes[:64, :k], scales[:64, : k // fmt.group_size], fmt.name)
    dense = pack(*half, fmt.name)
    assert torch.equal(view.weight, dense.weight) and torch.equal(view.scales, dense.scales)
    assert torch.equal(codes, before)


BAD = {
    "n is not a multiple of 64": (lambda c, s: (c[:65], s[:65]), r"n=65 .* n=128"),
    "k is not a multiple of 64": (lambda c, s: (c[:, :200], s), r"k=200 .* k=256"),
    "group_size does not divide k": (lambda c, s: (c[:, :192], s), r"group_size=128 does not divide k=192"),
    "codes dtype": (lambda c, s: (c.int(), s), r"torch.int32 .* torch.uint8"),
    "codes rank": (lambda c, s: (c[None], s), r"\[1, 128, 256\]"),
    "scales dtype": (lambda c, s: (c, s.float()), r"torch.float32 .* torch.float16"),
    "scales shape": (lambda c, s: (c, s[:, :1]), r"\[128, 1\]; .*\[128, 2\]"),
    "code out of range": (lambda c, s: (c + 1, s), r"code 16 does not fit .* 0 .. 15"),
}


@pytest.mark.parametrize("case", BAD)
def test_pack_names_what_is_wrong(case):
    codes, scales = random_weight(128, 256, FORMATS[DEFAULT_FORMAT])
    codes[0, 0] = 15
    change, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        pack(*change(codes, scales))


@pytest.mark.parametrize("zero", [-1.0, 17.0, 7.5, float("nan")])
def test_pack_refuses_zero_points_that_are_no_code(zero):
    codes, scales = random_weight(64, 128, FORMATS["u4zg128"])
    scales[3, 0, 1] = zero
    with pytest.raises(ValueError, match="zero points of u4zg128 must be whole numbers from 0 to 16"):
        pack(codes, scales, "u4zg128")


def test_unpack_refuses_another_layout_version():
    packed = pack(*random_weight(64, 128, FORMATS[DEFAULT_FORMAT]))
    with pytest.raises(ValueError, match=f"layout_version=7 is not {LAYOUT_VERSION}; pack the original"):
        unpack(PackedWeight(packed.weight, packed.scales, packed.weight_format, layout_version=7))


@pytest.mark.parametrize("dtype", SCALE_DTYPES)
def test_dequantize_rounds_as_the_table_of_formats_says(fmt, dtype):
    codes, scales = random_weight(64, fmt.group_size * 2, fmt, dtype=dtype)
    own = scales.double().view(64, 2, -1).repeat_interleave(fmt.group_size, 1)
    scale, offset = own[..., 0], own[..., 1] if fmt.has_offsets else torch.tensor(fmt.zero_point)
    # The difference is exact unless the zero point is not whole.
    numbers = E4M3[codes.long()] if fmt.offset == "floats" else codes.double()
    from_zero = (numbers - offset).to(dtype).double()
    exact = codes * scale + offset if fmt.offset == "minima" else from_zero * scale
    assert torch.equal(dequantize(codes, scales, fmt.name), exact.to(dtype))
    unrounded = gemm_reference(torch.eye(2 * fmt.group_size), codes, scales, fmt.name).T
    assert (unrounded - exact).norm() / exact.norm() < 2.0 ** (-8 if dtype == torch.bfloat16 else -11)


def test_quantize_round_trips_representable_weights(fmt):
    """Weights that are exactly what codes stand for in a full-range group come back as they went in."""
    codes, scales = random_weight(64, fmt.group_size * 2, fmt)
    groups = codes.view(64, -1, fmt.group_size)
    if fmt.has_offsets:
        groups[..., 0], groups[..., 1] = 0, 15
        scales[..., 0] = 2.0**-6
        scales[..., 1] = 5 if fmt.offset != "minima" else -5 * 2.0**-6
    elif fmt.offset == "floats":
        codes[:, :: fmt.group_size] = 0x7E  # 448
        scales = torch.full_like(scales, 2.0**-6)
    else:
        codes.clamp_(1)  # absmax is 7 scales, or 127
        groups[..., 0] = 1
        scales = torch.full_like(scales, 2.0**-6)
    weight = dequantize(codes, scales, fmt.name, torch.float32)
    back_codes, back_scales = quantize(weight, fmt.name)
    assert torch.equal(dequantize(back_codes, back_scales, fmt.name, torch.float32), weight)


def test_quantize_is_close_and_beats_plain_absmax(fmt):
    weight = torch.randn(128, fmt.group_size * 4, generator=torch.Generator().manual_seed(1))
    codes, scales = quantize(weight, fmt.name)
    assert codes.dtype == torch.uint8 and int(codes.max()) < fmt.codes and scales.dtype == torch.float16
    error = (dequantize(codes, scales, fmt.name, torch.float32) - weight).norm() / weight.norm()
    if fmt.offset == "floats":  # of each weight three bits behind the first are kept, and of the least ones some
        far = dequantize(codes, scales, fmt.name, torch.float32) - weight
        assert bool((far.abs() <= weight.abs() / 16 * 1.001 + scales.max() * 2**-10).all()) and error < 0.03
        return
    groups = weight.view(128, -1, fmt.group_size)
    plain_scale = groups.abs().amax(-1, keepdim=True) / (fmt.codes / 2 - 1)
    plain = (groups / plain_scale).round() * plain_scale
    assert error < 1.01 * (plain - groups).norm() / groups.norm()
    assert error < 2.0 / fmt.codes


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_quantize_survives_zero_and_tiny_groups(dtype):
    weight = torch.zeros(64, 384, dtype=dtype)
    weight[:, 128:256] = 1e-7 if dtype != torch.float16 else 6e-8
    weight[:, 256:] = torch.randn(64, 128).to(dtype)
    codes, scales = quantize(weight)
    decoded = dequantize(codes, scales)
    assert torch.isfinite(decoded).all() and (scales > 0).all()
    assert decoded.dtype == (torch.bfloat16 if dtype == torch.bfloat16 else torch.float16)
    assert bool((decoded[:, :128] == 0).all())
    assert (decoded[:, 128:256].float() - 1e-7).abs().max() <= 2.0**-24


@pytest.mark.parametrize("dtype", SCALE_DTYPES)
@pytest.mark.parametrize("weight_format", ["u4fg128", "u4fg64", "u4fg32"])
def test_quantize_survives_groups_far_from_zero(weight_format, dtype):
    """Constant ones above all: their zero point would be beyond f16."""
    weight = torch.randn(64, 256, generator=torch.Generator().manual_seed(1))
    for row, value in enumerate((0.02, -0.02, 3e4, -3e4)):
        weight[row] = value
    weight[4] = 1 + weight[4] * 1e-4
    decoded = dequantize(*quantize(weight, weight_format, dtype), weight_format, torch.float32)
    error = (decoded - weight).norm(dim=1) / weight.norm(dim=1)
    assert bool((error[:5] < (2.0**-8 if dtype == torch.bfloat16 else 2.0**-11)).all()), error[:5]
    assert bool((error[5:] < 0.15).all()), error


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e9])
def test_quantize_refuses_weights_a_scale_cannot_hold(value):
    weight = torch.randn(64, 128)
    weight[3, 5] = value
    with pytest.raises(ValueError, match=r"the largest weight is .* check the checkpoint"):
        quantize(weight)


def test_e4m3_takes_any_size_of_weights_and_refuses_what_it_cannot_decode():
    weight = torch.randn(64, 256, generator=torch.Generator().manual_seed(1)) * 1e-3
    weight[:, :128] *= 1e7
    weight[0, 0] = 65504
    codes, scales = quantize(weight, "e4m3g128")
    assert bool(dequantize(codes, scales, "e4m3g128").isfinite().all())
    error = (dequantize(codes, scales, "e4m3g128", torch.float32) - weight).view(64, 2, 128).norm(dim=-1)
    assert bool((error < 0.04 * weight.view(64, 2, 128).norm(dim=-1)).all())
    for code in (0x7F, 0xFF):
        with pytest.raises(ValueError, match=r"codes have NaN .* e4m3g128"):
            pack(torch.full_like(codes, code), scales, "e4m3g128")
    for scale in (147.0, float("inf"), float("nan")):
        with pytest.raises(ValueError, match=r"the largest scale is .* holds those up to 146"):
            pack(codes, torch.full_like(scales, scale), "e4m3g128")


def test_weights_that_a_minimum_cannot_hold_are_refused():
    """Where a group's minimum is kept as it is, f16 holds less than seven steps of a scale do."""
    far = torch.full((64, 128), -70000.0)
    assert all(part.isfinite().all() for part in quantize(far, "u4b8g128"))
    with pytest.raises(ValueError, match="u4mg128 holds finite weights up to 65504"):
        quantize(far, "u4mg128")
    codes, scales = quantize(far.clamp_min(-65504.0), "u4mg128")
    assert dequantize(codes, scales, "u4mg128", torch.float32).eq(-65504).all()
