"""Importers against layers that the formats' own libraries packed and decoded, and against a packer written here.

The fixtures are tools/make_checkpoint_fixtures.py's. Each library computes (code - zero) * scale in the dtype of its
scales, where code - zero is exact and the product rounds once; ``dequantize`` is exact in float64 and is rounded once
to that dtype, so the two must be equal bit for bit.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

import marlin_gen
from marlin_gen.checkpoints import READERS, read_layer
from marlin_gen.checkpoints.layer import unpack
from marlin_gen.checkpoints.packing import to_packed
from marlin_gen.layout import unpack as unpack_layout
from marlin_gen.reference import dequantize

FIXTURES = Path(__file__).parents[1] / "fixtures"
# bits, group size, whether zeros are kept, whether columns are reordered, and the dtype the library computes in.
EXPECTED = {
    "awq-4bit-g32": (4, 32, True, False, torch.float16),
    "awq-4bit-gk": (4, 256, True, False, torch.float16),
    "compressed-tensors-4bit-g32-asym": (4, 32, True, False, torch.float16),
    "compressed-tensors-4bit-g64-sym-actorder": (4, 64, False, True, torch.float16),
    "compressed-tensors-4bit-g64-sym-bf16": (4, 64, False, False, torch.bfloat16),
    "compressed-tensors-8bit-channel-asym-bf16": (8, 256, True, False, torch.bfloat16),
    "compressed-tensors-fp8-block-bf16": (8, 128, False, False, torch.bfloat16),
    "compressed-tensors-fp8-channel-bf16": (8, 256, False, False, torch.bfloat16),
    "compressed-tensors-fp8-tensor-f16": (8, 256, False, False, torch.float16),
    "gptq-v1-4bit-g32-asym-desc_act": (4, 32, True, True, torch.float16),
    "gptq-v1-4bit-g64-asym": (4, 64, True, False, torch.float16),
    "gptq-v1-4bit-g64-sym": (4, 64, False, False, torch.float16),
    "gptq-v1-8bit-gk-asym": (8, 256, True, False, torch.float16),
    "gptq-v2-4bit-g32-asym-desc_act": (4, 32, True, True, torch.float16),
}
SYMMETRIC, REORDERED, MODEL, AWQ, PACKED, BLOCKS = (
    "gptq-v1-4bit-g64-sym",
    "gptq-v2-4bit-g32-asym-desc_act",
    "gptq-v1-4bit-g64-asym",
    "awq-4bit-g32",
    "compressed-tensors-4bit-g32-asym",
    "compressed-tensors-fp8-block-bf16",
)


def fixture(name: str) -> tuple[dict[str, torch.Tensor], dict, torch.Tensor]:
    """(the layer's tensors, the quantization_config, the weight as the library decodes it)."""
    with safe_open(FIXTURES / f"{name}.safetensors", "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        about = json.loads(file.metadata()["fixture"])
    assert about["library"] and about["version"]
    return tensors, about["config"], tensors.pop("dequantized")


def test_every_fixture_is_read_and_small():
    files = [path for path in FIXTURES.glob("*.safetensors") if not path.stem.startswith("hqq-")]  # test_hqq.py's
    assert {path.stem for path in files} == set(EXPECTED)
    sizes = [path.stat().st_size for path in files]
    assert max(sizes) < 120_000 and sum(sizes) < 1_200_000


KERNEL_LAYERS = [name for name, row in EXPECTED.items() if row[0] == 4 or "fp8" in name]


@pytest.mark.parametrize("name", KERNEL_LAYERS)
def test_a_layer_in_the_kernels_layout_is_the_library_s_weight(name):
    tensors, config, decoded = fixture(name)
    packed = to_packed(read_layer(tensors, config, name), name)
    weight = dequantize(*unpack_layout(packed), packed.weight_format)
    assert (packed.order is not None) == EXPECTED[name][3]
    if packed.order is not None:
        weight = torch.empty_like(weight).index_copy_(1, packed.order, weight)
    assert torch.equal(weight.to(decoded.dtype), decoded)
    x = torch.randn(3, packed.k, generator=torch.Generator().manual_seed(1)).to(packed.dtype)
    expected = x.double() @ weight.double().T
    limit = 1e-3 if packed.dtype == torch.float16 else 4e-3
    assert (marlin_gen.gemm(x, packed).double() - expected).norm() / expected.norm() < limit


@pytest.mark.parametrize("name", EXPECTED)
def test_a_layer_decodes_as_its_library_decodes_it(name):
    tensors, config, decoded = fixture(name)
    weight = read_layer(tensors, config, "layer")
    bits, group_size, has_zeros, reordered, dtype = EXPECTED[name]
    assert (weight.bits, weight.group_size, decoded.dtype) == (bits, group_size, dtype)
    assert (weight.zeros is not None, weight.order is not None) == (has_zeros, reordered)
    assert weight.zeros is None or len(weight.zeros.unique()) > 3
    assert torch.equal(weight.dequantize().to(dtype), decoded)


def test_v1_of_gptqmodel_holds_zero_points_0():
    """What makes its reading differ from AutoGPTQ's: word arithmetic, with borrows."""
    tensors, config, _ = fixture(MODEL)
    assert bool((unpack(tensors["qzeros"], 4, dim=1, size=128) == 15).any())
    zeros = read_layer(tensors, config, "layer").zeros
    assert zeros is not None and int(zeros.min()) == 0 and int(zeros.max()) == 15


def test_columns_are_sorted_stably_by_group():
    tensors, config, _ = fixture(REORDERED)
    order = read_layer(tensors, config, "layer").order
    groups = tensors["g_idx"].tolist()
    assert order is not None and order.tolist() == sorted(range(256), key=lambda column: groups[column])


def changed(**tensors):
    """A mutation that sets tensors (None: removes them), each from the one before."""

    def mutate(before, config):
        for key, change in tensors.items():
            before[key] = None if change is None else change(before.get(key))
        return {key: tensor for key, tensor in before.items() if tensor is not None}, config

    return mutate


def configured(**entries):
    return lambda tensors, config: (tensors, config | entries)


def scheme(**entries):
    def mutate(tensors, config):
        config["config_groups"]["group_0"]["weights"].update(entries)
        return tensors, config

    return mutate


def transformed(*locations):
    """Hadamard transforms, as llm-compressor's SpinQuant and QuIP modifiers leave them."""
    apply = [{"location": one, "targets": ["Linear"], "inverse": False, "ignore": ["lm_head"]} for one in locations]
    return configured(transform_config={"config_groups": {"R": {"type": "hadamard", "apply": apply}}})


def with_value(value, *index):
    def change(tensor):
        tensor[index] = value
        return tensor

    return change


@pytest.mark.parametrize(
    ("name", "mutate", "says"),
    [
        (SYMMETRIC, configured(quant_method="quip"), "quant_method is 'quip'; known: awq, compressed-tensors, fp8"),
        (SYMMETRIC, changed(qweight=None), "qweight is missing; the layer has g_idx, qzeros, scales"),
        (SYMMETRIC, changed(qweight=lambda t: t.long()), r"qweight is torch.int64 \[32, 128\], not torch.int32"),
        (SYMMETRIC, changed(qweight=lambda t: t[1:]), r"qweight is torch.int32 \[31, 128\].* \[32, 128\]; check bits"),
        (SYMMETRIC, changed(qzeros=lambda t: t[:, 1:]), r"qzeros is torch.int32 \[4, 15\].* \[4, 16\]"),
        (SYMMETRIC, changed(scales=lambda t: t[:2]), r"scales is torch.float16 \[2, 128\].* \[4, 128\]"),
        (SYMMETRIC, changed(scales=with_value(float("nan"), 1, 2)), "scales holds nan; .* copy it anew"),
        (SYMMETRIC, changed(g_idx=with_value(9, 3)), "g_idx has 63 columns in group 0; it must have 64 in each of the"),
        (SYMMETRIC, changed(g_idx=with_value(-1, 3)), "g_idx has 1 columns in group -1"),
        (SYMMETRIC, changed(g_idx=lambda t: t + 1), "g_idx has 64 columns in group 4; .* 0 .. 3"),
        (SYMMETRIC, changed(qzeros=with_value(-1, 0, 0)), "qzeros hold 15, .* checkpoint_format 'gptq_v2'"),
        (REORDERED, changed(g_idx=None), "g_idx is missing"),
        (SYMMETRIC, configured(group_size=100), "group_size is 100, which does not divide k=256; .* divisor"),
        (SYMMETRIC, configured(group_size=None), "group_size is None"),
        (SYMMETRIC, configured(group_size=128), r"scales is torch.float16 \[4, 128\].* \[2, 128\]"),
        (SYMMETRIC, configured(bits=3), "bits is 3 in the quantization_config; supported: 4, 8"),
        (SYMMETRIC, configured(bits=8), r"qweight is torch.int32 \[32, 128\].* \[64, 128\]"),
        (SYMMETRIC, configured(checkpoint_format="marlin"), "checkpoint_format is 'marlin' .* 'gptq', 'gptq_v2'"),
        (AWQ, changed(qzeros=None), "qzeros is missing"),
        (AWQ, changed(scales=lambda t: t.T), r"scales is torch.float16 \[128, 8\].* \[8, 128\]"),
        (AWQ, configured(version="gemv"), "version is 'gemv'"),
        (AWQ, configured(bits=8), "bits is 8 .* supported: 4"),
        (AWQ, configured(group_size=48), "group_size is 48"),
        (PACKED, changed(weight_zero_point=None), "weight_zero_point is missing"),
        (PACKED, changed(weight_shape=with_value(512, 1)), r"weight_packed is torch.int32 \[128, 32\].* \[128, 64\]"),
        (PACKED, changed(weight_scale=lambda t: t[:, :1]), r"weight_scale is torch.float16 \[128, 1\].* \[128, 8\]"),
        (PACKED, scheme(symmetric=True), "weight_zero_point is there, but the scheme is symmetric"),
        (PACKED, scheme(actorder="group"), "weight_g_idx is missing"),
        (PACKED, scheme(strategy="tensor"), "strategy is 'tensor'"),
        (PACKED, scheme(type="float"), "format is 'pack-quantized' .* supported: 'float-quantized'"),
        (PACKED, scheme(type="bool"), "type is 'bool'"),
        (BLOCKS, scheme(num_bits=4), "num_bits is 4"),
        (BLOCKS, scheme(strategy="tensor_group"), "strategy is 'tensor_group'"),
        (BLOCKS, scheme(strategy="channel"), r"weight_scale is torch.bfloat16 \[2, 2\].* \[64, 1\]"),
        (BLOCKS, scheme(strategy="group", group_size=64), r"weight_scale is torch.bfloat16 \[2, 2\].* \[64, 4\]"),
        (BLOCKS, scheme(block_structure="48x128"), "its weight is scaled in blocks of '48x128', which is not"),
        (BLOCKS, scheme(block_structure=48), "its weight is scaled in blocks of 48, which is not"),
        (BLOCKS, changed(weight=lambda t: t.view(torch.uint8).fill_(255).view(t.dtype)), "weight has NaN"),
        (BLOCKS, scheme(block_structure=[48, 0]), r"its weight is scaled in blocks of \[48, 0\], which is not"),
        (BLOCKS, scheme(block_structure=[64, 128]), r"weight_scale is torch.bfloat16 \[2, 2\].* \[1, 2\]"),
        (BLOCKS, changed(weight=lambda t: t.float()), r"weight is torch.float32 \[64, 256\], not torch.float8_e4m3fn"),
        (BLOCKS, changed(weight=None), "weight is missing"),
        (BLOCKS, changed(weight_scale=None), "weight_scale is missing"),
        (BLOCKS, configured(quant_method="fp8", fmt="e5m2"), "fmt is 'e5m2'"),
        (PACKED, scheme(group_size=96), "group_size is 96"),
        (PACKED, configured(format="marlin-24"), "format is 'marlin-24'"),
        (PACKED, configured(config_groups={}), "none of the config_groups"),
        (PACKED, transformed("input", "weight_input", "k_cache"), r".* run time \(input, k_cache\), which"),
    ],
)
def test_damage_is_named(name, mutate, says):
    tensors, config, _ = fixture(name)
    tensors, config = mutate(tensors, config)
    with pytest.raises(ValueError, match=f"^model.layers.3.mlp.up_proj: {says}"):
        read_layer(tensors, config, "model.layers.3.mlp.up_proj")


def test_gptq_without_g_idx_and_desc_act():
    tensors, config, decoded = fixture(SYMMETRIC)
    del tensors["g_idx"]
    assert torch.equal(read_layer(tensors, config, "layer").dequantize().half(), decoded)


@pytest.mark.parametrize(
    "rules",
    [
        {r"+:.*\.down_proj": {"bits": 8, "group_size": -1}},
        {r".*down_proj$": {"bits": 8, "group_size": -1}},
        {"-:.*head": {}, "+:down": {"bits": 2}, r".*layers\.[12]\.": {"bits": 8, "group_size": -1}, ".*": {"bits": 3}},
    ],
)
def test_gptqmodel_s_dynamic_rules(rules):
    """By ``re.match``, the first wins, and layers of no rule have the settings of all."""
    tensors, config, expected = fixture("gptq-v1-8bit-gk-asym")
    mixed = {**config, "bits": 4, "group_size": 64, "dynamic": rules}
    weight = read_layer(tensors, mixed, "model.layers.1.mlp.down_proj")
    assert torch.equal(weight.dequantize().to(expected.dtype), expected)
    tensors, _, expected = fixture(SYMMETRIC)
    name = "lm_head" if ".*" in rules else "model.layers.1.mlp.up_proj"
    assert torch.equal(read_layer(tensors, mixed, name).dequantize().to(expected.dtype), expected)


def test_g_idx_of_minus_ones_is_no_order():
    """How compressed-tensors leaves weight_g_idx that nothing has set."""
    tensors, config, decoded = fixture(PACKED)
    tensors["weight_g_idx"] = torch.full((256,), -1, dtype=torch.int32)
    weight = read_layer(tensors, config, "layer")
    assert weight.order is None and torch.equal(weight.dequantize().half(), decoded)


@pytest.mark.parametrize("mutate", [transformed("weight_input", "weight_output"), configured(transform_config={})])
def test_transforms_that_are_fused_into_weights_change_nothing(mutate):
    tensors, config, decoded = fixture(PACKED)
    assert torch.equal(read_layer(*mutate(tensors, config), "layer").dequantize().half(), decoded)


def test_the_best_target_names_the_scheme():
    """Name before pattern before class."""
    tensors, config, decoded = fixture(PACKED)
    right = config["config_groups"]["group_0"]
    wrong = {"weights": right["weights"] | {"num_bits": 8}}
    for target, other in (("Linear", "Conv2d"), (r"re:.*\.up$", "Linear"), ("mlp.up", r"re:.*up")):
        groups = {"a": wrong | {"targets": [other]}, "b": right | {"targets": [target]}, "c": {"targets": ["mlp.up"]}}
        weight = read_layer(tensors, config | {"config_groups": groups}, "mlp.up")
        assert torch.equal(weight.dequantize().half(), decoded)


def packed(rows, bits, places=None):
    """Lists of numbers to int32 [rows, words]: bit by bit, in Python's integers; a last word is filled with zeros."""
    per_word = 32 // bits
    out = []
    for row in rows:
        row = list(row) + [0] * (-len(row) % per_word)
        words = [row[start : start + per_word] for start in range(0, len(row), per_word)]
        order = places or range(per_word)
        numbers = [sum(word[place] << (bits * i) for i, place in enumerate(order)) for word in words]
        out.append([number - (1 << 32) if number >> 31 else number for number in numbers])
    return torch.tensor(out, dtype=torch.int32)


@st.composite
def layers(draw, n_unit=1, bits=(4, 8), least_zero=0):
    """(bits, group size, codes [n, k], zeros [n, groups], scales [n, groups], g_idx [k]) of odd sizes."""
    width = draw(st.sampled_from(bits))
    n, groups, group_size = n_unit * draw(st.integers(1, 5)), draw(st.integers(1, 4)), draw(st.integers(1, 9))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1 << 30)))
    codes = torch.randint(0, 1 << width, (n, groups * group_size), generator=generator)
    zeros = torch.randint(least_zero, 1 << width, (n, groups), generator=generator)
    scales = torch.randn(n, groups, generator=generator).half()
    g_idx = torch.arange(groups * group_size) // group_size
    if draw(st.booleans()):
        g_idx = g_idx[torch.randperm(len(g_idx), generator=generator)]
    return width, group_size, codes, zeros, scales, g_idx


