"""Layers packed by other libraries, for tests: ``python tools/make_checkpoint_fixtures.py auto-gptq gptqmodel ...``.

Each name is a library that must be installed where this runs (torch and safetensors beside it): auto-gptq, gptqmodel,
autoawq, compressed-tensors. A random layer is quantised here, packed by the library's own packer, and written to
tests/fixtures with the weight that the library itself decodes; metadata: the library, its version, and the
quantization_config, as JSON. compressed-tensors 0.12.2 reads weight_g_idx and 0.20.0 does not: run it with each.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import json
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file

FOLDER = Path(__file__).parents[1] / "tests" / "fixtures"
N, K = 128, 256
LARGEST_FILE = 120_000


class Fixture(NamedTuple):
    variant: str
    config: dict[str, Any]  # the checkpoint's quantization_config
    tensors: dict[str, torch.Tensor]  # as the library packed them
    dequantized: torch.Tensor  # [n, k], as the library computes it


class Quantized(NamedTuple):
    weight: torch.Tensor  # f32 [n, k], on the grid of scales and zeros
    scales: torch.Tensor  # f32 with f16 values [n, groups]
    zeros: torch.Tensor  # f32 with whole values [n, groups]
    g_idx: torch.Tensor  # int32 [k]


def quantized(bits: int, group_size: int, symmetric: bool, shuffled: bool = False, least_zero: int = 0) -> Quantized:
    """A random weight rounded to a grid; asymmetric: rows differ in mean, some have the zero points 0 and maximum."""
    generator = torch.Generator().manual_seed(bits * 1000 + group_size + 7 * symmetric + 3 * shuffled)
    g_idx = torch.arange(K) // group_size
    if shuffled:
        g_idx = g_idx[torch.randperm(K, generator=generator)]
    order = g_idx.argsort(stable=True)
    weight = torch.randn(N, K, generator=generator) * 0.02
    largest = 2**bits - 1
    if not symmetric:
        weight += torch.linspace(-0.12, 0.12, N)[:, None]
    groups = weight[:, order].view(N, -1, group_size)
    low, high = groups.amin(-1).clamp_max(0), groups.amax(-1).clamp_min(0)
    if symmetric:
        scales = (2 * torch.maximum(-low, high) / largest).half().float()
        zeros = torch.full_like(scales, 2 ** (bits - 1))
    else:
        scales = ((high - low) / largest).half().float()
        zeros = (-low / scales).round().clamp(least_zero, largest)
    scales_of, zeros_of = scales[:, g_idx], zeros[:, g_idx]
    codes = (weight / scales_of + zeros_of).round().clamp(0, largest)
    return Quantized((codes - zeros_of) * scales_of, scales, zeros, g_idx.int())


def linear(weight: torch.Tensor, dtype: torch.dtype = torch.float16) -> torch.nn.Linear:
    layer = torch.nn.Linear(K, N, bias=False)
    layer.weight.data = weight.to(dtype)
    return layer


def bare(*packages: str) -> None:
    """Let modules of installed packages be imported without their ``__init__``, which would want kernels and models."""
    for name in packages:
        spec = importlib.util.find_spec(name)
        if spec is None or spec.submodule_search_locations is None:
            raise SystemExit(f"{name} is not installed: pip install --no-deps it beside torch")
        package = types.ModuleType(name)
        package.__path__ = list(spec.submodule_search_locations)
        sys.modules[name] = package


def gptq_config(bits: int, group_size: int, symmetric: bool, shuffled: bool, **more: Any) -> dict[str, Any]:
    config = {"quant_method": "gptq", "bits": bits, "group_size": group_size, "sym": symmetric, "desc_act": shuffled}
    return config | more


def own_tensors(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: getattr(module, name).clone() for name in ("qweight", "qzeros", "scales", "g_idx")}


def auto_gptq() -> Iterator[Fixture]:
    """Decoded by the layer itself, in f16: it is applied to the unit matrix."""
    bare("auto_gptq", "auto_gptq.nn_modules", "auto_gptq.nn_modules.qlinear")
    packer = importlib.import_module("auto_gptq.nn_modules.qlinear.qlinear_cuda").QuantLinear
    for variant, bits, group_size, symmetric, shuffled in (
        ("v1-4bit-g64-sym", 4, 64, True, False),
        ("v1-4bit-g32-asym-desc_act", 4, 32, False, True),
        ("v1-8bit-gk-asym", 8, -1, False, False),
    ):
        q = quantized(bits, group_size % (K + 1), symmetric, shuffled, least_zero=1)
        layer = packer(bits, group_size, K, N, bias=False)
        layer.pack(linear(q.weight), q.scales.clone(), q.zeros.clone(), q.g_idx)
        decoded = layer(torch.eye(K, dtype=torch.float16)).T
        yield Fixture(variant, gptq_config(bits, group_size, symmetric, shuffled), own_tensors(layer), decoded)


def gptqmodel() -> Iterator[Fixture]:
    """Decoded by ``dequantize_weight``, in f16; a v1 layer after the library's own conversion to v2."""
    from gptqmodel.nn_modules.qlinear.torch import TorchLinear
    from gptqmodel.quantization import QuantizeConfig
    from gptqmodel.utils.model import convert_gptq_v1_to_v2_format_module, convert_gptq_v2_to_v1_format_module

    meta = {"meta": {"quantizer": ["gptqmodel:" + importlib.metadata.version("gptqmodel")]}}
    for variant, bits, group_size, shuffled, version in (
        ("v2-4bit-g32-asym-desc_act", 4, 32, True, "gptq_v2"),
        ("v1-4bit-g64-asym", 4, 64, False, "gptq"),
    ):
        q = quantized(bits, group_size, False, shuffled)
        layer = TorchLinear(bits, group_size, False, shuffled, K, N, bias=False, pack_dtype=torch.int32)
        layer.pack_original(linear(q.weight, torch.float32), q.scales, q.zeros, q.g_idx)
        if version == "gptq":
            convert_gptq_v2_to_v1_format_module(layer, QuantizeConfig(bits=bits, group_size=group_size, sym=False))
        tensors = own_tensors(layer)
        if version == "gptq":
            convert_gptq_v1_to_v2_format_module(layer, bits, torch.int32)
        decoded = layer.dequantize_weight().T
        config = gptq_config(bits, group_size, False, shuffled, checkpoint_format=version, **meta)
        yield Fixture(variant, config, tensors, decoded)


