"""A GGUF file as a model of transformers, exactly, without a folder in between."""

from __future__ import annotations

import os
import warnings
from typing import Any, Literal

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from marlin_gen.checkpoints.fallback import Unheld, dense, packed_or_dense
from marlin_gen.checkpoints.gguf_llama import open_model
from marlin_gen.checkpoints.quantized import QuantizedWeight
from marlin_gen.nn import QuantLinear


def from_gguf(
    path: str | os.PathLike[str],
    device: torch.device | str = "cpu",
    weights: Literal["quantised", "f16", "exact"] = "quantised",
) -> Any:
    """The LlamaForCausalLM in ``path``, for inference, on ``device``.

    ``weights``: "quantised" has ``QuantLinear``s, activations in f16; "f16" the same weights dequantised, rounded to
    f16 once, in ``nn.Linear``s; "exact" those of "f16" in f32, activations too: what both are compared with.

    One warning lists linear layers that no kernel format holds, which are in f16. Raises ValueError for a file that is
    damaged, or of another architecture than llama.
    """
    if weights not in ("quantised", "f16", "exact"):
        raise ValueError(f"weights is {weights!r}; known: 'quantised', 'f16', 'exact'")
    settings, tensors = open_model(path)
    dtype = torch.float32 if weights == "exact" else torch.float16
    kind = settings.pop("model_type")
    config = AutoConfig.for_model(kind, **{**settings, "dtype": dtype})
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    unheld: dict[str, str] = {}
    for one in tensors:
        value = one.read()
        _check_shape(model, one.name, [value.n, value.k] if isinstance(value, QuantizedWeight) else list(value.shape))
        if isinstance(value, QuantizedWeight):
            layer = one.name.removesuffix(".weight")
            if weights == "quantised":
                held = packed_or_dense(value, layer)
                if not isinstance(held, Unheld):
                    model.set_submodule(layer, QuantLinear.from_packed(held.to(device)))
                    continue
                unheld[layer] = held.reason
                value = held.weight
            else:
                value = dense(value, layer)
        _set_parameter(model, one.name, value.to(device, dtype))
    model.tie_weights()
    _fill_buffers(model, config, device)
    if unheld:
        listed = "; ".join(f"{name} ({reason})" for name, reason in unheld.items())
        warnings.warn(
            f"marlin_gen: {len(unheld)} layers run as nn.Linear in f16, for no kernel format holds them: {listed}",
            stacklevel=2,
        )
    return model.eval()


def _set_parameter(model: nn.Module, name: str, tensor: torch.Tensor) -> None:
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, nn.Parameter(tensor, requires_grad=False))


def _check_shape(model: nn.Module, name: str, shape: list[int]) -> None:
    try:
        wanted = str(list(model.get_parameter(name).shape))
    except AttributeError:
        wanted = "no such tensor"
    if wanted != str(shape):
        raise ValueError(f"{name} is {shape} in the file; the model that its metadata describe has {wanted}")


def _fill_buffers(model: nn.Module, config: Any, device: torch.device | str) -> None:
    """Buffers that no file has (rotary frequencies) as the modules make them themselves."""
    for name, module in model.named_modules():
        if any(buffer.is_meta for buffer in module.buffers(recurse=False)):
            model.set_submodule(name, type(module)(config=config).to(device))
