"""The report: what is computed is right, the page stands alone, pictures say what they were drawn from."""

from __future__ import annotations

import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from marlin_gen.arch import Gpu
from marlin_gen.bench import BenchRow, write_csv
from marlin_gen.cli.root import main
from marlin_gen.config import Plan
from marlin_gen.measurement import Baseline, Measurement
from marlin_gen.problem import Problem
from marlin_gen.record import MeasurementLog, Recording, load_recording, pack
from marlin_gen.report import page, pictures
from marlin_gen.report.data import load, load_gpu, sources
from marlin_gen.report.series import ideal_speedup, search_progress, transformer_blocks
from marlin_gen.sustained import CUBLAS, SustainedRow
from marlin_gen.sustained import write_csv as write_sustained
from marlin_gen.table import DispatchTable
from marlin_gen.table_row import TableRow

ROOT = Path(__file__).resolve().parents[2]
H100 = Gpu((9, 0), 132, 50 << 20, 228 << 10, 3352, "NVIDIA H100 <80GB>")  # a name that HTML must escape
PLANS = [Plan.from_key(f"mma-m8n32k64-w1x{w}-s4-b1-c1-tiles-deferred-r1") for w in (16, 8, 4)]
LLAMA_8B = ((6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336))


def bench_row(n: int, k: int, m: int, us: float = 5.0) -> BenchRow:
    return BenchRow(n, k, m, "u4b8g128", "f16", us, 0.98 * us, 1.02 * us, PLANS[0].key, 4.0, 15.0, 2.2e-4, 0.9 * us)


@pytest.fixture
def folder(tmp_path):
    """One GPU with a table and nothing else."""
    row = TableRow(Problem(4096, 4096, 16), PLANS[0], 4.0, 3.9, 4.1, 2e-4, PLANS[1], 6.0, 15.0, 4.0)
    path = tmp_path / "tuned" / H100.slug
    runs = {"date": "2025-01-02", "torch": "2.13.0"}, {"date": "2025-03-03", "export": {"regret": 0.03}}
    DispatchTable(H100, (row,), {}, runs).write(path)
    return path


def fill(folder: Path) -> None:
    """The other files: four shapes at two m, three candidates of which one failed, two sustained runs."""
    write_csv(folder / "bench.csv", [bench_row(n, k, m) for n, k in LLAMA_8B for m in (1, 16)])
    pack(log(folder.parent.parent / "log"), folder / "recording.jsonl.gz")
    write_sustained(folder / "sustained.csv", [
        SustainedRow(28672, 4096, 4096, name, second / 2, start - second, 1700.0, 690.0, None)
        for name, start in ((PLANS[0].key, 720.0), (CUBLAS, 700.0)) for second in range(1, 9)
    ])  # fmt: skip


def log(path: Path) -> Path:
    """Roofline fractions over two problems: 0.5 and nothing, a failure that was fast before, then 0.8 and 0.4."""
    problems = [Problem(4096, 4096, m) for m in (1, 2)]
    writer = MeasurementLog(path, H100)
    for problem in problems:
        writer.baseline(Baseline(problem, 4.0, 15.0))
    for plan, times in zip(PLANS, ((8.0, None), (4.0, None), (5.0, 10.0)), strict=True):
        for problem, us in zip(problems, times, strict=True):
            status = "ok" if us else "wrong"
            if us or plan is PLANS[1]:
                writer.measurement(Measurement(problem, plan, status, us, us, us, 2e-4 if us else None))
        writer.candidate(plan.config, "wrong" if plan is PLANS[1] else "ok")
    writer.close()
    return path


def test_the_ideal_is_the_bytes_then_one():
    problem = Problem(28672, 4096, 1)
    values = [ideal_speedup(replace(problem, m=2**i), H100, 775.0) for i in range(13)]
    assert values[0] == pytest.approx(2 * problem.n * problem.k / problem.weight_bytes, rel=1e-3)
    assert values == sorted(values, reverse=True) and values[-1] == 1.0
    assert 1.5 < values[7] < 2.5  # at m = 128 4 bits are bound by the multiplications, fp16 still by the bytes


