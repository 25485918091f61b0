"""Words of the command line to values. Every function raises a ValueError that quotes the word and shows a good one."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from marlin_gen.config import KernelConfig, KernelSpec, Plan
from marlin_gen.formats import DEFAULT_DTYPE, DEFAULT_FORMAT, DTYPES, FORMATS, dtype, weight_format
from marlin_gen.models import LayerShape, model_shapes, parse_shape
from marlin_gen.problem import Problem

# Powers of two, and from 32 to 1024 what tiles divide: a plan for 256 tokens computes as many where there are 160.
DEFAULT_TOKENS = "1,2,4,8,16,32,48,64,80,96,112,128,160,192,224,256,320,384,448,512,640,768,896,1024,2048,4096"
MAX_TOKENS = 1 << 17
FORMAT_HELP = f"Weight formats, of {', '.join(FORMATS)}."
DTYPE_HELP = f"Activation types, of {', '.join(DTYPES)}."
ONLY_FORMATS_HELP = "Only these weight formats."
ONLY_DTYPES_HELP = "Only these activation types."
MODEL_HELP = "Presets, or paths to a Hugging Face config.json, as llama-3.1-8b,qwen2.5-7b."

_SECONDS = {"": 1, "s": 1, "m": 60, "h": 3600}


class Kind(NamedTuple):
    """The number formats of a problem: what a kernel is compiled for besides its config."""

    weight_format: str = DEFAULT_FORMAT
    act_dtype: str = DEFAULT_DTYPE

    @classmethod
    def of(cls, one: Problem | KernelSpec) -> Kind:
        return cls(one.weight_format, one.act_dtype)

    def __str__(self) -> str:
        return " ".join(self)


@dataclass(frozen=True)
class Work:
    """What a command is asked to do: layer shapes x token counts, in every number format."""

    layers: tuple[LayerShape, ...]
    tokens: tuple[int, ...]
    formats: tuple[str, ...] = (DEFAULT_FORMAT,)
    dtypes: tuple[str, ...] = (DEFAULT_DTYPE,)

    @property
    def kinds(self) -> list[Kind]:
        """The number formats asked for. Kernels of one kind are no use to another."""
        return [Kind(fmt, act_dtype) for fmt in self.formats for act_dtype in self.dtypes]

    def of(self, kind: Kind) -> list[Problem]:
        """Shape by shape, tokens ascending."""
        return [Problem(layer.n, layer.k, m, *kind) for layer in self.layers for m in self.tokens]

    @property
    def problems(self) -> list[Problem]:
        """Kind by kind."""
        return [problem for kind in self.kinds for problem in self.of(kind)]

    def __str__(self) -> str:
        shapes = ", ".join(f"{layer.n}x{layer.k} {layer.name}".rstrip() for layer in self.layers)
        kinds = "" if self.kinds == [Kind()] else f"; {', '.join(map(str, self.kinds))}"
        return f"{shapes}; m = {', '.join(map(str, self.tokens))}{kinds}"


def work(
    model: str | None,
    shapes: str | None,
    tp: str,
    tokens: str,
    format_words: str = DEFAULT_FORMAT,
    dtype_words: str = DEFAULT_DTYPE,
) -> Work:
    """The layers of the listed ``model``s and ``shapes``, each n x k once, at every token count and in every format."""
    formats, dtypes = names("--format", format_words), names("--dtype", dtype_words)
    # The largest groups are the hardest to divide k by: what fits them fits all.
    strictest = max(formats, key=lambda name: weight_format(name).group_size)
    asked = [
        layer
        for name in (model or "").split(",")
        if name.strip()
        for layer in model_shapes(name.strip(), ranks(tp), strictest)
    ]
    if not model and ranks(tp) != (1,):
        raise ValueError(f"--tp {tp} is of --model's layers; give --shapes as each rank has them")
    asked += [LayerShape("", *parse_shape(word, strictest)) for word in (shapes or "").split(",") if word.strip()]
    if not asked:
        raise ValueError("nothing to do: give --model (a preset or a config.json), or --shapes 4096x4096,...")
    layers: dict[tuple[int, int], LayerShape] = {}
    for layer in asked:
        layers.setdefault((layer.n, layer.k), layer)
    return Work(tuple(layers.values()), token_counts(tokens), formats, dtypes)


def names(option: str, text: str) -> tuple[str, ...]:
    """``u4b8g128,u4zg64`` of ``--format``, or ``f16`` of ``--dtype``, to names of the registry's rows, each once."""
    words = [word.strip() for word in text.split(",") if word.strip()]
    try:
        found = dict.fromkeys((weight_format if option == "--format" else dtype)(word).name for word in words)
    except ValueError as error:
        raise ValueError(f"{option} {text!r}: {error}") from None
    if not found:
        rows = FORMATS if option == "--format" else DTYPES
        raise ValueError(f"{option} {text!r} names nothing; known: {', '.join(rows)}")
    return tuple(found)


