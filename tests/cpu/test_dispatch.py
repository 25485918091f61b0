"""The look-up rule: exact shape, nearest shape, default; related GPUs below; damage moves on to the next candidate."""

from __future__ import annotations

import time
from dataclasses import replace

import pytest
import tables
from hypothesis import given, settings
from hypothesis import strategies as st
from tables import A100, H100, H200, mma, row, wgmma

from marlin_gen import env
from marlin_gen.arch import Gpu
from marlin_gen.config import KernelConfig, KernelSpec, Plan
from marlin_gen.dispatch import GOOD_DEFAULTS, Dispatcher, choose, known_winners
from marlin_gen.families import FAMILIES
from marlin_gen.families.defaults import default_plan, fits_better
from marlin_gen.installed import find_tables, tables_below
from marlin_gen.problem import Problem
from marlin_gen.table import DispatchTable, TableWarning
from marlin_gen.table_index import MAX_DISTANCE, POOR_DEFAULT, distance, wave_fill

M1, M16, M64 = mma(32), wgmma(16), wgmma(64)
NVL = replace(H100, bandwidth_gbs=3938)  # an H100 with other memory, so related
SLICE = replace(H100, num_sms=60)  # of an H100: of its architecture alone


def bare(rows, gpu=H100) -> DispatchTable:
    """A table without cubins."""
    return DispatchTable(gpu, tuple(sorted(rows, key=lambda r: r.problem)), {})


def plans(problem: Problem, *found: DispatchTable, gpu: Gpu = H100) -> list[tuple[str, Plan]]:
    return [(choice.origin, choice.plan) for choice in Dispatcher(gpu, found).choose(problem)]


ONE_SHAPE = bare([row(4096, 4096, 1, M1), row(4096, 4096, 16, M16), row(4096, 4096, 64, M64)])


@pytest.mark.parametrize(
    ("m", "expected"),
    [(1, M1), (2, M16), (15, M16), (16, M16), (17, M64), (63, M64), (64, M64), (65, M64), (100_000, M64)],
)
def test_exact_shape_takes_the_next_row_up_else_the_largest(m, expected):
    origin, plan = plans(Problem(4096, 4096, m), ONE_SHAPE)[0]
    assert (origin, plan) == ("exact", expected)


def test_candidates_go_on_upwards_then_downwards_then_to_defaults():
    found = plans(Problem(4096, 4096, 2), ONE_SHAPE)
    assert found[:3] == [("exact", M16), ("exact", M64), ("exact", M1)]
    assert {origin for origin, _ in found[3:]} == {"default"}
    assert len({plan for _, plan in found}) == len(found), "no plan twice"


@pytest.mark.parametrize(
    ("m", "expected"),
    [(1, "exact"), (2, "default"), (8, "default"), (9, "exact"), (16, "exact"), (17, "default"), (512, "default")],
)
def test_a_row_far_from_the_tokens_asked_for_comes_after_the_defaults_that_are_ready(m, expected, tmp_path):
    problem = Problem(5120, 4096, m)
    default = next(Dispatcher(H100, []).choose(problem)).plan
    rows = [row(5120, 4096, 1, M1, default=default), row(5120, 4096, 16, M16)]
    found = plans(problem, tables.table(tmp_path, rows))
    assert found[0][0] == expected and (expected == "exact" or found[0][1] == default)
    assert {("exact", M1), ("exact", M16)} <= set(found)


@pytest.mark.parametrize(("m", "expected"), [(511, "default"), (512, "exact"), (600, "exact"), (100_000, "exact")])
def test_rows_of_many_tokens_speak_for_one_another(m, expected, tmp_path):
    problem = Problem(5120, 4096, m)
    default = next(Dispatcher(H100, []).choose(problem)).plan
    many = replace(default, raster=16)  # no tiles fit better than its own
    table = tables.table(tmp_path, [row(5120, 4096, 2048, many, default=default)])
    assert default != many and plans(problem, table)[0] == (expected, many if expected == "exact" else default)


