"""marlin-gen convert on checkpoints of every method: exact, resumed after kill -9, refused with names."""

from __future__ import annotations

import json
import os
import signal
import struct
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from foreign import METHODS, random_weight, stored, write_checkpoint
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import marlin_gen.hf
from marlin_gen.cli.root import main
from marlin_gen.convert import convert
from marlin_gen.convert.shard import ShardWriter, is_intact
from marlin_gen.layout import LAYOUT_VERSION, PackedWeight, unpack
from marlin_gen.reference import dequantize

ROOT = Path(__file__).resolve().parents[2]
LAYER = "model.layers.1.mlp.up_proj"


def all_tensors(folder):
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("method", METHODS)
def test_every_layer_exactly_and_everything_else_as_it_was(tmp_path, method, shards):
    layers, _ = write_checkpoint(tmp_path / "in", method, shards, attention_bias=True)
    before = all_tensors(tmp_path / "in")
    floating_zeros = method == "hqq"  # which no kernel may hold
    with warnings.catch_warnings():
        warnings.simplefilter("ignore" if floating_zeros else "error")
        report = convert(tmp_path / "in", tmp_path / "out", floating_zeros, shard_bytes=100_000 * shards)
    found = all_tensors(tmp_path / "out")
    assert {*report.formats, *report.unheld} == set(layers) and (floating_zeros or not report.unheld)
    for name, weight in layers.items():
        if name in report.unheld:
            assert torch.equal(found.pop(f"{name}.weight"), weight.dequantize().half())
            continue
        assert int(found.pop(f"{name}.layout_version")) == LAYOUT_VERSION
        packed = PackedWeight(found.pop(f"{name}.weight"), found.pop(f"{name}.scales"), report.formats[name])
        assert report.formats[name] == ("e4m3g128" if method == "fp8" else "u4zg64") or floating_zeros
        assert torch.equal(dequantize(*unpack(packed), packed.weight_format), weight.dequantize().half())
    assert any(name.endswith("q_proj.bias") for name in found)
    for name, tensor in found.items():
        assert tensor.dtype == before[name].dtype and torch.equal(tensor, before[name])
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "marlin_gen" and config["hidden_size"] == 256
    assert config["quantization_config"]["formats"] == report.formats
    assert (tmp_path / "out/tokenizer.json").read_text() == (tmp_path / "in/tokenizer.json").read_text()
    assert not list((tmp_path / "out").glob("*.part"))
    index = tmp_path / "out/model.safetensors.index.json"
    where = json.loads(index.read_text())["weight_map"]
    assert set(where) == set(all_tensors(tmp_path / "out"))
    assert all(name in safe_open(tmp_path / "out" / file, "pt").keys() for name, file in where.items())  # noqa: SIM118


def test_files_load_by_memory_map_with_tensors_aligned(tmp_path):
    write_checkpoint(tmp_path / "in", "gptq")
    convert(tmp_path / "in", tmp_path / "out")
    raw = (tmp_path / "out/model.safetensors").read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    assert (8 + length) % 64 == 0
    for name, entry in json.loads(raw[8 : 8 + length]).items():
        if name.endswith((".weight", ".scales")):
            assert entry["data_offsets"][0] % 64 == 0, name


KILLED = """
import os, signal, sys
from marlin_gen.convert import convert
def progress(done, total, said):
    if done == int(sys.argv[3]):
        os.kill(os.getpid(), signal.SIGKILL)
convert(sys.argv[1], sys.argv[2], shard_bytes=60_000, on_progress=progress)
"""


