"""Checkpoints through transformers: every layer on QuantLinear, answers as those of the dequantised weights."""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
import transformers
from foreign import METHODS, quantization_config, random_weight, small_config, stored, write_checkpoint
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM
from transformers.quantizers import auto

import marlin_gen.hf as hf
from marlin_gen import QuantLinear, quantize_model
from marlin_gen.cli.root import main
from marlin_gen.convert import convert

ROOT = Path(__file__).resolve().parents[2]
IDS = torch.arange(7, 31)[None]
pytestmark = pytest.mark.filterwarnings("ignore:marlin_gen. .* for no kernel format holds them:UserWarning")


def kinds(model):
    """{layer: class} of every linear layer."""
    linears = (nn.Linear, QuantLinear)
    return {name: type(module) for name, module in model.named_modules() if isinstance(module, linears)}


def logits(model):
    with torch.no_grad():
        return model(IDS).logits.float()


def difference(found, expected):
    return float((found - expected).norm() / expected.norm())


def greedy(model):
    torch.manual_seed(0)
    return model.generate(IDS, max_new_tokens=12, do_sample=False, pad_token_id=0)[0].tolist()


def check(model, dense, odd=()):
    """Answers of the dequantised model, within what f16 does; every quantised layer but ``odd`` on QuantLinear."""
    assert set(kinds(model)) == set(kinds(dense))
    for name, kind in kinds(model).items():
        assert kind is (nn.Linear if name == "lm_head" or name in odd else QuantLinear), name
    assert model.dtype == torch.float16 and not any(tensor.is_meta for tensor in model.state_dict().values())
    assert difference(logits(model), logits(dense)) < 3e-3
    assert greedy(model) == greedy(dense)


def edit(folder, change=lambda tensors: None, **settings):
    """A checkpoint of one file with other tensors and settings."""
    tensors, about = load_file(folder / "model.safetensors"), json.loads((folder / "config.json").read_text())
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps({**about, **settings}))


@pytest.mark.parametrize("method", METHODS)
def test_a_converted_folder(tmp_path, method):
    _, dense = write_checkpoint(tmp_path / "in", method, attention_bias=True)
    arguments = ["convert", str(tmp_path / "in"), str(tmp_path / "out"), "--shard-gb", "0.001", "--keep-unsupported"]
    assert main(arguments) == 0
    unheld = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]["unheld"]
    assert method == "hqq" or not unheld
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    check(model, dense, unheld)
    assert model.model.layers[0].self_attn.q_proj.bias is not None

    direct = hf.from_pretrained(tmp_path / "in").state_dict()
    state = model.state_dict()
    assert direct.keys() == state.keys() and all(torch.equal(direct[name], state[name]) for name in state)


@pytest.mark.parametrize("method", ["fp8", "gptq", "hqq"])
def test_in_bfloat16(tmp_path, method):
    """Scales that are rounded to bf16 make another weight: that of the dense model in bf16, but for its rounding."""
    _, dense = write_checkpoint(tmp_path / "in", method, attention_bias=True)
    assert main(["convert", str(tmp_path / "in"), str(tmp_path / "out"), "--dtype", "bfloat16"]) == 0
    expected = logits(dense.bfloat16())
    converted = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    direct = hf.from_pretrained(tmp_path / "in", dtype=torch.bfloat16)
    for model in (converted, direct):
        layer = model.model.layers[0].self_attn.q_proj
        assert isinstance(layer, QuantLinear)
        assert {model.dtype, layer.scales.dtype, layer.bias.dtype} == {torch.bfloat16}
        assert difference(logits(model), expected) < 0.03
    assert torch.equal(logits(converted), logits(direct))
    direct.save_pretrained(tmp_path / "saved")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "saved")), logits(direct))


def test_saved_and_loaded_again(tmp_path):
    _, dense = write_checkpoint(tmp_path / "in", "gptq")
    model = hf.from_pretrained(tmp_path / "in")
    model.save_pretrained(tmp_path / "saved")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    check(again, dense)
    assert torch.equal(logits(again), logits(model))


def shuffled(layer, tensors):
    """In act-order."""
    tensors["g_idx"] = tensors["g_idx"].flip(0)


