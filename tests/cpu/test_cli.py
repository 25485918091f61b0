"""The command line as a user meets it: words to values, commands end to end on a recording, errors in one line."""

from __future__ import annotations

import csv
import json
import os
import random
import re
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from marlin_gen.arch import Gpu
from marlin_gen.bench import COLUMNS, BenchRow
from marlin_gen.cli import arguments, bench, console, gpus
from marlin_gen.cli.root import main
from marlin_gen.config import KernelSpec, Plan
from marlin_gen.cost_model import predict_us
from marlin_gen.dispatch import Dispatcher
from marlin_gen.families import FAMILIES
from marlin_gen.formats import weight_format
from marlin_gen.measurement import Baseline, Measurement
from marlin_gen.problem import Problem
from marlin_gen.record import MeasurementLog, load_recording, pack
from marlin_gen.replay import ReplayMeasurer, find_recording
from marlin_gen.space import ConfigSpace
from marlin_gen.table import DispatchTable

H100 = Gpu((9, 0), 132, 50 << 20, 228 << 10, 3352, "NVIDIA H100 80GB HBM3")
PROBLEMS = [Problem(4096, 4096, m) for m in (1, 16, 64)]
KEY = "mma-m8n32k64-w1x16-s4-b1-c1-tiles-deferred"


