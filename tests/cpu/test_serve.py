"""Which kernel serves a problem when tables, cubins or compilers fail. Only loading is stood in for: it needs a GPU."""

from __future__ import annotations

import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import tables
import torch
from tables import A100, H100, mma, row, wgmma

from marlin_gen import first_use, serve, toolchain
from marlin_gen.arch import Gpu
from marlin_gen.config import KernelSpec
from marlin_gen.dispatch import Dispatcher
from marlin_gen.driver import LaunchError
from marlin_gen.once import once
from marlin_gen.problem import Problem
from marlin_gen.reference import dequantized_matmul
from marlin_gen.serve import Server, ServeWarning
from marlin_gen.shipped_ptx import PtxWarning, ShippedPtx, shipped_ptx
from marlin_gen.table import DispatchTable, TableWarning
from marlin_gen.toolchain import ToolchainError

PROBLEM = Problem(4096, 4096, 1)
ROWS = [row(4096, 4096, 1, mma(32)), row(4096, 4096, 16, wgmma(16))]


class Loader:
    """Takes the driver's place: remembers what was loaded, refuses what it is told to, and computes nothing."""

    def __init__(self, refuse: str = "nothing") -> None:
        self.refuse, self.error = refuse, "CUDA_ERROR_INVALID_IMAGE"
        self.loaded: list[Path] = []

    def load(self, file: Path, symbol: str, spec: KernelSpec, image: bytes | None) -> tuple[Path, str]:
        if self.refuse in spec.key:
            raise LaunchError(f"cuModuleLoadData: {self.error}")
        self.loaded.append(file)
        return file, symbol


def server(
    found: list[DispatchTable], refuse: str = "nothing", gpu: Gpu = H100, ptx: ShippedPtx | None = None
) -> tuple[Server, Loader]:
    loader = Loader(refuse)
    return Server(0, loader, Dispatcher(gpu, found, ptx=ptx)), loader  # type: ignore[arg-type]


@pytest.fixture(autouse=True)
def captures(monkeypatch) -> list[bool]:
    """Whether a graph is being captured: the last of these."""
    told = [False]
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: told[-1])
    return told


@pytest.fixture
def no_compiler(monkeypatch):
    def find() -> None:
        raise ToolchainError("no CUDA compiler; get it with: pip install ...")

    monkeypatch.setattr(first_use, "find_toolchain", find)


def test_a_prebuilt_kernel_is_loaded_once(tmp_path):
    made, loader = server([tables.table(tmp_path, ROWS)])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert made.choice(PROBLEM).plan == mma(32)
        assert made.choice(PROBLEM) is made.choice(PROBLEM)
        assert made.choice(Problem(4096, 4096, 16)).plan == made.choice(Problem(4096, 4096, 9)).plan == wgmma(16)
    assert len(loader.loaded) == 2


def test_a_damaged_cubin_costs_one_warning_and_the_next_candidate_serves(tmp_path, no_compiler):
    table = tables.table(tmp_path, ROWS)
    tables.damage(table, ROWS[0].specs(H100)[0].key)
    made, _ = server([DispatchTable.load(table.folder)])
    with pytest.warns(UserWarning) as caught:
        assert made.choice(PROBLEM).plan == wgmma(16)
        assert made.choice(Problem(4096, 4096, 1)).plan == wgmma(16)
    assert [w.category for w in caught] == [TableWarning, ServeWarning]
    assert "sha256 differs" in str(caught[0].message) and "no CUDA compiler" in str(caught[1].message)


def test_a_cubin_that_does_not_load_costs_one_warning(tmp_path, no_compiler):
    made, loader = server([tables.table(tmp_path, ROWS)], refuse="mma-m8n32")
    with pytest.warns(ServeWarning, match=r"does not load \(cuModuleLoadData.*using the next candidate") as caught:
        assert made.choice(PROBLEM).plan == wgmma(16)
        assert made.choice(Problem(4096, 4096, 2)).plan == wgmma(16)
    assert len(caught) == 1 and len(loader.loaded) == 1


