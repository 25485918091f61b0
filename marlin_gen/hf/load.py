"""Checkpoints of other libraries through transformers, on these kernels."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

from transformers import AutoConfig, AutoModelForCausalLM
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from transformers.utils import cached_file

from marlin_gen.checkpoints.names import MARKS
from marlin_gen.hf.config import METHOD, MarlinGenConfig
from marlin_gen.hf.quantizer import MarlinGenQuantizer

_NOT_OF_THE_CONFIG = ("dtype", "torch_dtype", "quantization_config")


def from_pretrained(name: str | os.PathLike[str], auto_class: Any = AutoModelForCausalLM, **kwargs: Any) -> Any:
    """``auto_class.from_pretrained(name, **kwargs)`` with ``QuantLinear``s in place of the checkpoint's own layers.

    ``name``: a folder or a model of the hub, quantised by GPTQ, AWQ, compressed-tensors, HQQ or to fp8, or converted.
    One warning lists the layers that no kernel format holds, and why; they run as nn.Linear. Activations and scales are
    in ``dtype``, else in that of config.json, float16 or bfloat16. Transformers does not let a caller change the method
    that a checkpoint names, so this hands it a config that names ours.

    Raises ValueError for a checkpoint that is not quantised (give ``quantization_config=MarlinGenConfig(...)`` to
    quantise it here), of an unknown method, or damaged: the message has the layer's name.
    """
    of_the_hub = ("revision", "cache_dir", "token", "local_files_only", "subfolder")
    hub = {key: kwargs[key] for key in of_the_hub if key in kwargs}
    config = kwargs.pop("config", None)
    if config is None:
        config = AutoConfig.from_pretrained(name, trust_remote_code=kwargs.get("trust_remote_code", False), **hub)
        for key in [key for key in kwargs if key not in _NOT_OF_THE_CONFIG and hasattr(config, key)]:
            setattr(config, key, kwargs.pop(key))  # such as num_labels; a model's __init__ does not take them
    theirs = getattr(config, "quantization_config", None)
    if theirs is None:
        theirs = getattr(config.get_text_config(decoder=True), "quantization_config", None)
    if theirs is None:
        found = cached_file(name, "quantize_config.json", _raise_exceptions_for_missing_entries=False, **hub)
        if found is not None:  # AutoGPTQ before transformers had a place for it
            with open(found, encoding="utf-8") as file:
                theirs = {"quant_method": "gptq", **json.load(file)}
    if theirs is None:
        if not isinstance(kwargs.get("quantization_config"), MarlinGenConfig):
            raise ValueError(
                f"{name} is not quantised; give quantization_config=MarlinGenConfig(weight_format=...) to quantise it"
            )
        return auto_class.from_pretrained(name, config=config, **kwargs)
    kwargs.pop("quantization_config", None)  # of a quantised checkpoint, its own says everything
    theirs = theirs if isinstance(theirs, dict) else theirs.to_dict()
    method = getattr(theirs.get("quant_method"), "value", theirs.get("quant_method"))
    if method != METHOD:
        if method not in MARKS:
            raise ValueError(f"{name} has quant_method {method!r}; known: {', '.join(sorted(MARKS))}")
        theirs = {"quant_method": METHOD, "source": {**theirs, "quant_method": method}}
    config.quantization_config = theirs
    return auto_class.from_pretrained(name, config=config, **kwargs)


def take_over(methods: Iterable[str] = tuple(sorted(MARKS))) -> None:
    """From now on ``AutoModelForCausalLM.from_pretrained`` itself loads checkpoints of these methods on our kernels.

    It replaces transformers' own quantizers of these names in this process, for programs whose call of from_pretrained
    is out of reach; float models they quantise as ever. Raises ValueError for a method that is not read.
    """
    for method in methods:
        if method not in MARKS:
            raise ValueError(f"quant_method {method!r} is not read; known: {', '.join(sorted(MARKS))}")
        AUTO_QUANTIZATION_CONFIG_MAPPING[method] = MarlinGenConfig
        AUTO_QUANTIZER_MAPPING[method] = partial(_quantizer, AUTO_QUANTIZER_MAPPING[method])


def _quantizer(theirs: Callable[..., Any], config: Any, **kwargs: Any) -> Any:
    return (MarlinGenQuantizer if isinstance(config, MarlinGenConfig) else theirs)(config, **kwargs)