@pytest.fixture(scope="session")
def recording(tmp_path_factory):
    """A small recording whose times are the cost model's with noise: the format and the road are real."""
    folder = tmp_path_factory.mktemp("recording")
    space = ConfigSpace(H100.arch, weight_format("u4b8g128"), FAMILIES).enumerate()
    defaults = [family.default(p, H100).config for family in FAMILIES.rows.values() for p in PROBLEMS]
    configs = list(dict.fromkeys(defaults + random.Random(0).sample(space, 6)))
    us = predict_us(configs, PROBLEMS, H100) * np.random.default_rng(0).lognormal(0, 0.1, (len(configs), 3))
    log = MeasurementLog(folder / "log", H100, {"torch": "2.13.0"})
    for problem in PROBLEMS:
        log.baseline(Baseline(problem, 4.1, 15.0))
    for i, config in enumerate(configs):
        for j, problem in enumerate(PROBLEMS):
            family = FAMILIES.of(config)
            for raster in () if family.reject_problem(config, problem) else family.rasters(config, problem):
                t = float(us[i, j])
                log.measurement(Measurement(problem, Plan(config, raster), "ok", t, 0.99 * t, 1.01 * t, 2e-4))
    log.close()
    pack(folder / "log", folder / "recording.jsonl.gz")
    return folder / "recording.jsonl.gz"


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    """User folders of this test alone."""
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    monkeypatch.delenv("MARLIN_GEN_TABLE", raising=False)
    return tmp_path


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory):
    """One kernel cache for all of them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MARLIN_GEN_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
        yield


def tune(recording, *more):
    return main(["tune", "--model", "tiny", "--tokens", "1,16,64", "--device", f"replay:{recording}", *more])


# Words to values.


@pytest.mark.parametrize(
    ("text", "counts"),
    [("1", (1,)), ("8,1,8", (1, 8)), ("1,2,4,...,32", (1, 2, 4, 8, 16, 32)), ("1, 3, ..., 30", (1, 3, 9, 27, 30))],
)
def test_token_counts(text, counts):
    assert arguments.token_counts(text) == counts


def test_the_default_tokens_are_powers_of_two_and_what_tiles_divide_between_them():
    counts = arguments.token_counts(arguments.DEFAULT_TOKENS)
    assert {2**i for i in range(13)} < set(counts)
    assert all(following * 3 <= count * 4 for count, following in pairwise(counts) if 48 <= count < 1024)


@pytest.mark.parametrize(
    "text", ["", "0", "1,x", "...,4", "1,...,4", "1,2,...", "4,2,...,8", "2,3,...,9", "999999", "²"]
)
def test_bad_token_counts_are_quoted(text):
    with pytest.raises(ValueError, match="--tokens"):
        arguments.token_counts(text)


@pytest.mark.parametrize(("text", "expected"), [("9m", 540), ("90s", 90), ("1.5h", 5400), ("60", 60)])
def test_seconds(text, expected):
    assert arguments.seconds(text) == expected


@pytest.mark.parametrize("text", ["", "0s", "-1m", "9 minutes"])
def test_bad_seconds_are_quoted(text):
    with pytest.raises(ValueError, match="examples: 9m"):
        arguments.seconds(text)


def test_keys_of_all_three_kinds_name_the_same_kernel():
    spec = arguments.spec(f"{KEY}-u4b8g128-f16-sm_80", "sm_90a")
    assert spec.key == f"{KEY}-u4b8g128-f16-sm_80"
    assert arguments.spec(KEY, "sm_80") == arguments.spec(f"{KEY}-r8", "sm_80") == spec
    ptx = arguments.spec(KEY, "compute_80")  # as `compile --arch compute_80` prints it
    assert arguments.spec(ptx.key, "sm_90a") == ptx


def test_model_and_shapes_add_up_without_repeats():
    work = arguments.work("llama-3.1-8b", "4096x4096,1024x1024", "1", "1,2")
    assert len(work.layers) == 5
    assert len(work.problems) == 10


def test_several_models_add_up_in_their_order():
    both = arguments.work("llama-3.1-8b, qwen2.5-7b", None, "1", "16").layers
    alone = [arguments.work(name, None, "1", "16").layers for name in ("llama-3.1-8b", "qwen2.5-7b", "mistral-7b")]
    assert both == alone[0] + alone[1]
    assert arguments.work("llama-3.1-8b,mistral-7b", None, "1", "16").layers == alone[0] and alone[0] == alone[2]
    for nothing in ((None, None), (",", None), (None, " , ")):
        with pytest.raises(ValueError, match="nothing to do"):
            arguments.work(*nothing, "1", "16")
    with pytest.raises(ValueError, match=r"qwen2\.5-7bb.*did you mean qwen2\.5-7b"):
        arguments.work("llama-3.1-8b,qwen2.5-7bb", None, "1", "16")


# Commands.


def test_tune_writes_a_table_that_show_reads(recording, home, capsys, monkeypatch):
    assert tune(recording, "--out", str(home / "out"), "--record") == 0
    shown = capsys.readouterr()
    assert "4096x4096" in shown.out and "regime" in shown.out
    folder = home / "out" / H100.slug
    assert str(folder) in shown.err
    table = DispatchTable.load(folder)
    assert [row.problem for row in table.rows] == PROBLEMS
    specs = [KernelSpec(row.plan.config, "u4b8g128", "f16", "sm_90a") for row in table.rows]
    assert all(table.cubin(spec.key) for spec in specs)
    # Never slower than what would run without a table.
    assert all(row.us <= row.default_us for row in table.rows)
    assert find_recording(str(folder / "recording.jsonl.gz")).problems() == PROBLEMS

    monkeypatch.setenv("MARLIN_GEN_TABLE", str(home / "out"))
    assert main(["show", "--gpu", "h100", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [row["plan"] for row in found["rows"]] == [row.plan.key for row in table.rows]
    assert found["summary"][-1]["cells"] == 3
    assert main(["show", "--gpu", "h100", "--plans"]) == 0
    assert table.rows[0].plan.key in capsys.readouterr().out
    assert main(["show", "--gpu", "h100", "--shapes", "64x128"]) == 2
    assert "it has 4096x4096" in capsys.readouterr().err


def test_a_replay_that_was_not_told_m_takes_what_was_recorded(recording, home, capsys):
    words = ["tune", "--shapes", "4096x4096", "--device", f"replay:{recording}", "--out", str(home / "out")]
    assert main(words) == 0
    assert "the recording has 3 of these 26 problems" in capsys.readouterr().err
    assert [row.problem for row in DispatchTable.load(home / "out" / H100.slug).rows] == PROBLEMS
    assert main([*words, "--tokens", "1,2"]) == 2 and main([*words, "--shapes", "4096x4096,64x128"]) == 2
    assert "no n=4096 k=4096 m=2" in capsys.readouterr().err


def test_the_same_tune_again_goes_on_and_finds_the_same(recording, home, capsys):
    assert tune(recording, "--json") == 0
    first = capsys.readouterr()
    assert "going on" not in first.err
    assert tune(recording, "--json") == 0
    again = capsys.readouterr()
    assert "going on with the study" in again.err
    assert tune(recording) == 0
    assert re.search(r"\d+ timings, earlier sessions included; \d+ s; the search ended", capsys.readouterr().err)
    assert json.loads(again.out)["rows"] == json.loads(first.out)["rows"]
    assert tune(recording, "--fresh") == 0
    alone = capsys.readouterr().err
    assert "going on" not in alone and re.search(r"\d+ timings; \d+ s; the search ended", alone)


def test_a_recording_keeps_the_trials_of_other_problems(recording, home, capsys, monkeypatch):
    words = ["tune", "--model", "tiny", "--device", f"replay:{recording}", "--out", str(home / "out"), "--record"]
    path = home / "out" / H100.slug / "recording.jsonl.gz"
    found = {}
    for tokens in ("1,16", "16,64"):
        assert main([*words, "--tokens", tokens, "--trials", "1"]) == 0
        found[tokens] = load_recording(path)
    before, both = found.values()
    lines = path.read_bytes()
    assert main([*words, "--tokens", "16,64", "--trials", "1"]) == 0 and path.read_bytes() == lines
    assert both.problems() == PROBLEMS and set(both.baselines) == set(PROBLEMS)
    assert [m for m in both.measurements if m.problem.m == 1] == [m for m in before.measurements if m.problem.m == 1]
    assert before.artifacts.items() <= both.artifacts.items() and before.done.keys() <= both.done.keys()
    # What was timed with other versions is neither mixed in nor thrown away.
    monkeypatch.setattr("marlin_gen.cli.study.versions_of", lambda measurer: {"templates": "another"})
    content = path.read_bytes()
    capsys.readouterr()
    assert main([*words, "--tokens", "1,16", "--trials", "1"]) == 2
    said = capsys.readouterr().err
    assert f"{path} has 1 problems that this tune does not time, of other versions: move" in said
    assert "searching" not in said and path.read_bytes() == content
    assert main([*words, "--tokens", "1,16,64", "--trials", "1"]) == 0
    assert load_recording(path).versions == {"templates": "another"}


def test_hand_edited_kernels_are_timed_anew_when_they_change(recording, home, capsys, monkeypatch):
    monkeypatch.setenv("MARLIN_GEN_OVERRIDE_DIR", str(home))
    for text, goes_on in (("// a", False), ("// a", True), ("// b", False)):
        (home / f"{KEY}-u8b128g128-f16-sm_90a.cu").write_text(text)
        assert tune(recording, "--json") == 0
        assert ("going on" in capsys.readouterr().err) == goes_on


def test_a_fresh_start_does_not_take_away_the_study_of_a_running_tune(recording, home, capsys):
    running = MeasurementLog(home / "study" / "trials.jsonl", H100)
    (home / "study" / "optuna.journal").write_text("")
    assert tune(recording, "--study", str(home / "study"), "--fresh") == 2
    assert "is being written by another tune" in capsys.readouterr().err
    assert sorted(path.name for path in (home / "study").iterdir()) == ["optuna.journal", "trials.jsonl"]
    running.close()
    assert tune(recording, "--study", str(home / "study"), "--fresh") == 0


def test_a_table_is_written_before_it_is_printed_to_a_closed_pipe(recording, home, monkeypatch):
    def closed(*words):
        raise BrokenPipeError

    monkeypatch.setattr(console.out, "print", closed)
    assert tune(recording, "--out", str(home / "out")) == 1
    assert len(DispatchTable.load(home / "out" / H100.slug).rows) == 3


def test_a_replayed_table_is_kept_away_from_those_that_dispatch_reads(recording, home, capsys):
    assert tune(recording) == 0
    assert (home / "data" / "marlin_gen" / "replayed" / H100.slug / "table.json").is_file()
    assert not (home / "data" / "marlin_gen" / "tuned").exists()


def test_bench_writes_the_agreed_csv_of_what_the_table_chooses(recording, home, capsys, monkeypatch):
    tune(recording, "--out", str(home / "out"))
    monkeypatch.setenv("MARLIN_GEN_TABLE", str(home / "out"))
    monkeypatch.setattr(gpus, "require_gpu", lambda device, why: H100)

    @contextmanager
    def recorded(device):
        yield ReplayMeasurer(find_recording(str(recording)))

    monkeypatch.setattr(gpus, "measurer", recorded)
    path = home / "bench.csv"
    assert main(["bench", "--shapes", "4096x4096", "--tokens", "1,16", "--csv", str(path)]) == 0
    rows = list(csv.DictReader(path.open()))
    assert tuple(rows[0]) == COLUMNS
    table = DispatchTable.load(home / "out" / H100.slug)
    assert [row["config"] for row in rows] == [row.plan.key for row in table.rows[:2]]
    failed = Measurement(PROBLEMS[0], table.rows[0].plan, "launch", detail="[/x] of another's words")
    monkeypatch.setattr(bench.benching, "measure", lambda *_: iter([failed]))
    assert main(["bench", "--shapes", "4096x4096", "--tokens", "1", "--csv", str(path)]) == 2
    assert f"{table.rows[0].plan.key}: launch [/x] of another's words" in capsys.readouterr().err


def test_a_bench_is_written_beside_a_table_of_this_gpu_alone(recording, home):
    """Not beside one that only lends it kernels, which may be a shipped one."""
    tune(recording, "--out", str(home / "out"))
    table = DispatchTable.load(home / "out" / H100.slug)
    others = (replace(H100, num_sms=60), Path()), (replace(H100, bandwidth_gbs=4800), Path())
    for gpu, folder in ((H100, table.folder), *others):
        dispatcher = Dispatcher(gpu, [table])
        assert dispatcher.tables == [table] and bench.own_folder(dispatcher) == folder


def test_a_csv_that_cannot_be_written_is_said_before_anything_is_timed(recording, home, capsys, monkeypatch):
    monkeypatch.setattr(gpus, "require_gpu", lambda device, why: H100)
    monkeypatch.setattr(gpus, "measurer", lambda device: pytest.fail("measures"))
    (home / "file").write_text("")
    assert main(["bench", "--model", "tiny", "--tokens", "1", "--csv", str(home / "file" / "bench.csv")]) == 2
    said = f"error: --csv {home}/file/bench.csv cannot be written (File exists); name another folder\n"
    assert capsys.readouterr().err == said
    assert main(["bench", "--model", "tiny", "--tokens", "1", "--csv", str(home)]) == 2
    assert capsys.readouterr().err == f"error: --csv {home} is a folder; name a file in it\n"


def squeezed(text):
    """Its lines, each run of blanks as one."""
    return [" ".join(line.split()) for line in text.splitlines()]


ON_A_TERMINAL = """
import sys
sys.stdout.isatty = lambda: True
from marlin_gen.cli.root import main
sys.exit(main(["show", "--gpu", "h100", "--shapes", "4096x4096", "--format", "u4b8g128"]))
"""


def test_a_narrow_terminal_cuts_no_digits_off():
    """Of 4096 tokens and 169.0 us Rich left "4" and "16": other numbers, without a mark."""
    environment = {**os.environ, "COLUMNS": "40", "NO_COLOR": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run([sys.executable, "-c", ON_A_TERMINAL], env=environment, capture_output=True, text=True)
    lines = squeezed(re.sub(r"\x1b\[[0-9;]*m", "", done.stdout))
    assert "n x k m us default cuBLAS floor gain vs cuBLAS roofline" in lines
    assert any(re.match(r"4096 \d+\.\d+ ", line) for line in lines)


def test_tables_are_whole_on_80_columns(capsys, monkeypatch):
    monkeypatch.setattr(console.out, "width", 80)
    assert main(["show", "--gpu", "h100", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert main(["show", "--gpu", "h100"]) == 0
    lines = squeezed(capsys.readouterr().out)
    shapes = {(row["n"], row["k"], row["weight_format"], row["act_dtype"]) for row in rows}
    heads = "n x k m us default cuBLAS floor gain vs cuBLAS roofline"
    assert lines.count(heads) == len({shape[2:] for shape in shapes})
    found = [line.split()[0] for line in lines if re.match(r"\d+x\d+ ", line)]
    assert sorted(found) == sorted(f"{n}x{k}" for n, k, *_ in shapes)

    cell = (28672, 16384, 4096, "u4b8g128", "f16", 123.4, 122.9, 124.1, KEY, 123.0, 456.7, 2.8e-4, 234.5)
    bench._print_kind([BenchRow(*cell)], 700.0, "title")
    lines = squeezed(capsys.readouterr().out)
    assert "n x k m us 95 % chained cuBLAS floor ratio roofline error" in lines
    assert any(line.startswith("28672x16384 4096 123.4 122.9-124.1 234.5 456.7 123.0 3.70x") for line in lines)


def test_render_prints_exactly_the_source(capsys):
    from marlin_gen.render import render

    assert main(["render", KEY, "--arch", "sm_80"]) == 0
    spec = KernelSpec.from_key(f"{KEY}-u4b8g128-f16-sm_80")
    assert capsys.readouterr().out == render(spec).text


def test_compile_shows_a_folder_with_brackets_in_its_name(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("MARLIN_GEN_CACHE_DIR", str(tmp_path / "x[v2][" / "v3]"))
    assert main(["compile", KEY]) == 0
    assert f"{tmp_path}/x[v2][/v3]/kernels/" in capsys.readouterr().out


def test_compile_reports_what_the_compiler_made(capsys):
    assert main(["compile", "--json", KEY]) == 0
    report = json.loads(capsys.readouterr().out)
    (kernel,) = report["kernels"]
    assert kernel["spec"] == f"{KEY}-u4b8g128-f16-sm_90a"
    assert 0 < kernel["registers"] <= 128 and kernel["spill_bytes"] == 0 and kernel["rejected"] is None
    assert main(["compile", KEY]) == 0
    assert "registers x 512 threads" in capsys.readouterr().out


def test_doctor_says_what_a_replay_needs(capsys):
    main(["doctor", "--for", "replay", "--json"])
    report = json.loads(capsys.readouterr().out)
    names = {finding["name"] for finding in report["findings"]}
    assert {"torch", "nvcc", "NVRTC", "compiler in use", "tuning packages", "cache folder"} <= names


# Errors: exit code 2, one line, the value and the fix.


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["tune"], "--model"),
        (["tune", "--model", "lama-3.1-8b"], "did you mean llama-3.1-8b?"),
        (["tune", "--shapes", "100x4096"], "n=100"),
        (["tune", "--model", "tiny", "--device", "gpu"], "'gpu' is not auto"),
        (["tune", "--model", "tiny", "--device", "replay:b300"], "'b300'"),
        (["tune", "--model", "llama-3.1-8b", "--tp", "0"], "--tp '0'"),
        (["tune", "--shapes", "4096x4096", "--tp", "2"], "--tp 2 is of --model's layers; give --shapes as"),
        (["tune", "--model", "llama-3.1-8b", "--tp", "²"], "--tp '²'"),
        (["render", "mma-what"], "'mma-what'"),
        (["render", "mma-m8n32k64-w1x16-s400-b1-c1-tiles-exact"], "num_stages=400"),
        (["bench", "--model", "tiny", "--device", "replay:h100"], "on a GPU, which --device replay:h100 is not"),
        (["compile", KEY, "--compiler", "icc"], "'icc'"),
        (["show", "--gpu", "voodoo2"], "voodoo2"),
        (["doctor", "--for", "fun"], "serve, tune, replay"),
    ],
)
def test_errors_are_one_line_and_name_the_value(words, said, capsys):
    assert main(words) == 2
    shown = capsys.readouterr()
    last = shown.err.rstrip("\n").splitlines()[-1]
    assert last.startswith("error: ") and said in last
    assert "Traceback" not in shown.err and shown.out == ""


def test_a_misspelt_log_level_does_not_hide_the_error(capsys, monkeypatch):
    monkeypatch.setenv("MARLIN_GEN_LOG", "verbose")
    assert main(["show", "--gpu", "voodoo2"]) == 2
    assert capsys.readouterr().err.startswith("error: --gpu voodoo2 names 0 tables")
    monkeypatch.setenv("MARLIN_GEN_LOG", "Debug")
    with pytest.raises(ValueError, match="voodoo2"):
        main(["show", "--gpu", "voodoo2"])


def test_a_place_that_cannot_be_written_is_told_before_the_search(recording, home, capsys):
    (home / "file").touch()
    assert tune(recording, "--out", str(home / "file")) == 2
    said = f"error: --out {home / 'file'} cannot be written (Not a directory); name another folder\n"
    assert capsys.readouterr().err.endswith(said) and not (home / "data/marlin_gen/studies").exists()
    assert tune(recording, "--study", str(home / "file")) == 2
    assert f"error: {home / 'file'} cannot be used (File exists); name another path\n" in capsys.readouterr().err


def test_a_table_that_cannot_be_written_after_all_is_printed(recording, home, capsys, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device", str(home / "table.json"))

    monkeypatch.setattr("marlin_gen.cli.tune._publish", full)
    assert tune(recording, "--trials", "1") == 2
    shown = capsys.readouterr()
    assert "4096x4096" in shown.out and f"{home / 'table.json'} cannot be used (No space" in shown.err


def test_a_shape_the_recording_lacks_lists_those_it_has(recording, capsys):
    assert main(["tune", "--shapes", "64x128", "--device", f"replay:{recording}"]) == 2
    assert "it has the shapes 4096x4096" in capsys.readouterr().err


def test_unknown_options_are_usage_errors(capsys):
    assert main(["tune", "--bogus"]) == 2
    assert "--bogus" in capsys.readouterr().err


@pytest.mark.parametrize("words", [
    ("compile", KEY, "--jobs", "-1"), ("tune", "--model", "tiny", "--jobs", "0"),
    ("bench", "--model", "tiny", "--tokens", "1", "--sustained", "0"),
    ("tune", "--model", "tiny", "--seed", "-1"), ("tune", "--model", "tiny", "--seed", str(2**32)),
])  # fmt: skip
def test_numbers_out_of_range_name_their_option(words, capsys):
    assert main([*words]) == 2
    assert f"Invalid value for '{words[-2]}'" in capsys.readouterr().err


def test_measuring_without_a_gpu_says_what_is_needed(capsys, monkeypatch):
    monkeypatch.setattr(gpus, "this_gpu", lambda device="cuda:0": None)
    for command, *device in (["bench"], ["bench", "--device", "auto"], ["tune", "--device", "cuda:0"]):
        assert main([command, "--model", "tiny", *device]) == 2
        assert "needs an NVIDIA GPU of compute capability 8.0 or newer" in capsys.readouterr().err


def test_auto_is_the_first_gpu_there_is(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    monkeypatch.setattr("marlin_gen.driver.identify", lambda index: (H100, index))
    assert gpus.require_gpu("auto", "bench times kernels") == (H100, 0)