@pytest.mark.parametrize(
    ("m", "first"),
    [(129, "fitting"), (160, "fitting"), (192, "fitting"), *((m, "exact") for m in (24, 32, 193, 256))],
)
def test_a_plan_whose_tiles_fit_comes_before_a_row_of_a_third_more_tokens(m, first, tmp_path):
    """For 129 to 192 tokens 160 or 192 by what won at another shape; the row for 256 computes 256 of them."""
    served = wgmma(256) if m > 32 else wgmma(32)
    fits = [Plan(replace(wgmma(tile).config, num_stages=3)) for tile in (160, 192)]
    rows = [row(6144, 4096, plan.config.block_m, plan) for plan in fits]
    table = tables.table(tmp_path, [row(8192, 4096, served.config.block_m, served), *rows])
    expected = served if first == "exact" else fits[m > 160]
    found = plans(Problem(8192, 4096, m), table)
    assert found[0] == (first, expected) and ("exact", served) in found
    assert plans(Problem(8192, 4096, m), bare(table.rows))[0] == ("exact", served), "only a kernel that lies ready"


FITS = Plan(replace(wgmma(160).config, block_n=128, warps_n=8, num_stages=3))


def fitting_table(tmp_path, *more) -> DispatchTable:
    """What won for 160 tokens at another shape, and these rows."""
    return tables.table(tmp_path, [row(6144, 4096, 160, FITS), *more])


def test_a_shape_tuned_for_few_tokens_is_served_no_worse_than_one_never_tuned(tmp_path):
    problem = Problem(16384, 4096, 160)
    unseen = plans(problem, fitting_table(tmp_path))[0]
    few = fitting_table(tmp_path, row(16384, 4096, 1, M1), row(16384, 4096, 16, M16))
    assert unseen[0] == "fitting" and plans(problem, few)[0] == unseen


def test_many_tokens_take_what_fits_before_a_row_of_fewer(tmp_path):
    """640 are four tiles of 160, and with the row's of 256 three of which half of one is empty."""
    served = Plan(replace(wgmma(256).config, num_stages=2))
    table = fitting_table(tmp_path, row(8192, 4096, 512, served))
    assert plans(Problem(8192, 4096, 640), table)[0][0] == "fitting"
    assert plans(Problem(8192, 4096, 512), table)[0] == ("exact", served)


@pytest.mark.parametrize(("won_at", "m", "is_asked"), [(768, 192, True), (48, 192, True), (47, 192, False)])
def test_what_won_for_many_more_tokens_or_a_quarter_as_many_may_fit(won_at, m, is_asked, tmp_path):
    """One tile of 192 where four won: at 28672x4096 the default takes 1.4 times as long."""
    tiles = Plan(replace(wgmma(192).config, block_n=128, warps_n=8, block_k=64, num_stages=5), 8)
    found = plans(Problem(28672, 4096, m), tables.table(tmp_path, [row(6144, 4096, won_at, tiles)]))
    assert (found[0] == ("fitting", tiles)) == is_asked and ("fitting" in dict(found)) == is_asked


def test_what_a_row_won_against_stays_behind_it_where_the_tiles_are_as_many(tmp_path):
    """65 to 96 tokens, served by a row for 128 with one tile of 128: the default has one too, whatever is estimated."""
    problem = Problem(14336, 4096, 80)
    default = default_plan(problem, H100)
    served = Plan(replace(wgmma(128).config, num_stages=2))
    assert default.config.block_m == 128 and fits_better(default, served, problem, H100)
    table = tables.table(tmp_path, [row(14336, 4096, 128, served, default=default)])
    assert plans(problem, table)[0] == ("exact", served)


