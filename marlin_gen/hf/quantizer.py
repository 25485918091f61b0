"""What transformers calls before and after it loads weights."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
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


def _find(model: nn.Module, name: str) -> tuple[str, nn.Module | None]:
    """What ``model`` calls the checkpoint's ``name``, and that module: without a head, names lack a prefix."""
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    for target in (name, name.removeprefix(prefix), f"{prefix}{name}"):
        try:
            return target, model.get_submodule(target)
        except AttributeError:
            continue
    return name, None


@register_quantizer(METHOD)
class MarlinGenQuantizer(HfQuantizer):  # type: ignore[misc]
    """Puts ``QuantLinear``s where a checkpoint has quantised layers; see ``MarlinGenConfig``."""

    quantization_config: MarlinGenConfig
    requires_calibration = False

    def __init__(self, quantization_config: MarlinGenConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.dtype = torch.float16
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
        if config.formats is not None:
            orders = [name for name in header_entries(checkpoint_files or ()) if name.endswith(".order")]
            reordered = {_find(model, name.removesuffix(".order"))[0] for name in orders}
            for name, fmt in config.formats.items():
                kind = fmt, "meta", self.dtype, _find(model, name)[0] in reordered
                self._replace(model, name, lambda linear, kind=kind: QuantLinear(
                    linear.in_features, linear.out_features, linear.bias is not None, *kind
                ))  # fmt: skip
            return
        if not checkpoint_files:
            raise ValueError("a foreign checkpoint is read from safetensors files; state_dict= alone will not do")
        assert config.source is not None
        entries = header_entries(checkpoint_files)
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
            self._replace(model, layer, lambda linear, layer=layer, tensors=tensors: Staged(
                layer, tensors, linear, self.dtype
            ))  # fmt: skip

    def _replace(self, model: nn.Module, name: str, make: Any) -> None:
        """Put ``make(linear)`` where ``model`` has the nn.Linear that a checkpoint calls ``name``."""
        target, linear = _find(model, name)
        first = name.partition(".")[0]
        is_head = not hasattr(model, first) and first != getattr(model, "base_model_prefix", "")
        if is_head and linear is None and getattr(model, "base_model", model) is model:
            return  # of the head, which this model has not
        if not isinstance(linear, nn.Linear):
            what = "no such module" if linear is None else f"a {type(linear).__name__} of that name"
            raise ValueError(
                f"{name} is a quantised linear layer of the checkpoint, but {type(model).__name__} has {what};"
                " marlin_gen loads models whose quantised layers are each an nn.Linear"
            )
        model.set_submodule(target, make(linear))

    def _process_model_after_weight_loading(self, model: nn.Module, **_: Any) -> nn.Module:
        config = self.quantization_config
        config.dtype = str(self.dtype).removeprefix("torch.")
        if not self.pre_quantized:
            found = quantize_model(model, config.weight_format, config.skip)
            logger.info(str(found))
            config.formats = {name: config.weight_format for name in found.replaced}
            return model
        if config.source is not None and config.formats is None:
            config.formats = {}
            for target, staged in [(n, m) for n, m in model.named_modules() if isinstance(m, Staged)]:
                module, reason = staged.finished(config.source)
                model.set_submodule(target, module.train(staged.training))
                if isinstance(module, QuantLinear):
                    config.formats[staged.name] = module.weight_format
                else:
                    config.unheld[staged.name] = reason
                del staged
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
        for module in model.modules():  # which may have been cast since they were loaded
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
