"""The wgmma family's kernel, run instruction by instruction on the CPU, whole and with each of its waits gone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, reduce
from pathlib import Path

import pytest
import torch
from emulation import COPIES, EmulatedKernel, needs_gxx, random_problem, relative_error

from marlin_gen.config import KernelConfig
from marlin_gen.formats import DTYPES, FORMATS
from marlin_gen.layout import PackedWeight, pack
from marlin_gen.reference import dequantize, gemm_reference, quantize

pytestmark = needs_gxx

Compiled = Callable[..., EmulatedKernel]


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Compiled:
    """The kernel of a config key, with the faults of that key to choose from or as it is; compiled once a module."""
    folder = tmp_path_factory.mktemp("kernels")

    @cache
    def compile_once(key: str, faults: tuple[Fault, ...] = ()) -> EmulatedKernel:
        return EmulatedKernel(
            KernelConfig.from_key(key), folder, lambda text: reduce(lambda t, fault: fault.put_into(t), faults, text)
        )

    return compile_once


@dataclass(frozen=True)
class Case:
    """One config and what runs on it: (m, n, k), max_clusters, resident clusters, raster."""

    key: str
    runs: tuple[tuple[tuple[int, int, int], int, int, int], ...]


TILES = "wgmma-m16n64k64-w4x1-s3-b1-c1-tiles-exact"
TWO_RINGS = "wgmma-m16n64k64-w4x1-s5a2-b1-c1-tiles-exact"
ROW_TILES = "wgmma-m24n128k128-w8x1-s2-b1-c1-tiles-exact"
SPLITS_3 = "wgmma-m8n64k64-w4x3-s6-b1-c1-tiles-exact"
CLUSTER_2 = "wgmma-m16n64k128-w4x1-s2-b1-c2-clusterk-exact"
STRIPED = "wgmma-m16n64k64-w4x1-s3-b1-c1-striped-exact"
DEFERRED = "wgmma-m16n64k256-w4x1-s2-b1-c1-tiles-deferred"
CASES = (
    # Rings that wrap in the middle of a tile, blocks with several tiles, a last token tile that is not full.
    # In the last run four token tiles, seven feature tiles walked four at a time: the last group is narrow.
    Case(TILES, (((1, 64, 128), 4, 4, 1), ((20, 128, 512), 3, 2, 1), ((50, 448, 128), 3, 3, 4))),
    # Two warpgroups side by side, of which the last tile needs one; two token tiles walked two feature tiles at a time.
    Case(ROW_TILES, (((50, 192, 384), 3, 3, 1), ((40, 320, 256), 2, 2, 2))),
    Case("wgmma-m8n64k256-w4x1-s2-b1-c1-tiles-exact", (((9, 64, 1280), 1, 1, 1),)),
    # A ring of activations that is shallower than that of weights, alone and where warpgroups share both.
    Case("wgmma-m16n128k64-w8x1-s5a2-b1-c1-tiles-exact", (((20, 192, 640), 1, 1, 1),)),
    Case("wgmma-m8n64k64-w4x2-s6a4-b1-c1-striped-exact", (((20, 128, 512), 3, 2, 1),)),
    Case("wgmma-m16n64k64-w4x2-s8a4-b1-c2-clusterk-exact", (((20, 128, 640), 1, 1, 1),)),
    # k blocks that warpgroups share unevenly; in the first run the last ones have none.
    Case(SPLITS_3, (((8, 64, 128), 1, 1, 1), ((20, 128, 512), 2, 2, 1))),
    Case("wgmma-m16n128k128-w8x2-s4-b1-c1-tiles-exact", (((16, 128, 128), 1, 1, 1), ((33, 192, 384), 2, 1, 1))),
    # Five k blocks over two blocks, six over four; clusters that have several tiles.
    Case(CLUSTER_2, (((20, 128, 640), 2, 1, 1), ((5, 192, 256), 1, 1, 1))),
    Case("wgmma-m32n128k64-w8x1-s3-b1-c4-clusterk-exact", (((40, 192, 384), 2, 2, 2),)),
    # Four tiles of 8 k blocks: stripes of 7 (a tile over two blocks), 3 (over three), 8 (none split), not all resident.
    Case(
        STRIPED,
        (((20, 128, 512), 5, 5, 1), ((20, 128, 512), 11, 1, 1), ((20, 128, 512), 11, 2, 2), ((20, 128, 512), 4, 1, 1)),
    ),
    # Stripes of what fills no wave, then whole tiles: twelve tiles on five blocks, on two, on one.
    Case(STRIPED, (((50, 192, 384), 5, 2, 2), ((50, 192, 256), 2, 1, 1), ((20, 128, 256), 1, 1, 1))),
    # Deferred: two groups a stage, half a group a stage, with two rings and with warpgroups along k.
    Case(DEFERRED, (((20, 128, 768), 2, 1, 1), ((5, 64, 256), 1, 1, 1))),
    Case("wgmma-m16n128k64-w8x1-s5a2-b1-c1-striped-deferred", (((20, 192, 640), 2, 2, 1),)),
    Case("wgmma-m16n64k128-w4x2-s4-b1-c2-clusterk-deferred", (((20, 128, 640), 1, 1, 1), ((20, 128, 256), 1, 1, 1))),
    # Two warpgroups along each axis; stripes that end inside a tile, one block at a time.
    Case("wgmma-m16n128k64-w8x2-s4-b1-c1-striped-exact", (((16, 192, 512), 3, 1, 1), ((17, 192, 256), 5, 3, 1))),
)


@pytest.mark.parametrize("case", CASES, ids=[case.key for case in CASES])
def test_kernel_computes_the_product(case: Case, compiled: Compiled) -> None:
    kernel = compiled(case.key)
    for shape, max_clusters, resident, raster in case.runs:
        a, packed, dense = random_problem(*shape)
        late, *others = (
            kernel(a, packed, max_clusters, seed=seed, copies=copies, resident=resident, raster=raster)
            for seed, copies in enumerate(COPIES)
        )
        assert relative_error(late, a.float() @ dense.T) < 1e-3, shape
        for other in others:
            assert torch.equal(late, other), "the result depends on when copies land or in which order threads run"


@pytest.mark.parametrize("key", [TILES, STRIPED, DEFERRED])
def test_identity_gives_the_dequantised_weight(key: str, compiled: Compiled) -> None:
    _, packed, dense = random_problem(1, 128, 256)
    c = compiled(key)(torch.eye(256, dtype=torch.float16), packed, 5, seed=3, copies="anytime", resident=2)
    assert torch.equal(c, dense.half().T)


def weight_seen_by(kernel: EmulatedKernel, packed: PackedWeight, max_clusters: int, like: torch.Tensor) -> torch.Tensor:
    """The kernel's product with the identity, of ``like``'s k and type: the weight as it decodes it, [k, n]."""
    identity = torch.eye(like.shape[1]).to(like.dtype)
    return kernel(identity, packed, max_clusters, seed=2, copies="late")


# Stages that hold many groups, several warpgroups along k whose stages do, and clusters that split k between groups.
GROUPED = (
    (TILES, (20, 128, 320)),
    ("wgmma-m16n64k256-w4x1-s2-b1-c1-tiles-exact", (9, 64, 768)),
    (SPLITS_3, (20, 128, 320)),
    (CLUSTER_2, (5, 192, 384)),
    (STRIPED, (20, 128, 320)),
)


@pytest.mark.parametrize("weight_format", ["u4b8g128", "u4b8g64", "u4b8g32", "u4zg32"])
@pytest.mark.parametrize(("key", "shape"), GROUPED, ids=[key for key, _ in GROUPED])
def test_group_sizes(key: str, shape: tuple[int, int, int], weight_format: str, tmp_path: Path) -> None:
    if shape[2] % FORMATS[weight_format].group_size:
        shape = (*shape[:2], shape[2] + 64)  # 384 k, which all formats hold
    kernel = EmulatedKernel(KernelConfig.from_key(key), tmp_path, weight_format=weight_format)
    a, packed, dense = random_problem(*shape, weight_format)
    c = kernel(a, packed, 4, seed=1, copies="anytime")
    assert relative_error(c, a.float() @ dense.T) < 1e-3
    assert torch.equal(weight_seen_by(kernel, packed, 4, a), dense.half().T)


@pytest.mark.parametrize("act_dtype", DTYPES)
@pytest.mark.parametrize("weight_format", [f.name for f in FORMATS.values() if f.group_size == 32])
def test_every_kind_of_number(weight_format: str, act_dtype: str, tmp_path: Path) -> None:
    """Also with a bias that the last tile, half of it past n, must not read too far."""
    dtype = getattr(torch, DTYPES[act_dtype].torch_name)
    config = KernelConfig.from_key("wgmma-m16n128k64-w8x1-s3-b1-c1-striped-exact")
    kernel = EmulatedKernel(config, tmp_path, weight_format=weight_format, act_dtype=act_dtype)
    a, packed, dense = random_problem(21, 192, 320, weight_format, dtype)
    bias = torch.randn(192).to(dtype)
    expected = a.float() @ dense.T + bias.float()
    c = kernel(a, packed, 3, seed=1, copies="anytime", bias=bias)
    assert relative_error(c, expected) < (1e-3 if act_dtype == "f16" else 4e-3)
    assert torch.equal(weight_seen_by(kernel, packed, 3, a), dense.to(dtype).T)


@pytest.mark.parametrize("act_dtype", DTYPES)
@pytest.mark.parametrize("weight_format", ["u4b8g64", "u8b128g64"])
@pytest.mark.parametrize("key", [TILES, "wgmma-m16n128k128-w8x1-s2-b1-c2-clusterk-exact", STRIPED, DEFERRED])
def test_scales_of_any_size(key: str, weight_format: str, act_dtype: str, tmp_path: Path) -> None:
    """Every row by itself: of scales from 2^-14 (f16) or 2^-36 to 2^7, groups 2^-9 of the row's largest, and zeros."""
    dtype = getattr(torch, DTYPES[act_dtype].torch_name)
    n, k, fmt = 192, 1024, FORMATS[weight_format]
    generator = torch.Generator().manual_seed(5)
    codes = torch.randint(0, fmt.codes, (n, k), dtype=torch.uint8, generator=generator)
    of_rows = 2.0 ** torch.linspace(-14 if act_dtype == "f16" else -36, 7, n)[torch.randperm(n, generator=generator)]
    of_groups = 2.0 ** torch.randint(-9, 1, (n, k // fmt.group_size), generator=generator)
    scales = (of_rows[:, None] * of_groups * (1 + torch.rand(of_groups.shape, generator=generator) / 2)).to(dtype)
    scales[70], scales[71] = 0, scales[71] * -1
    a = torch.randn(20, k, generator=generator).to(dtype) / 512
    kernel = EmulatedKernel(KernelConfig.from_key(key), tmp_path, weight_format=weight_format, act_dtype=act_dtype)
    c = kernel(a, pack(codes, scales, weight_format), 2, seed=1, copies="anytime").float()
    reference = gemm_reference(a, codes, scales, weight_format)
    least = torch.finfo(dtype).tiny * (k // 64) ** 0.5  # of outputs and weights that are subnormal
    error = (c - reference).norm(dim=0) / (reference.norm(dim=0) + least)
    assert float(error.max()) < 2 * DTYPES[act_dtype].error_limit and not c[:, 70].any()
    rounded = (a.float() @ dequantize(codes, scales, weight_format).float().T).to(dtype).float()
    of_rounded = (rounded - reference).norm(dim=0) / (reference.norm(dim=0) + least)
    assert error.norm() < 1.1 * of_rounded.norm(), "as exact as cuBLAS with the rounded weight"


@pytest.mark.parametrize("act_dtype", DTYPES)
@pytest.mark.parametrize("scale", [1.0, 2.0 / 15, 1e-7])
@pytest.mark.parametrize("weight_format", ["u4b8g64", "u8b128g64"])
def test_groups_of_zeros_cost_no_others(weight_format: str, scale: float, act_dtype: str, tmp_path: Path) -> None:
    """Such as k padded to a multiple of the ranks, whose scale is whatever the quantiser left there."""
    dtype, fmt = getattr(torch, DTYPES[act_dtype].torch_name), FORMATS[weight_format]
    generator = torch.Generator().manual_seed(6)
    weight = torch.randn(64, 320, generator=generator) * 1e-4
    weight[:, 256:] = 0
    codes, scales = quantize(weight, weight_format, dtype)
    assert bool((codes[:, 256:] == fmt.zero_point).all())
    scales[:, 4] = scale
    a = torch.randn(20, 320, generator=generator).to(dtype)
    kernel = EmulatedKernel(KernelConfig.from_key(TILES), tmp_path, weight_format=weight_format, act_dtype=act_dtype)
    c = kernel(a, pack(codes, scales, weight_format), 2, seed=1, copies="anytime").float()
    assert relative_error(c, gemm_reference(a, codes, scales, weight_format)) < (5e-4 if act_dtype == "f16" else 4e-3)


@pytest.mark.parametrize("act_dtype", DTYPES)
@pytest.mark.parametrize("weight_format", ["u4b8g64", "u4zg128", "u8b128g128", "e4m3g128"])
def test_whole_numbers_scaled_afterwards(weight_format: str, act_dtype: str, tmp_path: Path) -> None:
    """Codes less their zero points are exact, in bf16 too, and so is a weight's product with its scale in fp32."""
    dtype = getattr(torch, DTYPES[act_dtype].torch_name)
    kernel = EmulatedKernel(KernelConfig.from_key(DEFERRED), tmp_path, weight_format=weight_format, act_dtype=act_dtype)
    a, packed, dense = random_problem(21, 192, 512, weight_format, dtype)
    c = kernel(a, packed, 3, seed=1, copies="anytime")
    assert relative_error(c, a.float() @ dense.T) < (1e-3 if act_dtype == "f16" else 4e-3)
    assert torch.equal(weight_seen_by(kernel, packed, 3, a), dense.to(dtype).T)


@dataclass(frozen=True)
class Fault:
    """Statements that the kernel contains once, what it may execute instead, and what then must be seen."""

    name: str
    key: str
    right: str
    wrong: str
    seen: tuple[str, ...]  # one of these is in the emulator's message; WRONG: the result is wrong
    resident: int = 2  # clusters at once

    def put_into(self, text: str) -> str:
        """``text`` with a choice between right and wrong, by emulator::request.fault."""
        assert text.count(self.right) == 1, self.right
        number = FAULTS.index(self) + 1
        choice = f"if (emulator::request.fault == {number}) {{\n{self.wrong}\n}} else {{\n{self.right}\n}}\n"
        return text.replace(self.right, choice)


WRONG = "wrong result"
TOUCHED = "touched while a copy to it is under way"
FAULTS = (
    Fault(
        "does not wait for a stage", TILES,
        "ptx::mbarrier_wait(barriers.full(at.stage), at.phase);", "",
        (TOUCHED, WRONG),
    ),
    Fault(
        "releases the stage it multiplies", TILES,
        "if (last_stage >= 0) release(barriers.a_empty(last_stage));",
        "release(barriers.a_empty(a_stage));",
        ("B of a wgmma was overwritten", "more arrivals"),
    ),
    Fault(
        "does not wait for activations", TWO_RINGS,
        "if (kOwnRing) ptx::mbarrier_wait(barriers.a_full(a_stage), a_at.phase);", "",
        (TOUCHED, WRONG),
    ),
    Fault(
        "fills a stage of activations in use", TWO_RINGS,
        "ptx::mbarrier_wait(barriers.a_empty(at.stage), at.phase);", "",
        ("B of a wgmma was overwritten", "mbarrier", TOUCHED, WRONG),
    ),
    Fault(
        "releases weights before it reads them", TWO_RINGS, "decode<kBuffer>(at.stage);",
        "release(barriers.empty(at.stage)); decode<kBuffer>(at.stage);",
        (TOUCHED, "more arrivals", WRONG),
    ),
    Fault(
        "decodes into registers in use", TILES, "ptx::wgmma_wait_group<1>();", "ptx::wgmma_wait_group<2>();",
        ("A registers of a wgmma were written", "B of a wgmma was overwritten"),
    ),
    Fault(
        "does not wait for its products", TILES, "ptx::wgmma_wait_group<0>();", "",
        ("B of a wgmma was overwritten", "sums were written", "products under way", WRONG),
    ),
    Fault(
        "waits for an arrival too many", TILES,
        "ptx::mbarrier_init(empty(stage), kRowTiles * kWarpgroup);",
        "ptx::mbarrier_init(empty(stage), kRowTiles * kWarpgroup + 1);",
        ("deadlock",),
    ),
    Fault(
        "expects too few bytes", TILES,
        "ptx::mbarrier_arrive_expect_tx(full, bytes);",
        "ptx::mbarrier_arrive_expect_tx(full, bytes - 16);",
        ("deadlock",),
    ),
    Fault(
        "fills a stage that has no barrier yet", TILES, "barriers.init_first();", "", ("mbarrier",),
    ),
    Fault(
        "leaves out an arrival for its other producer", SPLITS_3,
        "if (kTwoProducers) ptx::mbarrier_arrive(barriers.full(i));", "",
        ("deadlock",),
    ),
    Fault(
        "scales sums that are not there", DEFERRED, "ptx::wgmma_wait_group<0>();", "",
        ("B of a wgmma was overwritten", "sums were written", "products under way", WRONG),
    ),
    Fault(
        "stores without a fence", TILES,
        "ptx::fence_proxy_async_shared();\n    ptx::bar_sync(warpgroup_barrier(row_tile), kWarpgroup);",
        "ptx::bar_sync(warpgroup_barrier(row_tile), kWarpgroup);",
        ("without fence.proxy.async",),
    ),
    Fault(
        "starts before the barriers are there", TILES, "barriers.ready_sync();", "", ("deadlock", "mbarrier"),
    ),
    Fault(
        "overwrites what is being stored", TILES, "if (thread == 0) ptx::cp_async_bulk_wait_group_read();", "",
        ("overwritten before a store had read it",),
    ),
    Fault(
        "reads other splits' sums too soon", SPLITS_3, "ptx::bar_sync(full, kSplits * kWarpgroup);", "",
        (TOUCHED, WRONG),
    ),
    Fault(
        # What runs ahead also meets stages that another warpgroup had in the tile before, whose phases it has not seen.
        "overwrites its sums before they are read", SPLITS_3, "ptx::bar_sync(empty, kSplits * kWarpgroup);", "",
        (TOUCHED, WRONG, "overwritten before it was waited for"),
    ),
    Fault(
        "takes more registers than there are", SPLITS_3, "ptx::setmaxnreg_inc<Config::kConsumerRegisters>();",
        "ptx::setmaxnreg_inc<Config::kConsumerRegisters + 8>();",
        ("wait for registers",),
    ),
    Fault(
        "sends sums to a rank that still reads", CLUSTER_2,
        "ptx::mbarrier_wait_cluster(barriers.sums_empty(row_tile), phase ^ 1);", "",
        (TOUCHED, WRONG),
    ),
    Fault(
        "signals a rank that may have left", CLUSTER_2, "if (is_last) return;", "",
        ("a block that has left",),
    ),
    Fault(
        "stripes wait for later blocks", STRIPED,
        "return static_cast<int>(gridDim.x) - 1 - static_cast<int>(blockIdx.x);",
        "return static_cast<int>(blockIdx.x);",
        ("deadlock",), resident=1,
    ),
    Fault(
        "reads other stripes' sums too soon", STRIPED, "ptx::bar_sync(kPartialsReady, kPassThreads);", "",
        (WRONG,), resident=11,
    ),
    Fault(
        "says that sums are stored too soon", STRIPED, "ptx::bar_sync(kPartialsStored, kPassThreads);", "",
        (WRONG,), resident=11,
    ),
    Fault(
        "loads what the kernel before it writes", TILES,
        "if (dependent) ptx::griddepcontrol_wait();  // before activations are read", "",
        ("a load of A before griddepcontrol.wait",),
    ),
    Fault(
        "stores into what the kernel before it reads", TILES,
        "if (dependent) ptx::griddepcontrol_wait();  // before anything is written\n", "",
        ("a store of C before griddepcontrol.wait",),
    ),
)  # fmt: skip
RUNS = {  # (m, n, k), max_clusters
    TILES: ((20, 128, 512), 2),
    TWO_RINGS: ((20, 128, 1024), 2),
    DEFERRED: ((20, 128, 1024), 2),
    SPLITS_3: ((20, 128, 512), 1),
    CLUSTER_2: ((20, 192, 640), 1),
    STRIPED: ((20, 128, 512), 11),
}
SCHEDULES = 12  # in one of which a fault must show


@pytest.mark.parametrize("fault", FAULTS, ids=[fault.name for fault in FAULTS])
def test_emulator_sees_a_broken_kernel(fault: Fault, compiled: Compiled) -> None:
    """The tests above can fail: with one of its waits gone, the kernel is found out."""
    kernel = compiled(fault.key, tuple(f for f in FAULTS if f.key == fault.key))
    shape, max_clusters = RUNS[fault.key]
    a, packed, dense = random_problem(*shape)

    def seen(seed: int) -> str | None:
        try:
            c = kernel(
                a, packed, max_clusters, seed=seed, copies=COPIES[seed % 3], resident=min(max_clusters, fault.resident),
                fault=FAULTS.index(fault) + 1,
            )  # fmt: skip
        except RuntimeError as error:
            return str(error)
        return None if relative_error(c, a.float() @ dense.T) < 1e-3 else WRONG

    first = next(filter(None, map(seen, range(SCHEDULES))), "nothing")
    assert any(part in first for part in fault.seen), first