def test_a_plan_that_cannot_be_built_is_not_considered(tmp_path):
    """Nor estimated: some have no share of rows at all."""
    odd = Plan(replace(mma(32, 16).config, blocks_per_sm=1000))
    table = bare([row(6144, 4096, 16, odd, default=odd)])
    assert odd not in [plan for origin, plan in plans(Problem(8192, 4096, 16), table) if origin == "fitting"]


def test_what_fits_does_not_depend_on_defaults_being_good(tmp_path):
    table = fitting_table(tmp_path)  # no row says anything of defaults
    assert not Dispatcher(H100, [table])._indices[0][1].default_loss
    assert plans(Problem(16384, 4096, 160), table)[0][0] == "fitting"


@pytest.mark.parametrize("m", [8, 9, 16, 17])
def test_of_nine_to_sixteen_tokens_what_won_elsewhere_may_come_first(m, tmp_path):
    """On an H200 wide striped tiles, which no default has, take 0.91 of the default's time at 43008x5376."""
    wide = Plan(KernelConfig("wgmma", 16, 192, 128, 12, 1, 7, 1, 1, "striped", "deferred"))
    narrow = default_plan(Problem(28672, 8192, 16), H200)
    small = row(1024, 1024, 64, M64, us=100.0, default=M64)  # says that defaults are good
    table = tables.table(tmp_path, [row(28672, 8192, 16, wide, default=narrow), small], gpu=H200)
    found = plans(Problem(43008, 5376, m), table, gpu=H200)
    assert (found[0] == ("fitting", wide)) == (9 <= m <= 16)
    assert ("fitting" in dict(found)) == (9 <= m <= 16)


def test_more_tokens_than_its_tile_take_a_plan_in_the_order_of_several_tiles(tmp_path):
    found = plans(Problem(8192, 4096, 320), fitting_table(tmp_path, row(8192, 4096, 512, wgmma(256))))
    assert found[0] == ("fitting", replace(FITS, raster=8))


def test_a_rejected_plan_is_skipped():
    wide = wgmma(64, block_k=256)
    problem = Problem(4096, 4096 + 128, 8)
    assert FAMILIES.of(wide.config).reject_problem(wide.config, problem)
    table = bare([row(4096, 4096 + 128, 8, wide), row(4096, 4096 + 128, 16, M16)])
    assert plans(problem, table)[0] == ("exact", M16)
    assert wide not in [plan for _, plan in plans(problem, table)]


@pytest.mark.parametrize("m", [1, 7, 16, 17, 100, 1000, 5000])
@pytest.mark.parametrize("gpu", [H100, H200, A100, replace(A100, capability=(8, 6)), replace(A100, capability=(8, 9))])
def test_without_a_table_a_legal_default_serves(gpu, m):
    found = plans(Problem(6144, 4096, m), gpu=gpu)
    assert found and {origin for origin, _ in found} == {"default"}
    for _, plan in found:
        family = FAMILIES.of(plan.config)
        spec = KernelSpec(plan.config, "u4b8g128", "f16", gpu.arch.name)
        assert family.reject_reason(plan.config, spec.format_row, gpu.arch) is None
        assert family.reject_problem(plan.config, Problem(6144, 4096, m)) is None


def test_nearest_shape():
    near, far = mma(32, 16), mma(64, 16)
    table = bare([row(8192, 4096, 8, far), row(4096, 4096, 8, near)])
    found = plans(Problem(4096, 5120, 8), table)
    assert found[:2] == [("nearest", near), ("nearest", far)]


UNSEEN = Problem(5120, 4096, 1)
NEAREST_DEFAULT = next(Dispatcher(H100, []).choose(UNSEEN)).plan


