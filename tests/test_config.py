"""config.json and generation_config.json: every released dense model is read, everything else is refused by name."""

import dataclasses
import json
import math

import numpy as np
import pytest

from cuqwen.config import CheckpointError, Config, GenerationConfig, Yarn, check_sampling_value

# What the released files share, in the spelling they were published with (transformers 4).
QWEN3 = {
    "architectures": ["Qwen3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "head_dim": 128,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "max_position_embeddings": 40960,
    "model_type": "qwen3",
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": None,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.51.0",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
QWEN2 = {
    "architectures": ["Qwen2ForCausalLM"],
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "max_position_embeddings": 32768,
    "model_type": "qwen2",
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "sliding_window": 131072,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.43.1",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
BASE3 = {"eos_token_id": 151643, "max_position_embeddings": 32768}
LONG3 = {"max_position_embeddings": 262144, "rope_theta": 5000000}
WIDE2 = {"vocab_size": 152064}

# name: (common keys, C, F, L, H, K, tied, what differs)
RELEASED = {
    "Qwen3-0.6B": (QWEN3, 1024, 3072, 28, 16, 8, True, {}),
    "Qwen3-1.7B": (QWEN3, 2048, 6144, 28, 16, 8, True, {}),
    "Qwen3-4B": (QWEN3, 2560, 9728, 36, 32, 8, True, {}),
    "Qwen3-8B": (QWEN3, 4096, 12288, 36, 32, 8, False, {}),
    "Qwen3-14B": (QWEN3, 5120, 17408, 40, 40, 8, False, {}),
    "Qwen3-32B": (QWEN3, 5120, 25600, 64, 64, 8, False, {}),
    "Qwen3-0.6B-Base": (QWEN3, 1024, 3072, 28, 16, 8, True, BASE3),
    "Qwen3-1.7B-Base": (QWEN3, 2048, 6144, 28, 16, 8, True, BASE3),
    "Qwen3-4B-Base": (QWEN3, 2560, 9728, 36, 32, 8, True, BASE3),
    "Qwen3-8B-Base": (QWEN3, 4096, 12288, 36, 32, 8, False, BASE3),
    "Qwen3-14B-Base": (QWEN3, 5120, 17408, 40, 40, 8, False, BASE3),
    "Qwen3-4B-Instruct-2507": (QWEN3, 2560, 9728, 36, 32, 8, True, LONG3),
    "Qwen3-4B-Thinking-2507": (QWEN3, 2560, 9728, 36, 32, 8, True, LONG3),
    "Qwen3-Embedding-0.6B": (QWEN3, 1024, 3072, 28, 16, 8, True, {**BASE3, "vocab_size": 151669}),
    "Qwen2-0.5B": (QWEN2, 896, 4864, 24, 14, 2, True, {"max_position_embeddings": 131072}),
    "Qwen2-7B": (QWEN2, 3584, 18944, 28, 28, 4, False, {**WIDE2, "max_position_embeddings": 131072}),
    "Qwen2.5-0.5B-Instruct": (QWEN2, 896, 4864, 24, 14, 2, True, {"sliding_window": 32768}),
    "Qwen2.5-1.5B": (QWEN2, 1536, 8960, 28, 12, 2, True, {"use_mrope": False}),
    "Qwen2.5-3B-Instruct": (QWEN2, 2048, 11008, 36, 16, 2, True, {"sliding_window": 32768}),
    "Qwen2.5-7B": (QWEN2, 3584, 18944, 28, 28, 4, False, {**WIDE2, "use_mrope": False}),
    "Qwen2.5-14B-Instruct": (QWEN2, 5120, 13824, 48, 40, 8, False, {**WIDE2, "rms_norm_eps": 1e-05}),
    "Qwen2.5-32B-Instruct": (QWEN2, 5120, 27648, 64, 40, 8, False, {**WIDE2, "rms_norm_eps": 1e-05}),
    "Qwen2.5-72B-Instruct": (QWEN2, 8192, 29568, 80, 64, 8, False, {**WIDE2, "rms_norm_eps": 1e-05}),
}


def released(name):
    common, hidden, inner, layers, heads, kv_heads, tied, rest = RELEASED[name]
    sizes = {
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "max_window_layers": layers - 3,  # irrelevant while use_sliding_window is false
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "tie_word_embeddings": tied,
    }
    return {**common, **sizes, **rest}


def respelled(d):
    """The same model as transformers 5 saves it."""
    new = {k: v for k, v in d.items() if k not in ("torch_dtype", "rope_theta", "rope_scaling")}
    new["dtype"] = d["torch_dtype"]
    new["rope_parameters"] = {"rope_theta": d["rope_theta"], "rope_type": "default"}
    new["layer_types"] = ["full_attention"] * d["num_hidden_layers"]
    new["sliding_window"] = None
    new["pad_token_id"] = None
    return new


@pytest.fixture
def small():
    return released("Qwen3-0.6B")


def refused(d, *parts):
    with pytest.raises(CheckpointError) as caught:
        Config.from_dict(d, "/models/x/config.json")
    message = str(caught.value)
    assert "\n" not in message and len(message) < 400, message
    assert message.startswith("/models/x/config.json: "), message
    for part in parts:
        assert part in message, message
    return message


@pytest.mark.parametrize("name", RELEASED)
@pytest.mark.parametrize("spelling", [dict, respelled])
def test_released_models_are_read(name, spelling):
    d = released(name)
    config = Config.from_dict(spelling(d), name)
    for key in ("model_type", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"):
        assert getattr(config, key) == d[key]
    for key in ("num_key_value_heads", "vocab_size", "max_position_embeddings", "rms_norm_eps", "rope_theta"):
        assert getattr(config, key) == d[key]
    assert config.tie_word_embeddings is d["tie_word_embeddings"]
    assert config.head_dim == (64 if "0.5B" in name else 128)
    assert config.dtype == "bfloat16"
    assert config.eos_token_id == (d["eos_token_id"],)
    assert config.has_qk_norm is name.startswith("Qwen3")
    assert config.has_qkv_bias is name.startswith("Qwen2")
    for field in dataclasses.fields(Config):
        value = getattr(config, field.name)
        if field.name != "rope_scaling":
            assert type(value) is (tuple if field.name == "eos_token_id" else field.type)
    assert config.rope_scaling is None and config.context_length == d["max_position_embeddings"]


def test_from_folder_and_frozen(tmp_path, small):
    (tmp_path / "config.json").write_text(json.dumps(small))
    config = Config.from_folder(tmp_path)
    assert config == Config.from_dict(small, "")
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.head_dim = 64


@pytest.mark.parametrize("kind", ["Qwen3Config", "Qwen2Config"])
def test_what_transformers_saves_is_read(tmp_path, kind):
    transformers = pytest.importorskip("transformers")
    saved = getattr(transformers, kind)(
        hidden_size=96,
        intermediate_size=160,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=301,
        max_position_embeddings=512,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        eos_token_id=[7, 9],
        dtype="float16",
        rope_parameters={"rope_type": "default", "rope_theta": 12345.0},
    )
    saved.save_pretrained(tmp_path)
    config = Config.from_folder(tmp_path)
    head_dim = 128 if kind == "Qwen3Config" else 24
    expected = (96, 160, 3, 4, 2, head_dim, 301, 512, 1e-5, 12345.0, True, "float16", (7, 9), None)
    assert dataclasses.astuple(config)[1:] == expected


# --- absent keys -----------------------------------------------------------------------------------------------------

REQUIRED = ["model_type", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "head_dim"]
REQUIRED += ["num_key_value_heads", "vocab_size", "max_position_embeddings", "rms_norm_eps", "rope_theta"]
REQUIRED += ["tie_word_embeddings", "hidden_act", "attention_bias", "use_sliding_window"]


@pytest.mark.parametrize("key", REQUIRED)
@pytest.mark.parametrize("how", ["absent", "null"])
def test_a_missing_key_is_named(small, key, how):
    if how == "absent":
        del small[key]
    else:
        small[key] = None
    refused(small, f": {key}: wanted ", "not guessed")


def test_keys_that_transformers_leaves_out(small):
    for key in ("eos_token_id", "torch_dtype", "rope_scaling", "sliding_window", "max_window_layers"):
        del small[key]
    config = Config.from_dict(small, "")
    assert config.eos_token_id == () and config.dtype == "float32"


def test_keys_that_do_not_matter_are_ignored(small):
    expected = Config.from_dict(small, "")
    for key in ("architectures", "attention_dropout", "bos_token_id", "initializer_range", "use_cache"):
        del small[key]
    small.update({"transformers_version": 7, "_name_or_path": [], "unsloth_fixed": True, "num_experts": 0})
    assert Config.from_dict(small, "") == expected


def test_qwen2_head_dim():
    d = released("Qwen2.5-0.5B-Instruct")
    assert Config.from_dict(d, "").head_dim == 64
    assert Config.from_dict({**d, "head_dim": None}, "").head_dim == 64
    assert Config.from_dict({**d, "head_dim": 32}, "").head_dim == 32  # transformers honours it where it is given
    refused({**d, "num_attention_heads": 12}, "num_attention_heads: wanted a divisor of hidden_size = 896", "got 12")
    refused({**d, "hidden_size": 14 * 63}, "hidden_size / num_attention_heads", "wanted an even number", "got 63")


# --- what is not computed here ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"model_type": "qwen3_moe"}, ["model_type", '"qwen3" or "qwen2"', '"qwen3_moe"', "dense"]),
        ({"model_type": "llama"}, ["model_type", '"llama"']),
        ({"model_type": "qwen3_next"}, ["model_type"]),
        ({"model_type": ["qwen3"]}, ["model_type"]),
        ({"num_experts": 128}, ["num_experts", "128", "dense"]),
        ({"num_local_experts": 8}, ["num_local_experts"]),
        ({"moe_intermediate_size": 768}, ["moe_intermediate_size"]),
        ({"quantization_config": {"quant_method": "fp8"}}, ["quantization_config", "fp8", "unquantised"]),
        ({"quantization": {"bits": 4}}, ["quantization", "unquantised"]),
        ({"hidden_act": "gelu"}, ["hidden_act", '"silu"', '"gelu"']),
        ({"attention_bias": True}, ["attention_bias", "true"]),
        ({"auto_map": {"AutoModel": "modeling.X"}}, ["auto_map", "code of its own"]),
        ({"is_causal": False}, ["is_causal", "false"]),
        ({"use_mrope": True}, ["use_mrope"]),
        ({"use_mrope": 0}, ["use_mrope", "wanted no such key, null or false, got 0"]),
        ({"num_experts": False}, ["num_experts", "wanted no such key, null or 0, got false"]),
        ({"partial_rotary_factor": 0.5}, ["partial_rotary_factor", "0.5"]),
        ({"per_layer_config": {"0": {"head_dim": 64}}}, ["per_layer_config"]),
        ({"rope_scaling": {"factor": 4.0, "rope_type": "dynamic"}}, ["rope_scaling.rope_type", '"yarn"', '"dynamic"']),
        ({"rope_scaling": {"rope_type": "llama3"}}, ["rope_scaling.rope_type", '"default" or "yarn"', '"llama3"']),
        ({"rope_scaling": {"rope_type": "longrope"}}, ["rope_scaling.rope_type", "Remove the scaling"]),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, ["rope_scaling.type", '"linear"', "Remove the scaling"]),
        ({"rope_scaling": {"type": "default", "mrope_section": [16, 24, 24]}}, ["rope_scaling.mrope_section"]),
        ({"rope_scaling": "yarn"}, ["rope_scaling", "an object"]),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e6}}, ["rope_parameters.factor", "no such key"]),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1e6}}}, ["rope_parameters.full_attention"]),
        ({"rope_parameters": {"rope_theta": 1e6, "partial_rotary_factor": 0.25}}, ["partial_rotary_factor", "0.25"]),
        ({"use_sliding_window": True, "sliding_window": 4096}, ["use_sliding_window", "4096", "layer 25 of 28"]),
        ({"use_sliding_window": True, "sliding_window": 4096, "max_window_layers": 27}, ["layer 27 of 28"]),
        ({"layer_types": ["full_attention"] * 27 + ["sliding_attention"]}, ["layer_types[27]", "full attention"]),
        ({"layer_types": ["linear_attention"] * 28}, ["layer_types[0]", "linear_attention"]),
        ({"torch_dtype": "float8_e4m3fn"}, ["torch_dtype", "float8_e4m3fn", "unquantised"]),
        ({"torch_dtype": "float64"}, ["torch_dtype"]),
    ],
)
def test_what_is_not_computed_is_refused(small, changes, parts):
    refused({**small, **changes}, *parts)


