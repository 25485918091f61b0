"""tools/sanitize.py without a GPU: its cases, what it makes of a sanitizer's words, and a dry run."""

from __future__ import annotations

import ctypes
import subprocess
from pathlib import Path

import pytest
import torch
from load_tool import load_tool

from marlin_gen import driver
from marlin_gen.arch import ARCHS
from marlin_gen.config import KernelConfig, KernelSpec
from marlin_gen.families import FAMILIES
from marlin_gen.formats import FORMATS
from marlin_gen.installed import find_tables

sanitize, sanitize_case = load_tool("sanitize"), load_tool("sanitize_case")


def every_spec() -> list[KernelSpec]:
    """Defaults, what tables ship, and one of each partition that tables may lack."""
    keys = {key for table in find_tables() for key in table.kernels}
    configs = [(c, arch) for arch in ARCHS.values() for f in FAMILIES.rows.values() for c in f.defaults(arch, FMT)]
    configs += [(KernelConfig.from_key(key), ARCHS["sm_90a"]) for key in OTHERS]
    return [*map(KernelSpec.from_key, sorted(keys)), *(KernelSpec(c, FMT.name, "f16", a.name) for c, a in configs)]


FMT = FORMATS["u4b8g128"]
OTHERS = [
    "wgmma-m64n64k64-w4x2-s12-b1-c1-tiles-exact",
    "wgmma-m64n128k256-w8x1-s4-b1-c1-striped-exact",
    "wgmma-m32n64k64-w4x1-s5-b1-c4-clusterk-exact",
    "mma-m16n112k64-w1x4-s2-b2-c2-clusterk-deferred",
    "mma-m8n16k256-w1x4-s2-b4-c1-tiles-deferred",
    "mma-m8n256k64-w4x2-s2-b1-c1-tiles-deferred",
]