def test_a_kernel_that_a_capture_does_not_let_load_is_not_given_up(tmp_path, captures):
    made, loader = server([tables.table(tmp_path, ROWS)], refuse="mma-m8n32")
    captures.append(True)
    with pytest.raises(LaunchError, match=r"captured \(cuModuleLoadData.*call marlin_gen.gemm once .* before"):
        made.choice(PROBLEM)
    captures.append(False)
    loader.refuse = "nothing"
    assert made.choice(PROBLEM).plan == mma(32)


def test_a_kernel_that_memory_is_short_for_is_not_given_up(tmp_path):
    made, loader = server([tables.table(tmp_path, ROWS)], refuse="mma-m8n32")
    loader.error = "CUDA_ERROR_OUT_OF_MEMORY"
    with pytest.raises(LaunchError, match="OUT_OF_MEMORY"):
        made.choice(PROBLEM)
    loader.refuse = "nothing"
    assert made.choice(PROBLEM).plan == mma(32)


def test_threads_whose_first_calls_meet_get_one_server(monkeypatch):
    made: list[int] = []

    def slowly(index: int) -> object:
        made.append(index)
        time.sleep(0.05)
        return object()

    monkeypatch.setattr(serve, "_server", once(serve._server.__wrapped__))
    monkeypatch.setattr(serve, "new_server", slowly)
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(serve._server, [0, 1] * 8))
    assert sorted(made) == [0, 1] and len(set(map(id, found))) == 2


def test_without_table_and_compiler_the_last_resort_says_what_to_do(no_compiler):
    made, _ = server([])
    with pytest.warns(ServeWarning) as caught:
        assert made.choice(PROBLEM) is None
    (said,) = map(str, (warning.message for warning in caught))
    assert "no CUDA compiler" in said and "dequantising the whole weight on every call" in said
    assert "marlin-gen tune --shapes 4096x4096" in said and "pip install" in said


GPUS = {
    "A100": A100,
    "RTX 4090": Gpu((8, 9), 128, 72 << 20, 100 << 10, 1008, "NVIDIA GeForce RTX 4090"),
    "H100": H100,
    "B200": Gpu((10, 0), 148, 126 << 20, 228 << 10, 8000, "NVIDIA B200"),
    "RTX 5090": Gpu((12, 0), 170, 96 << 20, 100 << 10, 1792, "NVIDIA GeForce RTX 5090"),
}


@pytest.mark.parametrize("name", GPUS)
@pytest.mark.parametrize("m", [1, 17, 1000])
def test_without_table_and_compiler_shipped_ptx_serves_any_gpu(no_compiler, name, m):
    made, loader = server([], gpu=GPUS[name], ptx=shipped_ptx())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        choice = made.choice(Problem(4096, 4096, m))
        again = made.choice(Problem(4096, 4096, m + 1))
    assert choice.spec.arch == "compute_80" and b".target sm_80" in choice.kernel.image
    assert again.spec != choice.spec or again.kernel.image is choice.kernel.image, "a server remembers thousands"
    assert all(path.name == "u4b8g128.json.xz" for path in loader.loaded)
    said = [str(warning.message) for warning in caught]
    if GPUS[name].arch.is_ptx:  # its defaults are those kernels: nothing was to be compiled
        assert choice.origin == "default" and not said
    else:
        assert choice.origin == "ptx" and len(said) == 1
        assert "no CUDA compiler" in said[0] and choice.key in said[0] and "marlin-gen tune --shapes" in said[0]


def test_ptx_that_the_driver_refuses_leaves_the_last_resort(no_compiler):
    made, _ = server([], refuse="compute_80", ptx=shipped_ptx())
    with pytest.warns(ServeWarning) as caught:
        assert made.choice(PROBLEM) is None
    assert "does not load (cuModuleLoadData" in str(caught[0].message) and len(caught) == 2


def test_damaged_ptx_is_one_warning_and_the_last_resort(no_compiler, tmp_path):
    (tmp_path / "u4b8g128.json.xz").write_bytes(shipped_ptx().path("u4b8g128").read_bytes()[:-100])
    made, _ = server([], ptx=ShippedPtx(tmp_path))
    with pytest.warns(UserWarning) as caught:
        assert made.choice(PROBLEM) is None and made.choice(Problem(4096, 4096, 3)) is None
    assert [w.category for w in caught] == [PtxWarning, ServeWarning, ServeWarning]