@pytest.mark.parametrize(("loss", "first"), [(GOOD_DEFAULTS - 0.01, "default"), (GOOD_DEFAULTS + 0.01, "nearest")])
def test_defaults_come_before_the_nearest_shape_where_rows_say_that_they_are_good(loss, first, tmp_path):
    """In the mean over the rows of the problem's formats; rows without a default's time say nothing."""
    ways = {4096: 0.9, 8192: 1 / 0.9}
    timed = [replace(row(n, 4096, 1, M1, default=NEAREST_DEFAULT), default_us=10.0 * loss * w) for n, w in ways.items()]
    other = Problem(4096, 4096, 1, "u4b8g64")
    silent = [row(6144, 4096, 1, M1), replace(row(4096, 4096, 1, M1), problem=other, default_us=30.0)]
    found = tables.table(tmp_path, timed), bare(silent)
    origins = [origin for origin, _ in plans(UNSEEN, *found)]
    assert origins[0] == first and {"default", "nearest"} <= set(origins)
    assert plans(Problem(4096, 4096, 1), *found)[0] == ("exact", M1)


@pytest.mark.parametrize(
    ("n", "above", "still", "first"),
    [
        (4096, 0.01, True, "nearest"),
        (4096, 0.01, False, "default"),
        (4096, -0.01, True, "default"),
        (16384, 0.01, True, "default"),
    ],
)
def test_a_row_close_by_says_whether_the_default_is_good_there(n, above, still, first, tmp_path):
    """Within an octave, and of what is the default still; the rows of other shapes, far off, keep the mean low."""
    default = default_plan(Problem(n, 4096, 1), H100) if still else M64
    close = replace(row(n, 4096, 1, M1, default=default), default_us=10.0 * (POOR_DEFAULT + above))
    far = [replace(row(64 << i, 512, 1, M1, default=NEAREST_DEFAULT), default_us=10.0) for i in range(4)]
    found = plans(UNSEEN, tables.table(tmp_path, [close, *far]))
    assert found[0][0] == first
    assert ("default", NEAREST_DEFAULT) in found and ("nearest", M1) in found


@pytest.mark.parametrize("loss", [(POOR_DEFAULT + GOOD_DEFAULTS) / 2, GOOD_DEFAULTS + 0.02])
def test_a_row_close_by_but_far_in_tokens_comes_after_the_defaults_that_are_ready(loss, tmp_path):
    """Whether defaults are good in the mean or not: a plan for 16 tokens is none for 4096 of another shape either."""
    problem = Problem(5120, 4096, 4096)
    default = next(Dispatcher(H100, []).choose(problem)).plan
    close = replace(row(4096, 4096, 16, M16, default=default), default_us=10.0 * loss)
    found = plans(problem, tables.table(tmp_path, [close]))
    assert found[0] == ("default", default) and ("nearest", M16) in found
    near = replace(problem, m=16)
    assert plans(near, tables.table(tmp_path / "near", [close]))[0][0] == "nearest"


def test_times_of_any_size_can_be_compared():
    """A table is anybody's: the ratio of two times that it states need not be a float."""

    def first_origin(us: float, default_us: float) -> str:
        timed = replace(row(4096, 4096, 1, M1, default=M16), us=us, us_low=us, us_high=us, default_us=default_us)
        return plans(UNSEEN, bare([timed]))[0][0]

    assert first_origin(1e-300, 1e300) == first_origin(1e300, 1e-300) == "nearest"


def test_a_default_that_is_not_ready_does_not_come_before_a_neighbours_kernel(tmp_path):
    """To compile on first use takes a second and more; the kernel of the nearest shape is there."""
    table = tables.table(tmp_path, [replace(row(4096, 4096, 1, M1, default=M16), default_us=10.0)])
    choices = list(Dispatcher(H100, [table]).choose(UNSEEN))
    assert choices[0].origin == "nearest" and choices[0].kernel
    assert NEAREST_DEFAULT in [choice.plan for choice in choices if choice.origin == "default" and not choice.kernel]


