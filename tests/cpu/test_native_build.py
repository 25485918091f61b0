"""The native launcher's build: declarations that are torch's and CUDA's own, a library that is whole and current."""

from __future__ import annotations

import ctypes
import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import fake_gpu
import pytest
import torch

from marlin_gen import env, native, native_build
from marlin_gen.families.base import OPERANDS, LaunchShape

ROOT = Path(__file__).resolve().parents[2]
NATIVE = ROOT / "marlin_gen/csrc"
TORCH_INCLUDE = Path(torch.__file__).parent / "include"

pytestmark = fake_gpu.needs_compiler


def compiles(source: str, *flags: str) -> subprocess.CompletedProcess[str]:
    command = ["g++", "-std=c++17", "-fsyntax-only", f"-I{NATIVE}", *flags, "-x", "c++", "-"]
    return subprocess.run(command, input=source, capture_output=True, text=True)


SHIMS = """
#include <torch/csrc/stable/c/shim.h>
#include <type_traits>
#include "torch_shims.h"
#define SAME(name, result, arguments) static_assert(std::is_same_v<decltype(&::name), result(*) arguments>, #name);
MARLIN_GEN_TORCH_SHIMS(SAME)
#ifdef USE_CUDA
static_assert(std::is_same_v<decltype(&::aoti_torch_get_current_cuda_stream),
                             decltype(marlin_gen::Torch::aoti_torch_get_current_cuda_stream)>);
#endif
"""


@pytest.mark.parametrize("target", ["0x0209000000000000", "0x020a000000000000"])
def test_the_shims_are_declared_as_torch_2_9_declares_them(target):
    done = compiles(SHIMS, f"-I{TORCH_INCLUDE}", f"-DTORCH_TARGET_VERSION={target}", "-DUSE_CUDA")
    assert done.returncode == 0, done.stderr


def test_a_wrong_or_newer_shim_would_be_noticed():
    for wrong in ("X(torch_call_dispatcher, AOTITorchError, (const char*, const char*, StableIValue*, uint64_t))",
                  "X(aoti_torch_get_dim, AOTITorchError, (AtenTensorHandle, int32_t*))"):  # fmt: skip
        source = SHIMS.replace("MARLIN_GEN_TORCH_SHIMS(SAME)", wrong.replace("X(", "SAME("))
        done = compiles(source, f"-I{TORCH_INCLUDE}", "-DTORCH_TARGET_VERSION=0x0209000000000000")
        assert done.returncode != 0, wrong


CUDA = """
#include <cuda.h>
#include "cuda_driver.h"
using namespace marlin_gen::cuda;
#define OFFSET(ours, a, theirs, b) static_assert(offsetof(ours, a) == offsetof(theirs, b), #a)
static_assert(sizeof(TensorMap) == sizeof(CUtensorMap) && alignof(TensorMap) >= alignof(CUtensorMap));
static_assert(sizeof(LaunchAttribute) == sizeof(CUlaunchAttribute));
OFFSET(LaunchAttribute, id, CUlaunchAttribute, id);
OFFSET(LaunchAttribute, cluster, CUlaunchAttribute, value);
static_assert(sizeof(LaunchConfig) == sizeof(CUlaunchConfig));
OFFSET(LaunchConfig, grid, CUlaunchConfig, gridDimX);
OFFSET(LaunchConfig, block, CUlaunchConfig, blockDimX);
OFFSET(LaunchConfig, smem_bytes, CUlaunchConfig, sharedMemBytes);
OFFSET(LaunchConfig, stream, CUlaunchConfig, hStream);
OFFSET(LaunchConfig, attributes, CUlaunchConfig, attrs);
OFFSET(LaunchConfig, num_attributes, CUlaunchConfig, numAttrs);
static_assert(kClusterDimension == CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION);
static_assert(kInvalidContext == CUDA_ERROR_INVALID_CONTEXT && kSuccess == CUDA_SUCCESS);
static_assert(kFloat16 == CU_TENSOR_MAP_DATA_TYPE_FLOAT16 && kInterleaveNone == CU_TENSOR_MAP_INTERLEAVE_NONE);
static_assert(kSwizzle128 == CU_TENSOR_MAP_SWIZZLE_128B && kZeroFill == CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
static_assert(kPromoteL2To256 == CU_TENSOR_MAP_L2_PROMOTION_L2_256B);
static_assert(CU_STREAM_CAPTURE_STATUS_NONE == 0);
"""


def test_the_driver_is_declared_as_cuda_declares_it():
    include = next((folder for folder in cuda_includes() if (folder / "cuda.h").is_file()), None)
    if include is None:
        pytest.skip("no cuda.h")
    done = compiles(CUDA, f"-I{include}")
    assert done.returncode == 0, done.stderr


def cuda_includes() -> list[Path]:
    """Of the toolkit, and of the compiler's wheels."""
    spec = importlib.util.find_spec("nvidia")
    folders = [Path(path) for path in spec.submodule_search_locations] if spec else []
    toolkit = [home / "include"] if (home := env.cuda_home()) else []
    return [*toolkit, *(path for folder in folders for path in folder.glob("*/include"))]


RECORDS = """
#include "gemm.h"
#include "torch_shims.h"
using namespace marlin_gen;
static_assert(sizeof(ProblemKey) == {key} && sizeof(Step) == {step} && sizeof(Format) == {fmt});
static_assert(offsetof(Step, a_box) == {a_box} && offsetof(Step, scalars) == {scalars});
static_assert(offsetof(Step, operands) == {operands});
static_assert(int(Operand::kLocks) == {last} && int(Operand::kBias) == {bias});
static_assert(kMaxOperands == {max_operands} && kMaxScalars == {max_scalars});
"""


