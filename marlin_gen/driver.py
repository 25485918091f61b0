"""The CUDA driver, through cuda-bindings (CUDA builds of torch bring it): identity, modules, tensor maps, launches."""

from __future__ import annotations

import ctypes
import threading
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from marlin_gen.arch import Gpu

_THREAD = threading.local()
_MAX_CONFIGS = 4096  # remembered by a thread: one per grid seen


class LaunchError(RuntimeError):
    """The driver refused; the message names the call and the CUDA error."""


@cache
def _driver() -> Any:
    try:
        from cuda.bindings import driver
    except ImportError as error:
        raise LaunchError(f"cuda-bindings is missing ({error}); get it with: pip install cuda-bindings") from error
    return driver


def call(name: str, *arguments: Any) -> Any:
    """Call driver function ``name``: its result, a tuple of several, or None. LaunchError unless it succeeds."""
    status, *results = getattr(_driver(), name)(*arguments)
    if int(status):
        raise LaunchError(f"{name}: {status.name}")
    return results[0] if len(results) == 1 else tuple(results) or None


def identify(device_index: int) -> Gpu:
    """The identity of a CUDA device. Needs no context."""
    call("cuInit", 0)
    device = call("cuDeviceGet", device_index)

    def read(name: str) -> int:
        enum = _driver().CUdevice_attribute
        return int(call("cuDeviceGetAttribute", getattr(enum, f"CU_DEVICE_ATTRIBUTE_{name}"), device))

    # Memory clock in kHz, two transfers a clock, bus width in bits.
    bandwidth = 2 * read("MEMORY_CLOCK_RATE") * read("GLOBAL_MEMORY_BUS_WIDTH") / 8 / 1e6
    name = call("cuDeviceGetName", 96, device).split(b"\0")[0].decode()
    return Gpu(
        capability=(read("COMPUTE_CAPABILITY_MAJOR"), read("COMPUTE_CAPABILITY_MINOR")),
        num_sms=read("MULTIPROCESSOR_COUNT"),
        l2_bytes=read("L2_CACHE_SIZE"),
        smem_per_sm=read("MAX_SHARED_MEMORY_PER_MULTIPROCESSOR"),
        bandwidth_gbs=round(bandwidth) or 300,  # some that share the CPU's memory do not say
        name=name,
    )


def driver_version() -> str:
    """The newest CUDA version the installed driver supports, such as 13.0."""
    version = int(call("cuDriverGetVersion"))
    return f"{version // 1000}.{version % 1000 // 10}"


@dataclass(frozen=True)
class Function:
    """A loaded kernel. Holds its module, so that it stays loaded."""

    handle: Any
    module: Any


def load(cubin: Path, symbol: str, smem_bytes: int) -> Function:
    """``load_image`` of a file; a LaunchError where it cannot be read."""
    try:
        image = cubin.read_bytes()
    except OSError as error:
        raise LaunchError(f"cannot read {cubin.name}: {error.strerror}") from error
    return load_image(image, symbol, smem_bytes)


def load_image(image: bytes, symbol: str, smem_bytes: int) -> Function:
    """Load a cubin or PTX into the current context and allow it ``smem_bytes`` of dynamic shared memory.

    PTX is compiled by the driver, which keeps the result in a cache of its own.
    """
    module = call("cuModuleLoadData", image + b"\0")  # by which the end of PTX is known; a cubin says its size itself
    function = call("cuModuleGetFunction", module, symbol.encode())
    limit = _driver().CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
    call("cuFuncSetAttribute", function, limit, smem_bytes)
    return Function(function, module)


def launch_config(grid: int, threads: int, smem_bytes: int, cluster: int, dependent: bool = False) -> Any:
    """This thread's CUlaunchConfig for a one-dimensional grid: ``launch`` writes the stream into it.

    ``dependent``: a kernel that calls griddepcontrol.wait may start before the one ahead of it on the stream is done.
    """
    configs = _THREAD.__dict__.setdefault("configs", {})
    key = (grid, threads, smem_bytes, cluster, dependent)
    if key not in configs:
        if len(configs) >= _MAX_CONFIGS:
            configs.clear()
        configs[key] = _new_config(*key)
    return configs[key]


