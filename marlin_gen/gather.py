"""Activations in a weight's act-order, by a kernel of our own that ships as PTX: ``out[..., j] = a[..., order[j]]``."""

from __future__ import annotations

import ctypes
import logging
import threading

import torch

from marlin_gen import driver
from marlin_gen.driver import LaunchError
from marlin_gen.once import once
from marlin_gen.shipped_ptx import ShippedPtx, shipped_ptx

log = logging.getLogger("marlin_gen")

NAME = "gather"  # of templates/gather.cu, of its symbol, and of its file in ptx/
THREADS, COLUMNS = 128, 8  # of a block; of a thread
MAX_ROWS = 16  # of a thread: more would leave a GPU's SMs without work at the token counts of a prefill
ROWS_FROM = 64  # fewer tokens than this each have threads of their own


def check(a: torch.Tensor, order: torch.Tensor) -> None:
    """Raise a ValueError that names value and fix unless ``order`` is int64 [k], on the device of a [..., k]."""
    if order.dtype != torch.int64 or order.ndim != 1 or order.device != a.device:
        raise ValueError(
            f"order is {order.dtype} {list(order.shape)} on {order.device}; it must be torch.int64 [k] on {a.device},"
            " as read_layer gives it: move a and the packed weight to one device"
        )
    if a.ndim == 0 or a.shape[-1] != order.shape[0]:
        raise ValueError(
            f"a has shape {list(a.shape)}; its last dimension must be k={order.shape[0]}, the weight's in-features"
        )


class Gather:
    """The kernel on one device, loaded by its first call. Any thread may call ``run``."""

    def __init__(self, device_index: int, ptx: ShippedPtx) -> None:
        self.device_index = device_index
        self._ptx = ptx
        self._function: driver.Function | None = None
        self._is_missing = False
        self._lock = threading.Lock()

    def run(self, a: torch.Tensor, order: torch.Tensor) -> torch.Tensor | None:
        """``a [..., k]`` in ``order``, contiguous, on the current stream; None where the kernel cannot do it.

        That is for other element sizes than 2 bytes, a k that is no multiple of 8, or where it does not load.
        """
        k = order.shape[0]
        if a.element_size() != 2 or k % COLUMNS or not order.is_contiguous() or order.data_ptr() % 16:
            return None
        if torch.cuda.current_device() != self.device_index:
            with torch.cuda.device(self.device_index):
                return self.run(a, order)
        function = self._function or self._load()
        if function is None:
            return None
        out = torch.empty(a.shape, dtype=a.dtype, device=a.device)
        if out.numel():
            self._launch(function, a.reshape(-1, k), order, out)
        return out

    def _launch(self, function: driver.Function, a: torch.Tensor, order: torch.Tensor, out: torch.Tensor) -> None:
        driver.bind_context(self.device_index)
        m, k = a.shape
        rows = rows_per_block(m)
        arguments = [ctypes.c_uint64(tensor.data_ptr()) for tensor in (a, out, order)]
        arguments += [ctypes.c_uint64(a.stride(0)), ctypes.c_uint64(a.stride(1))]
        sizes = [ctypes.c_int32(size) for size in (m, k, rows)]
        stream = torch.cuda.current_stream(self.device_index).cuda_stream
        driver.launch(function, driver.launch_config(grid(m, k), THREADS, 0, 1), [*arguments, *sizes], stream)

    def _load(self) -> driver.Function | None:
        """The loaded kernel; None, for good, when it cannot be had, and for now while a graph is captured."""
        with self._lock:
            if self._function is None and not self._is_missing and not torch.cuda.is_current_stream_capturing():
                kernel = self._ptx.kernels(NAME).get(NAME)
                try:
                    if kernel is None:
                        raise LaunchError(f"{self._ptx.path(NAME)} does not hold the kernel")
                    driver.bind_context(self.device_index)
                    self._function = driver.load_image(kernel.image, kernel.symbol, 0)
                except LaunchError as error:
                    self._is_missing = True
                    log.warning("activations are put into act-order by torch's index_select: %s", error)
        return self._function


def rows_per_block(m: int) -> int:
    """Rows of a block, m > 0."""
    return max(1, min(MAX_ROWS, m // ROWS_FROM))


def grid(m: int, k: int) -> int:
    """Blocks: as templates/gather.cu counts them."""
    return -(-(k // COLUMNS) // THREADS) * -(-m // rows_per_block(m))


@once
def _gather(device_index: int) -> Gather:
    return Gather(device_index, shipped_ptx())


def gather(a: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """``a [..., k]`` on CUDA in ``order`` (int64 [k]): contiguous, bit for bit ``a.index_select(-1, order)``."""
    check(a, order)
    index = a.device.index if a.device.index is not None else torch.cuda.current_device()
    out = _gather(index).run(a, order)
    return a.index_select(-1, order) if out is None else out