def test_nearest_shape_prefers_a_plan_that_keeps_the_waves_full():
    """48-row blocks fill 6144 rows exactly and would leave a third of the SMs idle on 4096; 32-row blocks fit."""
    forty_eight, thirty_two = mma(48), mma(32)
    table = bare([row(6144, 4096, 1, forty_eight), row(8192, 4096, 1, thirty_two)])
    found = plans(Problem(4096, 4096, 1), table)
    assert found[0] == ("nearest", thirty_two), "although 6144 is nearer to 4096 than 8192 is"


def test_distance_is_zero_to_itself_and_counts_octaves():
    here = row(4096, 4096, 8, mma(32))
    assert distance(Problem(4096, 4096, 8), here, 132) == 0
    striped = Plan(KernelConfig("wgmma", 64, 64, 128, 4, 1, 4, 1, 1, "striped", "exact"))
    assert distance(Problem(8192, 2048, 8), row(4096, 4096, 8, striped), 132) == pytest.approx(2)


def test_shapes_too_far_away_are_not_considered():
    octaves = int(MAX_DISTANCE) + 1
    table = bare([row(64 << octaves, 4096, 8, mma(16))])
    assert {origin for origin, _ in plans(Problem(64, 4096, 8), table)} == {"default"}


def test_other_formats_do_not_match():
    other = replace(ONE_SHAPE.rows[0], problem=Problem(4096, 4096, 1))
    object.__setattr__(other.problem, "weight_format", "u8")  # a format this version lacks cannot be built honestly
    assert {origin for origin, _ in plans(Problem(4096, 4096, 1), bare([other]))} == {"default"}


def test_a_search_is_told_the_winners_of_the_default_format_where_its_groups_fit():
    """A k that only smaller groups divide has none there, and that is no error."""
    asked = [Problem(4096, 4096, 1, "u4b8g64"), Problem(2880, 2880, 1, "u4b8g64"), Problem(4096, 64, 1, "u4b8g64")]
    found = known_winners(H100, [ONE_SHAPE], asked)
    assert found.keys() == set(asked[:1]) and found[asked[0]][0] == M1


def test_a_search_is_told_the_winners_of_another_gpu_of_its_architecture():
    """A slice of an H100 tries what won at the same shape on the whole, which serves no call there."""
    asked = Problem(4096, 4096, 10)
    assert known_winners(SLICE, [ONE_SHAPE], [asked]) == {asked: [M16]}
    # Where defaults may come before the nearest row.
    timed = replace(row(4096, 4096, 1, M1, default=NEAREST_DEFAULT), default_us=10.0)
    assert known_winners(NVL, [bare([timed])], [UNSEEN]) == {UNSEEN: [M1]}
    assert known_winners(A100, [ONE_SHAPE], [asked]) == {}
    assert "exact" not in dict(plans(asked, ONE_SHAPE, gpu=SLICE))


def test_a_related_gpu_ranks_below_with_a_mark():
    related = bare([row(4096, 4096, 8, M1), row(8192, 8192, 8, M64)], H200)
    own = bare([row(6144, 4096, 8, M16)])
    found = plans(Problem(4096, 4096, 8), related, own)
    assert found[0] == ("related exact", M1), "an exact shape of a sibling comes before another shape"
    assert found[1] == ("nearest", M16)
    assert found[2] == ("related nearest", M64)
    own_exact = bare([row(4096, 4096, 8, M16)])
    assert plans(Problem(4096, 4096, 8), related, own_exact)[0] == ("exact", M16)


@pytest.mark.parametrize(("loss", "first"), [(GOOD_DEFAULTS - 0.01, "default"), (1.2, "related nearest")])
def test_rows_of_a_related_gpu_say_whether_defaults_are_good(loss, first, tmp_path):
    """An H100 NVL has the H100's SMs and other memory, and no table: the H100's says that for both."""
    default = default_plan(UNSEEN, NVL)
    table = tables.table(tmp_path, [replace(row(16384, 4096, 1, M1, default=default), default_us=10.0 * loss)])
    found = plans(UNSEEN, table, gpu=NVL)
    assert found[0][0] == first and {("default", default), ("related nearest", M1)} <= set(found)