@pytest.mark.parametrize("cast", [torch.bfloat16, torch.float16, torch.float32])
def test_a_model_of_another_type_is_saved_and_loaded_again(tmp_path, cast):
    """GPTQ's zero points are encoded otherwise in each type. Of float32, which no kernel has, the type before it."""
    write_checkpoint(tmp_path / "in", "gptq")
    model = hf.from_pretrained(tmp_path / "in")
    own = cast if cast != torch.float32 else torch.float16
    expected = logits(hf.from_pretrained(tmp_path / "in", dtype=own))
    model.to(cast).save_pretrained(tmp_path / "saved")
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert found.dtype == own and difference(logits(found), expected) < 1e-3


def test_a_fused_model_is_not_saved(tmp_path):
    write_checkpoint(tmp_path / "in", "gptq")
    model = hf.from_pretrained(tmp_path / "in")
    assert hf.fuse(model.model)
    with pytest.raises(ValueError, match=r"a fused model has other names .*: call save_pretrained before hf\.fuse"):
        model.save_pretrained(tmp_path / "saved")
    assert not list((tmp_path / "saved").iterdir())


def test_the_base_model_of_a_checkpoint(tmp_path):
    write_checkpoint(tmp_path / "in", "gptq")
    whole = hf.from_pretrained(tmp_path / "in")
    base = hf.from_pretrained(tmp_path / "in", auto_class=AutoModel)
    assert QuantLinear in kinds(base).values() and nn.Linear not in kinds(base).values()
    with torch.no_grad():
        assert torch.equal(base(IDS).last_hidden_state, whole.model(IDS).last_hidden_state)


@pytest.mark.parametrize("in_order", [True, False])
def test_a_checkpoint_of_a_base_model(tmp_path, in_order):
    """Saved from an AutoModel, names have no "model."; with or without the head, it is the same layers."""
    write_checkpoint(tmp_path / "in", "gptq", change=None if in_order else shuffled)
    whole = hf.from_pretrained(tmp_path / "in")
    expected = whole.model(IDS).last_hidden_state
    whole.save_pretrained(tmp_path / "whole")
    file = tmp_path / "in/model.safetensors"
    bare = {name.removeprefix("model."): tensor for name, tensor in load_file(file).items() if name != "lm_head.weight"}
    save_file(bare, file, metadata={"format": "pt"})
    hf.from_pretrained(tmp_path / "in", auto_class=AutoModel).save_pretrained(tmp_path / "bare")
    AutoModel.from_pretrained(tmp_path / "whole").save_pretrained(tmp_path / "cut")
    for name in ("in", "bare", "whole", "cut"):
        base = hf.from_pretrained(tmp_path / name, auto_class=AutoModel)
        assert set(kinds(base).values()) == {QuantLinear} and torch.equal(base(IDS).last_hidden_state, expected), name
        model = hf.from_pretrained(tmp_path / name).model
        assert set(kinds(model).values()) == {QuantLinear} and torch.equal(model(IDS).last_hidden_state, expected), name


def test_a_quantised_base_model_saved_and_loaded_again(tmp_path):
    torch.manual_seed(0)
    transformers.LlamaModel(small_config()).half().save_pretrained(tmp_path / "float")
    base = AutoModel.from_pretrained(tmp_path / "float", quantization_config=hf.MarlinGenConfig())
    base.save_pretrained(tmp_path / "saved")
    again, whole = (kind.from_pretrained(tmp_path / "saved") for kind in (AutoModel, AutoModelForCausalLM))
    assert set(kinds(base).values()) == {QuantLinear} and kinds(again) == kinds(base) == kinds(whole.model)
    for model in (again, whole.model):
        assert torch.equal(model(IDS).last_hidden_state, base(IDS).last_hidden_state)


def test_settings_of_the_config_are_taken_as_by_transformers(tmp_path):
    write_checkpoint(tmp_path / "in", "gptq")
    model = hf.from_pretrained(
        tmp_path / "in", transformers.AutoModelForSequenceClassification, num_labels=3, use_cache=False
    )
    assert isinstance(model.model.layers[0].mlp.up_proj, QuantLinear)
    assert model.score.out_features == 3 and not model.config.use_cache
    with pytest.raises(TypeError, match="bogus"):
        hf.from_pretrained(tmp_path / "in", bogus=1)


