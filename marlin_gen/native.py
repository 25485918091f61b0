"""The native launcher, as Python sees it: load the library, tell it of formats, steps and locks.

``csrc/*.cpp`` looks a problem up, checks operands, allocates, makes tensor maps and launches, without the GIL. What
it does not know it hands to ``marlin_gen::gemm_slow``, which is ``cuda_op.py``'s; that tells it how to launch such a
problem next time (``Native.put_step``). Without a C++ compiler, or with MARLIN_GEN_LAUNCHER=python, all of it is
done in Python.
"""

from __future__ import annotations

import ctypes
import logging
from pathlib import Path

from marlin_gen import env, native_build
from marlin_gen.families.base import OPERANDS, LaunchShape
from marlin_gen.formats import DTYPES, FORMAT_CODES, FORMATS
from marlin_gen.once import once
from marlin_gen.problem import Problem, words_per_tile

log = logging.getLogger("marlin_gen")

DTYPE_CODES = {name: code for code, name in enumerate(DTYPES)}
MAX_OPERANDS, MAX_SCALARS = 12, 12


class FormatRecord(ctypes.Structure):
    """``Format`` in csrc/gemm.h."""

    _fields_ = (
        ("group_size", ctypes.c_int32), ("scale_values", ctypes.c_int32),
        ("lift_rows", ctypes.c_int32), ("words_per_tile", ctypes.c_int32),
    )  # fmt: skip


class KeyRecord(ctypes.Structure):
    """``ProblemKey`` in csrc/steps.h."""

    _fields_ = (
        ("n", ctypes.c_int32), ("k", ctypes.c_int32), ("m", ctypes.c_int32),
        ("format", ctypes.c_int16), ("dtype", ctypes.c_int8), ("device", ctypes.c_int8),
    )  # fmt: skip


class StepRecord(ctypes.Structure):
    """``Step`` in csrc/steps.h."""

    _fields_ = (
        ("function", ctypes.c_void_p), ("partials_bytes", ctypes.c_int64),
        ("grid", ctypes.c_uint32), ("threads", ctypes.c_uint32), ("smem_bytes", ctypes.c_uint32),
        ("cluster", ctypes.c_uint32), ("dependent", ctypes.c_uint32), ("num_locks", ctypes.c_uint32),
        ("a_box", ctypes.c_uint32 * 2), ("c_box", ctypes.c_uint32 * 2), ("a_tail_rows", ctypes.c_uint32),
        ("num_operands", ctypes.c_int32), ("num_scalars", ctypes.c_int32),
        ("scalars", ctypes.c_int32 * MAX_SCALARS), ("operands", ctypes.c_uint8 * MAX_OPERANDS),
    )  # fmt: skip


def key_record(problem: Problem, device_index: int) -> KeyRecord:
    codes = FORMAT_CODES[problem.weight_format], DTYPE_CODES[problem.act_dtype]
    return KeyRecord(problem.n, problem.k, problem.m, *codes, device_index)


def step_record(function: int, shape: LaunchShape, smem_bytes: int, dependent: bool) -> StepRecord:
    """What a launch with that much shared memory needs; ValueError for a shape that the library has no room for."""
    if len(shape.operands) > MAX_OPERANDS or len(shape.scalars) > MAX_SCALARS:
        raise ValueError(f"{len(shape.operands)} operands and {len(shape.scalars)} scalars are too many")
    record = StepRecord(
        function, shape.partials_bytes, shape.grid, shape.threads, smem_bytes, shape.cluster, dependent, shape.num_locks
    )
    record.a_box[:], record.c_box[:], record.a_tail_rows = shape.a_box, shape.c_box, shape.a_tail_rows
    record.num_operands, record.num_scalars = len(shape.operands), len(shape.scalars)
    record.operands[: record.num_operands] = [OPERANDS.index(operand) for operand in shape.operands]
    record.scalars[: record.num_scalars] = shape.scalars
    return record


