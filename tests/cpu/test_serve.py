"""Which kernel serves a problem when tables, cubins or compilers fail. Only loading is stood in for: it needs a GPU."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import tables
import torch
from tables import H100, mma, row, wgmma

from marlin_gen import serve, toolchain
from marlin_gen.config import KernelSpec
from marlin_gen.dispatch import Dispatcher
from marlin_gen.driver import LaunchError
from marlin_gen.problem import Problem
from marlin_gen.serve import Server, ServeWarning
from marlin_gen.table import DispatchTable, TableWarning
from marlin_gen.toolchain import ToolchainError

PROBLEM = Problem(4096, 4096, 1)
ROWS = [row(4096, 4096, 1, mma(32)), row(4096, 4096, 16, wgmma(16))]


class Loader:
    """Takes the driver's place: remembers what was loaded, refuses what it is told to, and computes nothing."""

    def __init__(self, refuse: str = "nothing") -> None:
        self.refuse = refuse
        self.loaded: list[Path] = []

    def load(self, cubin: Path, symbol: str, spec: KernelSpec, sha256: str | None) -> tuple[Path, str]:
        if self.refuse in spec.key:
            raise LaunchError("cuModuleLoadData: CUDA_ERROR_INVALID_IMAGE")
        self.loaded.append(cubin)
        return cubin, symbol


def server(found: list[DispatchTable], refuse: str = "nothing") -> tuple[Server, Loader]:
    loader = Loader(refuse)
    return Server(0, loader, Dispatcher(H100, found)), loader  # type: ignore[arg-type]


@pytest.fixture
def no_compiler(monkeypatch):
    def find() -> None:
        raise ToolchainError("no CUDA compiler; get it with: pip install ...")

    monkeypatch.setattr(toolchain, "find_toolchain", find)


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
    (table.folder / table.kernels[ROWS[0].specs(H100)[0].key].file).write_bytes(b"damaged")
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


def test_without_table_and_compiler_the_last_resort_says_what_to_do(no_compiler):
    made, _ = server([])
    with pytest.warns(ServeWarning) as caught:
        assert made.choice(PROBLEM) is None
    assert "no CUDA compiler" in str(caught[0].message)
    assert "marlin-gen tune --shapes 4096x4096" in str(caught[-1].message)
    assert len(caught) == 2, "a missing compiler is looked for once"


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
    serve.dequantized_matmul(a, packed, None, out)
    reference = gemm_reference(a, codes, scales)
    assert (out.float() - reference).norm() / reference.norm() < 1e-3
    serve.dequantized_matmul(a, packed, torch.ones(64).half(), out)
    assert (out.float() - reference - 1).norm() / reference.norm() < 1e-3