@pytest.mark.parametrize(
    "changes",
    [
        {"use_sliding_window": False, "sliding_window": 4096},
        {"use_sliding_window": True, "sliding_window": None},
        {"use_sliding_window": True, "sliding_window": 4096, "max_window_layers": 28},  # no layer from 28 on
        {"layer_types": ["full_attention"] * 28},
        {"rope_scaling": {}},
        {"rope_scaling": {"rope_type": "default"}},
        {"rope_scaling": {"type": "default", "rope_type": "default", "rope_theta": 1000000}},
        {"rope_parameters": {"rope_theta": 1e6, "partial_rotary_factor": 1.0}},
        {"torch_dtype": None, "dtype": "bfloat16"},
        {"dtype": "bfloat16"},
        {"rope_theta": 1000000.0},
        {"use_mrope": False, "quantization_config": None, "is_causal": True, "auto_map": {}},
    ],
)
def test_other_ways_to_say_the_same(small, changes):
    assert Config.from_dict({**small, **changes}, "") == Config.from_dict(small, "")


def test_spellings_that_contradict_each_other(small):
    refused({**small, "rope_parameters": {"rope_theta": 10000.0}}, "rope_parameters.rope_theta", "1000000", "10000")
    refused({**small, "dtype": "float16"}, "torch_dtype", "float16", "bfloat16")
    refused({**small, "layer_types": ["full_attention"] * 27}, "layer_types", "28", "list of 27")
    refused({**small, "rope_scaling": {"rope_type": "default", "type": "yarn"}}, "rope_scaling.type")


