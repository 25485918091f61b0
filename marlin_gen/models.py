"""Which linear layers a model has: Hugging Face ``config.json`` (or a bundled preset) to n x k shapes.

Dense decoders only (Llama, Mistral, Qwen2, Qwen3, Gemma, Phi-3 and their like). Each layer of such a
decoder has four products, with the projections that read the same activations fused: ``qkv_proj``, ``o_proj``,
``gate_up_proj`` (``up_proj`` where there is no gate), ``down_proj``. Under tensor parallelism the first of each pair
splits its features (n), the second its inputs (k).
"""

from __future__ import annotations

import difflib
import json
import re
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from marlin_gen.formats import DEFAULT_FORMAT, weight_format
from marlin_gen.problem import SIZE_UNIT, check_shape

# Fields that say a config is not a dense decoder with plain attention, and what it is instead.
_NOT_DENSE = {
    "num_local_experts": "a mixture of experts",
    "num_experts": "a mixture of experts",
    "n_routed_experts": "a mixture of experts",
    "moe_num_experts": "a mixture of experts",
    "kv_lora_rank": "multi-head latent attention",
    "global_head_dim": "heads of two sizes",
    "per_layer_config": "layers of several sizes",
    "hybrid_override_pattern": "layers of several kinds",
    "block_types": "layers of several kinds",
    "block_auto_adjust_ff_dim": "an MLP of another size than intermediate_size",
    "is_encoder_decoder": "layers with cross-attention",
    "cross_layer_interval": "layers with cross-attention",
    "cross_attention_layers": "layers with cross-attention",
    "type_vocab_size": "an encoder, or a decoder built like one",
}
_ATTENTION = {"attention", "full_attention", "sliding_attention", "chunked_attention"}  # of layer_types
# Their up projection has no gate beside it; nothing else in a config.json says so.
_UNGATED = {
    "apertus", "apertus1p5_text", "arcee", "biogpt", "cosmos3_edge_text", "gpt_neox", "jais2", "nanochat", "nemotron",
    "persimmon", "phi", "starcoder2",
}  # fmt: skip


class LayerShape(NamedTuple):
    """The weight of one linear layer on one rank: n output features, k input features."""

    name: str  # "qkv_proj"; names of layers with equal shapes are joined by "+"
    n: int
    k: int


@cache
def presets() -> dict[str, dict[str, Any]]:
    """Bundled model configs by name, with the fields their published config.json has."""
    found: dict[str, dict[str, Any]] = json.loads((Path(__file__).parent / "presets.json").read_text())
    return found


def model_shapes(model: str, tps: tuple[int, ...] = (1,), fmt: str = DEFAULT_FORMAT) -> list[LayerShape]:
    """The distinct shapes of ``model`` (preset name, or path to a config.json) over all tensor-parallel degrees.

    A ValueError when weights of format ``fmt`` cannot have one of them.
    """
    config, source = load_config(model)
    if isinstance(shapes := config.get("shapes"), list):
        if tps != (1,):
            raise ValueError(f"{source} lists shapes, which --tp cannot divide; give --shapes as each rank has them")
        return [LayerShape(model, *parse_shape(str(s), fmt)) for s in shapes]
    return _distinct([layer for tp in tps for layer in layer_shapes(config, tp, source, fmt)])


def load_config(model: str) -> tuple[dict[str, Any], str]:
    """The config called ``model`` and where it came from; a ValueError or FileNotFoundError that says what to do."""
    if model in presets():
        return presets()[model], f"preset {model}"
    path = Path(model)
    if path.is_dir():
        path = path / "config.json"
    if path.is_file():
        try:
            config = json.loads(path.read_text())
        except ValueError as error:
            raise ValueError(f"{path} is not JSON: {error}") from None
        if not isinstance(config, dict):
            raise ValueError(f"{path} holds a {type(config).__name__}, not a model config (an object)")
        return config, str(path)
    known = ", ".join(presets())
    if path.suffix == ".json" or "/" in model:
        raise FileNotFoundError(f"no such file: {model}; give a Hugging Face config.json or a preset: {known}")
    near = difflib.get_close_matches(model.lower(), presets(), n=1, cutoff=0.5)
    hint = f"; did you mean {near[0]}?" if near else "."
    raise ValueError(f"unknown model preset {model!r}{hint} Presets: {known}; or give a path to a config.json")