def test_a_gpu_without_rows_takes_what_fits_and_its_kernels_from_one_of_its_architecture(tmp_path):
    """An H20 or a slice of an H100. Its rows say nothing of this GPU: neither of their own shape nor of near ones."""
    served = Problem(5120, 5120, 64)
    default = default_plan(served, SLICE)
    table = fitting_table(tmp_path, row(4096, 4096, 64, M64, default=default))
    dispatcher = Dispatcher(SLICE, [table])
    between, ready = next(dispatcher.choose(Problem(16384, 4096, 160))), next(dispatcher.choose(served))
    assert (between.origin, between.plan) == ("fitting", FITS) and between.kernel
    assert (ready.origin, ready.plan) == ("default", default) and ready.kernel
    assert {origin for origin, _ in plans(Problem(6144, 4096, 160), table, gpu=SLICE)} == {"fitting", "default"}
    # A small table of its own takes nothing away.
    own = tables.table(tmp_path / "own", [row(2048, 2048, 1, M1)], gpu=SLICE)
    assert plans(Problem(16384, 4096, 160), own, table, gpu=SLICE)[0] == ("fitting", FITS)
    # Up to 16 tokens the estimate goes by the memory, and what won with another says nothing.
    few = tables.table(tmp_path / "few", [row(6144, 4096, 16, Plan(replace(M16.config, dequant="deferred")))])
    assert "fitting" not in dict(plans(Problem(16384, 4096, 16), few, gpu=SLICE))


def test_of_each_problem_the_winner_of_the_gpu_most_like_it_counts(tmp_path):
    """Related before others of the architecture, whatever the order in which tables are found."""
    near, far = FITS, Plan(replace(FITS.config, num_stages=4))
    found = [tables.table(tmp_path / name, [row(6144, 4096, 160, plan)], gpu=gpu)
             for name, plan, gpu in (("far", far, SLICE), ("near", near, H100))]  # fmt: skip
    for order in (found, found[::-1]):
        assert plans(Problem(16384, 4096, 160), *order, gpu=NVL)[0] == ("fitting", near)


def test_what_fits_comes_before_a_related_row_of_a_third_more_tokens(tmp_path):
    served = Plan(replace(FITS.config, block_m=256, num_stages=2))
    related = fitting_table(tmp_path, row(16384, 4096, 256, served))
    found = plans(Problem(16384, 4096, 160), related, gpu=NVL)
    assert found[0] == ("fitting", FITS) and ("related exact", served) in found


def test_a_related_row_close_by_says_whether_the_default_is_good_there(tmp_path):
    """Also where the GPU's own rows say nothing of defaults."""
    default = default_plan(Problem(4096, 4096, 1), NVL)
    close = replace(row(4096, 4096, 1, M1, default=default), default_us=10.0 * (POOR_DEFAULT + 0.01))
    far = [replace(row(64 << i, 512, 1, M1, default=default), default_us=10.0) for i in range(4)]
    related = tables.table(tmp_path, [close, *far])
    own = bare([row(28672, 8192, 1, M1)], NVL)
    for found in ([related], [own, related]):
        assert plans(UNSEEN, *found, gpu=NVL)[0] == ("related nearest", M1)


def test_a_kernel_is_taken_from_the_table_of_the_gpu_most_like_it(tmp_path):
    gpus = {"own": H100, "related": H200, "other": SLICE}
    found = {name: tables.table(tmp_path / name, [row(4096, 4096, 1, M1)], gpu=gpu) for name, gpu in gpus.items()}
    spec = KernelSpec(M1.config, "u4b8g128", "f16", "sm_90a")
    for first, rest in (("own", ["other", "related", "own"]), ("related", ["other", "related"]), ("other", ["other"])):
        assert Dispatcher(H100, [found[name] for name in rest]).locate(spec).place == found[first].folder


