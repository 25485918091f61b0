"""A llama model of transformers in a few functions that torch.compile takes: a decode step, and a prefill.

The weights, norms and activation are the model's own modules, its projections fused (``marlin_gen.hf.fuse``); the walk
through them is this file's, the same for ``nn.Linear`` and ``QuantLinear``. One decoder layer is compiled once for all
layers of a model (weights and caches are its arguments), which takes seconds where a whole model takes a minute. As
serving engines do, a layer takes the residual and what is to be added to it, so that an addition and the norm after it
are one kernel; and rotary embedding looks up tables made once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

Attention = Callable[..., torch.Tensor]  # qkv, keys, values, cosines, sines, position -> [batch, heads * head]


def rotated(x: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor) -> torch.Tensor:
    low, high = x.chunk(2, dim=-1)
    return x * cosine + torch.cat((-high, low), dim=-1) * sine


def attention(
    qkv: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, cosines: torch.Tensor, sines: torch.Tensor,
    position: torch.Tensor,
) -> torch.Tensor:  # fmt: skip
    """Of one new token a sequence, at ``position`` [1] of caches [batch, heads, slots, head], which it is written to.

    qkv: [batch, all heads of q, k and v]; cosines, sines: [slots, head].
    """
    batch, kv_heads, slots, head = keys.shape
    heads = qkv.view(batch, -1, head)
    q, k, v = heads.split((heads.shape[1] - 2 * kv_heads, kv_heads, kv_heads), dim=1)
    cosine, sine = cosines[position], sines[position]
    keys.index_copy_(2, position, rotated(k, cosine, sine)[:, :, None])
    values.index_copy_(2, position, v[:, :, None])
    q = rotated(q, cosine, sine).view(batch, kv_heads, -1, head)
    scores = (q @ keys.transpose(2, 3)).float() * head**-0.5
    unused = torch.arange(slots, device=qkv.device) > position
    weights = scores.masked_fill(unused, float("-inf")).softmax(dim=-1).to(qkv.dtype)
    return (weights @ values).view(batch, -1)


def after_attention(layer: Any, x: torch.Tensor, attended: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The residual, and what is still to be added to it."""
    x = x + layer.self_attn.o_proj(attended)
    mlp = layer.mlp
    gate, up = mlp.gate_proj.linear(layer.post_attention_layernorm(x)).chunk(2, dim=-1)
    return x, mlp.down_proj(mlp.act_fn(gate) * up)


def decode_layer(
    layer: Any, attend: Attention, x: torch.Tensor, more: torch.Tensor, *about: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """x, more: [batch, hidden]; about: what ``attend`` takes after qkv."""
    x = x + more
    return after_attention(layer, x, attend(layer.self_attn.q_proj.linear(layer.input_layernorm(x)), *about))


def prefill_layer(
    layer: Any, x: torch.Tensor, more: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """x, more: [batch, tokens, hidden]; cosine, sine: [tokens, head]. The whole prompt attends to itself; no cache."""
    x = x + more
    projection, head = layer.self_attn.q_proj, cosine.shape[-1]
    qkv = projection.linear(layer.input_layernorm(x))
    q, k, v = (part.unflatten(-1, (-1, head)).transpose(1, 2) for part in qkv.split(projection.sizes, dim=-1))
    q, k = rotated(q, cosine, sine), rotated(k, cosine, sine)
    attended = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    return after_attention(layer, x, attended.transpose(1, 2).flatten(2))


def last_norm(norm: Any, x: torch.Tensor, more: torch.Tensor) -> torch.Tensor:
    hidden: torch.Tensor = norm(x + more)
    return hidden


def compiled(function: Callable[..., Any]) -> Any:
    """For each shape that it is called with anew: batches of 1, 16 and 64 want kernels of their own."""
    return torch.compile(function, fullgraph=True, dynamic=False)


class CompiledStep:
    """Greedy decoding: ``step`` makes ``logits`` and the next ``token`` of each sequence, in static memory.

    ``cache``: a StaticCache that holds a prompt of ``length`` tokens, and is written to; ``token`` [batch, 1]: the
    first after it.
    """

    def __init__(self, model: Any, cache: Any, token: torch.Tensor, length: int, attend: Attention = attention) -> None:
        self.model, self.cache, self.token, self.attend = model, cache, token.clone(), attend
        self.position = torch.tensor([length], device=token.device)
        self.tables = rotary_tables(model, cache.layers[0].keys.shape[2])
        self.nothing = torch.zeros(len(token), model.config.hidden_size, dtype=model.dtype, device=token.device)
        self._layer, self._norm = compiled(decode_layer), compiled(last_norm)
        self.logits = torch.empty(0)

    def step(self) -> None:
        body = self.model.model
        x, more = body.embed_tokens(self.token[:, 0]), self.nothing
        for layer, held in zip(body.layers, self.cache.layers, strict=True):
            x, more = self._layer(layer, self.attend, x, more, held.keys, held.values, *self.tables, self.position)
        self.logits = self.model.lm_head(self._norm(body.norm, x, more))
        self.token.copy_(self.logits.argmax(-1, keepdim=True))
        self.position.add_(1)


class PlainStep:
    """The same by transformers' own forward."""

    def __init__(self, model: Any, cache: Any, token: torch.Tensor, length: int) -> None:
        self.model, self.cache, self.token = model, cache, token.clone()
        self.position = torch.full_like(token, length)
        self.slots = torch.arange(cache.layers[0].keys.shape[2], device=token.device)
        self.logits = torch.empty(0)

    def step(self) -> None:
        mask = (self.slots <= self.position)[:, None, None, :]
        out = self.model(
            self.token, attention_mask=mask, position_ids=self.position, past_key_values=self.cache, logits_to_keep=1
        )
        self.logits = out.logits[:, -1]
        self.token.copy_(self.logits.argmax(-1, keepdim=True))
        self.position.add_(1)


class CompiledPrefill:
    """Logits [batch, vocabulary] after prompts [batch, tokens]."""

    def __init__(self, model: Any, tokens: int) -> None:
        self.model, self.tables = model, rotary_tables(model, tokens)
        self._layer, self._norm = compiled(prefill_layer), compiled(last_norm)

    def __call__(self, prompt: torch.Tensor) -> torch.Tensor:
        body = self.model.model
        x = body.embed_tokens(prompt)
        more = torch.zeros_like(x)
        for layer in body.layers:
            x, more = self._layer(layer, x, more, *self.tables)
        logits: torch.Tensor = self.model.lm_head(self._norm(body.norm, x[:, -1], more[:, -1]))
        return logits


def rotary_tables(model: Any, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """cosines and sines [tokens, head], as the model's own module makes them."""
    positions = torch.arange(tokens, device=model.device)[None]
    cosines, sines = model.model.rotary_emb(torch.empty(0, dtype=model.dtype, device=model.device), positions)
    return cosines[0].contiguous(), sines[0].contiguous()
