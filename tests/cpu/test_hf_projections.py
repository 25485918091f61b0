"""Fused projections: the unfused results bit for bit, and what is left alone."""

from __future__ import annotations

import copy
import gc
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

transformers = pytest.importorskip("transformers")

from marlin_gen import QuantLinear, quantize_model  # noqa: E402
from marlin_gen.hf import fuse  # noqa: E402

CONFIG = dict(
    vocab_size=128, hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=64,
)  # fmt: skip


def model(**changes):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**{**CONFIG, **changes})
    return transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float16).eval()


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("is_quantized", [False, True])
@torch.inference_mode()
def test_a_fused_model_answers_as_before(is_quantized, bias):
    made = model(attention_bias=bias)
    if is_quantized:
        quantize_model(made)
    tokens = torch.randint(0, 128, (2, 9))
    before = made(tokens).logits
    assert len(fuse(made)) == 4
    kind = QuantLinear if is_quantized else nn.Linear
    linears = [name for name, layer in made.named_modules() if type(layer) is kind and name != "lm_head"]
    assert len(linears) == 2 * 4, "qkv, o, gate_up and down of two layers"
    after = made(tokens).logits
    # Kernels of a product twice as wide may add up in another order where torch's do; ours do not.
    assert torch.equal(after, before) if is_quantized else torch.allclose(after, before, atol=2e-3)
    assert torch.equal(made(tokens).logits, after)


def test_layers_that_differ_are_left_alone():
    made = model()
    quantize_model(made, skip=("lm_head", "k_proj"))
    made.model.layers[0].mlp.up_proj = QuantLinear.from_float(nn.Linear(256, 512, bias=False).half(), "u4zg64")
    assert fuse(made) == ["model.layers.1.mlp.gate_proj+up_proj"]


@torch.inference_mode()
def test_layers_with_hooks_are_left_alone():
    made, tokens = model(), torch.randint(0, 128, (2, 9))
    attention, mlp = made.model.layers[0].self_attn, made.model.layers[1].mlp
    attention.k_proj.register_forward_hook(lambda module, arguments, result: result * 2)
    mlp.up_proj.register_forward_pre_hook(lambda module, arguments: arguments[0] * 2)
    before = made(tokens).logits
    assert fuse(made) == ["model.layers.0.mlp.gate_proj+up_proj", "model.layers.1.self_attn.q_proj+k_proj+v_proj"]
    assert torch.allclose(made(tokens).logits, before, atol=2e-3)


@pytest.mark.parametrize("is_quantized", [False, True])
@torch.inference_mode()
def test_layers_that_are_offloaded_are_left_alone(is_quantized):
    """accelerate's hook brings their weights, which lie on meta, and would not be the joined layer's."""
    accelerate = pytest.importorskip("accelerate")
    made, tokens = model(), torch.randint(0, 128, (2, 9))
    if is_quantized:
        quantize_model(made)
    before = made(tokens).logits
    accelerate.cpu_offload(made.model.layers[1], "cpu", offload_buffers=True)
    assert fuse(made) == ["model.layers.0.self_attn.q_proj+k_proj+v_proj", "model.layers.0.mlp.gate_proj+up_proj"]
    assert torch.allclose(made(tokens).logits, before, atol=2e-3)


def test_a_later_projection_alone_is_an_error():
    made = model()
    fuse(made)
    with pytest.raises(RuntimeError, match="up_proj is fused with the projection before it, which was not called"):
        made.model.layers[0].mlp.up_proj(torch.zeros(1, 256).half())


def test_a_later_projection_of_another_input_is_an_error():
    """Of the same shape too, as in cross-attention: it would get the first one's keys."""
    attention = model().model.layers[0].self_attn
    fuse(attention)
    one, two = torch.randn(2, 3, 256).half()
    attention.q_proj(one)
    with pytest.raises(RuntimeError, match="k_proj is fused with the projection before it, which was not called with"):
        attention.k_proj(two)


@torch.inference_mode()
def test_threads_do_not_get_one_another_s_results():
    made = model()
    attention = made.model.layers[0].self_attn
    one, two = torch.randn(2, 1, 256).half()
    key = attention.k_proj(one)
    fuse(made)
    attention.q_proj(one)
    with ThreadPoolExecutor(1) as other:
        other.submit(attention.q_proj, two).result()
        assert torch.equal(attention.k_proj(one), key)
        left = other.submit(lambda: weakref.ref(attention.q_proj.results.parts[1][1])).result()
        assert left() is not None
    gc.collect()
    assert left() is None, "what a thread never asked for goes with it"
    with ThreadPoolExecutor(1) as other, pytest.raises(RuntimeError, match="v_proj is fused with"):
        other.submit(attention.v_proj, one).result()


@torch.inference_mode()
def test_a_fused_model_is_copied_and_compiled_whole():
    made = model()
    block = made.model.layers[0].mlp
    fuse(made)
    x = torch.randn(3, 256).half()
    block.gate_proj(x)  # leaves a result
    expected = block(x)
    assert torch.equal(copy.deepcopy(block)(x), expected)
    compiled = torch.compile(block, fullgraph=True, backend="eager")
    with ThreadPoolExecutor(1) as other:
        assert torch.equal(compiled(x), expected) and torch.equal(other.submit(compiled, x).result(), expected)