# --- YaRN ----------------------------------------------------------------------------------------------------------

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}  # as in Qwen3's README


def test_yarn_as_published(small):
    """In either spelling; 131,072 tokens, whatever max_position_embeddings says."""
    plain = Config.from_dict(small, "")
    wanted = Yarn(4.0, 32768, 0.1 * math.log(4) + 1, 32.0, 1.0, True)
    config = Config.from_dict({**small, "rope_scaling": YARN}, "")
    assert config == dataclasses.replace(plain, rope_scaling=wanted) and config.context_length == 131072
    assert (plain.context_length, config.max_position_embeddings) == (40960, 40960)
    old = {"type": "yarn", "factor": 4, "original_max_position_embeddings": 32768}  # as in Qwen2.5's
    for d in (
        {**small, "rope_scaling": old},
        {**small, "rope_scaling": {**YARN, "type": "yarn", "attention_factor": None, "beta_fast": None}},
        {**respelled(small), "rope_parameters": {**YARN, "rope_theta": 1000000}},
        {**respelled(small), "rope_scaling": YARN},  # beside rope_parameters of the default type: as load() advises
        {**small, "rope_parameters": {**YARN, "rope_theta": 1000000}, "rope_scaling": old},
    ):
        assert Config.from_dict(d, "") == config
    assert Config.from_dict(released("Qwen3-4B-Instruct-2507"), "").context_length == 262144


