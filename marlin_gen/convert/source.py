"""What is converted: a folder of safetensors or a GGUF file, as units that are read one at a time."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from marlin_gen.checkpoints import read_layer
from marlin_gen.checkpoints.names import quantised_layers
from marlin_gen.checkpoints.quantized import QuantizedWeight
from marlin_gen.convert.shard import read_header

WEIGHTS = (".safetensors", ".safetensors.index.json", ".bin", ".bin.index.json", ".pt", ".pth", ".gguf", ".part")
SCALES = ("scale", "scales", "weight_scale", "weight_scale_inv")  # a layer's, in any method
CONFIGS = ("config.json", "quantize_config.json")


@dataclass(frozen=True)
class Unit:
    """One thing to write: a quantised layer, by its name, or one plain tensor."""

    name: str
    source_bytes: int
    is_layer: bool
    read: Callable[[], QuantizedWeight | torch.Tensor]


@dataclass(frozen=True)
class Source:
    """A checkpoint, its tensors not read yet."""

    path: Path
    units: tuple[Unit, ...]
    config: dict[str, Any]  # config.json without quantization_config
    quantization: dict[str, Any]  # the quantization_config, or what stands for it
    dtype: torch.dtype  # of activations, with which every weight can be exact: that of the scales
    files: tuple[Path, ...]  # that hold the weights
    copied: tuple[Path, ...]  # tokenizer and the like


def open_source(path: Path) -> Source:
    """The checkpoint at ``path``. Raises ValueError for what is none, OSError for what cannot be read."""
    if path.suffix == ".gguf":
        from marlin_gen.convert.gguf import open_gguf

        return open_gguf(path)
    if not path.is_dir():
        raise ValueError(f"{path} is neither a folder with config.json and safetensors files nor a .gguf file")
    return _open_folder(path)


def _open_folder(folder: Path) -> Source:
    config, quantization = _configs(folder)
    where: dict[str, Path] = {}
    sizes: dict[str, int] = {}
    types: dict[str, str] = {}
    for file in weight_files(folder):
        for name, entry in read_header(file)[0].items():
            if name in where:
                raise ValueError(f"{name} is in {where[name]} and in {file.name}: remove the file that is not wanted")
            where[name] = file
            sizes[name] = entry["data_offsets"][1] - entry["data_offsets"][0]
            types[name] = entry["dtype"]
    floats = {name for name, kind in types.items() if kind.startswith("F8_")}
    layers = quantised_layers(where, quantization.get("quant_method"), floats)
    if not layers:
        method = quantization.get("quant_method")
        raise ValueError(f"{folder} has no tensor of a {method!r} layer: is its quantization_config the right one?")
    scales = {types[f"{layer}.{last}"] for layer, lasts in layers.items() for last in lasts if last in SCALES}
    dtype = torch.bfloat16 if scales == {"BF16"} else torch.float16
    units: dict[str, Unit] = {}
    for name in where:
        layer, _, last = name.rpartition(".")
        if last not in layers.get(layer, ()):
            units[name] = Unit(name, sizes[name], False, lambda name=name: _tensor(where[name], name))  # type: ignore[misc]
        elif layer not in units:
            names = {last: f"{layer}.{last}" for last in layers[layer]}
            units[layer] = Unit(
                layer, sum(sizes[full] for full in names.values()), True,
                lambda layer=layer, names=names: read_layer(  # type: ignore[misc]
                    {last: _tensor(where[full], full) for last, full in names.items()}, quantization, layer
                ),
            )  # fmt: skip
    copied = [p for p in sorted(folder.iterdir()) if p.is_file() and not p.name.startswith(".")]
    copied = [p for p in copied if not p.name.endswith(WEIGHTS) and p.name not in CONFIGS]
    files = tuple(dict.fromkeys(where.values()))
    return Source(folder, tuple(units.values()), config, quantization, dtype, files, tuple(copied))


def _configs(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """(config.json without its quantization_config, that one)."""
    path = folder / "config.json"
    if not path.exists():
        raise ValueError(f"{folder} has no config.json: copy the whole checkpoint")
    config = _json_object(path)
    quantization = config.pop("quantization_config", None)
    if quantization is None and isinstance(text := config.get("text_config"), dict):  # of a multimodal model's
        quantization = text.pop("quantization_config", None)
    beside = folder / "quantize_config.json"
    if quantization is None and beside.exists():  # AutoGPTQ before transformers had a place for it
        quantization = {"quant_method": "gptq", **_json_object(beside)}
    if quantization is None:
        raise ValueError(
            f"{path} has no quantization_config: the checkpoint is not quantised. Load it with transformers and"
            " quantization_config=MarlinGenConfig(), or call marlin_gen.quantize_model"
        )
    if _checked(quantization, f"quantization_config in {path}").get("quant_method") == "marlin_gen":
        raise ValueError(f"{folder} is in the packed layout already")
    return config, quantization


def _json_object(path: Path) -> dict[str, Any]:
    try:
        return _checked(json.loads(path.read_text()), str(path))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not JSON ({error}); copy it anew") from error


def _checked(found: Any, what: str) -> dict[str, Any]:
    if not isinstance(found, dict):
        raise ValueError(f"{what} must be a JSON object, not {json.dumps(found):.40}; copy the file anew")
    return found


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint, as transformers chooses them: model.safetensors alone, else those that the
    index names; without either, all. A missing one is a ValueError.
    """
    if (whole := folder / "model.safetensors").exists():
        return [whole]
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        files = sorted(folder.glob("*.safetensors"))
        if not files:
            raise ValueError(f"{folder} has no safetensors files; save the model again with safe_serialization=True")
        return files
    where: dict[str, str] = _checked(_json_object(index).get("weight_map"), f"weight_map in {index}")
    files = [folder / name for name in dict.fromkeys(where.values())]
    for file in files:
        if not file.exists():
            lost = next(name for name, file_name in where.items() if file_name == file.name)
            raise ValueError(f"{file} is missing, and with it {lost}: copy it, then run again")
    found = {name for file in files for name in read_header(file)[0]}
    if lost_names := [name for name in where if name not in found]:
        raise ValueError(f"{lost_names[0]} is not in {where[lost_names[0]]}, where {index.name} has it: copy both anew")
    return files


def _tensor(file: Path, name: str) -> torch.Tensor:
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError as error:
        raise ImportError("reading checkpoints needs safetensors: pip install 'marlin_gen[hf]'") from error
    try:
        with safe_open(file, "pt") as opened:
            tensor: torch.Tensor = opened.get_tensor(name)
            return tensor
    except SafetensorError as error:
        raise ValueError(f"{name} cannot be read from {file} ({error}); copy the file anew") from error
