"""``torch.ops.marlin_gen.gather``: activations ``a [..., k]`` in a weight's act-order, ``a[..., order[j]]``.

Registered, as op.py, perhaps in the middle of ``import torch``: what an implementation needs its first call imports.
"""

from __future__ import annotations

from typing import Any

import torch

# Held for the life of the process: dropping a Library unregisters its operators.
_LIBRARY = torch.library.Library("marlin_gen", "FRAGMENT")  # type: ignore[no-untyped-call]
# The second is for calls without gradients: its dispatch does not go through Python for autograd.
for _name in ("gather", "gather_no_grad"):
    _LIBRARY.define(  # type: ignore[no-untyped-call]
        f"{_name}(Tensor a, Tensor order) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,)
    )


def in_order(a: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """``a [..., k]`` in ``order`` (int64 [k]), contiguous: by a kernel of ours on CUDA, else ``index_select``.

    Differentiable in ``a``; raises a ValueError that names what does not fit.
    """
    ops = torch.ops.marlin_gen
    if torch.compiler.is_compiling() or (torch.is_grad_enabled() and a.requires_grad):
        found: torch.Tensor = ops.gather.default(a, order)
    else:
        found = ops.gather_no_grad.default(a, order)
    return found


def _cuda(a: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    from marlin_gen.gather import gather

    return gather(a, order)


def _cpu(a: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    from marlin_gen.gather import check

    check(a, order)
    return a.index_select(-1, order)


def _fake(a: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    from marlin_gen.gather import check

    check(a, order)
    return a.new_empty((*a.shape[:-1], order.shape[0]))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    ctx.save_for_backward(inputs[1])


def _backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    """Each feature gets the gradients of all columns that read it: one, unless it was written into ``order`` twice."""
    (order,) = ctx.saved_tensors
    return torch.zeros_like(grad).index_add(-1, order, grad), None


for _name in ("gather", "gather_no_grad"):
    _LIBRARY.impl(_name, _cuda, "CUDA")  # type: ignore[no-untyped-call]
    _LIBRARY.impl(_name, _cpu, "CPU")  # type: ignore[no-untyped-call]
    torch.library.register_fake(f"marlin_gen::{_name}", _fake, lib=_LIBRARY)
_LIBRARY.impl("gather_no_grad", torch.library.fallthrough_kernel, "Autograd")  # type: ignore[no-untyped-call]
torch.library.register_autograd("marlin_gen::gather", _backward, setup_context=_setup_context, lib=_LIBRARY)
