"""One Triton kernel for what stands between q/k/v and o of a decode step: rotary embedding, the cache, attention.

Serving engines have such a kernel. Inductor makes five or six of it; each takes 1.8 us or more in an H100's CUDA graph,
about half of a 4-bit product at batch 1. Importing this needs triton; ``compiled_llama.attention`` is it in torch.
"""

from __future__ import annotations

import compiled_llama
import torch
import triton
import triton.language as tl

ROWS = 16  # heads of q in a block: the least that tl.dot takes; a group of fewer is padded
BLOCK = 128  # slots of the cache read at once


@triton.jit
def _kernel(
    qkv, keys, values, cosines, sines, position, out, scale, slots,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, HEAD: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A block: one sequence, one head of the cache with its GROUP heads of q."""
    sequence = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    at = tl.load(position)
    dtype = keys.dtype.element_ty
    d = tl.arange(0, HEAD)
    other = (d + HEAD // 2) % HEAD  # what rotating a half brings to d
    cosine = tl.load(cosines + at * HEAD + d).to(tl.float32)
    sine = tl.load(sines + at * HEAD + d).to(tl.float32) * tl.where(d < HEAD // 2, -1.0, 1.0)

    row = qkv + sequence * KV_HEADS * (GROUP + 2) * HEAD
    g = tl.arange(0, ROWS)
    is_head = (g < GROUP)[:, None]
    q_row = row + ((head * GROUP + g) * HEAD)[:, None]
    q = tl.load(q_row + d[None, :], mask=is_head, other=0.0).to(tl.float32) * cosine[None, :]
    q += tl.load(q_row + other[None, :], mask=is_head, other=0.0).to(tl.float32) * sine[None, :]
    q = q.to(dtype)
    k_row = row + (KV_HEADS * GROUP + head) * HEAD
    k = (tl.load(k_row + d).to(tl.float32) * cosine + tl.load(k_row + other).to(tl.float32) * sine).to(dtype)
    v = tl.load(row + (KV_HEADS * (GROUP + 1) + head) * HEAD + d)
    cache = (sequence * KV_HEADS + head) * slots * HEAD
    tl.store(keys + cache + at * HEAD + d, k)
    tl.store(values + cache + at * HEAD + d, v)

    # The running softmax begins with the new token, from registers: what was just stored is not read back.
    top = tl.sum(q.to(tl.float32) * k.to(tl.float32)[None, :], axis=1) * scale
    total = tl.full((ROWS,), 1.0, tl.float32)
    sums = tl.zeros((ROWS, HEAD), tl.float32) + v.to(tl.float32)[None, :]
    for start in range(0, at, BLOCK):
        slot = start + tl.arange(0, BLOCK)
        is_used = slot < at
        k_block = tl.load(keys + cache + slot[None, :] * HEAD + d[:, None], mask=is_used[None, :], other=0.0)
        scores = tl.where(is_used[None, :], tl.dot(q, k_block) * scale, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, axis=1))
        weights = tl.exp(scores - new_top[:, None])
        shrunk = tl.exp(top - new_top)
        v_block = tl.load(values + cache + slot[:, None] * HEAD + d[None, :], mask=is_used[:, None], other=0.0)
        sums = sums * shrunk[:, None] + tl.dot(weights.to(dtype), v_block)
        total = total * shrunk + tl.sum(weights, axis=1)
        top = new_top
    to = out + sequence * KV_HEADS * GROUP * HEAD + ((head * GROUP + g) * HEAD)[:, None] + d[None, :]
    tl.store(to, (sums / total[:, None]).to(dtype), mask=is_head)


@torch.library.custom_op("marlin_gen_tools::decode_attention", mutates_args=("keys", "values"))
def decode_attention(
    qkv: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, cosines: torch.Tensor, sines: torch.Tensor,
    position: torch.Tensor,
) -> torch.Tensor:  # fmt: skip
    """As ``compiled_llama.attention``; all operands contiguous, a head a power of two of at least 16."""
    batch, kv_heads, slots, head = keys.shape
    group = qkv.shape[1] // head // kv_heads - 2
    if group > ROWS:
        raise ValueError(f"{group} heads of q share one of k; this kernel takes {ROWS} at most: use --attention torch")
    out = qkv.new_empty(batch, kv_heads * group * head)
    _kernel[batch, kv_heads](
        qkv, keys, values, cosines, sines, position, out, head**-0.5, slots, kv_heads, group, head, ROWS, BLOCK,
        num_warps=4, num_stages=2,
    )  # fmt: skip
    return out


@decode_attention.register_fake
def _(qkv, keys, values, cosines, sines, position):  # type: ignore[no-untyped-def]
    return qkv.new_empty(len(qkv), qkv.shape[1] - 2 * keys.shape[1] * keys.shape[3])


def checked(device: torch.device, dtype: torch.dtype) -> compiled_llama.Attention:
    """``decode_attention``, tried once beside the same in torch; a ValueError if it computes something else."""
    qkv, caches = (torch.randn(*size, device=device).to(dtype) for size in ((2, 24 * 128), (2, 2, 4, 160, 128)))
    angles = torch.randn(160, 64, device=device).repeat(1, 2)
    about = angles.cos().to(dtype), angles.sin().to(dtype), torch.tensor([150], device=device)
    expected = compiled_llama.attention(qkv, *caches.clone(), *about).float()
    error = float((decode_attention(qkv, *caches, *about).float() - expected).norm() / expected.norm())
    if not error < 0.02:  # also for NaN; bf16 that rounds at other places is some 5e-3 apart
        raise ValueError(f"the Triton kernel for attention is {error:.1e} from torch's: use --attention torch")
    return decode_attention
