"""marlin_gen: linear layers with 4- or 8-bit weights, C[m, n] = A[m, k] @ dequantize(B)[n, k]^T in fp16 or bf16.

    codes, scales = marlin_gen.quantize(weight)       # float [n, k] -> uint8 codes, f16 scales
    packed = marlin_gen.pack(codes, scales).to("cuda")
    c = marlin_gen.gemm(a, packed)                     # torch.ops.marlin_gen.gemm

Importing this package is cheap and does not import torch. ``torch.ops.marlin_gen.gemm`` exists as soon as both are
imported, in either order: at once when torch already is, else right after torch.
"""

from __future__ import annotations

import importlib
import sys
from importlib.abc import MetaPathFinder
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from marlin_gen.layout import PackedWeight, pack, unpack
    from marlin_gen.nn import QuantLinear
    from marlin_gen.op import gemm
    from marlin_gen.ranks import check_ranks, table_hash
    from marlin_gen.reference import dequantize, quantize
    from marlin_gen.replace import quantize_model

__all__ = [
    "PackedWeight", "QuantLinear", "check_ranks", "dequantize", "gemm", "pack", "quantize", "quantize_model",
    "table_hash", "unpack",
]  # fmt: skip

_HOME = {
    "PackedWeight": "layout",
    "pack": "layout",
    "unpack": "layout",
    "dequantize": "reference",
    "quantize": "reference",
    "gemm": "op",
    "QuantLinear": "nn",
    "check_ranks": "ranks",
    "table_hash": "ranks",
    "quantize_model": "replace",
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("marlin_gen")
    if name not in _HOME:
        raise AttributeError(f"module 'marlin_gen' has no attribute {name!r}; public names: {', '.join(__all__)}")
    return getattr(importlib.import_module(f"marlin_gen.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]


def _register_op() -> None:
    importlib.import_module("marlin_gen.op")


class _AfterTorch(MetaPathFinder):
    """Registers the op once torch has been imported: sorted imports put marlin_gen first, and that must work."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name != "torch":
            return None
        others = (finder for finder in sys.meta_path if finder is not self)
        spec = next((found for finder in others if (found := finder.find_spec(name, path, target))), None)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def exec_module(module: Any) -> None:
                execute(module)
                if self in sys.meta_path:
                    sys.meta_path.remove(self)
                _register_op()

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


if "torch" in sys.modules:
    _register_op()
else:
    sys.meta_path.insert(0, _AfterTorch())
