"""quantize_model on models of every awkward kind, and QuantLinear's tensor-parallel parts."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

import marlin_gen
from marlin_gen import QuantLinear, quantize_model
from marlin_gen.formats import FORMATS


class Block(nn.Module):
    def __init__(self, inner=384):
        super().__init__()
        self.up = nn.Linear(256, inner)
        self.down = nn.Linear(inner, 256, bias=False)

    def forward(self, x):
        return x + self.down(torch.relu(self.up(x)))


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(128, 256)
        self.layers = nn.ModuleList([Block(), Block(320), Block()])
        self.head = nn.Linear(256, 128, bias=False)
        self.lm_head = nn.Linear(256, 128)
        self.head.weight = self.embed.weight

    def forward(self, ids):
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        return self.lm_head(x)


def model():
    torch.manual_seed(0)
    return Model().half().eval()


IDS = torch.arange(20)[None]


def test_replaces_in_place_and_says_what_it_left():
    made = model()
    expected = made(IDS).float()
    biases = [layer.up.bias.clone() for layer in made.layers]
    found = quantize_model(made)
    assert found.replaced == [
        "layers.0.up", "layers.0.down", "layers.1.up", "layers.2.up", "layers.2.down"
    ]  # fmt: skip
    assert found.skipped.keys() == {"layers.1.down", "head", "lm_head"}
    assert found.skipped["layers.1.down"].startswith("group_size=128 does not divide k=320")
    assert found.skipped["head"] == "its weight is shared with another module"
    assert found.skipped["lm_head"] == "skip has 'lm_head'"
    assert str(found).splitlines()[0] == "5 linear layers in u4b8g128, 3 left as they are"
    assert "  head: its weight is shared with another module" in str(found).splitlines()
    for name, module in made.named_modules():
        assert isinstance(module, QuantLinear) == (name in found.replaced), name
    assert made.head.weight is made.embed.weight and not made.layers[0].up.training
    assert all(torch.equal(layer.up.bias, bias) for layer, bias in zip(made.layers, biases, strict=True))
    error = (made(IDS).float() - expected).norm() / expected.norm()
    assert 0 < error < 0.12


def test_layers_in_bfloat16_stay_in_it():
    made = model().bfloat16()
    expected = made(IDS).float()
    quantize_model(made, "u4mg32")
    assert made.layers[0].up.scales.dtype == made(IDS).dtype == torch.bfloat16
    assert 0 < (made(IDS).float() - expected).norm() / expected.norm() < 0.12


@pytest.mark.parametrize(
    ("skip", "left"),
    [
        ((), {"layers.1.down", "head"}),
        (("layers.1", "lm_head"), {"layers.1.up", "layers.1.down", "head", "lm_head"}),
        (["*.down"], {"layers.0.down", "layers.1.down", "layers.2.down", "head"}),
        (("up",), {"layers.0.up", "layers.1.up", "layers.2.up", "layers.1.down", "head"}),
        (("layers",), {f"layers.{i}.{name}" for i in range(3) for name in ("up", "down")} | {"head"}),
        (("layers.10", "p", "yers.0"), {"layers.1.down", "head"}),  # whole parts of a name only
    ],
)
def test_skip_patterns(skip, left):
    assert set(quantize_model(model(), skip=skip).skipped) == left


def test_a_layer_used_twice_stays_one():
    shared = nn.Linear(256, 256)
    both = nn.Sequential(shared, nn.ReLU(), shared).half()
    assert quantize_model(both).replaced == ["0", "2"]
    assert both[0] is both[2] and isinstance(both[0], QuantLinear)


def test_what_is_no_plain_linear_is_left():
    class Lora(nn.Linear):
        pass

    odd = nn.ModuleDict({"lora": Lora(256, 256), "wide": nn.Linear(256, 256).double(), "small": nn.Linear(100, 64),
                         "meta": nn.Linear(256, 256, device="meta")})  # fmt: skip
    found = quantize_model(odd)
    assert not found.replaced and found.skipped["lora"].startswith("is a Lora")
    assert found.skipped["wide"] == "its weight is torch.float64"
    assert found.skipped["small"].startswith("k=100 is not a positive multiple of 64")
    assert "meta device" in found.skipped["meta"]


@pytest.mark.filterwarnings("ignore:.torch.nn.utils.weight_norm. is deprecated:FutureWarning")
def test_layers_with_hooks_are_left():
    """A QuantLinear would not call them, and those that make the weight anew leave no parameter of that name."""
    hooked = nn.ModuleDict({name: nn.Linear(256, 256) for name in ("after", "before", "norm", "pruned", "plain")})
    hooked["after"].register_forward_hook(lambda module, arguments, result: result * 2)
    hooked["before"].register_forward_pre_hook(lambda module, arguments: arguments[0] * 2)
    nn.utils.weight_norm(hooked["norm"])
    prune.l1_unstructured(hooked["pruned"], "weight", 0.5)
    found = quantize_model(hooked)
    assert found.replaced == ["plain"]
    assert set(found.skipped.values()) == {"has hooks, which may do more than a Linear"}


def test_a_transformer_encoder_runs_on():
    """For inference torch's own layer hands its Linears' weights to one operator."""
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(256, 4, 512, batch_first=True), 1).half().eval()
    made = nn.Sequential(encoder, nn.Linear(256, 256).half())
    x = torch.randn(2, 7, 256).half()
    with torch.no_grad():
        expected = made(x)
        found = quantize_model(made)
        assert found.replaced == ["1"] and "TransformerEncoderLayer" in found.skipped["0.layers.0.linear1"]
        assert 0 < (made(x) - expected).norm() / expected.norm() < 0.12


@pytest.mark.parametrize(
    ("kind", "sizes", "left", "reader"),
    [
        ("T5EncoderModel", {"d_model": 128, "d_kv": 64, "d_ff": 256, "num_heads": 2}, {"wo"}, "T5DenseActDense"),
        ("MambaModel", {"hidden_size": 128, "state_size": 64, "time_step_rank": 128}, {"x_proj", "dt_proj", "out_proj"},
         "MambaMixer"),
    ],
)  # fmt: skip
def test_layers_whose_weight_the_module_around_them_reads_are_left(kind, sizes, left, reader):
    """T5 casts activations to the type of wo's weight, which is no float in a QuantLinear; Mamba multiplies by it."""
    transformers = pytest.importorskip("transformers")
    kind = getattr(transformers, kind)
    made = kind(kind.config_class(vocab_size=128, num_layers=1, num_hidden_layers=1, **sizes)).half().eval()
    with torch.no_grad():
        expected = made(IDS)[0]
        found = quantize_model(nn.ModuleDict({"text": made}))  # a part of a model as well
        assert found.replaced and {name.rpartition(".")[2] for name in found.skipped} == left
        assert f"its weight is read by its {reader}, past its forward" in found.skipped.values()
        assert 0 < (made(IDS)[0] - expected).norm() / expected.norm() < 0.3