def test_yarn_with_everything(small):
    given = {"attention_factor": 0.5, "beta_fast": 16, "beta_slow": 2.0, "truncate": False}
    config = Config.from_dict({**small, "rope_scaling": {**YARN, **given}}, "")
    assert config.rope_scaling == Yarn(4.0, 32768, 0.5, 16.0, 2.0, False)
    config = Config.from_dict({**small, "rope_scaling": {**YARN, "mscale": 2.0, "mscale_all_dim": 0.5}}, "")
    assert config.rope_scaling.attention_factor == (0.2 * math.log(4) + 1) / (0.05 * math.log(4) + 1)


@pytest.mark.parametrize("changes,parts", [
    ({"factor": 0.5}, ["rope_scaling.factor", "from 1", "0.5"]),
    ({"factor": "4"}, ["rope_scaling.factor"]),
    ({"factor": None}, ["rope_scaling.factor"]),
    ({"original_max_position_embeddings": None}, ["rope_scaling.original_max_position_embeddings", "not guessed"]),
    ({"original_max_position_embeddings": 32768.0}, ["rope_scaling.original_max_position_embeddings"]),
    ({"attention_factor": -1.0}, ["rope_scaling.attention_factor"]),
    ({"beta_fast": 0.5}, ["rope_scaling.beta_fast", "beta_slow = 1.0", "0.5"]),
    ({"beta_slow": math.nan}, ["rope_scaling.beta_slow"]),
    ({"truncate": 1}, ["rope_scaling.truncate", "true or false"]),
    ({"truncate": None}, ["rope_scaling.truncate", "true or false"]),
    ({"short_factor": [1.0]}, ["rope_scaling.short_factor", "YaRN has", "beta_fast"]),
    ({"partial_rotary_factor": 0.5}, ["rope_scaling.partial_rotary_factor"]),
    ({"type": "default"}, ["rope_scaling.type", "the same as rope_scaling.rope_type = 'yarn'"]),
])  # fmt: skip
def test_yarn_refused(small, changes, parts):
    refused({**small, "rope_scaling": {**YARN, **changes}}, *parts)


