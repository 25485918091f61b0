"""``torch.ops.marlin_gen.gemm``: schema, checks, and what runs on each device.

Registering costs nothing but torch: what an implementation needs is imported by its first call. (Also, the package
registers this module in the middle of ``import torch``, when layout and the like may be half imported themselves.)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.autograd import forward_ad

from marlin_gen.formats import DTYPES, FORMAT_CODES, FORMATS, LAYOUT_VERSION, is_layout, version_error
from marlin_gen.formats import weight_format as format_row
from marlin_gen.gather_op import in_order
from marlin_gen.problem import SIZE_UNIT, words_per_tile

if TYPE_CHECKING:
    from marlin_gen.layout import PackedWeight

ACT_DTYPES = {getattr(torch, row.torch_name): name for name, row in DTYPES.items()}
ALIGNMENT = 16  # bytes: kernels read activations in 16-byte pieces

# Held for the life of the process: dropping a Library unregisters its operators.
_LIBRARY = torch.library.Library("marlin_gen", "FRAGMENT")  # type: ignore[no-untyped-call]
# The default of layout_version stays 2: an argument that is its default is left out of traced graphs, and neither a
# compiler's cache nor a saved program would tell the weights of two releases. ``gemm`` below names its own.
_LIBRARY.define(  # type: ignore[no-untyped-call]
    "gemm(Tensor a, Tensor weight, Tensor scales, Tensor? bias=None, str weight_format='u4b8g128',"
    " int layout_version=2) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
# Not for callers, and never in a graph: what ``gemm`` below calls on CUDA when there is nothing to differentiate or to
# trace, and what that calls when it does not know how to go on. ``format`` is an index of FORMATS, in this process.
for _name in ("gemm_no_grad", "gemm_slow"):
    _LIBRARY.define(  # type: ignore[no-untyped-call]
        f"{_name}(Tensor a, Tensor weight, Tensor scales, Tensor? bias, int format) -> Tensor"
    )

_direct: Any = None  # cuda_op.direct(), as soon as an op has run on CUDA


def gemm(a: torch.Tensor, packed: PackedWeight, bias: torch.Tensor | None = None) -> torch.Tensor:
    """``a [..., k] @ B^T + bias`` with the packed weight B (n, k): [..., n], contiguous, on the current stream.

    a, bias [n] and the result are of the type the weight was packed for, f16 or bf16. On CUDA a kernel measured for
    this GPU, shape and number of tokens runs, and adds the bias before it rounds; on the CPU the dequantised reference.
    Differentiable in ``a`` and ``bias``, backwards. Raises ValueError or TypeError that name what does not fit.
    For a weight in act-order the features of ``a`` are gathered first, on CUDA by a kernel of ours (gather.py).
    """
    try:
        scales, is_cuda = packed.scales, a.is_cuda
    except AttributeError:
        kinds = f"a is a {type(a).__name__} and packed a {type(packed).__name__}"
        raise TypeError(f"{kinds}; marlin_gen.gemm takes a Tensor and a PackedWeight of marlin_gen.pack") from None
    if forward_ad._current_level >= 0:
        _refuse_tangents(a, scales, bias)
    if packed.order is not None:
        a = in_order(a, packed.order)
    # The dispatcher would go through Python for autograd, and again for CUDA: 5 us each.
    if (
        not torch.compiler.is_compiling()
        and _direct is not None
        and is_cuda
        and packed.layout_version == LAYOUT_VERSION
        and (code := FORMAT_CODES.get(packed.weight_format)) is not None
        and not (
            torch.is_grad_enabled()
            and (a.requires_grad or scales.requires_grad or (bias is not None and bias.requires_grad))
        )
    ):
        return _launched(a, packed.weight, scales, bias, code)
    c: torch.Tensor = torch.ops.marlin_gen.gemm.default(
        a, packed.weight, scales, bias, packed.weight_format, packed.layout_version
    )
    return c


def _refuse_tangents(*operands: torch.Tensor | None) -> None:
    """Of an op of torch.library torch drops them without a word, as if the result were a constant."""
    tangents = (forward_ad.unpack_dual(one).tangent for one in operands if one is not None)  # type: ignore[no-untyped-call]
    if any(one is not None for one in tangents):
        raise NotImplementedError("marlin_gen.gemm has no forward-mode derivative (jvp, jacfwd); use backward()")


def _launched(
    a: torch.Tensor, weight: torch.Tensor, scales: torch.Tensor, bias: torch.Tensor | None, code: int
) -> torch.Tensor:
    """By the native launcher, which is there."""
    try:
        c: torch.Tensor = _direct(a, weight, scales, bias, code)
        return c
    except RuntimeError as error:
        from marlin_gen.cuda_op import raised

        raise raised(error) from None


def check_operands(
    a: torch.Tensor,
    weight: torch.Tensor,
    scales: torch.Tensor,
    bias: torch.Tensor | None,
    weight_format: str,
    layout_version: int,
) -> tuple[int, int]:
    """(n, k) of the packed weight, or an error that names the value and the fix."""
    fmt = FORMATS.get(weight_format) or format_row(weight_format)
    if not is_layout(layout_version, fmt):
        raise ValueError(version_error(layout_version))
    if a.dtype not in ACT_DTYPES:
        known = ", ".join(str(known) for known in ACT_DTYPES)
        raise TypeError(f"a is {a.dtype}; marlin_gen.gemm takes {known}, convert it, for instance with a.half()")
    words = words_per_tile(fmt)
    if weight.dtype != torch.int32 or weight.ndim != 3 or weight.shape[2] != words:
        raise ValueError(
            f"weight is {weight.dtype} {list(weight.shape)}; the packed layout of {fmt.name} is"
            f" torch.int32 [n/64, k/64, {words}], as marlin_gen.pack returns"
        )
    n, k = weight.shape[0] * SIZE_UNIT, weight.shape[1] * SIZE_UNIT
    expected = [n // SIZE_UNIT, fmt.scale_rows(k), SIZE_UNIT * fmt.scale_values]
    if scales.dtype not in ACT_DTYPES or list(scales.shape) != expected:
        raise ValueError(
            f"scales are {scales.dtype} {list(scales.shape)}; this {fmt.name} weight (n={n}, k={k}) needs {a.dtype}"
            f" {expected}, as marlin_gen.pack returns"
        )
    if scales.dtype != a.dtype:
        raise TypeError(
            f"a is {a.dtype} and the weight was packed for {scales.dtype}; convert a, or pack the weight with"
            f" {a.dtype} scales"
        )
    if bias is not None and (bias.dtype != a.dtype or list(bias.shape) != [n] or bias.device != a.device):
        raise ValueError(
            f"bias is {bias.dtype} {list(bias.shape)} on {bias.device}; it must be {a.dtype} [{n}] on {a.device}"
        )
    if a.ndim == 0 or a.shape[-1] != k:
        raise ValueError(f"a has shape {list(a.shape)}; its last dimension must be k={k}, the weight's in-features")
    if not (a.device == weight.device == scales.device):
        raise ValueError(
            f"a is on {a.device}, weight on {weight.device}, scales on {scales.device}; move all to one device,"
            " for instance packed.to(a.device)"
        )
    if not (weight.is_contiguous() and scales.is_contiguous()):
        raise ValueError(
            "weight and scales must be contiguous, as marlin_gen.pack returns them; call .contiguous() once"
        )
    return n, k


def _cuda(
    a: torch.Tensor,
    weight: torch.Tensor,
    scales: torch.Tensor,
    bias: torch.Tensor | None = None,
    weight_format: str = "u4b8g128",
    layout_version: int = 2,
) -> torch.Tensor:
    global _direct
    fmt = FORMATS.get(weight_format)
    code = FORMAT_CODES[weight_format] if fmt is not None and is_layout(layout_version, fmt) else None
    if _direct is None or code is None:
        from marlin_gen import cuda_op

        _direct = cuda_op.direct()
        if _direct is None or code is None:  # an error, if not that there is no native launcher
            return cuda_op.serve(a, weight, scales, bias, weight_format, layout_version)
    return _launched(a, weight, scales, bias, code)


def _slow(
    a: torch.Tensor, weight: torch.Tensor, scales: torch.Tensor, bias: torch.Tensor | None, format: int
) -> torch.Tensor:
    from marlin_gen import cuda_op

    return cuda_op.slow(a, weight, scales, bias, format)


def _cpu(
    a: torch.Tensor,
    weight: torch.Tensor,
    scales: torch.Tensor,
    bias: torch.Tensor | None = None,
    weight_format: str = "u4b8g128",
    layout_version: int = 2,
) -> torch.Tensor:
    from marlin_gen.layout import PackedWeight, unpack
    from marlin_gen.reference import gemm_reference

    check_operands(a, weight, scales, bias, weight_format, layout_version)
    codes, row_scales = unpack(PackedWeight(weight, scales, weight_format))
    with torch.autocast("cpu", enabled=False):  # which would take its product in fp32 for one in bf16
        return gemm_reference(a, codes, row_scales, weight_format, bias).to(a.dtype)


def _fake(
    a: torch.Tensor,
    weight: torch.Tensor,
    scales: torch.Tensor,
    bias: torch.Tensor | None = None,
    weight_format: str = "u4b8g128",
    layout_version: int = 2,
) -> torch.Tensor:
    n, _ = check_operands(a, weight, scales, bias, weight_format, layout_version)
    return a.new_empty((*a.shape[:-1], n))


def _fake_no_grad(
    a: torch.Tensor, weight: torch.Tensor, scales: torch.Tensor, bias: torch.Tensor | None, format: int
) -> torch.Tensor:
    return _fake(a, weight, scales, bias, list(FORMATS)[format])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    _, weight, scales, _, ctx.weight_format, _ = inputs
    ctx.save_for_backward(weight, scales)


def _backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    """grads of ``a`` and ``bias``: the weight is a constant, as for LoRA on a quantised base."""
    from marlin_gen.layout import PackedWeight, unpack
    from marlin_gen.reference import dequantize

    if ctx.needs_input_grad[2]:
        raise NotImplementedError("marlin_gen.gemm has no gradient for scales; call scales.requires_grad_(False)")
    weight, scales = ctx.saved_tensors
    grad_a = grad_bias = None
    if ctx.needs_input_grad[0]:
        codes, row_scales = unpack(PackedWeight(weight, scales, ctx.weight_format))
        grad_a = grad @ dequantize(codes, row_scales, ctx.weight_format, grad.dtype)
    if any(ctx.needs_input_grad[3:4]):  # the dispatcher drops arguments that are their defaults
        grad_bias = grad.reshape(-1, grad.shape[-1]).sum(0)
    return grad_a, None, None, grad_bias, None, None


_LIBRARY.impl("gemm", _cuda, "CUDA")  # type: ignore[no-untyped-call]
_LIBRARY.impl("gemm", _cpu, "CPU")  # type: ignore[no-untyped-call]
_LIBRARY.impl("gemm_slow", _slow, "CUDA")  # type: ignore[no-untyped-call]
for _name in ("gemm_no_grad", "gemm_slow"):
    _LIBRARY.impl(_name, torch.library.fallthrough_kernel, "Autograd")  # type: ignore[no-untyped-call]
torch.library.register_fake("marlin_gen::gemm", _fake, lib=_LIBRARY)
torch.library.register_fake("marlin_gen::gemm_no_grad", _fake_no_grad, lib=_LIBRARY)
torch.library.register_autograd("marlin_gen::gemm", _backward, setup_context=_setup_context, lib=_LIBRARY)