@pytest.mark.parametrize("units", [1, 9])
def test_a_killed_run_is_taken_up(tmp_path, units):
    write_checkpoint(tmp_path / "in", "awq")
    command = [sys.executable, "-c", KILLED, str(tmp_path / "in"), str(tmp_path / "out"), str(units)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    whole = [path for path in (tmp_path / "out").glob("*.safetensors")]
    assert list((tmp_path / "out").glob("*.part")) and not (tmp_path / "out/config.json").exists()
    assert bool(whole) == (units > 1)
    times = {path.name: path.stat().st_mtime_ns for path in whole}

    report = convert(tmp_path / "in", tmp_path / "out", shard_bytes=60_000)
    assert report.shards_kept == len(whole) and report.shards_written > 0
    assert all((tmp_path / "out" / name).stat().st_mtime_ns == then for name, then in times.items())
    convert(tmp_path / "in", tmp_path / "at-once", shard_bytes=60_000)
    names = sorted(path.name for path in (tmp_path / "at-once").iterdir())
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == names
    assert all((tmp_path / "out" / name).read_bytes() == (tmp_path / "at-once" / name).read_bytes() for name in names)


def test_two_runs_do_not_write_to_one_folder(tmp_path):
    write_checkpoint(tmp_path / "in", "awq")
    refused = []

    def progress(done, total, said):
        if done == 9:
            with pytest.raises(ValueError, match=r"another marlin-gen convert writes to .*out: wait") as error:
                convert(tmp_path / "in", tmp_path / "out")
            refused.append(error)

    convert(tmp_path / "in", tmp_path / "out", on_progress=progress)
    assert len(refused) == 1 and is_intact(tmp_path / "out/model.safetensors")
    convert(tmp_path / "in", tmp_path / "at-once")
    before, after = (all_tensors(tmp_path / name) for name in ("at-once", "out"))
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_shards_are_verified_before_they_are_kept(tmp_path):
    write_checkpoint(tmp_path / "in", "gptq")
    convert(tmp_path / "in", tmp_path / "out", shard_bytes=60_000)
    first, second, *_ = files = sorted((tmp_path / "out").glob("*.safetensors"))
    data = bytearray(first.read_bytes())
    data[-200] ^= 1
    first.write_bytes(data)
    second.unlink()
    assert not is_intact(first)
    report = convert(tmp_path / "in", tmp_path / "out", shard_bytes=60_000)
    assert (report.shards_written, report.shards_kept) == (2, len(files) - 2) and is_intact(first)

    write_checkpoint(tmp_path / "in", "gptq", change=lambda name, tensors: tensors["scales"].mul_(2))  # another one
    assert convert(tmp_path / "in", tmp_path / "out", shard_bytes=60_000).shards_kept == 0
    one = convert(tmp_path / "in", tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").glob("*.safetensors")] == ["model.safetensors"]
    assert not (tmp_path / "out/model.safetensors.index.json").exists() and one.shards_written == 1


SMALL_HEADS = {"head_dim": 16}  # k_proj and v_proj have 32 rows


def test_a_layer_that_no_format_holds_is_an_error_with_its_name_and_the_way_out(tmp_path, capsys):
    write_checkpoint(tmp_path / "in", "gptq", **SMALL_HEADS)
    assert main(["convert", str(tmp_path / "in"), str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert "error: model.layers.0.self_attn.k_proj: n=32 is not a positive multiple of 64" in said
    assert "--keep-unsupported" in said
    assert os.listdir(tmp_path / "out") == [".lock"]


def test_keep_unsupported_dequantises_and_warns_once(tmp_path):
    layers, _ = write_checkpoint(tmp_path / "in", "gptq", **SMALL_HEADS)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        report = convert(tmp_path / "in", tmp_path / "out", keep_unsupported=True)
    odd = {f"model.layers.{i}.self_attn.{p}_proj" for i in (0, 1) for p in "kv"}
    assert set(report.unheld) == odd and set(report.formats) == set(layers) - odd
    (warning,) = caught
    assert all(f"{name} (n=32 is not a positive multiple" in str(warning.message) for name in odd)
    found = all_tensors(tmp_path / "out")
    for name in odd:
        assert torch.equal(found[f"{name}.weight"], layers[name].dequantize().half())


def test_act_order_is_exact_whether_a_kernel_holds_it_or_not(tmp_path):
    order = torch.randperm(256, generator=torch.Generator().manual_seed(5))

    def reordered(layer, tensors):
        if layer == LAYER:
            weight = replace(random_weight(384, 256, "gptq", torch.Generator().manual_seed(6)), order=order)
            expected[layer] = weight.dequantize().half()
            return stored(weight, "gptq")

    expected = {}
    write_checkpoint(tmp_path / "in", "gptq", change=reordered)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        report = convert(tmp_path / "in", tmp_path / "out", keep_unsupported=True)
    if LAYER in report.unheld:
        assert "act-order" in report.unheld[LAYER] and len(report.unheld) == 1
        with pytest.raises(ValueError, match=f"^{LAYER}: is in act-order"):
            convert(tmp_path / "in", tmp_path / "strict")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    found = model.get_submodule(LAYER)(torch.eye(256).half()).T
    assert torch.equal(found, expected[LAYER])


def test_scales_in_bfloat16_stay_exact(tmp_path):
    layers = {}

    def in_bf16(layer, tensors):
        layers[layer] = tensors["weight_scale"].bfloat16()
        return {**tensors, "weight_scale": layers[layer]}

    weights, _ = write_checkpoint(tmp_path / "in", "compressed-tensors", change=in_bf16)
    report = convert(tmp_path / "in", tmp_path / "out")
    assert json.loads((tmp_path / "out/config.json").read_text())["dtype"] == "bfloat16"
    found = all_tensors(tmp_path / "out")
    packed = PackedWeight(found[f"{LAYER}.weight"], found[f"{LAYER}.scales"], report.formats[LAYER])
    assert packed.scales.dtype == torch.bfloat16
    exact = replace(weights[LAYER], scales=layers[LAYER]).dequantize().bfloat16()
    assert torch.equal(dequantize(*unpack(packed), packed.weight_format, torch.bfloat16), exact)


def damage(key, value):
    def change(layer, tensors):
        if layer == LAYER:
            tensors[key].view(-1)[3] = value

    return change


def without(key):
    return lambda layer, tensors: {k: v for k, v in tensors.items() if layer != LAYER or k != key}


@pytest.mark.parametrize(
    ("method", "change", "says"),
    [
        ("gptq", damage("scales", float("nan")), f"{LAYER}: scales holds nan; the checkpoint is damaged: copy it"),
        ("hqq", damage("scale", float("inf")), f"layer '{LAYER}': scale of group 3 is inf"),
        ("gptq", without("qweight"), f"{LAYER}: qweight is missing"),
        ("awq", without("qzeros"), f"{LAYER}: qzeros is missing"),
        ("compressed-tensors", without("weight_shape"), f"{LAYER}: weight_shape is missing"),
        ("fp8", without("weight_scale_inv"), f"{LAYER}: weight_scale_inv is missing; the layer has weight"),
        ("awq", lambda layer, t: {**t, "scales": t["scales"][1:]} if layer == LAYER else None, f"{LAYER}: scales is"),
    ],
)  # fmt: skip
def test_damage_is_an_error_with_the_tensor_s_name_also_with_keep(tmp_path, method, change, says):
    write_checkpoint(tmp_path / "in", method, change=change)
    with pytest.raises(ValueError) as error:
        convert(tmp_path / "in", tmp_path / "out", keep_unsupported=True)
    assert str(error.value).startswith(says)
    assert not (tmp_path / "out/config.json").exists() and not list((tmp_path / "out").glob("*.part"))


def test_files_that_are_cut_or_missing_are_named(tmp_path):
    write_checkpoint(tmp_path / "in", "gptq", shards=2)
    first, second = sorted((tmp_path / "in").glob("*.safetensors"))
    whole = second.read_bytes()
    for size in (4, 100, len(whole) - 10):
        second.write_bytes(whole[:size])
        with pytest.raises(ValueError, match=r"model-00002-of-00002.safetensors is not a whole safetensors file"):
            convert(tmp_path / "in", tmp_path / "out")
    second.unlink()
    with pytest.raises(ValueError, match=r"model-00002-of-00002.safetensors is missing, and with it \S+: copy it"):
        convert(tmp_path / "in", tmp_path / "out")
    second.write_bytes(first.read_bytes())
    with pytest.raises(ValueError, match=r"is not in model-00002-of-00002.safetensors, where"):
        convert(tmp_path / "in", tmp_path / "out")


@pytest.mark.parametrize("shards", [1, 2])
def test_other_weights_beside_model_safetensors_are_not_taken(tmp_path, shards):
    """As by transformers: also where shards and their index were left there."""
    write_checkpoint(tmp_path / "in", "gptq", shards)
    if shards > 1:
        write_checkpoint(tmp_path / "in", "gptq", change=lambda name, tensors: tensors["scales"].mul_(2))
    else:
        doubled = {name: tensor * 2 for name, tensor in load_file(tmp_path / "in/model.safetensors").items()}
        save_file(doubled, tmp_path / "in/older.safetensors")
    convert(tmp_path / "in", tmp_path / "out")
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    expected = marlin_gen.hf.from_pretrained(tmp_path / "in").state_dict()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_tensor_in_two_files_is_refused(tmp_path):
    write_checkpoint(tmp_path / "in", "gptq")
    (tmp_path / "in/model.safetensors").rename(tmp_path / "in/gptq_model-4bit.safetensors")
    convert(tmp_path / "in", tmp_path / "out")
    (tmp_path / "in/older.safetensors").write_bytes((tmp_path / "in/gptq_model-4bit.safetensors").read_bytes())
    with pytest.raises(ValueError, match=r"is in \S+gptq_model-4bit.safetensors and in older.safetensors: remove"):
        convert(tmp_path / "in", tmp_path / "again")


def test_what_cannot_be_converted_is_said(tmp_path):
    with pytest.raises(ValueError, match="neither a folder"):
        convert(tmp_path / "nothing", tmp_path / "out")
    write_checkpoint(tmp_path / "in", "gptq")
    with pytest.raises(ValueError, match="is the checkpoint itself"):
        convert(tmp_path / "in", tmp_path / "in")
    (tmp_path / "busy").mkdir()
    save_file({"a": torch.zeros(3)}, tmp_path / "busy/other.safetensors")
    with pytest.raises(ValueError, match=r"other\.safetensors was not written by marlin-gen convert"):
        convert(tmp_path / "in", tmp_path / "busy")
    assert load_file(tmp_path / "busy/other.safetensors").keys() == {"a"}
    for name, text in [("config.json", '{"quantization_config": null}'), ("pytorch_model.bin", "")]:
        other = tmp_path / f"of {name}" / name
        other.parent.mkdir()
        other.write_text(text)
        with pytest.raises(ValueError, match=f"{name} was not written by marlin-gen convert"):
            convert(tmp_path / "in", other.parent)
        assert os.listdir(other.parent) == [name] and other.read_text() == text

    convert(tmp_path / "in", tmp_path / "out")
    with pytest.raises(ValueError, match="in the packed layout already"):
        convert(tmp_path / "out", tmp_path / "again")
    config = json.loads((tmp_path / "in/config.json").read_text())
    for quantization, says in [(None, "is not quantised"), ({"quant_method": "quip"}, "is 'quip'; known: awq")]:
        (tmp_path / "in/config.json").write_text(json.dumps({**config, "quantization_config": quantization}))
        with pytest.raises(ValueError, match=says):
            convert(tmp_path / "in", tmp_path / "again")


@pytest.mark.parametrize("device", ["gpu", "cuda:99", "meta"])
def test_a_device_that_is_not_here_is_an_option_error(tmp_path, device, capsys):
    write_checkpoint(tmp_path / "in", "gptq")
    assert main(["convert", str(tmp_path / "in"), str(tmp_path / "out"), "--device", device]) == 2
    said = f"error: --device {device} is neither cpu nor a GPU that torch finds here, as cuda:0\n"
    assert capsys.readouterr().err == said and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("model.safetensors.index.json", "{}", "weight_map in {} must be a JSON object, not null; copy"),
        ("model.safetensors.index.json", "[]", "{} must be a JSON object, not []; copy"),
        ("model.safetensors.index.json", "{", "{} is not JSON (Expecting"),
        ("config.json", "[1]", "{} must be a JSON object, not [1]; copy"),
        ("config.json", "\x80", "{} is not JSON ("),
        ("config.json", '{"quantization_config": [4]}', "quantization_config in {} must be a JSON object, not [4];"),
        ("quantize_config.json", "4", "{} must be a JSON object, not 4; copy"),
    ],
)
def test_a_json_file_of_another_kind_is_named(tmp_path, name, text, says, capsys):
    write_checkpoint(tmp_path / "in", "gptq", 3)
    if name == "quantize_config.json":
        (tmp_path / "in/config.json").write_text("{}")
    (tmp_path / "in" / name).write_bytes(text.encode("latin-1"))
    assert main(["convert", str(tmp_path / "in"), str(tmp_path / "out")]) == 2
    shown = capsys.readouterr().err
    assert shown.startswith("error: " + says.format(tmp_path / "in" / name)) and "Traceback" not in shown


def test_autogptq_s_own_config_file(tmp_path):
    write_checkpoint(tmp_path / "in", "gptq")
    config = json.loads((tmp_path / "in/config.json").read_text())
    old = config.pop("quantization_config")
    del old["quant_method"]
    (tmp_path / "in/config.json").write_text(json.dumps(config))
    (tmp_path / "in/quantize_config.json").write_text(json.dumps(old))
    assert len(convert(tmp_path / "in", tmp_path / "out").formats) == 14
    assert not (tmp_path / "out/quantize_config.json").exists()


def test_the_command(tmp_path, capsys):
    write_checkpoint(tmp_path / "in", "compressed-tensors")
    assert main(["convert", str(tmp_path / "in"), str(tmp_path / "out")]) == 0
    assert "14 layers in u4zg64" in capsys.readouterr().out
    assert main(["convert", str(tmp_path / "in"), str(tmp_path / "out"), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["shards_kept"], report["shards_written"], len(report["formats"])) == (1, 0, 14)


def test_a_shard_that_fails_leaves_nothing(tmp_path):
    with pytest.raises(RuntimeError), ShardWriter(tmp_path / "a.safetensors", 4096) as shard:
        shard.add("x", torch.zeros(64))
        raise RuntimeError
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.uint8, torch.bool])
def test_tensors_of_any_kind_come_back(tmp_path, dtype):
    tensors = {"a": torch.arange(7).to(dtype), "b": torch.ones(3, 64).to(dtype), "scalar": torch.tensor(1).to(dtype),
               "empty": torch.zeros(0, 5).to(dtype), "view": torch.arange(12).view(3, 4).T.to(dtype)}  # fmt: skip
    with ShardWriter(tmp_path / "a.safetensors", 4096) as shard:
        for name, tensor in tensors.items():
            shard.add(name, tensor)
        shard.finish({})
    found = load_file(tmp_path / "a.safetensors")
    assert found.keys() == tensors.keys()
    assert all(found[name].dtype == dtype and torch.equal(found[name], tensors[name]) for name in tensors)


PEAK = """
import sys, threading
from marlin_gen.convert import convert
import marlin_gen.convert.run, marlin_gen.layout, safetensors
def anonymous():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("RssAnon")) << 10
peak, stop = 0, threading.Event()
def watch():
    global peak
    while not stop.wait(0.001):
        peak = max(peak, anonymous())
convert(sys.argv[1], sys.argv[3])
before = anonymous()
threading.Thread(target=watch, daemon=True).start()
convert(sys.argv[2], sys.argv[4])
stop.set()
print(peak - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
def test_memory_is_that_of_one_layer(tmp_path):
    """28 layers of half a MB packed in one file: what is anonymous grows by a layer's needs, not by the file."""
    sizes = {"hidden_size": 1024, "intermediate_size": 1024, "num_attention_heads": 16, "num_key_value_heads": 16,
             "head_dim": 64, "vocab_size": 64}  # fmt: skip
    write_checkpoint(tmp_path / "warm", "gptq")
    write_checkpoint(tmp_path / "in", "gptq", **{**sizes, "num_hidden_layers": 4})
    command = [sys.executable, "-c", PEAK, *(str(tmp_path / name) for name in ("warm", "in", "a", "b"))]
    # Else glibc keeps freed blocks of this size in its heap, where they are counted.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "100000"}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    total = (tmp_path / "b/model.safetensors").stat().st_size
    assert total > 14_500_000 and int(done.stdout) < 10_000_000, f"{int(done.stdout)} bytes of {total}"