def test_unsupported_layers_fall_through_with_one_warning(tmp_path):
    _, dense = write_checkpoint(tmp_path / "in", "awq", head_dim=16)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = hf.from_pretrained(tmp_path / "in")
    odd = {f"model.layers.{i}.self_attn.{p}_proj" for i in (0, 1) for p in "kv"}
    (said,) = [str(one.message) for one in caught if str(one.message).startswith("marlin_gen")]
    assert said.startswith("marlin_gen: 4 of 14 quantised layers run as nn.Linear in float16, for no kernel")
    assert all(f"{name} (n=32 is not a positive multiple of 64" in said for name in odd)
    check(model, dense, odd)

    model.save_pretrained(tmp_path / "saved")
    check(AutoModelForCausalLM.from_pretrained(tmp_path / "saved"), dense, odd)


def test_damage_is_named(tmp_path):
    def change(layer, tensors):
        if layer.endswith("1.mlp.up_proj"):
            tensors["scales"][0, 3] = float("nan")

    write_checkpoint(tmp_path / "in", "gptq", change=change)
    with pytest.raises(ValueError, match=r"^model.layers.1.mlp.up_proj: scales holds nan"):
        hf.from_pretrained(tmp_path / "in")


@pytest.mark.parametrize("last", ["weight", "scales", "layout_version"])
def test_a_tensor_that_a_converted_folder_lacks_is_named(tmp_path, last):
    """Transformers would leave what lay in memory."""
    write_checkpoint(tmp_path / "in", "gptq")
    convert(tmp_path / "in", tmp_path / "out")
    edit(tmp_path / "out", lambda tensors: tensors.pop(f"model.layers.1.mlp.up_proj.{last}"))
    with pytest.raises(ValueError, match=f"^model.layers.1.mlp.up_proj: {last} is missing; copy the checkpoint anew"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "out")


def test_a_bias_that_a_checkpoint_lacks_is_zero(tmp_path):
    _, dense = write_checkpoint(tmp_path / "in", "gptq")
    edit(tmp_path / "in", attention_bias=True)
    convert(tmp_path / "in", tmp_path / "out")
    junk = [torch.full((256,), float("nan")).half() for _ in range(2000)]
    del junk
    for model in (hf.from_pretrained(tmp_path / "in"), AutoModelForCausalLM.from_pretrained(tmp_path / "out")):
        check(model, dense)


def test_a_quantised_head_is_not_tied(tmp_path):
    write_checkpoint(tmp_path / "in", "gptq", vocab_size=128)
    weight = random_weight(128, 256, "gptq", torch.Generator().manual_seed(5))

    def change(tensors):
        del tensors["lm_head.weight"]
        tensors.update({f"lm_head.{last}": part.contiguous() for last, part in stored(weight, "gptq").items()})

    edit(tmp_path / "in", change, tie_word_embeddings=True)
    convert(tmp_path / "in", tmp_path / "out")
    for model in (hf.from_pretrained(tmp_path / "in"), AutoModelForCausalLM.from_pretrained(tmp_path / "out")):
        assert torch.equal(model.lm_head(torch.eye(256).half()).T, weight.dequantize().half())
        model.save_pretrained(tmp_path / "saved")
        assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "saved")), logits(model))


def test_an_offloaded_bias_is_named(tmp_path):
    write_checkpoint(tmp_path / "in", "gptq", attention_bias=True)
    places = {"model.embed_tokens": "cpu", "model.norm": "cpu", "lm_head": "cpu", "model.rotary_emb": "cpu",
              "model.layers.0": "cpu", "model.layers.1": "disk"}  # fmt: skip
    with pytest.raises(ValueError, match=r"^model.layers.1.self_attn.q_proj: device_map offloads its bias; run"):
        hf.from_pretrained(tmp_path / "in", device_map=places, offload_folder=str(tmp_path / "off"))