def autoawq() -> Iterator[Fixture]:
    """Decoded by ``dequantize_gemm``, in f16."""
    bare("awq", "awq.modules", "awq.modules.linear", "awq.utils")
    packer = importlib.import_module("awq.modules.linear.gemm").WQLinear_GEMM
    decode = importlib.import_module("awq.utils.packing_utils").dequantize_gemm
    for variant, group_size in (("4bit-g32", 32), ("4bit-gk", -1)):
        q = quantized(4, group_size % (K + 1), False)
        size = group_size % (K + 1)
        layer = packer.from_linear(linear(q.weight), 4, size, scales=q.scales.T.contiguous(), zeros=q.zeros.T)
        tensors = {name: getattr(layer, name).clone() for name in ("qweight", "qzeros", "scales")}
        config = {"quant_method": "awq", "bits": 4, "group_size": group_size, "zero_point": True, "version": "gemm"}
        decoded = decode(layer.qweight, layer.qzeros, layer.scales, 4, size).T
        yield Fixture(variant, config, tensors, decoded)


def compressed_tensors() -> Iterator[Fixture]:
    """Decoded by the compressor's ``decompress``, in the dtype of the scales."""
    from compressed_tensors.compressors import PackedQuantizationCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    old = hasattr(PackedQuantizationCompressor, "compress_weight")  # 0.12.2 has it, and reads weight_g_idx
    variants = [("4bit-g64-sym-actorder", 4, 64, True, torch.float16)] if old else [
        ("4bit-g64-sym-bf16", 4, 64, True, torch.bfloat16),
        ("4bit-g32-asym", 4, 32, False, torch.float16),
        ("8bit-channel-asym-bf16", 8, None, False, torch.bfloat16),
    ]  # fmt: skip
    for variant, bits, group_size, symmetric, dtype in variants:
        q = quantized(bits, group_size or K, symmetric, shuffled=old)
        strategy = "group" if group_size else "channel"
        settings = {"num_bits": bits, "group_size": group_size, "symmetric": symmetric, "strategy": strategy}
        args = QuantizationArgs(**settings)
        scales, zeros = q.scales.to(dtype), (q.zeros - 2 ** (bits - 1)).to(torch.int8)
        if old:
            compressor = PackedQuantizationCompressor()
            packed = compressor.compress_weight(q.weight.to(dtype), scales, args, zeros, q.g_idx)
            tensors = packed | {"weight_scale": scales, "weight_g_idx": q.g_idx}
            decoded = compressor.decompress_weight(tensors, args)
            settings["actorder"] = "group"
        else:
            scheme = QuantizationScheme(targets=["Linear"], weights=args)
            state = {"weight": q.weight.to(dtype), "weight_scale": scales, "weight_zero_point": zeros}
            tensors = PackedQuantizationCompressor.compress(state, scheme)
            decoded = PackedQuantizationCompressor.decompress(tensors, scheme)["weight"]
        groups = {"group_0": {"targets": ["Linear"], "weights": settings | {"type": "int"}}}
        config = {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": groups}
        yield Fixture(variant, config, tensors, decoded)
    if not old:
        yield from compressed_floats()


def compressed_floats() -> Iterator[Fixture]:
    """fp8, by the same library: decoded by ``decompress`` in the dtype of the scales."""
    from compressed_tensors.compressors import FloatQuantizationCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    n = 64
    weight = torch.randn(n, K, generator=torch.Generator().manual_seed(8)) * torch.logspace(-2, 0, n)[:, None]
    for strategy, rows, columns, dtype in (
        ("tensor", n, K, torch.float16), ("channel", 1, K, torch.bfloat16), ("block", 48, 128, torch.bfloat16),
    ):  # fmt: skip
        settings: dict[str, Any] = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": strategy}
        settings |= {"block_structure": [rows, columns]} if strategy == "block" else {}
        padded = torch.nn.functional.pad(weight, (0, -K % columns, 0, -n % rows))
        blocks = padded.unflatten(1, (-1, columns)).unflatten(0, (-1, rows))
        scales = (blocks.abs().amax((1, 3)) / 448).to(dtype)
        scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**settings))
        state = {"weight": weight.to(dtype), "weight_scale": scales.reshape(1) if strategy == "tensor" else scales}
        tensors = FloatQuantizationCompressor.compress(state, scheme)
        decoded = FloatQuantizationCompressor.decompress(tensors, scheme)["weight"]
        groups = {"group_0": {"targets": ["Linear"], "weights": settings, "format": None}}
        config = {"quant_method": "compressed-tensors", "format": "float-quantized", "config_groups": groups}
        name = str(dtype).removeprefix("torch.").replace("float", "f")
        yield Fixture(f"fp8-{strategy}-{name}", config, tensors, decoded)


