"""The op on a CUDA device, in Python: the whole of it, and what the native launcher leaves to it.

``marlin_gen::gemm_no_grad`` is the native op and takes the weight format as a number; where it cannot go on it calls
``marlin_gen::gemm_slow``, which is here. An exception must not travel through C++: it waits in ``_ERRORS``, its text
goes back as a tensor, the native op fails with that text, and ``raised`` finds the exception itself.
"""

from __future__ import annotations

import threading
from typing import Any

import torch

from marlin_gen import native
from marlin_gen.formats import FORMAT_CODES, LAYOUT_VERSION
from marlin_gen.once import once
from marlin_gen.op import ACT_DTYPES, ALIGNMENT, check_operands
from marlin_gen.serve import Server

FORMAT_NAMES = {code: name for name, code in FORMAT_CODES.items()}
ROW_UNIT = ALIGNMENT // 2  # elements: kernels read rows of activations that are multiples of this apart
_ERRORS = threading.local()


@once  # torch takes one implementation
def direct() -> Any:
    """``gemm_no_grad`` (a, weight, scales, bias, format code) where there is a native launcher, else None."""
    found = native.library()
    if found is None:
        return None
    found.implement("gemm_no_grad", "CUDA")
    overload = torch.ops.marlin_gen.gemm_no_grad.default
    return getattr(overload, "_op", overload)  # all that the overload's __call__ does, 150 ns sooner


def slow(
    a: torch.Tensor, weight: torch.Tensor, scales: torch.Tensor, bias: torch.Tensor | None, format: int
) -> torch.Tensor:
    """``gemm_slow``: the product, or the text of an error as uint8."""
    try:
        return serve(a, weight, scales, bias, FORMAT_NAMES.get(format, f"number {format}"), LAYOUT_VERSION)
    except BaseException as error:  # Ctrl-C too: the first call may compile for seconds
        _ERRORS.latest = error
        return torch.tensor(list(_text(error).encode()), dtype=torch.uint8)


def raised(error: RuntimeError) -> BaseException:
    """What this thread's ``slow`` raised, if that is why the native op failed with ``error``; else ``error``."""
    latest = getattr(_ERRORS, "latest", None)
    _ERRORS.latest = None
    return latest if latest is not None and _text(latest) in str(error) else error


def _text(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"


def serve(
    a: torch.Tensor, weight: torch.Tensor, scales: torch.Tensor, bias: torch.Tensor | None,
    weight_format: str, layout_version: int,
) -> torch.Tensor:  # fmt: skip
    """Check, choose a kernel and launch it, all from Python."""
    n, k = check_operands(a, weight, scales, bias, weight_format, layout_version)
    server = Server.of(a.device)
    out = torch.empty((*a.shape[:-1], n), dtype=a.dtype, device=a.device)
    if out.numel():
        if weight.data_ptr() % ALIGNMENT or scales.data_ptr() % ALIGNMENT:
            raise ValueError(
                f"weight and scales must be {ALIGNMENT}-byte aligned; clone the tensors once after loading"
            )
        if bias is not None and (bias.data_ptr() % ALIGNMENT or not bias.is_contiguous()):
            bias = bias.clone(memory_format=torch.contiguous_format)
        server.gemm(rows(a, k), weight, scales, bias, out.view(-1, n), weight_format, ACT_DTYPES[a.dtype])
    return out


def rows(a: torch.Tensor, k: int) -> torch.Tensor:
    """``a`` as [m, k], m > 0: a view where kernels can read one, else one copy.

    They need k side by side, and rows that start at multiples of 16 bytes and do not overlap.
    """
    a_2d = a.reshape(-1, k)
    apart = a_2d.stride(0) if a_2d.shape[0] > 1 else k
    if a_2d.stride(1) != 1 or apart < k or apart % ROW_UNIT:
        a_2d = a_2d.contiguous()
    return a_2d.clone(memory_format=torch.contiguous_format) if a_2d.data_ptr() % ALIGNMENT else a_2d