@pytest.mark.parametrize("in_text_config", [False, True])
def test_a_multimodal_checkpoint_by_transformers_renamed_keys(tmp_path, in_text_config):
    """model.language_model.layers of the model is language_model.model.layers in the file."""
    text = {**small_config(num_hidden_layers=1).to_dict(), "model_type": "mistral"}
    vision = {"model_type": "pixtral", "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1,
              "num_attention_heads": 2, "head_dim": 32, "image_size": 32, "patch_size": 16}  # fmt: skip
    config = transformers.Mistral3Config(text_config=text, vision_config=vision, image_token_index=10)
    dense = transformers.Mistral3ForConditionalGeneration(config).half().eval()
    layer = "language_model.model.layers.0.mlp.down_proj"
    weight = random_weight(256, 384, "gptq", torch.Generator().manual_seed(5))
    dense.model.language_model.layers[0].mlp.down_proj.weight.data = weight.dequantize().half()
    dense.save_pretrained(tmp_path / "in")

    def change(tensors):
        del tensors[f"{layer}.weight"]
        tensors.update({f"{layer}.{last}": part.contiguous() for last, part in stored(weight, "gptq").items()})

    about = {"quantization_config": quantization_config("gptq")}
    about = {"text_config": {**config.to_dict()["text_config"], **about}} if in_text_config else about
    edit(tmp_path / "in", change, **about)
    convert(tmp_path / "in", tmp_path / "out")
    kind = transformers.AutoModelForImageTextToText
    direct = hf.from_pretrained(tmp_path / "in", kind)
    direct.save_pretrained(tmp_path / "saved")
    for model in (direct, kind.from_pretrained(tmp_path / "out"), kind.from_pretrained(tmp_path / "saved")):
        assert isinstance(model.model.language_model.layers[0].mlp.down_proj, QuantLinear)
        assert difference(logits(model), logits(dense)) < 3e-3


def test_layers_that_transformers_ignores_are_left_out(tmp_path, monkeypatch):
    """As the head for multi-token prediction of Qwen3.5's fp8 checkpoints."""
    _, dense = write_checkpoint(tmp_path / "in", "fp8")
    weight = stored(random_weight(256, 384, "fp8", torch.Generator().manual_seed(5)), "fp8")
    edit(tmp_path / "in", lambda tensors: tensors.update({f"mtp.fc.{k}": v.contiguous() for k, v in weight.items()}))
    with pytest.raises(ValueError, match=r"^mtp.fc is a quantised linear .* has no such module"):
        hf.from_pretrained(tmp_path / "in")
    monkeypatch.setattr(transformers.LlamaForCausalLM, "_keys_to_ignore_on_load_unexpected", [r"^mtp.*"])
    convert(tmp_path / "in", tmp_path / "out")
    for model in (hf.from_pretrained(tmp_path / "in"), AutoModelForCausalLM.from_pretrained(tmp_path / "out")):
        check(model, dense)


def test_a_checkpoint_of_another_model_is_refused(tmp_path):
    write_checkpoint(tmp_path / "in", "gptq")
    path = tmp_path / "in/config.json"
    about = json.loads(path.read_text())
    path.write_text(json.dumps({**about, "intermediate_size": 512}))
    with pytest.raises(ValueError, match=r"model.layers.0.mlp.gate_proj is 384 x 256 in the checkpoint, 512 x 256 in"):
        hf.from_pretrained(tmp_path / "in")
    path.write_text(json.dumps({**about, "num_hidden_layers": 1}))
    for kind in (AutoModelForCausalLM, AutoModel):
        with pytest.raises(ValueError, match=r"model.layers.1.\S+ is a quantised linear .* has no such module"):
            hf.from_pretrained(tmp_path / "in", auto_class=kind)


@pytest.mark.usefixtures("restored")
def test_a_checkpoint_without_a_layer_of_its_method_is_refused(tmp_path):
    """AutoGPTQ's own Marlin layers, of which transformers would leave nn.Linears with random weights."""
    write_checkpoint(tmp_path / "in", "gptq", change=lambda _, parts: {"B": parts["qweight"], "s": parts["scales"]})
    path = tmp_path / "in/config.json"
    about = json.loads(path.read_text())
    about["quantization_config"]["checkpoint_format"] = "marlin"
    path.write_text(json.dumps(about))
    hf.take_over(["gptq"])
    for load in (hf.from_pretrained, AutoModelForCausalLM.from_pretrained):
        with pytest.raises(ValueError, match=r"no tensor of a 'gptq' layer \(checkpoint_format 'marlin'\): give"):
            load(tmp_path / "in")
    del about["quantization_config"]["checkpoint_format"]
    path.write_text(json.dumps(about))
    with pytest.raises(ValueError, match=r"no tensor of a 'gptq' layer: give one in the method's own"):
        hf.from_pretrained(tmp_path / "in")