def check(weight, codes, zeros, scales, g_idx):
    """Exactly (code - zero) * scale of each feature's group."""
    assert torch.equal(weight.dequantize(), (codes - zeros[:, g_idx]) * scales.double()[:, g_idx])
    assert (weight.order is None) == torch.equal(g_idx, g_idx.sort().values)
    assert weight.codes.is_contiguous() and weight.codes.dtype == torch.uint8


@settings(deadline=None, max_examples=60)
@given(layers(least_zero=1), st.sampled_from(["gptq", "gptq_v2", None]))
def test_gptq_round_trip(layer, version):
    bits, group_size, codes, zeros, scales, g_idx = layer
    stored = zeros if version == "gptq_v2" else zeros - 1
    tensors = {
        "qweight": packed(codes.tolist(), bits).T.contiguous(),
        "qzeros": packed(stored.T.tolist(), bits),
        "scales": scales.T.contiguous(),
        "g_idx": g_idx.int(),
    }
    config = {"quant_method": "gptq", "bits": bits, "group_size": group_size, "checkpoint_format": version}
    check(read_layer(tensors, config, "layer"), codes, zeros, scales, g_idx)


@settings(deadline=None, max_examples=40)
@given(layers(n_unit=8, bits=(4,)))
def test_awq_round_trip(layer):
    bits, group_size, codes, zeros, scales, _ = layer
    places = (0, 2, 4, 6, 1, 3, 5, 7)
    tensors = {
        "qweight": packed(codes.T.tolist(), bits, places),
        "qzeros": packed(zeros.T.tolist(), bits, places),
        "scales": scales.T.contiguous(),
    }
    config = {"quant_method": "awq", "bits": bits, "group_size": group_size}
    g_idx = torch.arange(codes.shape[1]) // group_size
    check(read_layer(tensors, config, "layer"), codes, zeros, scales, g_idx)


