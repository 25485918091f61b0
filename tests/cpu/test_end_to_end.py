"""tools/end_to_end.py on the CPU: the compiled steps against transformers' own forward, and the rows."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

transformers = pytest.importorskip("transformers")

from marlin_gen import csv_rows  # noqa: E402
from marlin_gen.hf import fuse  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
PROMPT, STEPS = 150, 3  # more than one block of the Triton kernel's


@pytest.fixture
def tools(monkeypatch):
    """A function that imports a tool."""
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    return importlib.import_module


def small_model():
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=128, hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=8,
        num_key_value_heads=2, initializer_range=0.2,  # of 0.02, attention would be the same wherever it looks
    )  # fmt: skip
    made = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="sdpa")
    fuse(made)
    return made.eval()


def prompted(model, prompt):
    cache = transformers.StaticCache(model.config, max_cache_len=PROMPT + STEPS)
    return cache, model(prompt, past_key_values=cache, logits_to_keep=1).logits.argmax(-1)


def check_steps(llama, model, attend):
    prompt = torch.randint(0, 128, (3, PROMPT))
    plain = llama.PlainStep(model, *prompted(model, prompt), PROMPT)
    ours = llama.CompiledStep(model, *prompted(model, prompt), PROMPT, attend)
    for _ in range(STEPS):
        plain.step()
        ours.step()
        assert torch.allclose(ours.logits, plain.logits, atol=1e-4) and torch.equal(ours.token, plain.token)
    for mine, theirs in zip(ours.cache.layers, plain.cache.layers, strict=True):
        assert torch.allclose(mine.keys, theirs.keys, atol=1e-4) and torch.allclose(
            mine.values, theirs.values, atol=1e-4
        )


def run_alone(script: str, **variables: str) -> None:
    """``script``, which ends by printing "equal", in a process of its own; its arguments are folders to import from."""
    command = [sys.executable, "-c", script, *(str(ROOT / folder) for folder in ("", "tools", "tests/cpu"))]
    done = subprocess.run(command, env=os.environ | variables, capture_output=True, text=True, timeout=300)
    assert done.stdout == "equal\n", done.stderr


@torch.no_grad()
def check_steps_and_prefill():
    import compiled_llama as llama

    model, llama.compiled = small_model(), lambda function: function  # what compiling does to them is tested below
    check_steps(llama, model, llama.attention)
    prompt = torch.randint(0, 128, (2, 40))
    expected = model(prompt, use_cache=False).logits[:, -1]
    assert torch.allclose(llama.CompiledPrefill(model, 40)(prompt), expected, atol=1e-4)


ALONE = """
import sys
sys.path[:0] = sys.argv[1:]
import test_end_to_end
test_end_to_end.check_steps_and_prefill()
print("equal")
"""


def test_a_step_and_a_prefill_are_those_of_transformers():
    """In a process of its own: once, behind other tests, transformers' own step was 0.003 from what it always is."""
    run_alone(ALONE)


INTERPRETED = """
import sys
sys.path[:0] = sys.argv[1:]
import torch, compiled_llama as llama
from decode_attention import checked
decode_attention = checked(torch.device("cpu"), torch.float16)
for batch, kv_heads, group, position in ((1, 8, 4, 150), (2, 2, 1, 128), (2, 3, 3, 5), (1, 1, 16, 0)):
    torch.manual_seed(position)
    qkv = torch.randn(batch, kv_heads * (group + 2) * 32)
    caches = torch.randn(2, batch, kv_heads, 160, 32)
    angles = torch.randn(160, 16).repeat(1, 2)
    about = angles.cos(), angles.sin(), torch.tensor([position])
    expected, found = caches.clone(), caches.clone()
    assert torch.allclose(decode_attention(qkv, *found, *about), llama.attention(qkv, *expected, *about), atol=1e-5)
    assert torch.allclose(found, expected, atol=1e-6)
print("equal")
"""


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")
def test_the_triton_kernel_is_the_torch_one():
    """By triton's interpreter, in a process of its own: it is chosen when triton is imported."""
    run_alone(INTERPRETED, TRITON_INTERPRET="1")


@pytest.mark.slow
def test_the_tool_measures_all_rows(tools, tmp_path, capsys, monkeypatch):
    tool = tools("end_to_end")
    monkeypatch.setattr(tool, "PREFILL", 64)
    torch._dynamo.utils.counters.clear()
    path = tmp_path / "e.csv"
    tool.main(["--model", "tiny", "--device", "cpu", "--batches", "1,2", "--lm-head", "--csv", str(path)])
    rows = csv_rows.read(path, tool.Row, "end to end")
    kinds = [("float16", "float16")] * 6 + [("u4b8g128", "float16")] * 6 + [("u4b8g128", "quantised")] * 4
    assert [(row.kernels, row.lm_head) for row in rows] == kinds
    assert [(row.way, row.work, row.batch) for row in rows[:6]] == [
        (way, *cell) for way in tool.WAYS for cell in (("decode", 1), ("decode", 2), ("prefill 64", 1))
    ]
    assert all(row.over_dense == 1 for row in rows[:6])
    assert all((row.logits_error or 0) < 2e-3 and row.ms > 0 for row in rows)
    # A layer and a norm for each batch, and for the prompt: not for each layer.
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2 * (3 + 3) + 2 * 2
    assert "of which compiling" in capsys.readouterr().out


def test_a_step_that_computes_something_else_is_refused(tools, tmp_path, monkeypatch):
    tool, llama = tools("end_to_end"), tools("compiled_llama")
    monkeypatch.setattr(llama, "compiled", lambda function: function)
    monkeypatch.setattr(llama, "attention", lambda qkv, keys, *about: 100 * qkv[:, : 2 * keys.shape[1] * keys.shape[3]])
    only = ["--batches", "1", "--ways", "compiled"]
    with pytest.raises(ValueError, match=r"logits of the compiled model are .* from those of transformers' forward"):
        tool.main(["--model", "tiny", "--device", "cpu", *only, "--csv", str(tmp_path / "e.csv")])