def test_a_float_checkpoint_is_quantised(tmp_path):
    torch.manual_seed(0)
    source = transformers.LlamaForCausalLM(small_config()).half().eval()
    source.save_pretrained(tmp_path / "float")
    config = hf.MarlinGenConfig("u4zg32", skip=("lm_head", "*.down_proj"))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "float", quantization_config=config)
    found = kinds(model)
    assert [name for name, kind in found.items() if kind is nn.Linear] == [
        "model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj", "lm_head"
    ]  # fmt: skip
    assert {module.weight_format for module in model.modules() if isinstance(module, QuantLinear)} == {"u4zg32"}
    assert difference(logits(model), logits(source)) < 0.25
    model.save_pretrained(tmp_path / "saved")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert kinds(again) == found and torch.equal(logits(again), logits(model))

    with pytest.raises(ValueError, match=r"is not quantised; give quantization_config=MarlinGenConfig"):
        hf.from_pretrained(tmp_path / "float")


def test_a_config_is_not_shared_and_what_is_saved_is_the_model_s(tmp_path):
    transformers.LlamaForCausalLM(small_config(vocab_size=128)).half().save_pretrained(tmp_path / "float")
    config = hf.MarlinGenConfig(skip=("lm_head", "model.layers.1"))
    one, other = (
        AutoModelForCausalLM.from_pretrained(tmp_path / "float", quantization_config=config, dtype=dtype)
        for dtype in (torch.float16, torch.bfloat16)
    )
    assert other.dtype == torch.bfloat16 and config.to_dict() == hf.MarlinGenConfig(skip=config.skip).to_dict()
    assert len(quantize_model(one, "u4zg64", skip=()).replaced) == 8
    for model in (one, other):
        model.save_pretrained(tmp_path / "saved")
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
        assert kinds(again) == kinds(model) and torch.equal(logits(again), logits(model))


@pytest.fixture
def restored():
    """transformers' own registries as they were."""
    mappings = (auto.AUTO_QUANTIZATION_CONFIG_MAPPING, auto.AUTO_QUANTIZER_MAPPING)
    before = [dict(mapping) for mapping in mappings]
    yield
    for mapping, old in zip(mappings, before, strict=True):
        mapping.clear()
        mapping.update(old)


@pytest.mark.usefixtures("restored")
@pytest.mark.parametrize("method", ["awq", "fp8", "gptq"])
def test_taking_over_lets_from_pretrained_itself_load_them(tmp_path, method):
    _, dense = write_checkpoint(tmp_path / "in", method)
    hf.take_over([method])
    check(AutoModelForCausalLM.from_pretrained(tmp_path / "in"), dense)
    if method == "fp8":  # to which transformers itself quantises float models, as ever
        made = auto.AutoHfQuantizer.from_config(transformers.FineGrainedFP8Config(), pre_quantized=False)
        assert type(made).__name__ == "FineGrainedFP8HfQuantizer"
    with pytest.raises(ValueError, match="'quip' is not read; known: awq, compressed-tensors, fp8, gptq, hqq"):
        hf.take_over(["quip"])


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"weight_format": "u3"}, "unknown weight format 'u3'"),
        ({"formats": {"a": "u5"}}, "unknown weight format 'u5'"),
        ({"formats": {}, "layout_version": 9}, "layout_version=9 is not 3: convert the checkpoint again"),
        ({"bits": 4}, "MarlinGenConfig has no bits; it has weight_format and skip"),
    ],
)
def test_what_a_config_refuses(settings, says):
    with pytest.raises(ValueError, match=says):
        hf.MarlinGenConfig(**settings)


def test_serving_does_not_import_transformers():
    code = (
        "import sys, torch, marlin_gen; layer = marlin_gen.QuantLinear(128, 64); layer(torch.zeros(1, 128).half());"
        " marlin_gen.quantize_model; print([m for m in ('transformers', 'safetensors', 'gguf') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