def test_kernels_go_by_the_compile_target_not_the_compute_capability(tmp_path):
    orin = replace(A100, capability=(8, 7), num_sms=16)
    desktop = replace(A100, capability=(8, 6), num_sms=84)
    default = default_plan(Problem(4096, 4096, 1), orin)
    table = tables.table(tmp_path, [row(4096, 4096, 1, default, default=default)], gpu=desktop)
    first = next(Dispatcher(orin, [table]).choose(Problem(4096, 4096, 1)))
    assert orin.arch == desktop.arch and (first.origin, first.plan) == ("default", default) and first.kernel


@pytest.mark.parametrize("num_sms", [16, 60, 78, 114, 144])
def test_what_ships_serves_every_gpu_of_its_architecture_without_a_compiler(num_sms):
    gpu = replace(H100, num_sms=num_sms, bandwidth_gbs=2000)
    dispatcher = Dispatcher(gpu, tables_below(env.tuned_dir()))
    origins = []
    for kind in (("u4zg128", "bf16"), ("u4b8g32", "f16"), ("u8b128g128", "f16"), ("e4m3g128", "bf16")):
        for n, k in ((5120, 5120), (2560, 9728), (28672, 4096)):
            for m in (1, 12, 24, 48, 80, 160, 320, 896, 4096):
                first = next(dispatcher.choose(Problem(n, k, m, *kind)))
                assert first.kernel, first
                origins.append(first.origin)
    assert set(origins) == {"fitting", "default"} and origins.count("fitting") > 20


def test_a_table_of_another_architecture_is_ignored():
    assert {origin for origin, _ in plans(Problem(4096, 4096, 8), bare([row(4096, 4096, 8, M1)], A100))} == {"default"}


def test_boards_of_one_bandwidth_class_share_a_table():
    assert plans(Problem(4096, 4096, 1), ONE_SHAPE, gpu=replace(H100, bandwidth_gbs=3500))[0] == ("exact", M1)


def test_an_earlier_table_hides_rows_but_not_shapes():
    mine = bare([row(4096, 4096, 16, wgmma(32))])
    dispatcher = Dispatcher(H100, [mine, ONE_SHAPE])
    assert next(dispatcher.choose(Problem(4096, 4096, 16))).plan == wgmma(32)
    assert next(dispatcher.choose(Problem(4096, 4096, 64))).plan == M64, "tuning m = 16 must not cost m = 64"


def test_forced_plan_comes_first(monkeypatch):
    monkeypatch.setenv("MARLIN_GEN_CONFIG", M64.key)
    choices = list(choose(Problem(4096, 4096, 1), H100, [ONE_SHAPE]))
    assert [(c.origin, c.plan) for c in choices[:2]] == [("forced", M64), ("exact", M1)]
    monkeypatch.setenv("MARLIN_GEN_CONFIG", "fast")
    with pytest.raises(ValueError, match="not a plan key: 'fast'; example: "):
        next(choose(Problem(4096, 4096, 1), H100, []))


def test_a_gpu_too_old_is_refused():
    with pytest.raises(ValueError, match=r"capability 7.5 is too old: marlin_gen needs a GPU of 8.0 or newer"):
        Dispatcher(replace(A100, capability=(7, 5)), [])


def test_choices_name_intact_cubins_and_pass_over_damaged_ones(tmp_path):
    table = tables.table(tmp_path, [row(4096, 4096, 1, M1), row(4096, 4096, 16, M16)])
    first, second = list(Dispatcher(H100, [table]).choose(Problem(4096, 4096, 1)))[:2]
    assert first.kernel.image == first.spec.key.encode()
    assert first.kernel.symbol == "symbol_of_mma" and second.kernel.symbol == "symbol_of_wgmma"
    tables.damage(table, first.spec.key)
    again = DispatchTable.load(table.folder)
    with pytest.warns(TableWarning, match="a sha256 differs"):
        first, second = list(Dispatcher(H100, [again]).choose(Problem(4096, 4096, 1)))[:2]
    assert first.plan == M1 and first.kernel is None
    assert second.kernel is not None