class Native:
    """The loaded library. Any thread may call any method."""

    def __init__(self, path: Path) -> None:
        """Raises OSError when the library does not load, and native_build.BuildError when it is of other sources."""
        self.path = path
        library = ctypes.CDLL(str(path))
        for name in ("digest", "init", "implement"):
            self._function(library, name).restype = ctypes.c_char_p
        if (digest := library.marlin_gen_digest().decode()) != native_build.digest(env.native_dir()):
            raise native_build.BuildError(f"{path} was built from other sources ({digest})")
        if error := library.marlin_gen_init():
            raise native_build.BuildError(error.decode())
        self._function(library, "launches").restype = ctypes.c_uint64
        self._function(library, "lookup_ns").restype = ctypes.c_double
        self._function(library, "put_locks").argtypes = (
            ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint32,
        )  # fmt: skip
        self._function(library, "set_test_stream").argtypes = (ctypes.c_void_p,)
        self._library = library
        for name, code in FORMAT_CODES.items():
            row = FORMATS[name]
            record = FormatRecord(row.group_size, row.scale_values, row.has_lifts, words_per_tile(row))
            library.marlin_gen_set_format(code, ctypes.byref(record))

    @staticmethod
    def _function(library: ctypes.CDLL, name: str) -> ctypes._NamedFuncPointer:
        return getattr(library, f"marlin_gen_{name}")  # type: ignore[no-any-return]

    def implement(self, op: str, dispatch_key: str) -> None:
        """Register the library's kernel for ``marlin_gen::<op>``, for good."""
        if error := self._library.marlin_gen_implement(op.encode(), dispatch_key.encode()):
            raise RuntimeError(error.decode())

    def put_step(
        self, problem: Problem, device_index: int, function: int, shape: LaunchShape, smem_bytes: int, dependent: bool
    ) -> None:
        """Launch ``problem`` like this from now on. ``function`` is a CUfunction that stays loaded."""
        step = step_record(function, shape, smem_bytes, dependent)
        self._library.marlin_gen_put_step(ctypes.byref(key_record(problem, device_index)), ctypes.byref(step))

    def clear_steps(self, device_index: int) -> None:
        """Forget what was put for a device: its next calls ask Python."""
        self._library.marlin_gen_clear_steps(device_index)

    def put_locks(self, device_index: int, stream: int, address: int, num_locks: int) -> None:
        """Zeroed words for striped kernels on ``stream``; they stay allocated."""
        self._library.marlin_gen_put_locks(device_index, stream, address, num_locks)

    def launches(self) -> int:
        """How many kernels the library has launched."""
        return int(self._library.marlin_gen_launches())

    def lookup_ns(self, problem: Problem, device_index: int, repeats: int = 1_000_000) -> float:
        """Mean nanoseconds of one look-up; KeyError when the problem has no step yet."""
        spent = float(self._library.marlin_gen_lookup_ns(ctypes.byref(key_record(problem, device_index)), repeats))
        if spent < 0:
            raise KeyError(problem)
        return spent

    def set_test_stream(self, stream: int) -> None:
        """The stream that calls on CPU tensors are on: for tests, with a driver that only records."""
        self._library.marlin_gen_set_test_stream(stream)


@once
def library() -> Native | None:
    """The launcher, loaded or built on the first call; None, for good, where Python has to do its job.

    Raises RuntimeError when MARLIN_GEN_LAUNCHER=native and there is none.
    """
    wanted = env.launcher()
    if wanted == "python":
        return None
    reasons, there = [], native_build.candidates()
    for path in (*there, None):
        try:
            return Native(path or native_build.build_cached(there))
        except (OSError, native_build.BuildError) as error:
            reasons.append(str(error))
    if wanted == "native":
        raise RuntimeError(f"MARLIN_GEN_LAUNCHER=native, but there is no native launcher: {'; '.join(reasons)}")
    log.warning("launching from Python, which takes several times as long a call: %s", "; ".join(reasons))
    return None
