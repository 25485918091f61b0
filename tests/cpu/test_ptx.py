"""The shipped PTX: it is what the templates give, what a driver of CUDA 12.0 can read, and believed in nothing."""

from __future__ import annotations

import json
import lzma
import random
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from load_tool import load_tool

from marlin_gen import driver, toolchain, xz
from marlin_gen.arch import ARCHS, PTX_ARCH, Gpu, arch_for
from marlin_gen.config import KernelSpec
from marlin_gen.families import FAMILIES
from marlin_gen.families.defaults import ptx_plan
from marlin_gen.formats import DTYPES, FORMATS
from marlin_gen.problem import Problem
from marlin_gen.shipped_ptx import MAX_UNPACKED, PtxKernel, PtxWarning, ShippedPtx, file_text, parse, shipped_ptx
from marlin_gen.table_file import seal

MAX_TOTAL_BYTES = 1 << 20  # of all files: what a wheel may carry of them
NAMES = shipped_ptx().names()


make_ptx = load_tool("make_ptx")


def content(name: str) -> bytes:
    return xz.unpack(shipped_ptx().path(name).read_bytes(), MAX_UNPACKED)


# What ships.


def test_the_committed_ptx_is_of_the_sources_as_they_are():
    """After a change of the templates or the defaults: python tools/make_ptx.py"""
    assert make_ptx.stale(shipped_ptx()) == []


@pytest.mark.parametrize("fmt", FORMATS.values(), ids=lambda fmt: fmt.name)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_choice_of_the_rule_is_there(fmt, dtype):
    for num_sms in (20, 46, 108, 132, 170):
        for n in (64, 1024, 4096, 6144, 28672):
            for m in (1, 8, 9, 17, 33, 64, 1000):
                problem = Problem(n, 4096, m, fmt.name, dtype)
                plan = ptx_plan(problem, Gpu((8, 6), num_sms, 6 << 20, 100 << 10, 500))
                assert shipped_ptx().find(KernelSpec(plan.config, fmt.name, dtype, PTX_ARCH)), plan.key


def test_it_is_small():
    assert sum(path.stat().st_size for path in shipped_ptx().folder.iterdir()) <= MAX_TOTAL_BYTES


@pytest.mark.parametrize("name", NAMES)
def test_a_file_is_what_the_tool_writes(name):
    text = content(name)
    compiler = json.loads(text)["compiler"]
    assert re.fullmatch(r"nvrtc 13\.0\.\d+", compiler), "the version that pyproject.toml pins"
    assert file_text(parse(text), compiler).encode() == text
    for key, kernel in parse(text).items():
        assert re.search(rf"^\.visible \.entry {kernel.symbol}\($", kernel.text, re.MULTILINE), key
        assert re.findall(r"^\.(version|target) (\S+)$", kernel.text, re.MULTILINE) == [
            ("version", toolchain.PTX_VERSION), ("target", "sm_80"),
        ]  # fmt: skip
        assert not re.search(r"(?<![\w/])/(home|root|tmp|usr|work)/", kernel.text), "no path of a machine"


@pytest.mark.usefixtures("tmp_cache")
def test_the_pinned_compiler_makes_the_same_bytes_again():
    try:
        nvrtc = toolchain.find_toolchain("nvrtc")
    except toolchain.ToolchainError as error:
        pytest.skip(str(error))
    text = content("u4b8g128")
    if json.loads(text)["compiler"] != f"nvrtc {nvrtc.version}":
        pytest.skip(f"NVRTC here is {nvrtc.version}")
    assert make_ptx.compiled("u4b8g128", nvrtc) == parse(text)