def test_a_block_sums_its_layers_and_names_every_model_of_that_shape():
    rows = [bench_row(n, k, 16, us) for (n, k), us in zip(LLAMA_8B, (1.0, 2.0, 4.0, 8.0), strict=True)]
    (block,) = transformer_blocks(rows)
    assert block.models == ("llama-3.1-8b", "mistral-7b")
    assert [layer.name for layer in block.layers] == ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]
    assert [layer.us for layer in block.layers] == [1.0, 2.0, 4.0, 8.0] and block.us == 15.0 and block.cublas_us == 60.0


def test_models_that_were_benched_apart_have_blocks_too(folder):
    """Of a layer that both have, the bench's own time counts: that is what was tuned."""
    fill(folder)
    qwen = ((4608, 3584), (3584, 3584), (37888, 3584), (3584, 18944))
    write_csv(folder / "models.csv", [bench_row(n, k, 16, 7.0) for n, k in (*qwen, *LLAMA_8B)])
    data = load_gpu(folder)
    blocks = transformer_blocks(data.benched)
    assert {block.models: block.us for block in blocks} == {("llama-3.1-8b", "mistral-7b"): 20.0, ("qwen2.5-7b",): 28.0}
    figure = pictures.block(data)
    assert figure and any("qwen2.5-7b" in text.get_text() for axes in figure.axes for text in axes.texts)


def test_a_block_with_a_layer_that_was_not_benched_is_not_shown():
    assert transformer_blocks([bench_row(n, k, 16) for n, k in LLAMA_8B[:3]]) == []
    assert transformer_blocks([bench_row(n, k, 1) for n, k in LLAMA_8B]) == []


def test_search_progress_is_the_mean_best_so_far_and_failures_gain_nothing(tmp_path):
    progress = search_progress(load_recording(log(tmp_path / "log")), 775.0)
    assert progress.fractions == pytest.approx((0.25, 0.25, 0.6))
    assert progress.outcomes == (("ok", 2), ("wrong", 1)) and progress.problems == 2


def test_progress_of_an_empty_recording_is_empty():
    assert search_progress(Recording(H100), 775.0).fractions == ()


def test_the_default_is_scaled_by_the_ratio_of_the_tune(folder):
    fill(folder)
    (data,) = load(folder.parent)
    by_m = {cell.bench.m: cell for cell in data.of_shape(4096, 4096)}
    assert by_m[16].default_us == pytest.approx(5.0 * 6.0 / 4.0) and by_m[16].default_speedup == pytest.approx(2.0)
    assert by_m[1].default_us is None


def test_a_folder_without_tables_says_how_to_make_one(tmp_path):
    with pytest.raises(ValueError, match=r"has no <gpu>/table\.json .*marlin-gen tune"):
        load(tmp_path)


def test_the_page_asks_the_network_for_nothing_and_repeats(folder):
    fill(folder)
    text = page.render(load(folder.parent))
    assert text == page.render(load(folder.parent))
    assert text.count("<svg ") == len(pictures.PICTURES)
    assert not re.findall(r"<(?:script|link|iframe|img)\b|@import|url\((?!#)", text)
    assert not [url for url in re.findall(r"(?:src|href)=\"([^\"]*)", text) if not url.startswith(("#", "data:"))]
    ids = re.findall(r'\bid="([^"]+)"', text)
    assert len(ids) == len(set(ids))
    assert set(re.findall(r"url\(#([^)]+)\)", text)) <= set(ids)


def test_the_page_states_provenance_and_figures(folder):
    fill(folder)
    text = page.render(load(folder.parent))
    assert "NVIDIA H100 &lt;80GB&gt;" in text and "Tuned 2025-01-02, torch 2.13.0." in text
    assert "2 ran and were right, not usable: 1 wrong" in text
    assert "marlin_gen 99.2%, cuBLAS fp16 99.1%" in text  # (713 + 712) / (719 + 718), (693 + 692) / (699 + 698)
    for cell in ("<td>8 x 32</td>", "<td>1 x 16</td>", "<td>7.50</td>", "<td>deferred</td>", "<td>2.2e-04</td>"):
        assert cell in text


