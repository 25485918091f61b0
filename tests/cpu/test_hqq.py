"""HQQ layers, beside what hqq itself made of them (tools/make_hqq_fixtures.py wrote the files)."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from marlin_gen.checkpoints import hqq

FIXTURES = sorted((Path(__file__).resolve().parents[1] / "fixtures").glob("hqq-*.safetensors"))


def load(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    with safe_open(path, "pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}, file.metadata()  # noqa: SIM118


def fixture(name: str) -> Path:
    (path,) = [path for path in FIXTURES if path.name.startswith(name)]
    return path


@pytest.fixture
def state() -> dict[str, torch.Tensor]:
    """n=6, k=192, 4 bits in groups of 64: small enough to damage by hand."""
    return load(fixture("hqq-4bit-g64-6x192"))[0]


@pytest.mark.parametrize("path", FIXTURES, ids=lambda path: path.stem)
def test_is_what_hqq_computes(path):
    """Exactly: in float64 (by its hash), and in the library's own type, which rounds difference and product."""
    state, metadata = load(path)
    expected = state.pop("dequantized")
    weight = hqq.read(state, {}, "layer")
    assert path.stem.startswith(f"hqq-{weight.bits}bit-g{weight.group_size}-{weight.n}x{weight.k}-")
    assert metadata["library"] == "hqq 0.2.8.post1"
    assert hashlib.sha256(weight.dequantize().numpy().tobytes()).hexdigest() == metadata["float64_sha256"]

    dtype = weight.scales.dtype
    codes = weight.codes.to(dtype).view(weight.n, -1, weight.group_size)
    rounded = ((codes - weight.zeros[..., None]) * weight.scales[..., None]).view(weight.n, weight.k)
    assert expected.dtype == weight.zeros.dtype == dtype
    assert torch.equal(rounded, expected)


def test_every_wanted_case_is_there():
    stems = {path.stem for path in FIXTURES}
    assert {f"hqq-{bits}bit-g{g}-128x256-float16" for bits in (4, 8) for g in (32, 64, 128)} <= stems
    assert max(path.stat().st_size for path in FIXTURES) < 120_000


def test_four_bit_zeros_are_no_whole_numbers():
    """hqq rounds them, then refines them: they must not be stored as codes."""
    zeros = hqq.read(load(fixture("hqq-4bit-g64-128x256"))[0], {}, "layer").zeros
    assert not torch.equal(zeros, zeros.round())


def test_plain_meta_of_a_pickle_is_read_too(state):
    plain = {"W_q": state["W_q"], "scale": state["scale"], "zero": state["zero"], "shape": torch.Size([6, 192])}
    plain |= {"nbits": 4, "group_size": 64, "axis": 1, "packing": "4bit_u8", "quant_scale": False, "quant_zero": False}
    assert torch.equal(hqq.read(plain, {}, "a").dequantize(), hqq.read(state, {}, "a").dequantize())


def test_no_group_size_is_a_whole_row():
    state = load(fixture("hqq-6bit-g96-5x96"))[0]
    del state["group_size"]
    assert hqq.read(state, {}, "a").group_size == 96


def number(value: int) -> torch.Tensor:
    return torch.tensor(value, dtype=torch.int32)


def text(value: str) -> torch.Tensor:
    return torch.tensor([ord(c) for c in value], dtype=torch.uint8)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"axis": number(0)}, "axis=0 shares a scale among output features.*again with axis=1"),
        ({"scale": None}, r"has no scale: .*offload_meta=False"),
        ({"W_q": None, "nbits": None}, "has no W_q, nbits"),
        ({"quant_zero": torch.tensor(1, dtype=torch.uint8)}, "its zero are themselves quantised"),
        ({"packing": text("4bit_u16")}, "unknown packing '4bit_u16'; known: 8bit_u8, 4bit_u8"),
        ({"packing": text("8bit_u8")}, r"W_q is torch.uint8 \[9, 64\]; 18 groups of 64 codes .* packing 8bit_u8"),
        ({"nbits": number(5)}, "codes of 5 bits in packing 4bit_u8 need"),
        ({"nbits": number(3)}, "too large for 3 bits"),
        ({"W_q": torch.zeros(8, 64, dtype=torch.uint8)}, r"torch.uint8 \[8, 64\].*need torch.uint8 \[18 / 2, 64\]"),
        ({"W_q": torch.zeros(9, 64, dtype=torch.int32)}, "W_q is torch.int32"),
        ({"shape": torch.tensor([5, 192]), "W_q": torch.zeros(8, 64, dtype=torch.uint8)}, r"need .* \[15 / 2, 64\]"),
        ({"shape": torch.tensor([12, 96])}, "k=96 is no multiple of group_size=64, so groups cross rows"),
        ({"scale": torch.ones(1, dtype=torch.float16)}, r"scale is torch.float16 \[1\]; n=6 rows of 3 groups"),
        ({"zero": torch.zeros(18, 1, dtype=torch.uint8)}, "zero is torch.uint8"),
        ({"zero": torch.full((18, 1), float("nan"))}, "zero of group 0 is nan"),
    ],
)  # fmt: skip
def test_damage_is_named(state, changes, says):
    damaged = {key: value for key, value in (state | changes).items() if value is not None}
    with pytest.raises(ValueError, match=says) as error:
        hqq.read(damaged, {}, "model.layers.3.mlp.up_proj")
    assert "layer 'model.layers.3.mlp.up_proj'" in str(error.value)