def assembled(kernel: PtxKernel, arch: str, folder: Path, version: str = toolchain.PTX_VERSION) -> bytes:
    """By ptxas, which is the driver's compiler too, and refuses an instruction that is newer than the version said."""
    ptxas = toolchain._in_wheel("nvidia-cuda-nvcc", r"/bin/ptxas$")
    if ptxas is None:
        pytest.skip("the wheel of nvcc, which holds ptxas, is not installed")
    (folder / "kernel.ptx").write_text(kernel.text.replace(f".version {toolchain.PTX_VERSION}", f".version {version}"))
    command = [str(ptxas), f"-arch={arch}", "kernel.ptx", "-o", "kernel.cubin"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return (folder / "kernel.cubin").read_bytes()


@pytest.mark.parametrize("name", NAMES)
def test_its_version_is_all_it_needs(name, tmp_path):
    """One kernel of each file, the largest of them all for every kind of GPU; the version it says changes nothing."""
    kernels = sorted(shipped_ptx().kernels(name).values(), key=lambda kernel: len(kernel.text))
    for arch in ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120") if name == "u4b8g128" else ("sm_80",):
        kernel = kernels[0] if name != "u4b8g128" else kernels[-1]
        assert assembled(kernel, arch, tmp_path) == assembled(kernel, arch, tmp_path, version="9.0"), arch


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_every_kernel_is_assembled_for_old_and_new_gpus(name, tmp_path):
    for kernel in shipped_ptx().kernels(name).values():
        for arch in ("sm_80", "sm_120"):
            assembled(kernel, arch, tmp_path)


# Targets.


@pytest.mark.parametrize(
    ("capability", "name"),
    [
        ((8, 0), "sm_80"), ((8, 6), "sm_86"), ((8, 7), "sm_86"), ((8, 9), "sm_89"), ((9, 0), "sm_90a"),
        ((9, 1), PTX_ARCH), ((10, 0), PTX_ARCH), ((10, 3), PTX_ARCH), ((12, 0), PTX_ARCH), ((20, 0), PTX_ARCH),
    ],
)  # fmt: skip
def test_a_gpu_without_a_target_of_its_own_runs_ptx(capability, name):
    assert arch_for(capability).name == name


def test_a_gpu_that_is_too_old_still_is():
    with pytest.raises(ValueError, match="too old"):
        arch_for((7, 5))


def test_the_target_has_the_least_of_all():
    """Beside those listed: what compute capability 12.0 has."""
    least = ARCHS[PTX_ARCH]
    for arch in ARCHS.values():
        for limit in ("smem_per_block", "smem_per_sm", "max_threads_per_sm", "registers_per_sm"):
            assert getattr(least, limit) <= getattr(arch, limit)
    assert least.smem_per_block <= 99 << 10 and not least.has_tma and not least.has_wgmma
    assert {f.name for f in FAMILIES.rows.values() if f.defaults(least, FORMATS["u4b8g128"])} == {"mma"}


def test_nvcc_is_told_that_nvrtc_makes_ptx():
    nvcc = toolchain.Toolchain("nvcc", "13.0.88", Path("nvcc"), "")
    with pytest.raises(toolchain.ToolchainError, match="MARLIN_GEN_COMPILER=nvrtc"):
        nvcc.flags(PTX_ARCH)


# What is not intact is a miss with one warning.

EXAMPLE = {"k1": PtxKernel("one", "0" * 64, ".version 8.0\n"), "k2": PtxKernel("two", "1" * 64, ".target sm_80\n")}


def attempt(path: Path) -> list[str]:
    """Read as serving does; the warnings. Any other exception fails the test."""
    shipped = ShippedPtx(path.parent)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            found = shipped.kernels(path.name.removesuffix(".json.xz"))
    assert found in ({}, EXAMPLE) and all(w.category is PtxWarning for w in caught)
    assert bool(caught) == (not found)
    return [str(w.message) for w in caught]


@pytest.fixture
def written(tmp_path) -> Path:
    path = tmp_path / "x.json.xz"
    path.write_bytes(xz.pack(file_text(EXAMPLE, "nvrtc 1").encode()))
    assert attempt(path) == []
    return path


def test_one_bit_anywhere_is_a_miss_with_one_warning(written):
    packed, generator = written.read_bytes(), random.Random(0)
    text = file_text(EXAMPLE, "nvrtc 1").encode()
    for whole, wrap in ((packed, bytes), (text, xz.pack)):
        for at in range(len(whole)):
            damaged = whole[:at] + bytes([whole[at] ^ 1 << generator.randrange(8)]) + whole[at + 1 :]
            written.write_bytes(wrap(damaged))
            assert len(attempt(written)) == 1, at


def test_a_file_cut_short_or_with_more_behind_is_a_miss(written):
    packed = written.read_bytes()
    for length in range(len(packed)):
        written.write_bytes(packed[:length])
        assert len(attempt(written)) == 1, length
    written.write_bytes(packed + b"more")
    assert len(attempt(written)) == 1


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.binary(max_size=300), is_packed=st.booleans())
def test_any_bytes_are_no_file(written, data, is_packed):
    written.write_bytes(xz.pack(data) if is_packed else data)
    assert len(attempt(written)) == 1


ODD = st.one_of(st.none(), st.integers(), st.floats(), st.text(max_size=8), st.lists(st.integers(), max_size=2))


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_value_in_a_sealed_file_is_harmless(written, data):
    value = json.loads(file_text(EXAMPLE, "nvrtc 1"))
    del value["sha256"]
    places = [(value, name) for name in value if name != "compiler"]
    places += [(value["kernels"], key) for key in EXAMPLE]
    where, name = data.draw(st.sampled_from(places))
    where[name] = data.draw(ODD)
    written.write_bytes(xz.pack(seal(json.dumps(value)[1:]).encode()))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for kernel in ShippedPtx(written.parent).kernels("x").values():
            assert kernel.text.isascii() and "\0" not in kernel.text


@pytest.mark.parametrize("field", ["schema", "layout_version", "launch_version"])
def test_another_version_is_named(written, field):
    value = json.loads(file_text(EXAMPLE, "nvrtc 1"))
    del value["sha256"]
    value[field] += 1
    written.write_bytes(xz.pack(seal(json.dumps(value)[1:]).encode()))
    (said,) = attempt(written)
    assert f"{field}={value[field]} is not {value[field] - 1}" in said and "Restore the file" in said


def test_a_bomb_is_not_unpacked(written):
    written.write_bytes(lzma.compress(bytes(200 << 20)))
    (said,) = attempt(written)
    assert "unpacks to more than" in said


def test_a_python_without_lzma_does_without(written, monkeypatch):
    monkeypatch.setitem(sys.modules, "lzma", None)
    (said,) = attempt(written)
    assert "lzma" in said


def test_a_missing_file_is_no_fault(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert ShippedPtx(tmp_path).kernels("u4b8g128") == {}


def test_the_driver_gets_the_text_that_was_hashed_and_its_end(monkeypatch):
    images = []

    def call(name, *arguments):
        if name == "cuModuleLoadData":
            images.append(arguments[0])
        return 1

    monkeypatch.setattr(driver, "call", call)
    monkeypatch.setattr(driver, "_driver", lambda: type("D", (), {"CUfunction_attribute": ATTRIBUTES}))
    kernel = next(iter(shipped_ptx().kernels("u4b8g128").values()))
    driver.load_image(kernel.image, kernel.symbol, 0)
    assert images == [kernel.text.encode() + b"\0"]


ATTRIBUTES = type("A", (), {"CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES": 8})
