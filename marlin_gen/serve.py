"""What the op does on a CUDA device: choose a plan, load its kernel once, launch it.

A candidate that is damaged, does not compile, load or launch costs one warning, and the next one is tried. The last are
kernels that ship as PTX, for where nothing can be compiled. The last resort, which needs no kernel at all, is to
dequantise the weight and call cuBLAS.
"""

from __future__ import annotations

import logging
import os
import threading
import warnings
from typing import NamedTuple

import torch

from marlin_gen import native
from marlin_gen.arch import PTX_ARCH
from marlin_gen.config import KernelSpec, Plan
from marlin_gen.dispatch import Choice, Dispatcher, KernelLocation, forced_plan
from marlin_gen.installed import find_tables
from marlin_gen.launch import Kernel, Launcher, LaunchError
from marlin_gen.layout import PackedWeight
from marlin_gen.once import once
from marlin_gen.problem import Problem
from marlin_gen.reference import dequantized_matmul
from marlin_gen.shipped_ptx import shipped_ptx

log = logging.getLogger("marlin_gen")

MAX_STEPS = 1 << 14  # problems remembered per device; far above the token counts a server meets


class ServeWarning(UserWarning):
    """A problem is not served by its best kernel; the message says why and what to do."""


Key = tuple[int, int, int, str, str]  # Problem's fields in order: a plain tuple hashes fastest


class Step(NamedTuple):
    """What to do for one problem."""

    problem: Problem
    choice: Choice | None  # None: dequantise and call cuBLAS
    kernel: Kernel | None


