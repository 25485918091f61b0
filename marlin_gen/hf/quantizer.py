"""What transformers calls before and after it loads weights."""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming, rename_source_key
from transformers.quantizers import HfQuantizer
from transformers.quantizers.auto import register_quantizer
from transformers.utils import logging

from marlin_gen.checkpoints.names import quantised_layers
from marlin_gen.hf.config import METHOD, MarlinGenConfig
from marlin_gen.hf.projections import FusedProjection
from marlin_gen.hf.staged import Staged, header_entries
from marlin_gen.layout import SCALE_DTYPES
from marlin_gen.nn import QuantLinear
from marlin_gen.replace import quantize_model

logger = logging.get_logger(__name__)


def _formats(model: nn.Module) -> dict[str, str]:
    return {name: one.weight_format for name, one in model.named_modules() if isinstance(one, QuantLinear)}


@register_quantizer(METHOD)
class MarlinGenQuantizer(HfQuantizer):  # type: ignore[misc]
    """Puts ``QuantLinear``s where a checkpoint has quantised layers; see ``MarlinGenConfig``."""

    quantization_config: MarlinGenConfig
    requires_calibration = False

    def __init__(self, quantization_config: MarlinGenConfig, **kwargs: Any) -> None:
        super().__init__(copy.deepcopy(quantization_config), **kwargs)  # this model's alone: it is written to
        self.dtype = torch.float16
        self.renamings: list[Any] = []  # transformers' own, of the checkpoint's names to the model's
        if self.pre_quantized and quantization_config.formats is None and quantization_config.source is None:
            raise ValueError("the checkpoint's quantization_config names no layers: convert it again")

    def update_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """Activations are float16 or bfloat16; of a packed checkpoint, those that it was packed for."""
        wanted = dtype if dtype in SCALE_DTYPES else torch.float16
        if self.quantization_config.formats is not None and self.quantization_config.dtype is not None:
            wanted = getattr(torch, self.quantization_config.dtype)
        if dtype not in (wanted, torch.float32):  # float32 is what not asking for one means to older releases
            logger.warning(f"marlin_gen: dtype {dtype} becomes {wanted}, the type of the layers' activations")
        self.dtype = wanted
        return wanted

    def _process_model_before_weight_loading(
        self, model: nn.Module, checkpoint_files: Sequence[str] | None = None, **_: Any
    ) -> None:
        config = self.quantization_config
        if not self.pre_quantized:
            return
        self.renamings = [one for one in get_model_conversion_mapping(model) if isinstance(one, WeightRenaming)]
        entries = header_entries(checkpoint_files or ())
        names = [key.rpartition(".") for key in entries]
        stored = {(self._find(model, layer)[0], last) for layer, _, last in names}
        if config.formats is not None:
            for name, fmt in config.formats.items():
                target, linear = self._linear(model, name, stored)
                if linear is None:
                    continue
                lost = [last for last in ("weight", "scales", "layout_version") if (target, last) not in stored]
                if stored and lost:
                    raise ValueError(f"{name}: {lost[0]} is missing; copy the checkpoint anew, or convert it again")
                model.set_submodule(target, QuantLinear(
                    linear.in_features, linear.out_features, linear.bias is not None, fmt, "meta", self.dtype,
                    (target, "order") in stored,
                ))  # fmt: skip
            return
        if not checkpoint_files:
            raise ValueError("a foreign checkpoint is read from safetensors files; state_dict= alone will not do")
        assert config.source is not None
        method = config.source.get("quant_method")
        floats = {name for name, (kind, _) in entries.items() if kind.is_floating_point and kind.itemsize == 1}
        layers = quantised_layers(entries, method, floats)
        if not layers:
            keys = [key for key in ("checkpoint_format", "format") if key in config.source]
            said = "".join(f" ({key} {config.source[key]!r})" for key in keys)
            raise ValueError(
                f"the checkpoint has no tensor of a {method!r} layer{said}: give one in the method's own format"
            )
        for layer, lasts in layers.items():
            tensors = {last: entries[f"{layer}.{last}"] for last in lasts}
            target, linear = self._linear(model, layer, stored)
            if linear is not None:
                model.set_submodule(target, Staged(layer, tensors, linear, self.dtype))

    def _find(self, model: nn.Module, name: str) -> tuple[str, nn.Module | None]:
        """What ``model`` calls the checkpoint's ``name``, and that module: without a head, names lack a prefix."""
        prefix = f"{getattr(model, 'base_model_prefix', '')}."
        for renamings in ([], self.renamings):
            name = rename_source_key(f"{name}.weight", renamings, [])[0].removesuffix(".weight")
            for target in (name, name.removeprefix(prefix), f"{prefix}{name}"):
                try:
                    return target, model.get_submodule(target)
                except AttributeError:
                    continue
        return name, None

    def _linear(self, model: nn.Module, name: str, stored: set[tuple[str, str]]) -> tuple[str, nn.Linear | None]:
        """What ``model`` calls the checkpoint's ``name``, and that nn.Linear; None for what it has no use for."""
        target, linear = self._find(model, name)
        first = name.partition(".")[0]
        is_head = not hasattr(model, first) and first != getattr(model, "base_model_prefix", "")
        if is_head and linear is None and getattr(model, "base_model", model) is model:
            return target, None  # of the head, which this model has not
        ignored = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()
        if linear is None and any(re.search(one, f"{key}.weight") for one in ignored for key in (name, target)):
            return target, None  # as a head for multi-token prediction
        if not isinstance(linear, nn.Linear):
            what = "no such module" if linear is None else f"a {type(linear).__name__} of that name"
            raise ValueError(
                f"{name} is a quantised linear layer of the checkpoint, but {type(model).__name__} has {what};"
                " marlin_gen loads models whose quantised layers are each an nn.Linear"
            )
        if stored and linear.bias is not None and (target, "bias") not in stored:
            logger.warning_once("marlin_gen: biases that config.json asks for are not in the checkpoint: they are zero")
            linear.register_parameter("bias", None)
        getattr(model, "all_tied_weights_keys", {}).pop(f"{target}.weight", None)  # whatever tie_word_embeddings says
        return target, linear

    def _process_model_after_weight_loading(self, model: nn.Module, **_: Any) -> nn.Module:
        config = self.quantization_config
        config.dtype = str(self.dtype).removeprefix("torch.")
        if not self.pre_quantized:
            logger.info(str(quantize_model(model, config.weight_format, config.skip)))
            config.formats = _formats(model)
            return model
        if config.source is not None and config.formats is None:
            for target, staged in [(n, m) for n, m in model.named_modules() if isinstance(m, Staged)]:
                module, reason = staged.finished(config.source)
                model.set_submodule(target, module.train(staged.training))
                if not isinstance(module, QuantLinear):
                    config.unheld[staged.name] = reason
                del staged
            config.formats = _formats(model)
            if config.unheld:
                listed = "; ".join(f"{name} ({reason})" for name, reason in config.unheld.items())
                warnings.warn(
                    f"marlin_gen: {len(config.unheld)} of {len(config.unheld) + len(config.formats)} quantised layers"
                    f" run as nn.Linear in {config.dtype}, for no kernel format holds them: {listed}",
                    stacklevel=2,
                )
        return model

    def get_state_dict_and_metadata(self, model: nn.Module, *_: Any, **__: Any) -> tuple[None, dict[str, str]]:
        """What ``save_pretrained`` asks for before it writes; only here is the model at hand."""
        if any(isinstance(module, FusedProjection) for module in model.modules()):
            raise ValueError("a fused model has other names than its config: call save_pretrained before hf.fuse")
        self.quantization_config.formats = _formats(model)  # its layers may have been quantised, or cast, since
        for module in model.modules():
            if isinstance(module, QuantLinear) and module.scales.dtype in SCALE_DTYPES:
                self.quantization_config.dtype = str(module.scales.dtype).removeprefix("torch.")
        return None, {}

    def is_serializable(self, *_: Any, **__: Any) -> bool:
        """``save_pretrained`` writes what ``from_pretrained`` reads: a folder in the packed layout."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Of adapters beside it: gradients reach the activations."""
        return True

    @property
    def is_compileable(self) -> bool:
        return True
