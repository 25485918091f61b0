"""The mma family: legality, defaults, launch arithmetic, and its kernel run instruction by instruction on the CPU."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from emulation import EmulatedKernel, needs_gxx, random_problem, relative_error

from marlin_gen.arch import ARCHS, Gpu
from marlin_gen.config import KernelConfig, Plan
from marlin_gen.families.mma import MMA
from marlin_gen.formats import DTYPES, FORMATS
from marlin_gen.problem import Problem

FORMAT = FORMATS["u4b8g128"]
BASE = KernelConfig.from_key("mma-m8n64k64-w1x8-s4-b1-c1-tiles-deferred")
GPUS = (
    Gpu((9, 0), 132, 50 << 20, 228 << 10, 3352),
    Gpu((8, 0), 108, 40 << 20, 164 << 10, 2039),
    Gpu((8, 6), 84, 6 << 20, 100 << 10, 936),
    Gpu((8, 9), 128, 72 << 20, 100 << 10, 1008),
)
SHAPES = ((64, 128), (6144, 4096), (4096, 14336), (28672, 8192), (192, 640))
TOKENS = (1, 8, 9, 16, 33, 64, 1000)
# The registry's offsets and bits in both number types, in the groups that are hardest, or scaled afterwards.
KINDS = [(f.name, "exact", act) for f in FORMATS.values() if f.group_size == 32 for act in DTYPES]
KINDS += [("u4b8g128", "deferred", "bf16"), ("u4zg128", "deferred", "f16"), ("u4zg128", "deferred", "bf16")]
KINDS += [(name, "deferred", act) for name in ("u8b128g128", "e4m3g128") for act in DTYPES]


@pytest.mark.parametrize(
    ("change", "arch", "words"),
    [
        ({"partition": "striped"}, "sm_90a", ["'striped'", "tiles"]),
        ({"partition": "clusterk"}, "sm_90a", ["'clusterk'", "cluster_size=1"]),
        ({"cluster_size": 2}, "sm_90a", ["'tiles'", "cluster_size=2"]),
        ({"cluster_size": 3, "partition": "clusterk"}, "sm_90a", ["cluster_size=3"]),
        ({"cluster_size": 2, "partition": "clusterk"}, "sm_80", ["cluster_size=2", "sm_80"]),
        ({"warps_k": 16, "warps_n": 2}, "sm_90a", ["32 warps", "16"]),
        ({"warps_k": 16, "blocks_per_sm": 4}, "sm_86", ["2048 threads", "1536"]),
        ({"block_n": 48, "warps_n": 2}, "sm_90a", ["block_n=48", "warps_n=2"]),
        ({"block_n": 512}, "sm_90a", ["block_n=512"]),
        ({"block_m": 40}, "sm_90a", ["block_m=40"]),
        ({"num_stages": 11}, "sm_90a", ["num_stages=11"]),
        ({"block_k": 96}, "sm_90a", ["block_k=96"]),
        ({"block_m": 64, "block_n": 256}, "sm_90a", ["registers", "block_m=64", "block_n=256"]),
        ({"num_stages": 10}, "sm_90a", ["bytes of shared memory", "sm_90a", "232448"]),
        ({"blocks_per_sm": 2}, "sm_90a", ["blocks_per_sm=2", "233472"]),
    ],
)
def test_reject_reason_names_the_value(change: dict[str, object], arch: str, words: list[str]) -> None:
    assert MMA.reject_reason(BASE, FORMAT, ARCHS["sm_90a"]) is None
    reason = MMA.reject_reason(replace(BASE, **change), FORMAT, ARCHS[arch])  # type: ignore[arg-type]
    assert reason is not None
    assert all(word in reason for word in words), reason


@pytest.mark.parametrize("gpu", GPUS, ids=lambda gpu: gpu.arch.name)
def test_default_is_legal_and_listed(gpu: Gpu) -> None:
    listed = set(MMA.defaults(gpu.arch, FORMAT))
    assert 0 < len(listed) <= 12
    for config in listed:
        assert MMA.reject_reason(config, FORMAT, gpu.arch) is None
    returned = {MMA.default(Problem(n, k, m), gpu).config for n, k in SHAPES for m in TOKENS}
    assert returned <= listed


@pytest.mark.parametrize(
    ("gbs", "rows"),
    [
        # Memory is all: the fewest rows, whose sums are added up soonest.
        (3352, {(4096, 4096): 16, (4096, 14336): 16, (6144, 4096): 16, (1024, 8192): 16}),
        # SMs multiply nearly as long as weights take to come: as many rows as keep each equally busy.
        (4814, {(4096, 4096): 32, (4096, 14336): 32, (6144, 4096): 48, (8192, 8192): 32, (28672, 4096): 112}),
    ],
)
def test_default_of_one_token_goes_by_memory_and_by_the_busiest_sm(gbs: int, rows: dict[tuple[int, int], int]) -> None:
    gpu = replace(GPUS[0], bandwidth_gbs=gbs)
    assert {shape: MMA.default(Problem(*shape, 1), gpu).config.block_n for shape in rows} == rows


@pytest.mark.parametrize("max_clusters", [1, 3, 33, 66, 132, 264])
def test_launch_covers_every_row_once(max_clusters: int) -> None:
    for n, k in SHAPES:
        for m in TOKENS:
            for cluster in (1, 2):
                config = replace(BASE, cluster_size=cluster, partition="clusterk" if cluster > 1 else "tiles")
                shape = MMA.launch_shape(Plan(config), Problem(n, k, m), 132, max_clusters)
                *sizes, rows = shape.scalars
                assert sizes == [m, n, k]
                token_tiles = -(-m // config.block_m)
                ranges, rest = divmod(shape.grid, token_tiles * cluster)
                assert rest == 0
                assert (ranges - 1) * rows < n // 16 <= ranges * rows, "a cluster has no rows, or a row no cluster"
                if token_tiles <= max_clusters:
                    assert shape.grid <= max_clusters * cluster, "a second wave"


@pytest.mark.parametrize(
    ("key", "n", "max_clusters", "rows"),
    [
        # 256 row blocks. Two blocks fit on an SM: one row block each would compute two, so an SM gets one of two.
        ("mma-m8n32k128-w1x8-s2-b1-c1-tiles-deferred", 4096, 264, 2),
        # 1792 row blocks. Five blocks of three would compute 20 an SM, four of four 16.
        ("mma-m8n32k64-w1x4-s4-b3-c1-tiles-deferred", 28672, 660, 4),
        # Nothing to gain by fewer blocks: as many as fit.
        ("mma-m8n16k128-w1x8-s3-b1-c1-tiles-deferred", 4096, 264, 1),
        # 14 passes of one warp pair would compute as much as 12 blocks of two passes, but wait for each.
        ("mma-m8n16k64-w1x2-s5-b4-c1-tiles-deferred", 28672, 1584, 2),
    ],
)
def test_rows_are_shared_out_so_that_no_pass_is_half_empty(key: str, n: int, max_clusters: int, rows: int) -> None:
    """The first two took 6.27 and 28.3 us on an H100 with as many blocks as fit, 4.99 and 22.9 like this."""
    shape = MMA.launch_shape(Plan(KernelConfig.from_key(key)), Problem(n, 4096, 8), 132, max_clusters)
    assert shape.scalars[-1] == rows and shape.grid == -(-n // 16 // rows)


@pytest.mark.parametrize("gpu", GPUS, ids=lambda gpu: gpu.arch.name)
def test_an_sm_holds_as_many_blocks_as_the_config_asks_for_or_more(gpu: Gpu) -> None:
    for config in MMA.defaults(gpu.arch, FORMAT):
        resident = MMA.resident_blocks(config, FORMAT, gpu.arch)
        assert config.blocks_per_sm <= resident <= gpu.arch.max_threads_per_sm // MMA.threads(config)


def test_empty_product_is_refused() -> None:
    assert "m=0" in (MMA.reject_problem(BASE, Problem(64, 128, 0)) or "")
    assert MMA.reject_problem(BASE, Problem(64, 128, 1)) is None
    largest = (1 << 24) - 128
    assert MMA.reject_problem(BASE, Problem(64, largest, 1)) is None
    assert "k=16777216 is too large" in (MMA.reject_problem(BASE, Problem(64, largest + 128, 1)) or "")


# One case per feature: a ring deeper or shallower than k, warps along n, passes that end early, k that ends inside a
# stage, several token tiles, sums added up in parts, clusters with and without work for every block.
CASES = (
    ("mma-m8n32k64-w1x4-s2-b1-c1-tiles-deferred", ((1, 64, 128), (7, 192, 640), (17, 128, 256))),
    ("mma-m16n96k128-w2x2-s3-b1-c1-tiles-exact", ((5, 192, 896), (40, 64, 384))),
    ("mma-m24n64k256-w1x2-s2-b1-c1-tiles-deferred", ((24, 128, 640), (30, 64, 128))),
    ("mma-m16n64k64-w1x4-s6-b1-c2-clusterk-deferred", ((16, 192, 640), (20, 64, 128))),
    ("mma-m32n112k256-w1x2-s2-b1-c4-clusterk-exact", ((29, 256, 384),)),
    ("mma-m64n64k64-w1x8-s2-b1-c1-tiles-exact", ((64, 64, 1024),)),
    ("mma-m48n64k64-w4x2-s2-b1-c1-tiles-exact", ((50, 192, 256),)),
)


@needs_gxx
@pytest.mark.parametrize(("key", "problems"), CASES, ids=[key for key, _ in CASES])
def test_kernel_computes_the_product(key: str, problems: tuple[tuple[int, int, int], ...], tmp_path: Path) -> None:
    kernel = EmulatedKernel(KernelConfig.from_key(key), tmp_path)
    for m, n, k in problems:
        a, packed, dense = random_problem(m, n, k)
        late = kernel(a, packed, 3, seed=1, copies="late")
        assert relative_error(late, a.float() @ dense.T) < 1e-3, (m, n, k)
        early = kernel(a, packed, 3, seed=2, copies="early")
        assert torch.equal(late, early), "the result depends on when copies land or in which order threads run"


@needs_gxx
def test_identity_gives_the_dequantised_weight(tmp_path: Path) -> None:
    _, packed, dense = random_problem(1, 64, 128)
    kernel = EmulatedKernel(replace(BASE, block_m=64, warps_k=2, dequant="exact"), tmp_path)
    c = kernel(torch.eye(128, dtype=torch.float16), packed, 4, seed=3, copies="late")
    assert torch.equal(c, dense.half().T)


@needs_gxx
@pytest.mark.parametrize("weight_format", ["u4b8g128", "u4b8g64", "u4b8g32", "u4zg32"])
@pytest.mark.parametrize("block_k", [64, 128, 256])
@pytest.mark.parametrize("dequant", ["exact", "deferred"])
def test_group_sizes(block_k: int, dequant: str, weight_format: str, tmp_path: Path) -> None:
    config = replace(BASE, block_k=block_k, warps_k=2, num_stages=2, dequant=dequant)
    if reason := MMA.reject_reason(config, FORMATS[weight_format], ARCHS["sm_90a"]):
        assert dequant == "deferred" and weight_format not in ("u4b8g64", "u4b8g128"), reason
        return
    k = {32: 320, 64: 448, 128: 384}[FORMATS[weight_format].group_size]  # no multiple of 256: a last stage past k
    a, packed, dense = random_problem(7, 128, k, weight_format)
    kernel = EmulatedKernel(config, tmp_path, weight_format=weight_format)
    assert relative_error(kernel(a, packed, 2, seed=5, copies="late"), a.float() @ dense.T) < 1e-3


@needs_gxx
@pytest.mark.parametrize(("weight_format", "dequant", "act_dtype"), KINDS)
def test_every_kind_of_number(weight_format: str, dequant: str, act_dtype: str, tmp_path: Path) -> None:
    dtype = getattr(torch, DTYPES[act_dtype].torch_name)
    config = replace(BASE, block_n=32, warps_k=2, num_stages=2, dequant=dequant)
    kernel = EmulatedKernel(config, tmp_path, weight_format=weight_format, act_dtype=act_dtype)
    a, packed, dense = random_problem(7, 64, 320 if "g32" in weight_format else 384, weight_format, dtype)
    bias = torch.randn(64).to(dtype)
    expected = a.float() @ dense.T + bias.float()
    limit = 1e-3 if act_dtype == "f16" else 4e-3
    assert relative_error(kernel(a, packed, 2, seed=5, copies="late", bias=bias), expected) < limit
    if dequant == "exact":
        identity = torch.eye(packed.k).to(dtype)
        assert torch.equal(kernel(identity, packed, 2, seed=6, copies="late"), dense.to(dtype).T)


@needs_gxx
@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("cp_async_wait_group<Config::kNumStages - 1>", "cp_async_wait_group<Config::kNumStages>"),
        ("if (pass > 0 || first_token > 0) __syncthreads();", ""),
        ("__syncthreads();\n    if constexpr", "if constexpr"),
        ("row_block_end - 1)", "row_block_end + 99)"),
    ],
    ids=["waits for too few copies", "overwrites sums", "reads sums too soon", "reads past the weight"],
)
def test_emulator_sees_a_broken_kernel(right: str, wrong: str, tmp_path: Path) -> None:
    """The tests above can fail: with one of its waits or bounds gone, the kernel is found out."""

    def broken(text: str) -> str:
        assert text.count(right) == 1
        return text.replace(right, wrong)

    a, packed, dense = random_problem(7, 192, 128)
    # Passes of 80 of 192 rows: the last one reaches past the end.
    kernel = EmulatedKernel(replace(BASE, block_n=80, warps_k=2, num_stages=2), tmp_path, broken)

    def is_wrong(seed: int) -> bool:
        try:
            return not relative_error(kernel(a, packed, 1, seed=seed, copies="late"), a.float() @ dense.T) < 1e-3
        except RuntimeError as fault:
            return "outside" in str(fault)

    assert any(is_wrong(seed) for seed in range(32))