def test_kernels_that_differ_in_their_rings_alone_differ_in_the_page(folder):
    plans = [f"wgmma-m256n128k64-w8x1-{rings}-b1-c1-tiles-exact-r8" for rings in ("s7", "s7a3", "s7a4")]
    rows = [replace(bench_row(4096, 4096, m), config=plan) for m, plan in enumerate(plans, 1)]
    write_csv(folder / "bench.csv", rows)
    text = page.render(load(folder.parent))
    assert [f"<td>{stages}</td>" in text for stages in ("7", "7 + 3", "7 + 4")] == [True] * 3


def test_what_is_not_committed_is_one_sentence_with_its_command(folder):
    text = page.render(load(folder.parent))
    assert "<svg" not in text
    for command in (page.BENCH_COMMAND, page.TUNE_COMMAND, page.SUSTAINED_COMMAND):
        assert f"<code>{command}</code>" in text


def test_two_gpus_have_a_section_each(folder):
    other = replace(H100, bandwidth_gbs=4800, name="NVIDIA H200")
    DispatchTable(other, (), {}).write(folder.parent / other.slug)
    fill(folder)
    text = page.render(load(folder.parent))
    assert [f'id="{gpu.slug}"' in text and f'href="#{gpu.slug}"' in text for gpu in (H100, other)] == [True, True]


def test_a_png_says_what_it_was_drawn_from(folder, tmp_path):
    fill(folder)
    data = load_gpu(folder)
    for name in ("a.png", "b.png"):
        assert pictures.ROOFLINE.png(data, tmp_path / name)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    assert pictures.shown(tmp_path / "a.png") == sources(folder)
    write_csv(folder / "bench.csv", [bench_row(4096, 4096, 1)])
    assert pictures.shown(tmp_path / "a.png") != sources(folder)


def test_the_committed_pictures_are_those_of_the_committed_benches():
    tuned = ROOT / "tuned"
    wanted = [bench.with_name(f"{p.name}.png") for bench in tuned.glob("*/bench.csv") for p in pictures.README_PICTURES]
    assert wanted
    for path in wanted:
        assert pictures.shown(path) == sources(path.parent), f"{path.name}: run python tools/results_table.py"


def test_the_command_writes_page_and_pictures(folder, tmp_path, capsys):
    fill(folder)
    out = tmp_path / "new" / "report.html"
    assert main(["report", "--tuned", str(folder.parent), "--out", str(out), "--png", str(tmp_path / "png")]) == 0
    assert out.read_text() == page.render(load(folder.parent))
    drawn = sorted(path.name for path in (tmp_path / "png" / H100.slug).iterdir())
    assert drawn == ["block.png", "roofline.png", "search.png", "speedup.png", "sustained.png"]


def test_the_command_takes_a_tables_own_folder_and_does_not_claim_pictures_that_are_not_drawn(folder, tmp_path, capsys):
    pages = [tmp_path / "a.html", tmp_path / "b.html"]
    for tuned, out in zip((folder.parent, folder), pages, strict=True):
        assert main(["report", "--tuned", str(tuned), "--out", str(out), "--png", str(tmp_path / "png")]) == 0
    assert pages[0].read_bytes() == pages[1].read_bytes() and not (tmp_path / "png").exists()
    shown = capsys.readouterr().err
    assert "nothing to draw" in shown and "png" not in shown


def test_the_command_without_matplotlib_says_how_to_get_it(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    for name in ("page", "pictures"):
        monkeypatch.delitem(sys.modules, f"marlin_gen.report.{name}")
        monkeypatch.delattr(f"marlin_gen.report.{name}")
    assert main(["report", "--tuned", str(folder.parent), "--out", str(tmp_path / "r.html")]) == 2
    assert "pip install 'marlin_gen[report]'" in capsys.readouterr().err
