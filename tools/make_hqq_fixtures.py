"""Write tests/fixtures/hqq-*.safetensors: small layers quantised and dequantised by the hqq package itself, on the CPU.

In an environment of its own, for hqq wants much that it does not need here:

    pip install torch==2.13.0 safetensors termcolor numpy && DISABLE_CUDA=1 pip install --no-deps hqq==0.2.8.post1
    python tools/make_hqq_fixtures.py

Each file holds ``HQQLinear.state_dict()`` as hqq would save it and ``dequantized`` [n, k], what hqq makes of it in its
compute type. The metadata have the SHA-256 of what it makes of the same tensors in float64, too large to keep.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import hqq
import torch
from hqq.core.quantize import BaseQuantizeConfig, HQQLinear, Quantizer
from safetensors.torch import save_file

FOLDER = Path(__file__).resolve().parent.parent / "tests/fixtures"


@dataclass(frozen=True)
class Case:
    bits: int
    group_size: int
    n: int = 128
    k: int = 256
    dtype: torch.dtype = torch.float16
    view_as_float: bool = False

    @property
    def path(self) -> Path:
        kind = str(self.dtype).removeprefix("torch.") + ("-viewed" if self.view_as_float else "")
        return FOLDER / f"hqq-{self.bits}bit-g{self.group_size}-{self.n}x{self.k}-{kind}.safetensors"


CASES = [Case(bits, group_size) for bits in (4, 8) for group_size in (32, 64, 128)] + [
    Case(4, 64, n=3, k=128, dtype=torch.bfloat16),  # the halves of W_q meet within a row
    Case(4, 64, n=6, k=192, view_as_float=True),
    Case(3, 64, n=6, k=192),  # 18 groups in words of ten: two rows of padding
    Case(2, 64, n=8, k=192, dtype=torch.float32),
    Case(1, 64, n=8, k=192),
    Case(6, 96, n=5, k=96),  # a group is a row; six bits lie in bytes
]


def main() -> None:
    for case in CASES:
        torch.manual_seed(0)
        linear = torch.nn.Linear(case.k, case.n, bias=False)
        linear.weight.data = torch.randn(case.n, case.k) * 0.02
        config = BaseQuantizeConfig(
            nbits=case.bits, group_size=case.group_size, axis=1, view_as_float=case.view_as_float
        )
        layer = HQQLinear(linear, config, compute_dtype=case.dtype, device="cpu")
        meta = dict(layer.meta, scale=layer.meta["scale"].double(), zero=layer.meta["zero"].double())
        exact = Quantizer.dequantize(layer.W_q.data, meta | {"compute_dtype": torch.float64})
        tensors = {key: value for key, value in layer.state_dict().items() if value is not None}
        tensors = {key: value.detach().contiguous() for key, value in tensors.items()}
        metadata = {
            "library": f"hqq {hqq.__version__}",
            "torch": torch.__version__,
            "float64_sha256": hashlib.sha256(exact.contiguous().numpy().tobytes()).hexdigest(),
        }
        save_file(tensors | {"dequantized": layer.dequantize().contiguous()}, case.path, metadata)
        print(case.path.name, case.path.stat().st_size)


if __name__ == "__main__":
    main()