def test_records_are_laid_out_as_the_library_reads_them():
    values = {
        "key": ctypes.sizeof(native.KeyRecord), "step": ctypes.sizeof(native.StepRecord),
        "fmt": ctypes.sizeof(native.FormatRecord), "a_box": native.StepRecord.a_box.offset,
        "scalars": native.StepRecord.scalars.offset, "operands": native.StepRecord.operands.offset,
        "last": OPERANDS.index("locks"), "bias": OPERANDS.index("bias"),
        "max_operands": native.MAX_OPERANDS, "max_scalars": native.MAX_SCALARS,
    }  # fmt: skip
    done = compiles(RECORDS.format(**values))
    assert done.returncode == 0, done.stderr
    assert OPERANDS.index("locks") == len(OPERANDS) - 1


def test_too_many_operands_are_refused():
    with pytest.raises(ValueError, match="13 operands"):
        native.step_record(1, LaunchShape(1, 1, 0, 1, ("a",) * 13, ()), 0, False)


def run(code: str, **changes: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT)} | changes
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)


WHO = "import torch, logging; logging.basicConfig(level='INFO'); from marlin_gen import native; print(native.library())"


def test_without_compiler_or_driver_python_launches(tmp_path):
    """And says why, when asked to be verbose; native can be insisted on."""
    bare = {"PATH": str(tmp_path), "MARLIN_GEN_CACHE_DIR": str(tmp_path / "cache")}
    done = run(WHO, **bare)
    assert done.stdout.strip() == "None" and "no C++ compiler on PATH" in done.stderr, done.stderr
    done = run(WHO, **bare, MARLIN_GEN_LAUNCHER="native")
    assert "RuntimeError: MARLIN_GEN_LAUNCHER=native, but there is no native launcher: no C++ compiler" in done.stderr
    assert run(WHO, MARLIN_GEN_LAUNCHER="python").stdout.strip() == "None"


def test_processes_that_build_at_once_leave_one_whole_library(tmp_path):
    fake_gpu.build(tmp_path)
    changes = {
        "MARLIN_GEN_CACHE_DIR": str(tmp_path / "cache"), "LD_LIBRARY_PATH": str(tmp_path),
        "MARLIN_GEN_LAUNCHER": "native", "PYTHONPATH": str(ROOT),
    }  # fmt: skip
    command = [sys.executable, "-c", WHO.replace("native.library()", "native.library().path")]
    started = [
        subprocess.Popen(command, env=os.environ | changes, stdout=subprocess.PIPE, text=True) for _ in range(2)
    ]
    found = {process.communicate()[0].strip() for process in started}
    expected = tmp_path / "cache" / "native" / native_build.digest(NATIVE) / native_build.LIBRARY
    assert found <= {str(expected), str(native_build.carried(NATIVE))} and all(p.returncode == 0 for p in started)
    assert [path.name for path in expected.parent.glob("*")] in ([native_build.LIBRARY], [])


def test_a_cached_library_that_does_not_load_is_built_anew(tmp_path):
    """One that a power cut left empty, or that another machine with another C library put into a shared cache."""
    folder = tmp_path / "marlin_gen" / "csrc"
    shutil.copytree(NATIVE, folder, ignore=shutil.ignore_patterns("*.so"))
    fake_gpu.build(tmp_path)
    there = tmp_path / "cache" / "native" / native_build.digest(folder) / native_build.LIBRARY
    there.parent.mkdir(parents=True)
    there.write_bytes(b"")
    code = f"""
import torch
from pathlib import Path
from marlin_gen import env, native
env.native_dir = lambda: Path({str(folder)!r})
print(native.library().path)
"""
    changes = {"MARLIN_GEN_CACHE_DIR": str(tmp_path / "cache"), "LD_LIBRARY_PATH": str(tmp_path)}
    for _ in range(2):
        done = run(code, **changes, MARLIN_GEN_LAUNCHER="native")
        assert done.stdout.strip() == str(there) and there.stat().st_size > 0, done.stderr
        changes["PATH"] = str(tmp_path)  # no compiler: from now on it is loaded


def test_a_cache_that_cannot_be_read_has_no_library(tmp_path, monkeypatch):
    monkeypatch.setattr(env, "native_dir", lambda: tmp_path / "package/csrc")
    shutil.copytree(NATIVE, env.native_dir(), ignore=shutil.ignore_patterns("*.so"))
    monkeypatch.setenv("MARLIN_GEN_CACHE_DIR", "/" + "x" * 300)  # which fails for root too
    assert native_build.candidates() == []
    with pytest.raises(OSError, match="File name too long"):  # and then Python launches
        native_build.build_cached()


def test_a_library_of_other_sources_is_not_used(tmp_path, monkeypatch):
    folder = tmp_path / "marlin_gen" / "csrc"
    shutil.copytree(NATIVE, folder, ignore=shutil.ignore_patterns("*.so"))
    output = native_build.build(folder, native_build.carried(folder))
    assert output.stat().st_mode & 0o111
    monkeypatch.setattr(env, "native_dir", lambda: folder)
    assert native_build.candidates()[0] == output
    (folder / "steps.h").write_text((folder / "steps.h").read_text() + "// changed\n")
    with pytest.raises(native_build.BuildError, match="built from other sources"):
        native.Native(output)


def test_a_build_that_fails_says_why_and_leaves_nothing(tmp_path):
    (tmp_path / "broken.cpp").write_text("this is not C++\n")
    with pytest.raises(native_build.BuildError, match=r"broken\.cpp"):
        native_build.build(tmp_path, tmp_path / "out" / "library.so")
    assert list((tmp_path / "out").iterdir()) == []