@pytest.mark.parametrize("spec", every_spec(), ids=lambda spec: spec.key)
def test_every_case_is_legal_small_and_wraps_the_ring(spec):
    case, config, family = sanitize_case.Case.of(spec), spec.config, FAMILIES.of(spec.config)
    p = case.problem
    assert family.reject_reason(config, spec.format_row, spec.arch_row) is None
    assert family.reject_problem(config, p) is None
    assert p.n * p.k * p.m < 3e9, "a racecheck of it would take long"
    assert p.m > config.block_m and p.m % config.block_m, "a partial token tile beside a whole one"
    shape = family.launch_shape(case.plan, p, 132, case.max_clusters)
    assert 1 < shape.grid <= 64, "blocks enough to meet, few enough to be resident at once"
    tiles = -(-p.m // config.block_m) * -(-p.n // config.block_n)
    splits = config.warps_k * config.cluster_size if config.family == "mma" else config.cluster_size
    if config.partition == "striped":
        per_block = -(-tiles * (p.k // config.block_k) // shape.grid)
        assert per_block > config.num_stages
        assert p.k // config.block_k > 2 * per_block, "some tile is cut into three"
    else:
        assert p.k // config.block_k // splits > config.num_stages
        assert tiles > shape.grid // config.cluster_size, "some block has more than one tile, or pass"


CLEAN = """========= COMPUTE-SANITIZER
case a-key symbol=kernel_a n=64 k=128 m=17 grid=2
done a-key error=2.1e-04
case b-key symbol=kernel_b n=64 k=128 m=17 grid=2
done b-key error=2.1e-04
2 kernels, 0 failed
"""
NO_ERRORS = "========= ERROR SUMMARY: 0 errors\n"
NO_HAZARDS = "========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)\n"


@pytest.mark.parametrize(("tool", "summary"), [("memcheck", NO_ERRORS), ("racecheck", NO_HAZARDS)])
def test_a_clean_report(tool, summary):
    report = sanitize.parse(tool, CLEAN + summary, 0)
    assert report.clean and report.cases == ("a-key", "b-key")


@pytest.mark.parametrize(
    ("tool", "found"),
    [
        (
            "memcheck",
            "========= Invalid __global__ write of size 8 bytes\n=========     at kernel_b+0x420\n"
            "=========     by thread (1,0,0) in block (0,0,0)\n========= \n========= ERROR SUMMARY: 1 error\n",
        ),
        (
            "racecheck",
            "========= Error: Race reported between Read access at kernel_b+0xa70\n"
            "=========     and Write access at kernel_b+0xb00 [96 hazards]\n========= \n"
            "========= RACECHECK SUMMARY: 1 hazard displayed (1 error, 0 warnings)\n",
        ),
    ],
)
def test_a_fault_names_its_kernel_wherever_it_is_printed(tool, found):
    for text in (CLEAN + found, found + CLEAN):
        report = sanitize.parse(tool, text, 9)
        assert not report.clean and list(report.faults) == ["b-key"]
        assert "kernel_b+0x" in report.summary()


@pytest.mark.parametrize(
    ("text", "returncode", "at_fault"),
    [
        (CLEAN.replace("done b-key error=2.1e-04", "failed b-key: relative error nan") + NO_ERRORS, 1, "b-key"),
        (CLEAN.replace("done b-key error=2.1e-04\n", "") + NO_ERRORS, 0, "b-key"),
        (CLEAN, 255, ""),
        (CLEAN + NO_ERRORS, 1, ""),
        (CLEAN + "========= Internal error\n=========\n========= ERROR SUMMARY: 1 error\n", 9, ""),
        ("========= COMPUTE-SANITIZER\n========= Error: Device not supported\n", 255, ""),
    ],
)
def test_what_is_not_clean(text, returncode, at_fault):
    assert list(sanitize.parse("memcheck", text, returncode).faults) == [at_fault]


def test_nothing_launched_is_not_clean():
    assert not sanitize.parse("memcheck", NO_ERRORS, 0).clean


def fake_sanitizer(folder: Path, script: str) -> Path:
    path = folder / "compute-sanitizer"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return path


def test_run_reports_what_the_tool_prints(tmp_path):
    (tmp_path / "out.txt").write_text(CLEAN + NO_ERRORS)
    assert sanitize.Run(fake_sanitizer(tmp_path, f"cat {tmp_path}/out.txt"), "memcheck", []).report().clean


def test_a_hang_ends_with_all_its_processes(tmp_path):
    script = f"sleep 60 & echo $! >{tmp_path}/child; wait"
    report = sanitize.Run(fake_sanitizer(tmp_path, script), "racecheck", [], timeout_s=0.5).report()
    assert report.faults[""] == ["racecheck printed no summary; exit status -9"]
    child = int((tmp_path / "child").read_text())
    assert subprocess.run(["ps", "-o", "stat=", "-p", str(child)], capture_output=True, text=True).stdout[:1] in "Z"


def test_version(tmp_path):
    tool = fake_sanitizer(tmp_path, "echo 'NVIDIA (R) Compute Sanitizer'; echo 'Version 2025.3.1.0 (build 3)'")
    assert sanitize.version_of(tool) == (2025, 3, 1, 0) < sanitize.TRUSTED


class HostDriver:
    """The driver's memory calls on host memory, and a launch that reads its arguments as the kernel would."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, spec: KernelSpec) -> None:
        self.memory: dict[int, ctypes.Array] = {}
        self.spec = spec
        self.dependent: list[int] = []  # of each launch
        monkeypatch.setattr(sanitize_case, "call", self.call)
        monkeypatch.setattr(driver, "load_image", lambda image, symbol, smem_bytes: driver.Function(None, None))
        monkeypatch.setattr(driver, "resident_clusters", lambda *arguments: 132)
        monkeypatch.setattr(driver, "tensor_map", lambda pointer, rows, columns, box: (pointer, rows, columns, box))
        monkeypatch.setattr(driver, "launch", self.launch)

    def call(self, name, *arguments):
        if name == "cuMemAlloc":
            buffer = ctypes.create_string_buffer(arguments[0])
            self.memory[ctypes.addressof(buffer)] = buffer
            return ctypes.addressof(buffer)
        if name in ("cuMemcpyHtoD", "cuMemcpyDtoH"):
            return ctypes.memmove(*arguments)
        if name == "cuMemFree":
            return self.memory.pop(arguments[0])
        assert name in ("cuCtxSynchronize",)
        return None

    def launch(self, function, config, arguments, stream):
        case, family = sanitize_case.Case.of(self.spec), FAMILIES.of(self.spec.config)
        p = case.problem
        shape = family.launch_shape(case.plan, p, 132, case.max_clusters)
        names = [*shape.operands, *("scalar" for _ in shape.scalars), "dependent"]
        given = dict(zip(names, arguments, strict=True))
        self.dependent.append(given["dependent"].value)
        pointer = given["c_map"][0] if "c_map" in given else given["c"].value
        a_pointer = given["a_map"][0] if "a_map" in given else given["a"].value
        assert len(self.memory[pointer]) == p.m * p.n * 2 and len(self.memory[a_pointer]) == p.m * p.k * 2
        given = sanitize_case.operands(p)
        assert bytes(self.memory[a_pointer]) == sanitize_case.as_bytes(given.a).tobytes()
        assert bytes(self.memory[arguments[names.index("bias")].value]) == sanitize_case.as_bytes(given.bias).tobytes()
        c = given.reference.to(given.a.dtype).view(torch.int16).numpy()
        ctypes.memmove(pointer, c.ctypes.data, c.nbytes)


@pytest.mark.parametrize(
    ("key", "numbers"),
    [
        ("mma-m8n32k64-w1x16-s4-b1-c1-tiles-deferred", "u4b8g128-f16"),
        (OTHERS[1], "u4zg64-bf16"),
        (OTHERS[2], "u8b128g32-bf16"),
    ],
)
def test_dry_run(key, numbers, monkeypatch, capsys):
    """Everything but the kernel: operands of exact size, arguments in the kernel's order, nothing left allocated."""
    pytest.importorskip("cuda.bindings.driver")
    spec = KernelSpec.from_key(f"{key}-{numbers}-sm_90a")
    host = HostDriver(monkeypatch, spec)
    assert sanitize_case.run(spec, b"none", "kernel", 132) < 4e-3
    assert not host.memory and host.dependent == [0, 1]
    assert capsys.readouterr().out.startswith(f"case {spec.key} symbol=kernel n=")