def test_a_second_tables_cubin_replaces_a_damaged_one(tmp_path):
    mine = tables.table(tmp_path / "user", [row(4096, 4096, 1, M1)])
    shipped = tables.table(tmp_path / "shipped", [row(4096, 4096, 1, M1)])
    next(iter((mine.folder / "kernels").iterdir())).unlink()
    with pytest.warns(TableWarning, match="cannot be read"):
        first = next(Dispatcher(H100, [mine, shipped]).choose(Problem(4096, 4096, 1)))
    assert first.kernel.place == shipped.folder


@pytest.fixture
def roots(tmp_path, monkeypatch):
    """Empty user and packaged roots, no override."""
    from marlin_gen import env

    shipped = tmp_path / "shipped"
    shipped.mkdir()
    monkeypatch.setattr(env, "tuned_dir", lambda: shipped)
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    monkeypatch.delenv("MARLIN_GEN_TABLE", raising=False)
    return tmp_path / "data" / "marlin_gen" / "tuned", shipped


def test_find_tables_in_order(roots, tmp_path, monkeypatch):
    assert find_tables() == []
    user, shipped = roots
    tables.table(shipped, [row(64, 128, 1, M1)])
    tables.table(user, [row(128, 128, 1, M1)])
    assert [found.rows[0].problem.n for found in find_tables()] == [128, 64]
    mine = tables.table(tmp_path / "mine", [row(192, 128, 1, M1)])
    for folder in (mine.folder, mine.folder.parent):
        monkeypatch.setenv("MARLIN_GEN_TABLE", str(folder))
        assert [found.rows[0].problem.n for found in find_tables()] == [192, 64], "the user's tables are left out"


def test_find_tables_names_a_wrong_override(roots, tmp_path, monkeypatch):
    monkeypatch.setenv("MARLIN_GEN_TABLE", str(tmp_path / "nowhere"))
    with pytest.raises(FileNotFoundError, match=r"MARLIN_GEN_TABLE=.*nowhere holds no table.json"):
        find_tables()


def test_user_tables_that_cannot_be_read_are_a_warning(roots, monkeypatch):
    """As in a container whose HOME is that of root: a name too long fails for root too."""
    tables.table(roots[1], [row(64, 128, 1, M1)])
    monkeypatch.setenv("XDG_DATA_HOME", "/" + "x" * 300)
    with pytest.warns(TableWarning, match="no table of this user is used: .*File name too long"):
        assert len(find_tables()) == 1
    monkeypatch.setenv("MARLIN_GEN_TABLE", "/" + "x" * 300)
    with pytest.raises(OSError, match="File name too long"):
        find_tables()


@settings(max_examples=60, deadline=None)
@given(n=st.integers(1, 512), m=st.integers(1, 8192), plan=st.sampled_from([mma(32), mma(48), M16, wgmma(256)]))
def test_wave_fill_is_a_fraction(n, m, plan):
    assert 0 < wave_fill(plan, Problem(64 * n, 4096, m), 132) <= 1


def test_first_candidate_is_found_quickly():
    """A look-up that nobody has asked before; the op remembers the answer."""
    rows = [row(64 * n, 64 * 2 * k, 1 << m, M16) for n in range(1, 9) for k in range(1, 9) for m in range(13)]
    dispatcher = Dispatcher(H100, [bare(rows)])
    problems = [Problem(256, 512, m) for m in range(1, 1001)]
    start = time.perf_counter()
    for problem in problems:
        next(dispatcher.choose(problem))
    assert (time.perf_counter() - start) / len(problems) < 500e-6, "25 us on a laptop core"