def layer_shapes(
    config: dict[str, Any], tp: int = 1, source: str = "config", fmt: str = DEFAULT_FORMAT
) -> list[LayerShape]:
    """The linear layers of one decoder layer on one of ``tp`` ranks, equal shapes merged.

    Raises a ValueError that names the field and ``source`` when the config lacks one, and the layer and
    tp when a shape does not divide or the packed layout cannot hold it.
    """
    if tp < 1:
        raise ValueError(f"tp={tp} is not a positive number of ranks")
    found = []
    made_as, is_nested = str(config.get("architectures") or "CausalLM"), bool(config.get("text_config"))
    config = config.get("text_config") or config  # multimodal models nest the decoder
    if not isinstance(config, dict):
        raise ValueError(f"{source}: text_config={config!r:.60} is not a model config (an object)")
    is_text = is_nested or "vocab_size" in config or re.search("CausalLM|Conditional", made_as)
    if "MaskedLM" in made_as or not is_text:
        found.append(("architectures", made_as, "no decoder of text"))
    kind = str(config.get("model_type"))
    found += [(name, config[name], what) for name, what in _NOT_DENSE.items() if config.get(name)]
    if kind == "muse_glimmer_text":  # no field says so
        found.append(("model_type", kind, "attention with a gate"))
    types = config.get("layer_types") or config.get("layers_block_type") or []
    if not types:
        found += [(name, value, "state-space layers") for name, value in config.items() if value and "mamba_" in name]
    others = sorted({str(one) for one in types} - _ATTENTION) if isinstance(types, list) else [types]
    found += [("layer_types", one, "layers without plain attention") for one in others]
    for name, value, what in found:
        raise ValueError(f"{source}: {name}={value!s:.60} means {what}; only dense decoder layers are derived,"
                         " list the others with --shapes NxK,...")  # fmt: skip
    hidden = _field(config, "hidden_size", source)
    intermediate = _field(config, "intermediate_size", source)
    heads = _field(config, "num_attention_heads", source)
    kv_heads = _field(config, "num_key_value_heads", source, heads)  # absent before grouped-query attention
    # Gemma's configs leave out what is the class's default.
    head_dim = _field(config, "head_dim", source, 256 if kind.startswith("gemma") else hidden // heads)

    rank_heads = _split(heads, tp, "num_attention_heads", source)
    # With more ranks than kv heads each rank holds a copy of one.
    rank_kv_heads = 1 if tp > kv_heads and tp % kv_heads == 0 else _split(kv_heads, tp, "num_key_value_heads", source)
    rank_intermediate = _split(intermediate, tp, "intermediate_size", source)
    layers = [
        LayerShape("qkv_proj", (rank_heads + 2 * rank_kv_heads) * head_dim, hidden),
        LayerShape("o_proj", hidden, rank_heads * head_dim),
        LayerShape("up_proj", rank_intermediate, hidden)
        if kind in _UNGATED
        else LayerShape("gate_up_proj", 2 * rank_intermediate, hidden),
        LayerShape("down_proj", hidden, rank_intermediate),
    ]
    for layer in layers:
        try:
            check_shape(layer.n, layer.k, weight_format(fmt))
        except ValueError as error:
            raise ValueError(f"{source}: {layer.name} at tp={tp} is {layer.n}x{layer.k}: {error}") from None
    return _distinct(layers)


def parse_shape(text: str, fmt: str = DEFAULT_FORMAT) -> tuple[int, int]:
    """``4096x14336`` (n x k: output features, input features) to numbers the layout can hold in format ``fmt``."""
    found = re.fullmatch(r"\s*(\d+)\s*[xX]\s*(\d+)\s*", text)
    if not found:
        raise ValueError(f"not a shape: {text!r}; write n x k in multiples of {SIZE_UNIT}, for example 4096x14336")
    n, k = int(found[1]), int(found[2])
    check_shape(n, k, weight_format(fmt))
    return n, k


def _distinct(layers: list[LayerShape]) -> list[LayerShape]:
    """One entry per n x k in order of first appearance; the names of equals are joined."""
    names: dict[tuple[int, int], list[str]] = {}
    for layer in layers:
        known = names.setdefault((layer.n, layer.k), [])
        known += [name for name in layer.name.split("+") if name not in known]
    return [LayerShape("+".join(known), n, k) for (n, k), known in names.items()]


def _field(config: dict[str, Any], name: str, source: str, default: int | None = None) -> int:
    value = default if config.get(name) is None else config[name]
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        said = "has no" if name not in config else f"has {name}={value!r:.60}, not a positive whole number, as"
        raise ValueError(
            f"{source} {said} {name}; a dense decoder's config.json has it. If this one leaves out what is its class's"
            " default, AutoConfig.from_pretrained(...).to_json_file(..., use_diff=False) writes it; or give --shapes"
        )
    return value


def _split(value: int, tp: int, name: str, source: str) -> int:
    if value % tp:
        raise ValueError(f"{source}: {name}={value} does not divide over tp={tp} ranks; use a divisor of {value}")
    return value // tp
