"""GGUF files, written, quantised and dequantised by llama.cpp's own gguf package."""

from __future__ import annotations

import sys

import gguf as library
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from gguf_files import finish

from marlin_gen.checkpoints import gguf
from marlin_gen.checkpoints.quantized import QuantizedWeight

KINDS = [Kind.Q4_0, Kind.Q4_1, Kind.Q8_0]


def write(path, tensors, endianess=library.GGUFEndian.LITTLE, **metadata):
    """A file of {name: (data, kind)}; metadata keys with ``__`` for dots, lists as arrays."""
    writer = library.GGUFWriter(path, "llama", endianess=endianess)
    for key, value in metadata.items():
        name = key.replace("__", ".")
        if isinstance(value, list):
            writer.add_array(name, value)
        elif isinstance(value, float):
            writer.add_float32(name, value)
        else:
            writer.add_string(name, value) if isinstance(value, str) else writer.add_uint32(name, value)
    for name, (data, kind) in tensors.items():
        writer.add_tensor(name, data, raw_dtype=kind)
    finish(writer)
    return path


def read(path):
    return dict(gguf.read_tensors(gguf.open_reader(path)))


def random_blocks(kind, n, k, seed):
    """Every bit pattern that a block may have, not only those that quantising makes: any code, any finite d and m."""
    blocks = np.random.default_rng(seed).integers(0, 256, (n, k // 32, library.GGML_QUANT_SIZES[kind][1]), np.uint8)
    halves = blocks[..., : 4 if kind == Kind.Q4_1 else 2].view(np.uint16)
    halves[(halves & 0x7C00) == 0x7C00] = 0x0001  # neither infinite nor nan: the smallest number there is
    return blocks.reshape(n, -1)


def assert_exact(weight, data, kind):
    """Bit for bit. gguf computes in float32: codes times a float16 fit it, the sum of Q4_1 is rounded once."""
    expected = torch.from_numpy(library.quants.dequantize(data, kind))
    assert torch.equal(weight.dequantize().float().view(torch.int32), expected.view(torch.int32))
    if kind != Kind.Q4_1:
        assert torch.equal(weight.dequantize(), expected.double())


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
@pytest.mark.parametrize(("n", "k"), [(1, 32), (3, 96), (7, 160), (192, 576)])
def test_is_what_gguf_computes(tmp_path, kind, n, k):
    values = np.random.default_rng(n).standard_normal((n, k)).astype(np.float32)
    values[0, :32] = 0  # a block with d = 0
    tensors = {"quantised": library.quants.quantize(values, kind), "random": random_blocks(kind, n, k, seed=k)}
    found = read(write(tmp_path / "a.gguf", {name: (data, kind) for name, data in tensors.items()}))
    assert list(found) == list(tensors)
    for name, data in tensors.items():
        weight = found[name]
        assert (weight.n, weight.k, weight.group_size, weight.zeros) == (n, k, 32, None)
        assert weight.bits == (8 if kind == Kind.Q8_0 else 4) and weight.scales.dtype == torch.float16
        assert (weight.minima is not None) == (kind == Kind.Q4_1)
        assert_exact(weight, data, kind)


def test_every_code_of_every_place_is_told_apart(tmp_path):
    """A 4-bit row whose 32 places hold different pairs, by hand: low halves first, then high ones."""
    block = np.concatenate([np.float16([2.0]).view(np.uint8), np.arange(16, dtype=np.uint8) | 0x50])
    (weight,) = read(write(tmp_path / "a.gguf", {"w": (block[None], Kind.Q4_0)})).values()
    assert weight.codes[0].tolist() == [*range(16), *[5] * 16]
    assert weight.dequantize()[0, [0, 15, 16]].tolist() == [-16.0, 14.0, -6.0]


def test_floating_tensors_stay_as_they_are(tmp_path):
    values = np.random.default_rng(0).standard_normal((2, 3, 5)).astype(np.float32)
    bf16 = library.quants.quantize(values, Kind.BF16)
    tensors = {"f32": (values, Kind.F32), "f16": (values.astype(np.float16), Kind.F16), "bf16": (bf16, Kind.BF16)}
    found = read(write(tmp_path / "a.gguf", tensors | {"bias": (values[0, 0], Kind.F32)}))
    expected = torch.from_numpy(values)
    assert torch.equal(found["f32"], expected) and torch.equal(found["bias"], expected[0, 0])
    assert torch.equal(found["f16"], expected.half()) and torch.equal(found["bf16"], expected.bfloat16())


def test_one_tensor_at_a_time(tmp_path, monkeypatch):
    data = random_blocks(Kind.Q4_0, 2, 32, seed=0)
    reader = gguf.open_reader(write(tmp_path / "a.gguf", {name: (data, Kind.Q4_0) for name in "abc"}))
    made = []
    monkeypatch.setattr(gguf, "QuantizedWeight", lambda *args, **kw: made.append(1) or QuantizedWeight(*args, **kw))
    tensors = gguf.read_tensors(reader)
    assert not made and next(tensors)[0] == "a" and len(made) == 1


@pytest.mark.parametrize("kind", [Kind.Q4_K, Kind.Q5_0, Kind.I32], ids=lambda kind: kind.name)
def test_other_types_are_named_before_any_tensor_is_read(tmp_path, kind):
    block, size = library.GGML_QUANT_SIZES[kind]
    other = np.zeros((1, 8), np.int32) if kind == Kind.I32 else np.zeros((1, size * 256 // block), np.uint8)
    path = write(tmp_path / "a.gguf", {"a": (np.zeros(4, np.float32), Kind.F32), "blk.0.odd": (other, kind)})
    with pytest.raises(ValueError, match=f"tensor 'blk.0.odd' has type {kind.name}, .* Q4_0, Q4_1, Q8_0"):
        gguf.read_tensors(gguf.open_reader(path))


def test_quantised_experts_are_refused(tmp_path):
    data = np.zeros((2, 3, 18), np.uint8)
    path = write(tmp_path / "a.gguf", {"blk.0.ffn_up_exps.weight": (data, Kind.Q4_0)})
    with pytest.raises(ValueError, match=r"ffn_up_exps.weight' is Q4_0 of shape \[2, 3, 32\]"):
        read(path)


@pytest.mark.parametrize(("place", "value"), [(0, "inf"), (1, "nan")], ids=["scale", "minimum"])
def test_a_scale_that_is_no_number_is_named(tmp_path, place, value):
    data = random_blocks(Kind.Q4_1, 3, 96, seed=0)
    data.reshape(3, 3, 20)[2, 1, 2 * place : 2 * place + 2] = np.float16([float(value)]).view(np.uint8)
    path = write(tmp_path / "a.gguf", {"w": (data, Kind.Q4_1)})
    with pytest.raises(ValueError, match=f"tensor 'w': block 1 of row 2 has scale or minimum {value}"):
        read(path)


def test_a_damaged_file_is_named(tmp_path):
    path = write(tmp_path / "a.gguf", {"w": (random_blocks(Kind.Q4_0, 8, 64, seed=0), Kind.Q4_0)})
    whole = path.read_bytes()
    path.write_bytes(whole[:-40])
    with pytest.raises(ValueError, match=r"a\.gguf is not a whole GGUF file"):
        gguf.open_reader(path)
    path.write_bytes(whole[:70])
    with pytest.raises(ValueError, match=r"a\.gguf is not a whole GGUF file"):
        gguf.open_reader(path)
    path.write_bytes(b"GGML" + whole[4:])
    with pytest.raises(ValueError, match=r"a\.gguf is not a whole GGUF file .*magic"):
        gguf.open_reader(path)


def test_the_other_byte_order_is_refused(tmp_path):
    other = library.GGUFEndian.BIG if sys.byteorder == "little" else library.GGUFEndian.LITTLE
    path = write(tmp_path / "a.gguf", {"w": (np.zeros(4, np.float32), Kind.F32)}, endianess=other)
    with pytest.raises(ValueError, match="gguf-convert-endian"):
        gguf.open_reader(path)


MODEL = {
    "general__name": "small", "llama__block_count": 2, "llama__embedding_length": 64, "llama__feed_forward_length": 128,
    "llama__attention__head_count": 4, "llama__rope__freq_base": 10000.0,
    "llama__attention__layer_norm_rms_epsilon": 0.5,
    "tokenizer__ggml__tokens": ["a", "b", "\u0120c"], "tokenizer__ggml__merges": ["a b"],
}  # fmt: skip


def test_metadata(tmp_path):
    path = write(tmp_path / "a.gguf", {"w": (np.zeros(4, np.float32), Kind.F32)}, **MODEL)
    assert gguf.read_metadata(gguf.open_reader(path)) == {
        "architecture": "llama", "name": "small", "layers": 2, "hidden_size": 64, "intermediate_size": 128, "heads": 4,
        "kv_heads": 4, "head_size": 16, "context_length": None, "norm_eps": 0.5, "vocabulary_size": 3,
        "rope": {"freq_base": 10000.0},
        "tokenizer": {"tokens": ["a", "b", "\u0120c"], "merges": ["a b"], "chat_template": None},
    }  # fmt: skip


def test_what_the_metadata_say_goes_before_what_follows(tmp_path):
    more = {"llama__attention__head_count_kv": 2, "llama__attention__key_length": 32, "llama__vocab_size": 5}
    path = write(tmp_path / "a.gguf", {"w": (np.zeros(4, np.float32), Kind.F32)}, **MODEL, **more)
    found = gguf.read_metadata(gguf.open_reader(path))
    assert (found["kv_heads"], found["head_size"], found["vocabulary_size"]) == (2, 32, 5)


def test_missing_metadata_are_named(tmp_path):
    path = write(tmp_path / "a.gguf", {"w": (np.zeros(4, np.float32), Kind.F32)})
    with pytest.raises(ValueError, match=r"no 'llama.attention.head_count'"):
        gguf.read_metadata(gguf.open_reader(path))


def test_without_the_package_the_error_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ImportError, match=r"pip install 'marlin_gen\[hf\]'"):
        gguf.open_reader("a.gguf")