def test_yarn_contradicted(small):
    refused(
        {**small, "rope_scaling": YARN, "rope_parameters": {**YARN, "factor": 2.0}}, "rope_scaling", "rope_parameters"
    )
    by_parameters = {**small, "rope_parameters": {**YARN, "rope_theta": 1e6}}
    refused({**by_parameters, "rope_scaling": {"rope_type": "default"}}, "rope_scaling", "rope_parameters")
    refused({**small, "rope_scaling": YARN, "rope_theta": 1}, "rope_theta", "> 1 for YaRN")


# --- wrong types and impossible values -------------------------------------------------------------------------------

NOT_A_SIZE = ["28", 28.0, True, 0, -1, [28], {}, math.nan, 2**31]
NOT_A_POSITIVE = ["1e6", True, 0, -1.0, math.nan, math.inf, [1.0], 10**400, 1e300]
NOT_A_BOOL = [0, 1, "false", [], {}]


@pytest.mark.parametrize("key", [key for key in REQUIRED if key.startswith("num_") or key.endswith(("_size", "_dim"))])
@pytest.mark.parametrize("value", NOT_A_SIZE, ids=repr)
def test_sizes(small, key, value):
    refused({**small, key: value}, f": {key}: wanted an integer from 1 to ")


@pytest.mark.parametrize("key", ["rms_norm_eps", "rope_theta"])
@pytest.mark.parametrize("value", NOT_A_POSITIVE, ids=lambda v: repr(v)[:8])
def test_positive_numbers(small, key, value):
    refused({**small, key: value}, f": {key}: wanted a finite number > 0, got ")


