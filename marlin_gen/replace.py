"""``quantize_model``: the ``nn.Linear``s of a model replaced in place by quantised ones."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import cache
from typing import Any

from torch import nn

from marlin_gen.formats import DEFAULT_FORMAT
from marlin_gen.formats import weight_format as format_row
from marlin_gen.nn import QuantLinear

DEFAULT_SKIP = ("lm_head",)


@dataclass
class Replacements:
    """What ``quantize_model`` did. ``print`` shows it in a few lines."""

    weight_format: str
    replaced: list[str] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)  # layer -> why

    def __str__(self) -> str:
        by_reason: dict[str, list[str]] = {}
        for name, reason in self.skipped.items():
            by_reason.setdefault(reason, []).append(name)
        lines = [f"{len(self.replaced)} linear layers in {self.weight_format}, {len(self.skipped)} left as they are"]
        for reason, names in by_reason.items():
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            lines.append(f"  {', '.join(names[:3])}{more}: {reason}")
        return "\n".join(lines)


def quantize_model(
    model: nn.Module, weight_format: str = DEFAULT_FORMAT, skip: Iterable[str] = DEFAULT_SKIP
) -> Replacements:
    """Replace every ``nn.Linear`` below ``model`` by a ``QuantLinear``, in place and on its own device.

    ``skip``: names of layers, or of anything above them, to leave: whole ("model.layers.0.mlp"), the last part
    ("lm_head", "router"), or with wildcards ("*.layers.0.*"). Also left, with the reason in the result: subclasses
    of Linear, layers with hooks, those whose weight the source of the module around them reads past their forward, or
    that a model of transformers keeps in float32, layers of other than 16- and 32-bit floats, weights that two modules
    share (an lm_head tied to the embedding), and sizes that the layout cannot hold. A layer that occurs twice is
    replaced in both places by one.

    Layers are for activations in bfloat16 where they were of that type, else in float16: convert the rest of the model
    to that type, first or after. Raises ValueError for an unknown format, for a
    ``skip`` that is one string and not a collection, for weights that are not finite, and if ``model`` is a Linear.
    """
    format_row(weight_format)
    if isinstance(skip, str):
        raise ValueError(f"skip is the string {skip!r}; give a collection of patterns, as ({skip!r},)")
    if isinstance(model, nn.Linear):
        raise ValueError("the model is itself a Linear and cannot be replaced in place; use QuantLinear.from_float")
    patterns = tuple(skip)
    found = Replacements(weight_format)
    owners = _owners(model)
    # Of transformers' models: such a layer's activations are float32.
    kept = [
        (f"{above}.".lstrip("."), one)
        for above, module in model.named_modules()
        for key in ("", "_strict")
        for one in getattr(module, f"_keep_in_fp32_modules{key}", None) or ()
    ]
    made: dict[int, QuantLinear] = {}
    for name, linear in list(model.named_modules(remove_duplicate=False)):
        if not isinstance(linear, nn.Linear):
            continue
        parent, _, last = name.rpartition(".")
        reason = _skip_reason(name, linear, patterns, owners)
        around: Any = model.get_submodule(parent)
        if reason is None and _reads_weight(around, last):
            reason = f"its weight is read by its {type(around).__name__}, past its forward"
        below = ((f".{name.removeprefix(above)}.weight.", one) for above, one in kept if name.startswith(above))
        if reason is None and any(f".{one}." in path for path, one in below):
            reason = "is one that its model keeps in float32"
        if reason is None and id(linear) not in made:
            try:
                made[id(linear)] = QuantLinear.from_float(linear, weight_format)
            except ValueError as error:
                if not bool(linear.weight.isfinite().all()):
                    raise ValueError(f"{name}: {error}") from error
                reason = str(error)
        if reason is not None:
            found.skipped[name] = reason
            continue
        setattr(model.get_submodule(parent), last, made[id(linear)].train(linear.training))
        found.replaced.append(name)
    return found


def _skip_reason(name: str, linear: nn.Linear, patterns: tuple[str, ...], owners: dict[int, set[int]]) -> str | None:
    for pattern in patterns:
        above = [name[:end] for end in range(len(name) + 1) if end == len(name) or name[end] == "."]
        if any(fnmatchcase(one, pattern) or one.rpartition(".")[2] == pattern for one in above):
            return f"skip has {pattern!r}"
    if type(linear) is not nn.Linear:
        return f"is a {type(linear).__name__}, which may do more than a Linear"
    if linear._forward_hooks or linear._forward_pre_hooks:  # also those that make its weight (weight_norm, prune)
        return "has hooks, which may do more than a Linear"
    if not linear.weight.is_floating_point() or linear.weight.element_size() not in (2, 4):
        return f"its weight is {linear.weight.dtype}"
    if linear.weight.is_meta:
        return "its weight is on the meta device: load the weights first"
    if len(owners[id(linear.weight)]) > 1:
        return "its weight is shared with another module"
    return None


def _reads_weight(module: Any, name: str) -> bool:
    """Whether ``module`` reads the weight of its layer ``name`` itself, as far as its source is at hand."""
    if isinstance(module, nn.TransformerEncoderLayer):  # source or not
        return True
    kind: Any = type(module)
    source = _source(kind)
    slices = getattr(module, "pretraining_tp", getattr(getattr(module, "config", None), "pretraining_tp", None))
    if slices == 1 and "pretraining_tp" in source:  # Bloom's code for a model in slices is not reached
        return False
    return re.search(rf"\bself\.{name}\.weight\b(?!\.device)", source) is not None


@cache
def _source(kind: Any) -> str:
    """What defines a class, with those it inherits from; of one without source, nothing."""
    found = ""
    for one in kind.__mro__[: kind.__mro__.index(nn.Module)]:
        with suppress(OSError, TypeError):
            found += inspect.getsource(one)
    return found


def _owners(model: nn.Module) -> dict[int, set[int]]:
    """The modules that have each parameter."""
    owners: dict[int, set[int]] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            owners.setdefault(id(parameter), set()).add(id(module))
    return owners