LIBRARIES = {
    "auto-gptq": ("gptq", auto_gptq),
    "gptqmodel": ("gptq", gptqmodel),
    "autoawq": ("awq", autoawq),
    "compressed-tensors": ("compressed-tensors", compressed_tensors),
}


def main() -> None:
    unknown = [name for name in sys.argv[1:] if name not in LIBRARIES]
    if unknown or not sys.argv[1:]:
        raise SystemExit(f"usage: make_checkpoint_fixtures.py LIBRARY ...; known: {', '.join(LIBRARIES)}")
    FOLDER.mkdir(exist_ok=True)
    for library in sys.argv[1:]:
        checkpoint_format, fixtures = LIBRARIES[library]
        version = importlib.metadata.version(library)
        for fixture in fixtures():
            tensors = {**fixture.tensors, "dequantized": fixture.dequantized}
            path = FOLDER / f"{checkpoint_format}-{fixture.variant}.safetensors"
            about = {"library": library, "version": version, "config": fixture.config}
            metadata = {"fixture": json.dumps(about)}  # one entry: safetensors writes several in any order
            save_file({name: tensor.detach().contiguous() for name, tensor in tensors.items()}, path, metadata)
            size = path.stat().st_size
            print(f"{path.name}: {size} bytes, {library} {version}, decoded in {fixture.dequantized.dtype}")
            if size > LARGEST_FILE:
                raise SystemExit(f"{path.name} has {size} bytes; a fixture must have at most {LARGEST_FILE}")


if __name__ == "__main__":
    main()