class Server:
    """One device's tables, loaded kernels and decisions. Any thread may call ``gemm``."""

    def __init__(self, device_index: int, launcher: Launcher, dispatcher: Dispatcher) -> None:
        self.device_index = device_index
        self.launcher = launcher
        self.dispatcher = dispatcher
        self._steps: dict[Key, Step] = {}
        self._kernels: dict[str, Kernel | None] = {}  # by spec key; None: cannot be had
        self._failed: set[tuple[Key, Plan, str]] = set()  # with the target: the driver refused to launch them
        self._no_compiler = ""  # why nothing can be compiled, once that is known
        self._has_said_so = False
        self._pid = os.getpid()
        self._native: native.Native | None = None
        self._lock = threading.Lock()

    @classmethod
    def of(cls, device: torch.device) -> Server:
        """The device's server, made on first use.

        Raises ValueError for a GPU that no kernel can run on, and RuntimeError in a child of the process that made it.
        """
        server = _server(device.index if device.index is not None else torch.cuda.current_device())
        if server._pid != os.getpid():
            raise RuntimeError(
                "marlin_gen.gemm was called on CUDA before this process was forked, and CUDA does not survive a fork;"
                " start processes with multiprocessing.set_start_method('spawn'), or fork before the first call"
            )
        return server

    def launch_natively(self, launcher: native.Native) -> None:
        """From now on tell ``launcher`` how to launch what has been launched once."""
        launcher.clear_steps(self.device_index)
        self._native = launcher

    def gemm(
        self,
        a: torch.Tensor,
        weight: torch.Tensor,
        scales: torch.Tensor,
        bias: torch.Tensor | None,
        out: torch.Tensor,
        weight_format: str,
        act_dtype: str,
    ) -> None:
        """Write ``a [m, k] @ B^T + bias`` into ``out [m, n]``: what ``Launcher.run`` takes, with m > 0."""
        problem = (out.shape[1], a.shape[1], a.shape[0], weight_format, act_dtype)
        if torch.cuda.current_device() == self.device_index:  # the context manager costs as much as a launch
            self._run(problem, a, weight, scales, bias, out)
        else:
            with torch.cuda.device(self.device_index):
                self._run(problem, a, weight, scales, bias, out)

    def _run(
        self, key: Key, a: torch.Tensor, weight: torch.Tensor, scales: torch.Tensor, bias: torch.Tensor | None,
        out: torch.Tensor,
    ) -> None:  # fmt: skip
        while True:
            step = self._steps.get(key) or self._decide(key)
            if step.choice is None or step.kernel is None:
                return dequantized_matmul(a, PackedWeight(weight, scales, step.problem.weight_format), bias, out)
            try:
                self.launcher.run(step.kernel, step.choice.plan, step.problem, a, weight, scales, out, bias)
            except LaunchError as error:
                _warn(f"{step.choice.plan.key} does not launch ({error}); using the next candidate")
                self._failed.add((key, step.choice.plan, step.choice.spec.arch))
                self._steps.pop(key, None)
                self.forget_native()
                continue
            if self._native:
                self._tell_native(self._native, step.problem, step.choice.plan, step.kernel)
            return

    def _tell_native(self, launcher: native.Native, problem: Problem, plan: Plan, kernel: Kernel) -> None:
        """This problem's launch, and the current stream's locks where it needs them."""
        shape, smem_bytes = kernel.shape(plan, problem, self.launcher.gpu.num_sms)
        if shape.num_locks:
            stream = torch.cuda.current_stream(self.device_index).cuda_stream
            locks = self.launcher.workspace.shared_locks(stream)
            if locks is not None:  # else it is being captured
                launcher.put_locks(self.device_index, stream, locks.data_ptr(), locks.numel())
        dependent = self.launcher.depends(kernel.spec)
        handle = int(kernel.function.handle)
        launcher.put_step(problem, self.device_index, handle, shape, smem_bytes[dependent], dependent)

    def forget_native(self) -> None:
        """Let every problem's next call come by here."""
        if self._native:
            self._native.clear_steps(self.device_index)

    def choice(self, problem: Problem) -> Choice | None:
        """What serves ``problem``, for people and tests; None: dequantise and call cuBLAS."""
        return self.step(problem).choice

    def step(self, problem: Problem) -> Step:
        """``choice`` with its loaded kernel, for a caller that launches it itself."""
        key = (problem.n, problem.k, problem.m, problem.weight_format, problem.act_dtype)
        return self._steps.get(key) or self._decide(key)

    def _decide(self, key: Key) -> Step:
        with self._lock:
            if len(self._steps) >= MAX_STEPS:
                self._steps.clear()
                self.forget_native()
            step = self._steps[key] = self._first_that_loads(key)
        return step

    def _first_that_loads(self, key: Key) -> Step:
        problem = Problem(*key)
        for choice in self.dispatcher.choose(problem):
            if (key, choice.plan, choice.spec.arch) in self._failed:
                continue
            if kernel := self._kernel(choice):
                log.info("n=%d k=%d m=%d: %s", problem.n, problem.k, problem.m, choice.key)
                if self._no_compiler and not self._has_said_so:
                    self._has_said_so = True
                    _warn(f"{self._no_compiler}; others serve instead, such as {choice.key}. {_fix(problem)}")
                return Step(problem, choice, kernel)
        reason = f" ({self._no_compiler})" if self._no_compiler else ""
        _warn(
            f"no kernel for n={problem.n}, k={problem.k}, m={problem.m} on {self.dispatcher.gpu.slug}{reason}:"
            f" dequantising the whole weight on every call, which is slow. {_fix(problem)}"
        )
        return Step(problem, None, None)

    def _kernel(self, choice: Choice) -> Kernel | None:
        """The loaded kernel of a choice, prebuilt or compiled now; None, for good, when it cannot be had."""
        key = choice.spec.key
        if key not in self._kernels:
            location = choice.kernel or self._compiled(choice.spec)
            self._kernels[key] = self._loaded(location, choice.spec) if location else None
        return self._kernels[key]

    def _loaded(self, location: KernelLocation, spec: KernelSpec) -> Kernel | None:
        if spec.arch == PTX_ARCH:
            log.info("the driver compiles %s from PTX, and remembers it", spec.key)
        try:
            return self.launcher.load(location.place, location.symbol, spec, location.image)
        except LaunchError as error:
            if torch.cuda.is_current_stream_capturing():
                fix = "call marlin_gen.gemm once with these shapes before"
                raise LaunchError(f"no kernel is loaded while a CUDA graph is captured ({error}); {fix}") from error
            if "OUT_OF_MEMORY" in str(error):  # the kernel is not at fault: the next call may find room for it
                raise
            said = f"{spec.key} in {location.place} does not load ({error})"
            _warn(f"{said}; using the next candidate. Compile or tune it again")
            return None

    def _compiled(self, spec: KernelSpec) -> KernelLocation | None:
        """Compile ``spec`` through the cache; None without a compiler, or when it does not compile."""
        if self._no_compiler:
            return None
        try:
            # Serving prebuilt kernels needs none of these: they may not be installed.
            from marlin_gen.compile import CompileFailure
            from marlin_gen.first_use import compile_now
            from marlin_gen.toolchain import ToolchainError
        except ImportError as error:
            self._no_compiler = f"cannot compile {spec.key}: {error}"
            return None
        try:
            result = compile_now(spec)
        except (ToolchainError, OSError) as error:  # a timeout is an OSError, and would come again
            self._no_compiler = f"cannot compile {spec.key}: {error}"
            return None
        except ValueError as error:  # not legal for this architecture, for instance a forced plan
            _warn(str(error))
            return None
        if isinstance(result, CompileFailure):
            _warn(f"{spec.key} does not compile ({result.reason}); using the next candidate")
            return None
        return KernelLocation(result.cubin, result.symbol)


@once
def _server(device_index: int) -> Server:
    """The one server of a device: a second one's locks would not be the first one's."""
    return new_server(device_index)


def new_server(device_index: int) -> Server:
    """A server with the tables that are found now; the native launcher forgets what it was told by another."""
    launcher = Launcher.for_device(device_index)
    server = Server(device_index, launcher, Dispatcher(launcher.gpu, find_tables(), forced_plan(), shipped_ptx()))
    if found := native.library():
        server.launch_natively(found)
    return server


def _fix(problem: Problem) -> str:
    """What to run to be served better, as a sentence."""
    return (
        f"Run `marlin-gen tune --shapes {problem.n}x{problem.k}` here, or install a compiler for the default kernels:"
        " pip install 'marlin_gen[tune,nvrtc]'"
    )


def _warn(message: str) -> None:
    warnings.warn(message, ServeWarning, stacklevel=2)