def test_code_for_a_model_in_slices_leaves_no_layer_where_there_is_one():
    transformers = pytest.importorskip("transformers")
    config = transformers.BloomConfig(vocab_size=128, hidden_size=128, n_layer=1, n_head=2)
    assert len(quantize_model(transformers.BloomModel(config).half()).replaced) == 4
    config.pretraining_tp = 2
    assert len(quantize_model(transformers.BloomModel(config).half()).replaced) == 2


def test_a_class_without_source_is_taken_as_it_is():
    space = {}
    exec("import torch\nclass Odd(torch.nn.Module): pass", space)
    made = space["Odd"]()
    made.up = nn.Linear(256, 256)
    assert quantize_model(made).replaced == ["up"]


def test_what_a_model_of_transformers_keeps_in_float32_is_left():
    made = model()
    made._keep_in_fp32_modules_strict = ["0.up.weight", "layers.2", "own"]
    assert quantize_model(made).replaced == ["layers.0.down", "layers.1.up"]


def test_errors_name_the_layer_or_the_argument():
    with pytest.raises(ValueError, match="unknown weight format 'u3'"):
        quantize_model(model(), "u3")
    with pytest.raises(ValueError, match=r"skip is the string 'lm_head'; give .* \('lm_head',\)"):
        quantize_model(model(), skip="lm_head")
    with pytest.raises(ValueError, match=r"use QuantLinear\.from_float"):
        quantize_model(nn.Linear(256, 256))
    broken = model()
    broken.layers[1].up.weight.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"^layers\.1\.up: the largest weight is nan"):
        quantize_model(broken)


