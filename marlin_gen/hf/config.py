"""The quantisation config that transformers keeps in a model's config.json."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from transformers.quantizers.auto import register_quantization_config
from transformers.utils.quantization_config import QuantizationConfigMixin

from marlin_gen.formats import DEFAULT_FORMAT, LAYOUT_VERSION
from marlin_gen.formats import weight_format as format_row
from marlin_gen.replace import DEFAULT_SKIP

METHOD = "marlin_gen"


@register_quantization_config(METHOD)
class MarlinGenConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """How a checkpoint becomes ``QuantLinear``s. Which of three cases it is, its fields say:

    ``formats`` (of ``marlin-gen convert`` and ``save_pretrained``): {layer: weight format} of one in the packed layout.
    ``source``: the quantization_config of a GPTQ, AWQ, compressed-tensors, HQQ or fp8 checkpoint, which is repacked
    while it is loaded. Neither: a float checkpoint, which is quantised to ``weight_format`` but for ``skip``.

    Raises ValueError for an unknown format or a layout of another version.
    """

    def __init__(
        self,
        weight_format: str = DEFAULT_FORMAT,
        skip: Iterable[str] = DEFAULT_SKIP,
        formats: Mapping[str, str] | None = None,
        unheld: Mapping[str, str] | None = None,
        source: Mapping[str, Any] | None = None,
        layout_version: int = LAYOUT_VERSION,
        dtype: str | None = None,
        quant_method: str = METHOD,
        **rest: Any,
    ) -> None:
        if quant_method != METHOD:  # after take_over: the config of another method, as its checkpoint has it
            source = {"quant_method": quant_method, **rest}
        elif rest:
            raise ValueError(f"MarlinGenConfig has no {', '.join(sorted(rest))}; it has weight_format and skip")
        for name in {weight_format, *(formats or {}).values()}:
            format_row(name)
        if formats is not None and layout_version != LAYOUT_VERSION:
            raise ValueError(f"layout_version={layout_version} is not {LAYOUT_VERSION}: convert the checkpoint again")
        self.quant_method = METHOD
        self.weight_format, self.skip = weight_format, list(skip)
        self.formats = None if formats is None else dict(formats)
        self.unheld = dict(unheld or {})  # layer -> why it is an nn.Linear
        self.source = None if source is None else dict(source)
        self.layout_version = layout_version
        self.dtype = dtype  # of the packed layers' activations, with ``formats``
