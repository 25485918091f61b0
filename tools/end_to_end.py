"""Tokens per second of a whole model, fp16 and on these kernels, in one run: greedy decoding and prefill.

    python tools/end_to_end.py --csv end_to_end.csv [--model llama-3.1-8b] [--batches 1,16,64] [--ways compiled]

The model has the shape that its config says and random weights. It decodes with a static cache, one CUDA graph a step
(argmax and the next position inside), after a prompt of 128 tokens. Two ways, each the same for fp16 and for these
kernels, with fused projections: "transformers", its own forward, kernel by kernel; and "compiled", the same weights
through compiled_llama.py. Before a compiled step is timed, its logits are held to those of transformers' forward on the
same tokens. lm_head is in 16 bits, but for the rows that say otherwise (--lm-head). Extra: hf; on a GPU also triton.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import transformers

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]

import compiled_llama  # noqa: E402

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
CHECKED, WARM = 4, 3  # steps before those that are timed
# Relative difference of logits from transformers' forward. Thirty-two layers of fp16 that round elsewhere are some 3e-3
# apart; bf16 rounds eight times as coarsely.
LIMITS = {"float16": 0.02, "bfloat16": 0.16}
WAYS = ("transformers", "compiled")


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
    lm_head: str
    way: str
    work: str
    batch: int
    tokens_per_s: float
    ms: float  # of a step, or of the prompt
    over_dense: float = 1.0
    logits_error: float | None = None  # relative, to transformers' forward
    same_tokens: float | None = None  # share of checked tokens that are those of transformers' forward
    compile_s: float | None = None


class Meter:
    """Times one model; ``attend``: the attention of compiled steps."""

    def __init__(self, model: Any, attend: compiled_llama.Attention) -> None:
        self.model, self.device, self.attend = model, model.device, attend
        self.limit = LIMITS.get(str(model.dtype).removeprefix("torch."), LIMITS["float16"])

    def prompted(self, prompt: torch.Tensor) -> tuple[Any, torch.Tensor]:
        """A static cache with the prompt in it, and the first token after it."""
        cache = transformers.StaticCache(self.model.config, max_cache_len=PROMPT + CHECKED + WARM + STEPS)
        return cache, self.model(prompt, past_key_values=cache, logits_to_keep=1).logits.argmax(-1)

    def decoding(self, way: str, batch: int) -> dict[str, float]:
        """``ms`` a step, the median, and for "compiled" what the check found."""
        prompt = torch.randint(0, self.model.config.vocab_size, (batch, PROMPT), device=self.device)
        plain = compiled_llama.PlainStep(self.model, *self.prompted(prompt), PROMPT)
        if way == "transformers":
            return {"ms": self.replayed(plain.step)}
        ours = compiled_llama.CompiledStep(self.model, *self.prompted(prompt), PROMPT, self.attend)
        errors, same, began, compile_s = [], [], time.monotonic(), 0.0
        for _ in range(CHECKED):
            ours.step()
            self.settled()
            compile_s = compile_s or time.monotonic() - began
            plain.step()
            errors.append(self.difference(ours.logits, plain.logits))
            same.append(float((ours.token == plain.token).float().mean()))
            ours.token.copy_(plain.token)  # where two nearly equal logits traded places, what follows is compared still
        found = {"logits_error": max(errors), "same_tokens": statistics.mean(same), "compile_s": compile_s}
        return {"ms": self.replayed(ours.step), **found}

    def prefilling(self, way: str) -> dict[str, float]:
        """``ms`` for one prompt of ``PREFILL`` tokens, the median of a few, and what the check found."""
        prompt = torch.randint(0, self.model.config.vocab_size, (1, PREFILL), device=self.device)

        def plain() -> torch.Tensor:
            logits: torch.Tensor = self.model(prompt, use_cache=False, logits_to_keep=1).logits[:, -1]
            return logits

        if way == "transformers":
            return {"ms": statistics.median(self.milliseconds(plain, 8)[2:])}
        ours, began = compiled_llama.CompiledPrefill(self.model, PREFILL), time.monotonic()
        logits, expected = ours(prompt), plain()
        self.settled()
        found = {"compile_s": time.monotonic() - began, "logits_error": self.difference(logits, expected)}
        found["same_tokens"] = float((logits.argmax(-1) == expected.argmax(-1)).float().mean())
        return {"ms": statistics.median(self.milliseconds(lambda: ours(prompt), 8)[2:]), **found}

    def difference(self, logits: torch.Tensor, expected: torch.Tensor) -> float:
        error = float((logits.float() - expected.float()).norm() / expected.float().norm())
        if not error < self.limit:  # also for NaN
            raise ValueError(
                f"logits of the compiled model are {error:.1e} from those of transformers' forward, {self.limit} is"
                " allowed: find the layer that differs, or try --attention torch"
            )
        return error

    def replayed(self, step: Callable[[], None]) -> float:
        """Milliseconds a step, the median: of one CUDA graph, or plainly on the CPU."""
        if self.device.type != "cuda":
            return statistics.median(self.milliseconds(step, STEPS))
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARM):
                step()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step()
        return statistics.median(self.milliseconds(graph.replay, STEPS))

    def milliseconds(self, call: Callable[[], object], count: int) -> list[float]:
        """Of each of ``count`` calls, on the device's clock."""
        if self.device.type != "cuda":
            times = [time.perf_counter()]
            for _ in range(count):
                call()
                times.append(time.perf_counter())
            return [1e3 * (after - before) for before, after in pairwise(times)]
        events = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]
        events[0].record()
        for event in events[1:]:
            call()
            event.record()
        torch.cuda.synchronize()
        return [before.elapsed_time(after) for before, after in pairwise(events)]

    def settled(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def measured(meter: Meter, about: Row, options: argparse.Namespace) -> Iterator[Row]:
    """``about`` has the model, the kernels and lm_head."""
    torch.compiler.reset()  # what was compiled for other weights only fills the tables
    for way in options.ways:
        for batch in options.batches:
            found = meter.decoding(way, batch)
            yield replace(about, way=way, work="decode", batch=batch, tokens_per_s=batch / found["ms"] * 1e3, **found)
        if about.lm_head != "quantised" and options.prefill:  # it computes one token's logits: nothing to see
            found = meter.prefilling(way)
            work = f"prefill {PREFILL}"
            yield replace(about, way=way, work=work, batch=1, tokens_per_s=PREFILL / found["ms"] * 1e3, **found)


@torch.no_grad()
def run(options: argparse.Namespace) -> list[Row]:
    torch.manual_seed(0)
    device = torch.device(options.device)
    attend = compiled_llama.attention
    if options.attention == "triton" and "compiled" in options.ways:
        from decode_attention import checked

        attend = checked(device, getattr(torch, options.dtype))
    model, began = built(options.model, getattr(torch, options.dtype), device), time.monotonic()
    rows: list[Row] = []
    dense: dict[tuple[str, str, int], float] = {}

    def note(kernels: str, lm_head: str) -> None:
        about = Row(options.model, kernels, lm_head, "", "", 0, 0.0, 0.0)
        for found in measured(Meter(model, attend), about, options):
            first = dense.setdefault((found.way, found.work, found.batch), found.tokens_per_s)
            rows.append(row := replace(found, over_dense=found.tokens_per_s / first))
            check = f", logits {row.logits_error:.1e}, compiled in {row.compile_s:.0f} s" if row.compile_s else ""
            print(
                f"{row.kernels:10} lm_head {row.lm_head:9} {row.way:12} {row.work:12} batch {row.batch:3}:"
                f" {row.tokens_per_s:9.0f} tokens/s, {row.ms:.2f} ms, {row.over_dense:.2f}x{check}",
                flush=True,
            )
            csv_rows.write(options.csv, Row, rows, digits=6)

    fuse(model)
    note(options.dtype, options.dtype)
    print(marlin_gen.quantize_model(model, options.format), flush=True)
    note(options.format, options.dtype)
    if options.lm_head:
        marlin_gen.quantize_model(model, options.format, skip=())
        note(options.format, "quantised")
    print(f"{time.monotonic() - began:.0f} s, of which compiling {sum(row.compile_s or 0 for row in rows):.0f} s")
    return rows


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=CONFIGS, default="llama-3.1-8b")
    parser.add_argument("--dtype", choices=LIMITS, default="float16")
    parser.add_argument("--format", default=DEFAULT_FORMAT)
    parser.add_argument("--batches", default="1,16,64", type=lambda text: [int(part) for part in text.split(",")])
    parser.add_argument("--ways", default=",".join(WAYS), type=lambda text: text.split(","), help="default: both")
    parser.add_argument("--attention", choices=("triton", "torch"), help="default: triton on a GPU, else torch")
    parser.add_argument("--lm-head", action="store_true", help="also with lm_head quantised: more rows")
    parser.add_argument("--prefill", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--csv", type=Path, required=True)
    options = parser.parse_args(arguments)
    if unknown := set(options.ways) - set(WAYS):
        parser.error(f"--ways has {', '.join(sorted(unknown))}; known: {', '.join(WAYS)}")
    options.attention = options.attention or ("triton" if options.device.startswith("cuda") else "torch")
    run(options)


if __name__ == "__main__":
    main()
