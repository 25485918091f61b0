"""Model configs to layer shapes: published models, tensor parallelism, and what bad configs are told."""

from __future__ import annotations

import json

import pytest

from marlin_gen.models import layer_shapes, load_config, model_shapes, parse_shape, presets

LLAMA_8B = {"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8}


def sizes(layers):
    return [(layer.n, layer.k) for layer in layers]


def test_llama_8b_has_the_four_published_shapes():
    assert sizes(model_shapes("llama-3.1-8b")) == [(6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336)]


def test_tp_splits_features_of_the_first_and_inputs_of_the_second_of_each_pair():
    layers = {layer.name: (layer.n, layer.k) for layer in layer_shapes(LLAMA_8B, tp=2)}
    assert layers == {
        "qkv_proj": (3072, 4096),
        "o_proj": (4096, 2048),
        "gate_up_proj": (14336, 4096),
        "down_proj": (4096, 7168),
    }


def test_kv_heads_are_copied_when_there_are_more_ranks_than_kv_heads():
    wide = {**LLAMA_8B, "intermediate_size": 16384}
    qkv = layer_shapes(wide, tp=16)[0]
    assert qkv.n == (2 + 2 * 1) * 128


def test_head_dim_of_the_config_wins_over_hidden_size_by_heads():
    layers = model_shapes("qwen3-32b")
    assert (layers[0].n, layers[0].k) == ((64 + 2 * 8) * 128, 5120)
    assert (layers[1].n, layers[1].k) == (5120, 64 * 128)


def test_gemma_3_12b_does_not_state_its_head_dim():
    text = {"hidden_size": 3840, "intermediate_size": 15360, "num_attention_heads": 16, "num_key_value_heads": 8}
    layers = layer_shapes({"text_config": {**text, "model_type": "gemma3_text"}})
    assert sizes(layers[:2]) == [((16 + 2 * 8) * 256, 3840), (3840, 16 * 256)]


def test_shapes_of_several_tp_degrees_are_distinct():
    layers = model_shapes("llama-3.1-8b", (1, 2, 2))
    assert len(layers) == len(set(sizes(layers))) == 8


def test_equal_shapes_are_merged_and_both_named():
    square = {**LLAMA_8B, "num_key_value_heads": 32, "intermediate_size": 4096 * 3 // 2}
    layers = layer_shapes(square)
    assert sizes(layers)[0] == (12288, 4096)
    assert layers[0].name == "qkv_proj+gate_up_proj"


@pytest.mark.parametrize("name", presets())
def test_every_preset_gives_shapes_without_tp(name):
    assert model_shapes(name)


def test_a_hugging_face_config_and_its_folder_are_read(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**LLAMA_8B, "torch_dtype": "bfloat16"}))
    assert model_shapes(str(path)) == model_shapes(str(tmp_path)) == model_shapes("llama-3.1-8b")


def test_a_multimodal_config_is_read_through_its_text_config():
    assert layer_shapes({"vision_config": {"hidden_size": 1}, "text_config": LLAMA_8B}) == layer_shapes(LLAMA_8B)


def test_an_unknown_preset_is_told_the_nearest_and_all():
    with pytest.raises(ValueError, match=r"'llama-3\.1-8B-it'; did you mean llama-3\.1-8b\?.*qwen3-32b"):
        load_config("llama-3.1-8B-it")


@pytest.mark.parametrize("field", ["hidden_size", "intermediate_size", "num_attention_heads"])
def test_a_missing_field_is_named_with_the_file(tmp_path, field):
    path = tmp_path / "config.json"
    path.write_text(json.dumps({k: v for k, v in LLAMA_8B.items() if k != field}))
    with pytest.raises(ValueError, match=rf"{path} has no {field}"):
        model_shapes(str(path))


@pytest.mark.parametrize("text", ["{", "[1]"])
def test_a_file_that_is_no_config_is_named(tmp_path, text):
    path = tmp_path / "config.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=str(path)):
        model_shapes(str(path))


@pytest.mark.parametrize("shapes", [[4096], ["4096x"], [None]])
def test_a_list_of_what_are_no_shapes_is_quoted(tmp_path, shapes):
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"shapes": shapes}))
    with pytest.raises(ValueError, match=r"not a shape: '(4096x?|None)'"):
        model_shapes(str(path))


def test_listed_shapes_are_not_divided():
    with pytest.raises(ValueError, match="preset tiny lists shapes, which --tp cannot divide"):
        model_shapes("tiny", (2,))


def test_a_missing_file_is_named():
    with pytest.raises(FileNotFoundError, match=r"nowhere/config\.json"):
        load_config("nowhere/config.json")


def test_a_shape_the_layout_cannot_hold_names_layer_and_tp():
    with pytest.raises(ValueError, match=r"preset qwen2\.5-72b: down_proj at tp=2 is 8192x14784: group_size=128"):
        model_shapes("qwen2.5-72b", (2,))


def test_heads_that_do_not_divide_name_the_field_and_tp():
    with pytest.raises(ValueError, match=r"num_attention_heads=28 does not divide over tp=8"):
        model_shapes("qwen2.5-7b", (8,))