@settings(deadline=None, max_examples=60)
@given(layers())
def test_compressed_tensors_round_trip(layer):
    bits, group_size, codes, zeros, scales, g_idx = layer
    tensors = {
        "weight_packed": packed(codes.tolist(), bits),
        "weight_zero_point": packed(zeros.T.tolist(), bits).T.contiguous(),
        "weight_scale": scales,
        "weight_shape": torch.tensor(codes.shape),
        "weight_g_idx": g_idx.int(),
    }
    weights = {"num_bits": bits, "group_size": group_size, "symmetric": False, "strategy": "group", "actorder": "group"}
    groups = {"group_0": {"targets": ["Linear"], "weights": weights}}
    config = {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": groups}
    check(read_layer(tensors, config, "layer"), codes, zeros, scales, g_idx)


@settings(deadline=None, max_examples=60)
@given(
    st.tuples(st.integers(1, 9), st.integers(1, 9)), st.tuples(st.integers(1, 4), st.integers(1, 4)),
    st.sampled_from([torch.bfloat16, torch.float32]), st.integers(0, 1 << 30),
)  # fmt: skip
def test_fp8_blocks_of_any_size(shape, block, dtype, seed):
    """Also those at the lower and right edges, which are smaller."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(shape, generator=generator).to(torch.float8_e4m3fn)
    grid = [-(-size // of) for size, of in zip(shape, block, strict=True)]
    scales = torch.rand(grid, generator=generator).to(dtype)
    expected = weight.double()
    for row in range(shape[0]):
        for column in range(shape[1]):
            expected[row, column] *= scales[row // block[0], column // block[1]].double()
    tensors = {"weight": weight, "weight_scale_inv": scales}
    config = {"quant_method": "fp8", "weight_block_size": list(block)}
    assert torch.equal(read_layer(tensors, config, "layer").dequantize(), expected)


@pytest.mark.parametrize("name", ["weight_scale", "weight_scale_inv"])
@pytest.mark.parametrize("scales", [torch.tensor(0.25), torch.rand(1), torch.rand(6), torch.rand(6, 1)])
def test_fp8_without_blocks(name, scales):
    """As transformers and the first checkpoints for vLLM have them; scales of activations are theirs."""
    weight = torch.randn(6, 10).to(torch.float8_e4m3fn)
    found = read_layer({"weight": weight, name: scales, "input_scale": torch.ones(1)}, {"quant_method": "fp8"}, "layer")
    assert torch.equal(found.dequantize(), weight.double() * scales.double().reshape(-1, 1))


def test_a_grid_of_as_many_scales_as_rows_is_no_column():
    weight = torch.randn(128, 256).to(torch.float8_e4m3fn)
    with pytest.raises(ValueError, match=r"weight_scale_inv is torch.float32 \[8, 16\], not .* \[128, 1\]"):
        read_layer({"weight": weight, "weight_scale_inv": torch.rand(8, 16)}, {"quant_method": "fp8"}, "layer")


def test_a_scale_that_is_too_large_is_named_with_its_layer():
    tensors = {"weight": torch.ones(64, 128).to(torch.float8_e4m3fn), "weight_scale": torch.full((1,), 300.0)}
    weight = read_layer(tensors, {"quant_method": "fp8"}, "layer")
    with pytest.raises(ValueError, match=r"^q_proj: the largest scale is 300.0; e4m3g128 holds those up to 146"):
        to_packed(weight, "q_proj")


def test_fp8_as_transformers_dequantises_it():
    fp8 = pytest.importorskip("transformers.integrations.finegrained_fp8")
    weight = torch.randn(256, 384).to(torch.float8_e4m3fn)
    scales = torch.rand(2, 3)
    config = {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic", "fmt": "e4m3"}
    found = read_layer({"weight": weight, "weight_scale_inv": scales}, config, "layer").dequantize()
    assert torch.equal(found.float(), fp8.Fp8Dequantize(None)._dequantize_one(weight, scales))


def test_the_registry_names_quant_methods():
    assert {"awq", "compressed-tensors", "fp8", "gptq"} <= set(READERS)