@pytest.mark.parametrize("key", ["tie_word_embeddings", "attention_bias", "use_sliding_window"])
@pytest.mark.parametrize("value", NOT_A_BOOL, ids=repr)
def test_booleans(small, key, value):
    refused({**small, key: value}, f": {key}: wanted true or false, got ")


def test_sizes_that_do_not_fit_each_other(small):
    refused({**small, "num_key_value_heads": 3}, "num_key_value_heads", "divisor of num_attention_heads = 16", "got 3")
    refused({**small, "num_key_value_heads": 32}, "num_key_value_heads", "got 32")
    refused({**small, "head_dim": 127}, "head_dim", "even", "got 127")
    refused({**small, "num_hidden_layers": 10**6}, "num_hidden_layers", "10000", "1000000")


@pytest.mark.parametrize("value", [-1, 151936, "2", 1.0, True, [1, None], [[1]], {"id": 1}], ids=repr)
def test_end_tokens_that_cannot_be(small, value):
    refused({**small, "eos_token_id": value}, "eos_token_id", "from 0 to vocab_size - 1 = 151935")


@pytest.mark.parametrize(("value", "expected"), [(5, (5,)), ([5, 0], (5, 0)), ([], ()), (None, ())])
def test_end_tokens(small, value, expected):
    assert Config.from_dict({**small, "eos_token_id": value}, "").eos_token_id == expected


# --- files and folders -----------------------------------------------------------------------------------------------


def refused_folder(folder, *parts):
    with pytest.raises(CheckpointError) as caught:
        Config.from_folder(folder)
    message = str(caught.value)
    assert "\n" not in message and str(folder) in message, message
    for part in parts:
        assert part in message, message


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b'{"a": 1,}', b"not json", b"\xff\xfe\x00", b"[" * 100_000, b'{"a": ' + b"9" * 5000 + b"}"],
    ids=["empty", "cut", "comma", "text", "bytes", "deep", "digits"],
)
def test_broken_json(tmp_path, content):
    (tmp_path / "config.json").write_bytes(content)
    refused_folder(tmp_path, "config.json: broken JSON", "Download this file again")


@pytest.mark.parametrize("content", ["[]", "3", "null", '"text"', "[" + "1, " * 5000 + "1]"])
def test_not_an_object(tmp_path, content):
    (tmp_path / "config.json").write_text(content)
    refused_folder(tmp_path, "config.json: wanted a JSON object, got ")


@pytest.mark.parametrize(
    ("names", "parts"),
    [
        ([], ["no config.json", "empty", "as the hub serves it"]),
        (["notes.txt", "a.py"], ["no config.json", "a.py, notes.txt", "as the hub serves it"]),
        (["Qwen3-0.6B-Q8_0.gguf"], ["GGUF", "original checkpoint"]),
        (["adapter_config.json", "adapter_model.safetensors"], ["LoRA adapter", "Merge it"]),
        (["pytorch_model.bin"], ["PyTorch pickle", "save_pretrained"]),
        (["refs", "snapshots"], ["hub cache", "snapshots/"]),
        (["model.safetensors"], ["Download config.json"]),
    ],
)
def test_a_folder_that_is_something_else(tmp_path, names, parts):
    for name in names:
        (tmp_path / name).write_bytes(b"")
    refused_folder(tmp_path, *parts)


def test_no_folder_at_all(tmp_path):
    refused_folder(tmp_path / "absent", "no such folder")
    file = tmp_path / "model.gguf"
    file.write_bytes(b"GGUF")
    refused_folder(file, "is a file", f"Pass {tmp_path}")


def test_a_config_that_is_a_folder(tmp_path):
    (tmp_path / "config.json").mkdir()
    refused_folder(tmp_path, "no config.json")


# --- generation_config.json ------------------------------------------------------------------------------------------

QWEN3_GENERATION = {
    "bos_token_id": 151643,
    "do_sample": True,
    "eos_token_id": [151645, 151643],
    "pad_token_id": 151643,
    "temperature": 0.6,
    "top_k": 20,
    "top_p": 0.95,
    "transformers_version": "4.51.0",
}


