"""tools/decode_attention.py on a GPU: what it computes is what ``compiled_llama.attention`` does, at llama's sizes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.gpu
HEADS, KV_HEADS, HEAD, SLOTS = 32, 8, 128, 199


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("batch", [1, 64])
@pytest.mark.parametrize("position", [0, 1, 128, 198])
def test_as_in_torch(monkeypatch, position, batch, dtype):
    pytest.importorskip("triton")
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[2] / "tools"))
    from compiled_llama import attention
    from decode_attention import decode_attention

    qkv = torch.randn(batch, (HEADS + 2 * KV_HEADS) * HEAD, device="cuda").to(dtype)
    caches = torch.randn(2, batch, KV_HEADS, SLOTS, HEAD, device="cuda").to(dtype)
    caches[..., position:, :] = float("nan")  # what was never written must not be read
    angles = torch.randn(SLOTS, HEAD // 2, device="cuda").repeat(1, 2)
    about = angles.cos().to(dtype), angles.sin().to(dtype), torch.tensor([position], device="cuda")
    expected, found = caches.nan_to_num(0).float(), caches.clone()
    exact = attention(qkv.float(), *expected, about[0].float(), about[1].float(), about[2])
    c = decode_attention(qkv, *found, *about)
    limit = 2e-3 if dtype == torch.float16 else 1.6e-2
    assert (c.float() - exact).norm() / exact.norm() < limit
    written = (found[..., position, :].float() - expected[..., position, :]).norm() / expected[..., position, :].norm()
    assert written < limit and torch.equal(found[..., :position, :], caches[..., :position, :])
