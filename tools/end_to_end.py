"""Tokens per second of a whole model, fp16 and on these kernels, in one run: greedy decoding and prefill.

    python tools/end_to_end.py --csv end_to_end.csv [--model llama-3.1-8b] [--dtype float16] [--batches 1,16,64]

The model has the shape that its config says and random weights. It decodes with a static cache, one CUDA graph a step
(argmax and the next position inside), after a prompt of 128 tokens. fp16 runs with the same fused projections as the
quantised model. Extra: hf.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import transformers

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import marlin_gen  # noqa: E402
from marlin_gen import csv_rows  # noqa: E402
from marlin_gen.formats import DEFAULT_FORMAT  # noqa: E402
from marlin_gen.hf import fuse  # noqa: E402

CONFIGS = {
    "llama-3.1-8b": dict(
        vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=8, max_position_embeddings=8192, rope_theta=500000.0,
    ),
    "tiny": dict(
        vocab_size=512, hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=4096,
    ),
}  # fmt: skip
PROMPT, STEPS, PREFILL = 128, 64, 2048  # tokens


def built(name: str, dtype: torch.dtype, device: torch.device) -> Any:
    """The model with random weights."""
    config = transformers.LlamaConfig(**CONFIGS[name])
    with device:
        return transformers.AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa").eval()


@dataclass(frozen=True)
class Row:
    """A line of the CSV."""

    model: str
    kernels: str
    work: str
    batch: int
    tokens_per_s: float
    ms: float  # of a step, or of the prompt
    over_dense: float = 1.0


class Decoder:
    """Greedy decoding of one batch; ``step`` makes a token for each sequence, with static memory throughout."""

    def __init__(self, model: Any, batch: int) -> None:
        self.model, self.device = model, model.device
        self.length = PROMPT + STEPS + 8
        self.cache = transformers.StaticCache(model.config, max_cache_len=self.length)
        prompt = torch.randint(0, model.config.vocab_size, (batch, PROMPT), device=self.device)
        logits = model(prompt, past_key_values=self.cache, logits_to_keep=1).logits
        self.token = logits.argmax(-1)
        self.position = torch.full((batch, 1), PROMPT, device=self.device)
        self.slots = torch.arange(self.length, device=self.device)

    def step(self) -> None:
        mask = (self.slots <= self.position)[:, None, None, :]
        out = self.model(
            self.token, attention_mask=mask, position_ids=self.position, past_key_values=self.cache, logits_to_keep=1
        )
        self.token.copy_(out.logits.argmax(-1))
        self.position.add_(1)


def milliseconds(call: Callable[[], None], count: int) -> list[float]:
    """Of each of ``count`` calls, on the GPU's clock."""
    events = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]
    events[0].record()
    for event in events[1:]:
        call()
        event.record()
    torch.cuda.synchronize()
    return [before.elapsed_time(after) for before, after in pairwise(events)]


@torch.inference_mode()
def decoding(model: Any, batch: int) -> float:
    """Milliseconds a step, the median."""
    decoder = Decoder(model, batch)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            decoder.step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        decoder.step()
    return statistics.median(milliseconds(graph.replay, STEPS - 4))


@torch.inference_mode()
def prefilling(model: Any) -> float:
    """Milliseconds for one prompt of ``PREFILL`` tokens, the median of a few."""
    prompt = torch.randint(0, model.config.vocab_size, (1, PREFILL), device=model.device)
    return statistics.median(milliseconds(lambda: model(prompt, use_cache=False, logits_to_keep=1), 8)[2:])


def measured(name: str, kernels: str, model: Any, batches: list[int]) -> Iterator[Row]:
    for batch in batches:
        ms = decoding(model, batch)
        yield Row(name, kernels, "decode", batch, batch / ms * 1e3, ms)
    ms = prefilling(model)
    yield Row(name, kernels, f"prefill {PREFILL}", 1, PREFILL / ms * 1e3, ms)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=CONFIGS, default="llama-3.1-8b")
    parser.add_argument("--dtype", choices=("float16", "bfloat16"), default="float16")
    parser.add_argument("--format", default=DEFAULT_FORMAT)
    parser.add_argument("--batches", default="1,16,64", type=lambda text: [int(part) for part in text.split(",")])
    parser.add_argument("--csv", type=Path, required=True)
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    model = built(options.model, getattr(torch, options.dtype), torch.device("cuda"))
    rows: list[Row] = []
    dense: dict[tuple[str, int], float] = {}

    def note(found: Row) -> None:
        first = dense.setdefault((found.work, found.batch), found.tokens_per_s)
        rows.append(row := replace(found, over_dense=found.tokens_per_s / first))
        print(
            f"{row.kernels:12} {row.work:12} batch {row.batch:3}: {row.tokens_per_s:9.0f} tokens/s, {row.ms:.2f} ms,"
            f" {row.over_dense:.2f}x",
            flush=True,
        )
        csv_rows.write(options.csv, Row, rows, digits=6)

    fuse(model)
    for found in measured(options.model, options.dtype, model, options.batches):
        note(found)
    print(marlin_gen.quantize_model(model, options.format))
    torch.cuda.empty_cache()
    for found in measured(options.model, options.format, model, options.batches):
        note(found)


if __name__ == "__main__":
    main()
