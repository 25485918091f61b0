"""From a plan and tensors to a launch: grid, kernel arguments, workspace."""

from __future__ import annotations

import ctypes
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from marlin_gen import driver, env
from marlin_gen.arch import Arch, Gpu
from marlin_gen.config import KernelSpec, Plan
from marlin_gen.driver import LaunchError
from marlin_gen.families import FAMILIES
from marlin_gen.families.base import LaunchShape
from marlin_gen.once import once
from marlin_gen.problem import Problem

__all__ = ["Kernel", "LaunchError", "Launcher", "Workspace"]

_MIN_LOCKS = 4096  # words of a stream's buffer: more than any kernel of today's GPUs needs
_MAX_SHAPES = 4096  # launch shapes remembered per kernel: one per (plan, problem) seen


@dataclass
class Kernel:
    """A kernel that is loaded on one device."""

    spec: KernelSpec
    function: driver.Function
    max_clusters: int  # clusters (blocks, when there are none) that are resident at once
    shapes: dict[tuple[int, Problem], tuple[LaunchShape, tuple[int, int]]] = field(default_factory=dict)

    def shape(self, plan: Plan, problem: Problem, num_sms: int) -> tuple[LaunchShape, tuple[int, int]]:
        """The launch shape, and the dynamic shared memory of a plain launch and of a dependent one, in bytes."""
        known = self.shapes.get((plan.raster, problem))
        if known:
            return known
        shape = FAMILIES.of(plan.config).launch_shape(plan, problem, num_sms, self.max_clusters)
        found = shape, (shape.smem_bytes, _smem_bytes_alone(shape, self.spec.arch_row, num_sms))
        if len(self.shapes) >= _MAX_SHAPES:
            self.shapes.clear()
        self.shapes[plan.raster, problem] = found
        return found