def test_a_mixture_of_experts_is_refused_by_name():
    with pytest.raises(ValueError, match=r"num_experts=128 means a mixture of experts"):
        layer_shapes({**LLAMA_8B, "num_experts": 128})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"moe_num_experts": 64}, "moe_num_experts=64 means a mixture of experts"),  # ERNIE 4.5, Aria
        ({"global_head_dim": 512}, "global_head_dim=512 means heads of two sizes"),  # Gemma 4
        ({"per_layer_config": {"05": {"head_dim": 512}}}, "per_layer_config=.* means layers of several sizes"),
        ({"hybrid_override_pattern": "M-M*"}, "hybrid_override_pattern=.* means layers of several kinds"),  # Nemotron-H
        ({"layer_types": ["linear_attention", "full_attention"]}, "layer_types=linear_attention"),  # Qwen3.5
        ({"layers_block_type": ["mamba", "attention"]}, "layer_types=mamba"),
        ({"layer_types": 5}, "layer_types=5"),
        ({"block_types": ["recurrent", "attention"]}, "block_types=.* means layers of several kinds"),  # RecurrentGemma
        ({"mamba_d_state": 16}, "mamba_d_state=16 means state-space layers"),  # Bamba, Falcon-H1
        ({"block_auto_adjust_ff_dim": True}, "means an MLP of another size than intermediate_size"),  # LFM2
        ({"cross_layer_interval": 1}, "means layers with cross-attention"),  # IDEFICS
        ({"cross_attention_layers": [3]}, "means layers with cross-attention"),  # Llama 3.2 Vision
        ({"is_encoder_decoder": True}, "means layers with cross-attention"),
        ({"type_vocab_size": 2}, "type_vocab_size=2 means an encoder"),  # BERT and its like
        ({"model_type": "muse_glimmer_text"}, "means attention with a gate"),
    ],
)
def test_layers_that_are_not_those_of_a_plain_decoder_are_refused_by_name(fields, message):
    with pytest.raises(ValueError, match=message):
        layer_shapes({"text_config": {**LLAMA_8B, **fields}})


def test_a_model_that_is_no_decoder_is_refused_by_its_architecture():
    for name, fields in {
        "LlamaForCausalLM": {}, "LlavaForConditionalGeneration": {}, "Qwen3Model": {"vocab_size": 9},
        "LlamaForSequenceClassification": {"vocab_size": 9}, "Gemma3Model": {"text_config": LLAMA_8B},
        "GraniteMoeHybridForCausalLM": {"mamba_d_conv": 4, "layer_types": ["attention"] * 2},
    }.items():  # fmt: skip
        assert layer_shapes({**LLAMA_8B, **fields, "architectures": [name]}) == layer_shapes(LLAMA_8B)
    for name, fields in {"ViTModel": {}, "DebertaV2ForMaskedLM": {"vocab_size": 9, "type_vocab_size": 0}}.items():
        with pytest.raises(ValueError, match=rf"architectures=\['{name}'\] means no decoder of text"):
            layer_shapes({**LLAMA_8B, **fields, "architectures": [name]})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_key_value_heads": "8"}, "num_key_value_heads='8', not a positive whole number"),
        ({"head_dim": [128]}, r"head_dim=\[128\], not a positive whole number"),
        ({"head_dim": -128}, "head_dim=-128, not a positive whole number"),
        ({"head_dim": 0}, "head_dim=0, not a positive whole number"),
        ({"text_config": [1]}, r"text_config=\[1\] is not a model config"),
        ({"text_config": {"model_type": "gemma3_text", "hidden_size": 2560, "intermediate_size": 10240}},
         r"has no num_attention_heads; .* AutoConfig.*use_diff=False.*--shapes"),
    ],
)  # fmt: skip
def test_a_field_of_another_type_or_left_out_is_named_with_what_to_do(fields, message):
    with pytest.raises(ValueError, match=message):
        layer_shapes({**LLAMA_8B, **fields})


def test_fields_that_are_null_count_as_absent():
    nothing = dict.fromkeys(("text_config", "num_key_value_heads", "head_dim", "layer_types", "architectures"))
    assert layer_shapes({**LLAMA_8B, **nothing}) == layer_shapes({**LLAMA_8B, "num_key_value_heads": 32})


@pytest.mark.parametrize(
    "model_type",
    ["apertus", "arcee", "biogpt", "gemma3_text", "llama", "nanochat", "phi", "phi3", "qwen3", "starcoder2"],
)
def test_the_shapes_are_those_of_the_modules_in_transformers(model_type):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    config = transformers.AutoConfig.for_model(model_type, num_hidden_layers=1)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    layers = next(module for module in model.modules() if isinstance(module, torch.nn.ModuleList))
    linears = [module.weight.numel() for module in layers.modules() if isinstance(module, torch.nn.Linear)]
    found = layer_shapes(json.loads(config.to_json_string(use_diff=False)))
    assert sum(layer.n * layer.k * len(layer.name.split("+")) for layer in found) == sum(linears)


def test_windowed_attention_is_plain():
    assert layer_shapes({**LLAMA_8B, "layer_types": ["sliding_attention", "full_attention"]}) == layer_shapes(LLAMA_8B)


@pytest.mark.parametrize("model_type", ["arcee", "gpt_neox", "jais2", "nemotron", "persimmon", "phi", "starcoder2"])
def test_a_model_whose_mlp_has_no_gate_gets_the_up_projection_alone(model_type):
    layers = {layer.name: (layer.n, layer.k) for layer in layer_shapes({**LLAMA_8B, "model_type": model_type})}
    assert (layers["up_proj"], layers["down_proj"]) == ((14336, 4096), (4096, 14336))
    assert "gate_up_proj" not in layers


@pytest.mark.parametrize(
    ("text", "message"),
    [("4096", "'4096'"), ("4096x", "'4096x'"), ("ax4096", "'ax4096'"), ("100x4096", "n=100"), ("4096x4100", "k=4100")],
)
def test_a_bad_shape_is_named(text, message):
    with pytest.raises(ValueError, match=message):
        parse_shape(text)