def test_a_compiler_that_takes_too_long_is_not_waited_for_twice(monkeypatch):
    asked = []

    def slow(spec):
        asked.append(spec)
        raise TimeoutError("nvrtc has not compiled it in 120 s")

    monkeypatch.setattr(first_use, "compile_now", slow)
    made, _ = server([], ptx=shipped_ptx())
    with pytest.warns(ServeWarning, match="has not compiled it in 120 s; others serve instead") as caught:
        assert {made.choice(Problem(4096, 4096, m)).origin for m in (1, 20, 100)} == {"ptx"}
    assert len(asked) == len(caught) == 1


def test_a_table_or_a_compiler_comes_before_ptx(tmp_path, tmp_cache):
    made, _ = server([tables.table(tmp_path, ROWS)], ptx=shipped_ptx())
    assert [made.choice(problem).origin for problem in (PROBLEM, Problem(64, 128, 1))] == ["exact", "default"]
    assert next(iter(made.dispatcher.choose(Problem(64, 128, 1)))).kernel is None, "it was compiled"


def test_a_plan_that_does_not_launch_is_still_tried_as_ptx(no_compiler):
    """On an RTX 4090 the default is the same plan, for another target."""
    gpu = GPUS["RTX 4090"]
    made, _ = server([], gpu=gpu, ptx=shipped_ptx())
    native, ptx = (choice for choice in made.dispatcher.choose(PROBLEM))
    assert native.plan == ptx.plan and (native.spec.arch, ptx.spec.arch) == ("sm_89", "compute_80")
    made._failed.add(((4096, 4096, 1, "u4b8g128", "f16"), native.plan, "sm_89"))
    assert made.choice(PROBLEM).origin == "ptx"


def test_a_kernel_that_does_not_compile_is_passed_over(tmp_path, tmp_cache, monkeypatch):
    """The real compiler, and a hand-edited source with an error in it."""
    first, second = list(Dispatcher(H100, []).choose(PROBLEM))[:2]
    monkeypatch.setenv("MARLIN_GEN_OVERRIDE_DIR", str(tmp_path))
    (tmp_path / f"{first.spec.key}.cu").write_text("this is not CUDA\n")
    made, _ = server([])
    with pytest.warns(ServeWarning, match="does not compile .* using the next candidate"):
        assert made.choice(PROBLEM).plan == second.plan


def test_a_default_kernel_is_compiled_on_first_use(tmp_cache, caplog):
    made, loader = server([])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        choice = made.choice(PROBLEM)
    assert choice.origin == "default" and choice.kernel is None
    assert loader.loaded[0].is_relative_to(tmp_cache)
    assert loader.loaded[0].read_bytes()[:4] == b"\x7fELF"
    assert [r.message for r in caplog.records if "compiling" in r.message] == [
        f"no prebuilt kernel {choice.spec.key}; compiling it with {toolchain.find_toolchain().name}, once"
    ]


def test_decisions_are_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(serve, "MAX_STEPS", 10)
    made, loader = server([tables.table(tmp_path, ROWS)])
    for m in range(1, 40):
        made.choice(Problem(4096, 4096, m))
    assert len(made._steps) <= 10
    assert len(loader.loaded) == 2, "kernels are remembered apart from decisions"


def test_the_last_resort_computes_the_reference():
    """What runs when no kernel does, on CPU tensors."""
    from marlin_gen.layout import pack
    from marlin_gen.reference import gemm_reference

    codes = torch.randint(0, 16, (64, 128), dtype=torch.uint8)
    scales = (torch.rand(64, 1) * 0.02 + 0.005).half()
    packed = pack(codes, scales)
    a, out = torch.randn(3, 128).half(), torch.full((3, 64), float("nan")).half()
    dequantized_matmul(a, packed, None, out)
    reference = gemm_reference(a, codes, scales)
    assert (out.float() - reference).norm() / reference.norm() < 1e-3
    dequantized_matmul(a, packed, torch.ones(64).half(), out)
    assert (out.float() - reference - 1).norm() / reference.norm() < 1e-3