def _smem_bytes_alone(shape: LaunchShape, arch: Arch, num_sms: int) -> int:
    """Dynamic shared memory per block with which an SM holds no more blocks than its share of the grid.

    A dependent launch starts while the grid before it leaves SMs one by one: those would take blocks of which others
    are then short (n=6144 k=4096 m=1 on an H100: 6.7 us, with room for just the share 5.4 us).
    """
    share = -(-shape.grid // num_sms)
    least = arch.smem_per_sm // (share + 1) - arch.smem_reserved + 128
    fits = (max(least, shape.smem_bytes) + arch.smem_reserved) * share <= arch.smem_per_sm
    return max(shape.smem_bytes, least // 128 * 128) if fits else shape.smem_bytes


class Workspace:
    """Scratch of striped kernels: fp32 partial sums, and locks that are zero between launches.

    One stream uses a workspace at a time. Eager calls share one lock buffer per stream; a call under graph capture gets
    locks of its own, since its graph may later be replayed beside anything.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._locks: dict[int, torch.Tensor] = {}  # by stream
        self._outgrown: list[torch.Tensor] = []  # kept: the native launcher may have read their addresses
        self._growing = threading.Lock()

    def take(self, shape: LaunchShape, stream: int) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Partials and locks for a launch on ``stream``, the current stream; (None, None) where none are needed.

        The caching allocator keeps the partials for this stream until what is queued on it now is done.
        """
        if not shape.partials_bytes:
            return None, None
        partials = torch.empty(shape.partials_bytes, dtype=torch.uint8, device=self._device)
        if torch.cuda.is_current_stream_capturing():
            return partials, torch.zeros(shape.num_locks, dtype=torch.int32, device=self._device)
        with self._growing:  # threads may share a stream: a buffer that one of them was given must not be dropped
            locks = self._locks.get(stream)
            if locks is None or locks.numel() < shape.num_locks:
                if locks is not None:
                    self._outgrown.append(locks)
                words = max(shape.num_locks, _MIN_LOCKS)
                locks = self._locks[stream] = torch.zeros(words, dtype=torch.int32, device=self._device)
        return partials, locks

    def shared_locks(self, stream: int) -> torch.Tensor | None:
        """The words that eager calls on ``stream`` share; None before the first striped one."""
        return self._locks.get(stream)


class Launcher:
    """Loads and launches kernels on one CUDA device."""

    def __init__(self, device_index: int) -> None:
        self.device_index = device_index
        self.gpu: Gpu = driver.identify(device_index)
        self.workspace = Workspace(torch.device("cuda", device_index))
        self._depends = env.dependent_launches()
        self._thread = threading.local()
        torch.cuda.synchronize(device_index)  # creates the context that modules are loaded into

    @classmethod
    @once
    def for_device(cls, device_index: int) -> Launcher:
        """The one launcher of a device."""
        return cls(device_index)

    def load(self, file: Path, symbol: str, spec: KernelSpec, image: bytes | None = None) -> Kernel:
        """Load the cubin or PTX in ``file``, or ``image`` in its place.

        A LaunchError when it is neither, lacks the symbol, or cannot be resident.
        """
        family = FAMILIES.of(spec.config)
        threads, smem = family.threads(spec.config), family.smem_bytes(spec.config, spec.format_row)
        with torch.cuda.device(self.device_index):
            limit = spec.arch_row.smem_per_block
            function = driver.load(file, symbol, limit) if image is None else driver.load_image(image, symbol, limit)
            resident = driver.resident_clusters(function, threads, smem, spec.config.cluster_size, self.gpu.num_sms)
        if resident < 1:
            raise LaunchError(
                f"{spec.key} does not fit on an SM of {self.gpu.name}: {smem} bytes of shared memory, {threads} threads"
            )
        return Kernel(spec, function, resident)

    def run(
        self, kernel: Kernel, plan: Plan, problem: Problem,
        a: torch.Tensor, weight: torch.Tensor, scales: torch.Tensor, out: torch.Tensor,
        bias: torch.Tensor | None = None,
    ) -> None:  # fmt: skip
        """``out [m, n] = a [m, k] @ B^T + bias [n]`` on the current stream; tensors contiguous, 16-byte aligned, on it.

        The rows of ``a`` may be apart by more than k elements, in units of 8: a kernel that cannot read them so gets a
        copy. The launch is dependent (see ``run_with``) where it can be, unless MARLIN_GEN_DEPENDENT=0.
        """
        if not getattr(self._thread, "has_context", False):
            driver.bind_context(self.device_index)
            self._thread.has_context = True
        shape, _ = kernel.shape(plan, problem, self.gpu.num_sms)
        partials, locks = self.workspace.take(shape, torch.cuda.current_stream(self.device_index).cuda_stream)
        dependent = self.depends(kernel.spec)
        self.run_with(kernel, plan, problem, a, weight, scales, out, partials, locks, bias, dependent=dependent)

    def depends(self, spec: KernelSpec) -> bool:
        """Whether the op launches this kernel dependently: one that was compiled to wait for the kernel ahead of it."""
        return self._depends and spec.arch_row.has_tma

    def run_with(
        self, kernel: Kernel, plan: Plan, problem: Problem,
        a: torch.Tensor, weight: torch.Tensor, scales: torch.Tensor, out: torch.Tensor,
        partials: torch.Tensor | None, locks: torch.Tensor | None, bias: torch.Tensor | None = None, *,
        dependent: bool = False,
    ) -> None:  # fmt: skip
        """``run`` with the caller's workspace: at least the launch shape's sizes, locks zero.

        ``dependent``: start while the kernel ahead on the stream ends (programmatic dependent launch); this one waits
        for it before it reads or writes anything but the first of its weights and scales. Those may be written by any
        kernel ahead that does not itself let its successors start before it has. Not for a kernel of an architecture
        without TMA, which does not wait.
        """
        shape, smem_bytes = kernel.shape(plan, problem, self.gpu.num_sms)
        if bias is not None and "bias" not in shape.operands:
            raise LaunchError(f"{kernel.spec.key} takes no bias")
        if "a" in shape.operands:
            a = a.contiguous()
        pointers: dict[str, Any] = {
            "a": a, "c": out, "weight": weight, "scales": scales, "bias": bias,
            "partials": partials, "locks": locks,
        }  # fmt: skip
        arguments: list[Any] = []
        maps: dict[Any, Any] = {}  # A's two maps are one unless the last token tile is partial
        for operand in shape.operands:
            if mapped := shape.map_of(operand):
                if mapped not in maps:
                    matrix, box = mapped
                    of = a if matrix == "a" else out
                    row_stride = of.stride(0) if problem.m > 1 else of.shape[1]
                    maps[mapped] = driver.tensor_map(of.data_ptr(), problem.m, of.shape[1], box, row_stride)
                arguments.append(maps[mapped])
            else:
                tensor = pointers[operand]
                arguments.append(ctypes.c_uint64(tensor.data_ptr() if tensor is not None else 0))
        arguments.extend(map(ctypes.c_int32, (*shape.scalars, dependent)))
        stream = torch.cuda.current_stream(self.device_index).cuda_stream
        config = driver.launch_config(shape.grid, shape.threads, smem_bytes[dependent], shape.cluster, dependent)
        driver.launch(kernel.function, config, arguments, stream)