FORMAT_CASES = sorted(FORMATS)


def quant_linear(weight_format, k=768, n=384, bias=True):
    torch.manual_seed(1)
    return QuantLinear.from_float(nn.Linear(k, n, bias=bias), weight_format)


@pytest.mark.parametrize("weight_format", FORMAT_CASES)
@pytest.mark.parametrize("world", [1, 2, 3, 6])
def test_row_parts_are_slices_of_the_output(weight_format, world):
    whole = quant_linear(weight_format)
    x = torch.randn(5, 768).half()
    parts = [whole.shard(rank, world, "rows") for rank in range(world)]
    assert all((part.out_features, part.in_features) == (384 // world, 768) for part in parts)
    assert torch.equal(torch.cat([part(x) for part in parts], -1), whole(x))
    parts[0].weight.zero_()
    assert whole.weight[0].any(), "parts share no memory"


@pytest.mark.parametrize("weight_format", FORMAT_CASES)
@pytest.mark.parametrize("world", [1, 2, 3, 6])
def test_column_parts_sum_to_the_output(weight_format, world):
    whole = quant_linear(weight_format)
    x = torch.randn(5, 768).half()
    parts = [whole.shard(rank, world, "columns") for rank in range(world)]
    assert [part.bias is not None for part in parts] == [True] + [False] * (world - 1)
    assert all(part.weight.is_contiguous() and part.scales.is_contiguous() for part in parts)
    if FORMATS[weight_format].has_lifts:
        assert all(torch.equal(part.scales[:, -1], whole.scales[:, -1]) for part in parts), "lifts are of whole rows"
    dense = [part(torch.eye(part.in_features).half()) - (0 if part.bias is None else part.bias) for part in parts]
    expected = quant_linear(weight_format, bias=False)(torch.eye(768).half())
    assert torch.allclose(torch.cat(dense), expected, atol=2e-3), "the same weight, cut"
    total = sum(part(piece).float() for part, piece in zip(parts, x.chunk(world, -1), strict=True))
    assert (total - whole(x).float()).norm() / total.norm() < 1e-3


def test_a_part_round_trips_through_its_state_dict():
    part = quant_linear("u4zg64").shard(1, 3, "columns")
    other = QuantLinear(256, 384, weight_format="u4zg64")
    other.load_state_dict(part.state_dict())
    x = torch.randn(2, 256).half()
    assert torch.equal(other(x), part(x))


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ((0, 4, "rows"), r"out_features=384 is 6 times 64, the layout's tile, .* world=4 .* that can: 1, 2, 3, 6"),
        ((0, 5, "columns"), r"in_features=768 is 12 times 64, .* that can: 1, 2, 3, 4, 6, 12"),
        ((0, 4, "columns"), r"in_features=768 is 6 times 128, the group_size, .* that can: 1, 2, 3, 6"),
        ((2, 2, "rows"), r"rank=2 is not one of 0 \.\. 1, the ranks of world=2"),
        ((-1, 2, "rows"), "rank=-1"),
        ((0, 0, "rows"), "rank=0 is not one of"),
        ((0, 2, "n"), r"dim is 'n'; known: 'rows' \(out_features\), 'columns' \(in_features\)"),
    ],
)
def test_what_cannot_be_shared_is_said(arguments, says):
    with pytest.raises(ValueError, match=says):
        quant_linear("u4b8g128").shard(*arguments)


def test_the_public_names():
    assert "quantize_model" in marlin_gen.__all__ and marlin_gen.quantize_model is quantize_model