@pytest.fixture
def config(small):
    return Config.from_dict(small, "")


def generation(folder, d, config):
    (folder / "generation_config.json").write_text(d if isinstance(d, str) else json.dumps(d))
    return GenerationConfig.from_folder(folder, config)


def test_generation_config(tmp_path, config):
    got = generation(tmp_path, QWEN3_GENERATION, config)
    assert got == GenerationConfig((151645, 151643), True, 0.6, 20, 0.95, None, None)
    got = generation(tmp_path, {"eos_token_id": 3, "repetition_penalty": 1.05, "min_p": 0, "temperature": 1}, config)
    assert got == GenerationConfig((3,), False, 1.0, None, None, 0.0, 1.05)
    assert type(got.temperature) is float


def test_generation_config_without_the_file_or_keys(tmp_path, config):
    nothing = GenerationConfig((151645,), False, None, None, None, None, None)
    assert GenerationConfig.from_folder(tmp_path, config) == nothing
    assert generation(tmp_path, {"transformers_version": "5.0.0"}, config) == nothing
    assert generation(tmp_path, {"do_sample": None, "top_k": None, "eos_token_id": None}, config) == nothing
    assert generation(tmp_path, {"eos_token_id": []}, config).eos_token_id == ()


def test_generation_config_that_transformers_saves(tmp_path, config):
    transformers = pytest.importorskip("transformers")
    transformers.GenerationConfig(do_sample=True, temperature=0.7, top_k=5, eos_token_id=[1, 2]).save_pretrained(
        tmp_path
    )
    assert GenerationConfig.from_folder(tmp_path, config) == GenerationConfig((1, 2), True, 0.7, 5, None, None, None)


BAD_SAMPLING = [
    ("temperature", -0.1),
    ("temperature", "0.6"),
    ("temperature", True),
    ("temperature", math.nan),
    ("temperature", math.inf),
    ("temperature", [1.0]),
    ("top_k", -1),
    ("top_k", 20.0),
    ("top_k", False),
    ("top_k", 10**4000),
    ("top_p", 0),
    ("top_p", 1.01),
    ("top_p", -0.5),
    ("top_p", math.nan),
    ("min_p", -0.01),
    ("min_p", 1.5),
    ("repetition_penalty", 0),
    ("repetition_penalty", -1),
    ("repetition_penalty", 10**400),
]


@pytest.mark.parametrize(("key", "value"), BAD_SAMPLING, ids=lambda v: repr(v)[:12])
def test_generation_config_bad_values(tmp_path, config, key, value):
    with pytest.raises(CheckpointError, match=rf"generation_config\.json: {key}: wanted an? .*, got .*remove it"):
        generation(tmp_path, {key: value}, config)


@pytest.mark.parametrize(
    ("d", "message"),
    [
        ({"do_sample": 1}, "do_sample: wanted true or false, got 1"),
        ({"do_sample": "true"}, "do_sample: wanted true or false"),
        ({"eos_token_id": 151936}, "eos_token_id: wanted an id"),
        ({"eos_token_id": ["</s>"]}, "eos_token_id: wanted an id"),
        ("{", "broken JSON"),
        ("[]", "wanted a JSON object"),
    ],
)
def test_generation_config_other_errors(tmp_path, config, d, message):
    with pytest.raises(CheckpointError, match="generation_config.json: " + message):
        generation(tmp_path, d, config)


def test_check_sampling_value_returns_python_numbers():
    assert type(check_sampling_value("top_k", np.int64(5))) is int
    assert type(check_sampling_value("top_p", np.float32(0.5))) is float
    assert type(check_sampling_value("temperature", 0)) is float
    with pytest.raises(TypeError, match=r"top_p: wanted a number > 0 and <= 1 .*of type bool"):
        check_sampling_value("top_p", np.True_)