def _new_config(grid: int, threads: int, smem_bytes: int, cluster: int, dependent: bool) -> Any:
    driver = _driver()
    config = driver.CUlaunchConfig()
    config.gridDimX, config.gridDimY, config.gridDimZ = grid, 1, 1
    config.blockDimX, config.blockDimY, config.blockDimZ = threads, 1, 1
    config.sharedMemBytes = smem_bytes
    attributes = []
    if cluster > 1:
        dimension = driver.CUlaunchAttribute()
        dimension.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION
        dimension.value.clusterDim.x, dimension.value.clusterDim.y, dimension.value.clusterDim.z = cluster, 1, 1
        attributes.append(dimension)
    if dependent:
        early = driver.CUlaunchAttribute()
        early.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
        early.value.programmaticStreamSerializationAllowed = 1
        attributes.append(early)
    if attributes:
        config.attrs, config.numAttrs = attributes, len(attributes)
    return config


def resident_clusters(function: Function, threads: int, smem_bytes: int, cluster: int, num_sms: int) -> int:
    """How many clusters (blocks, when ``cluster`` is 1) of the kernel run at once on an empty GPU."""
    if cluster > 1:
        config = launch_config(cluster, threads, smem_bytes, cluster)
        return int(call("cuOccupancyMaxActiveClusters", function.handle, config))
    return num_sms * int(call("cuOccupancyMaxActiveBlocksPerMultiprocessor", function.handle, threads, smem_bytes))


def bind_context(device_index: int) -> None:
    """Give the calling thread the device's primary context, torch's, unless it has one.

    A thread has none until something in it calls the CUDA runtime, which torch's allocator need not.
    """
    if not int(call("cuCtxGetCurrent")):
        call("cuCtxSetCurrent", call("cuDevicePrimaryCtxRetain", call("cuDeviceGet", device_index)))


def tensor_map(pointer: int, rows: int, columns: int, box: tuple[int, int], row_stride: int | None = None) -> Any:
    """A CUtensorMap of a row-major 16-bit matrix, read or written in boxes of (rows, columns), 128-byte swizzle.

    ``pointer`` is 16-byte aligned, ``columns`` and ``row_stride`` (``columns`` when None) are multiples of 8, a box row
    is 128 bytes. The encoded 128 bytes are at ``.getPtr()``.
    """
    d = _driver()
    return call(
        "cuTensorMapEncodeTiled",
        d.CUtensorMapDataType.CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
        2,
        pointer,
        [d.cuuint64_t(columns), d.cuuint64_t(rows)],
        [d.cuuint64_t((row_stride or columns) * 2)],
        [d.cuuint32_t(box[1]), d.cuuint32_t(box[0])],
        [d.cuuint32_t(1), d.cuuint32_t(1)],
        d.CUtensorMapInterleave.CU_TENSOR_MAP_INTERLEAVE_NONE,
        d.CUtensorMapSwizzle.CU_TENSOR_MAP_SWIZZLE_128B,
        d.CUtensorMapL2promotion.CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
        d.CUtensorMapFloatOOBfill.CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
    )


def launch(function: Function, config: Any, arguments: list[Any], stream: int) -> None:
    """Launch on ``stream`` (a CUstream as an integer). ``arguments`` are ctypes scalars or objects with ``getPtr``."""
    pointers = (ctypes.c_void_p * len(arguments))(
        *(a.getPtr() if hasattr(a, "getPtr") else ctypes.addressof(a) for a in arguments)
    )
    config.hStream = stream
    call("cuLaunchKernelEx", config, function.handle, ctypes.addressof(pointers), 0)