def only_kinds(format_words: str | None, dtype_words: str | None) -> Callable[[Kind], bool]:
    """What ``--format`` and ``--dtype`` leave; without them everything."""
    wanted = (
        names("--format", format_words) if format_words else None,
        names("--dtype", dtype_words) if dtype_words else None,
    )
    return lambda kind: all(only is None or name in only for only, name in zip(wanted, kind, strict=True))


def ranks(text: str) -> tuple[int, ...]:
    """``1,2,4`` to tensor-parallel degrees."""
    words = [word.strip() for word in text.split(",")]
    if not all(word.isdecimal() and int(word) > 0 for word in words):
        raise ValueError(f"--tp {text!r} is not a list of positive numbers of ranks; example: --tp 1,2")
    return tuple(dict.fromkeys(int(word) for word in words))


def token_counts(text: str) -> tuple[int, ...]:
    """``1,2,4,...,4096`` to ascending token counts; ``...`` goes on by the ratio of the two numbers before it."""
    counts: list[int] = []
    words = [word.strip() for word in text.split(",")]
    for position, word in enumerate(words):
        if word == "...":
            counts += _continued(counts, words[position + 1 :], text)
        elif word.isdecimal() and 0 < int(word) <= MAX_TOKENS:
            counts.append(int(word))
        else:
            raise ValueError(f"--tokens {text!r}: {word!r} is not one of 1 to {MAX_TOKENS}; example: 1,2,4,...,4096")
    return tuple(sorted(set(counts)))


def _continued(counts: list[int], rest: list[str], text: str) -> list[int]:
    good = len(counts) >= 2 and counts[-1] > counts[-2] and counts[-1] % counts[-2] == 0
    if not good or not rest or not rest[0].isdecimal() or not counts[-1] < int(rest[0]) <= MAX_TOKENS:
        raise ValueError(
            f"--tokens {text!r}: '...' needs two numbers before it, the second a multiple of the first, a larger one"
            " after it; example: 1,2,4,...,4096"
        )
    ratio = counts[-1] // counts[-2]
    found: list[int] = []
    while (following := (found or counts)[-1] * ratio) < int(rest[0]):
        found.append(following)
    return found


def seconds(text: str) -> float:
    """``9m``, ``90s``, ``1h`` or ``540`` to seconds."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([smh]?)\s*", text)
    if not found or float(found[1]) <= 0:
        raise ValueError(f"--budget {text!r} is not a positive time; examples: 9m, 90s, 1h")
    return float(found[1]) * _SECONDS[found[2]]


def percent(option: str, text: str) -> float:
    """``3%`` or ``3`` to 0.03."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*%?\s*", text)
    if not found or float(found[1]) > 100:
        raise ValueError(f"{option} {text!r} is not a percentage of 0 to 100; examples: 3%, 0.5%")
    return float(found[1]) / 100


def check_writable(folder: Path, words: str) -> None:
    """Make the folder, which ``words`` named, where there is none. To be asked before long work, not after it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise ValueError(f"{words} cannot be written ({error.strerror}); name another folder") from None


def spec(text: str, arch: str) -> KernelSpec:
    """A spec key as it is; a config or plan key with the default format and activation type, for ``arch``."""
    if re.search(r"-(sm|compute)_\d+a?$", text):
        return KernelSpec.from_key(text)
    config = Plan.from_key(text).config if re.search(r"-r\d+$", text) else KernelConfig.from_key(text)
    return KernelSpec(config, DEFAULT_FORMAT, DEFAULT_DTYPE, arch)
