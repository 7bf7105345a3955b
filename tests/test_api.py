"""`load` and the `Model` it returns: arguments, logits, streams and how they end. On the CPU."""

import json
import shutil

import checkpoints
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import cuqwen

PROMPT = "In the beginning"
N = 32  # tokens of the text that most tests look at


@pytest.fixture(scope="module")
def steps(demo):
    """What the demo writes greedily after the prompt."""
    return list(demo.stream(PROMPT, max_tokens=N, temperature=0))


@pytest.fixture(scope="module")
def text(steps):
    return "".join(step.text for step in steps)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A random checkpoint of a few hundred kB, whose tokens are mostly single bytes."""
    return checkpoints.write(tmp_path_factory.mktemp("tiny"), checkpoints.SPECS["tied_redundant_head"])


@pytest.fixture(scope="module")
def tiny(folder):
    return cuqwen.load(folder, device="cpu")


@pytest.fixture
def copy(folder, tmp_path):
    return shutil.copytree(folder, tmp_path / "copy")


def tokens(steps):
    return [step.token for step in steps]


# --- load ----------------------------------------------------------------------------------------------------------


def test_load_by_name_folder_and_path(demo, steps):
    assert demo.device == "cpu" and demo.config.vocab_size == 4096
    for where in (checkpoints.DEMO, str(checkpoints.DEMO)):
        assert tokens(cuqwen.load(where, device="cpu").stream(PROMPT, max_tokens=4, temperature=0)) == tokens(steps)[:4]


@pytest.mark.parametrize(
    "arguments",
    [
        {"device": "tpu"}, {"device": "CUDA"}, {"device": ""}, {"device": "cuda:0"}, {"dtype": "float16"},
        {"dtype": "bfloat16"}, {"dtype": ""}, {"kv_dtype": "int8"}, {"kv_dtype": ""}, {"max_context": 0},
        {"max_context": -5}, {"max_context": 2049}, {"device": "cuda", "dtype": "float64"},
    ],
    ids=str,
)  # fmt: skip
def test_load_refuses_impossible_values(arguments):
    arguments = {"device": "cpu"} | arguments
    with pytest.raises(ValueError, match=r"wanted .*got") as caught:
        cuqwen.load("demo", **arguments)
    assert any(key in str(caught.value) for key in arguments)


@pytest.mark.parametrize(
    "arguments",
    [{"max_context": 12.0}, {"max_context": "12"}, {"max_context": True}, {"device": 0}, {"dtype": np.float32},
     {"kv_dtype": 16}, {"kv_dtype": ["float32"]}],
    ids=str,
)  # fmt: skip
def test_load_refuses_wrong_types(arguments):
    with pytest.raises((TypeError, ValueError), match=r"wanted .*got") as caught:
        cuqwen.load("demo", **({"device": "cpu"} | arguments))
    assert next(iter(arguments)) in str(caught.value)


@pytest.mark.parametrize("model", [None, 3, "", b"demo", ["demo"]])
def test_load_refuses_what_names_no_model(model):
    with pytest.raises((TypeError, ValueError), match="model"):
        cuqwen.load(model, device="cpu")


def test_files_are_told_as_checkpoint_errors(tmp_path, copy):
    with pytest.raises(cuqwen.CheckpointError, match=r"config\.json"):
        cuqwen.load(tmp_path, device="cpu")
    with pytest.raises(cuqwen.CheckpointError, match="nowhere"):
        cuqwen.load(tmp_path / "nowhere", device="cpu")
    (copy / "tokenizer.json").unlink()
    with pytest.raises(cuqwen.CheckpointError, match=r"tokenizer\.json"):
        cuqwen.load(copy, device="cpu")
    assert issubclass(cuqwen.CheckpointError, ValueError)


def test_nan_is_found_when_asked_for(copy):
    arrays = load_file(copy / "model.safetensors")
    arrays["model.layers.1.mlp.up_proj.weight"][5, 7] = np.nan
    save_file(arrays, copy / "model.safetensors", metadata={"format": "pt"})
    cuqwen.load(copy, device="cpu")
    with pytest.raises(cuqwen.CheckpointError, match=r"layers\.1\.mlp\.up_proj\.weight.*5, 7"):
        cuqwen.load(copy, device="cpu", check_weights=True)


def test_progress_ends_at_the_total(folder):
    calls = []
    cuqwen.load(folder, device="cpu", progress=lambda done, total: calls.append((done, total)))
    done, totals = zip(*calls, strict=True)
    assert list(done) == sorted(done) and len(set(totals)) == 1 and done[-1] == totals[0] > 100_000


def test_cuda_without_a_gpu_names_the_remedy():
    from cuqwen import launch

    if launch.has_gpu():
        pytest.skip("there is a GPU")
    with pytest.raises(cuqwen.DeviceError, match="cpu"):
        cuqwen.load("demo", device="cuda")
    assert cuqwen.load("demo").device == "cpu"


# --- logits --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_logits_have_the_computing_dtype(folder, dtype):
    model = cuqwen.load(folder, device="cpu", dtype=dtype)
    for count in (1, 5):
        logits = model.logits(list(range(count)))
        assert isinstance(logits, np.ndarray) and logits.dtype == dtype and logits.shape == (count, 517)
        assert np.isfinite(logits).all()


def test_logits_take_lists_tuples_and_integer_arrays(tiny):
    expected = tiny.logits([3, 1, 4, 1, 5])
    for ids in ((3, 1, 4, 1, 5), np.array([3, 1, 4, 1, 5]), np.array([3, 1, 4, 1, 5], np.uint8)):
        np.testing.assert_array_equal(tiny.logits(ids), expected)
    np.testing.assert_array_equal(tiny.logits(range(5)), tiny.logits([0, 1, 2, 3, 4]))
    strided = np.array([3, 0, 1, 0, 4, 0, 1, 0, 5, 0])[::2]
    np.testing.assert_array_equal(tiny.logits(strided), expected)


def test_logits_do_not_change_their_argument(tiny):
    ids = np.array([3, 1, 4], np.int32)
    logits = tiny.logits(ids)
    kept = logits.copy()
    logits[:] = 0  # and are the caller's own
    np.testing.assert_array_equal(tiny.logits(ids), kept)
    assert ids.tolist() == [3, 1, 4]


@pytest.mark.parametrize(
    "ids", [[-1], [517], [0, 1, 2**31], [0, -(2**63)], [], np.zeros((0,), np.int64), [[1, 2], [3, 4]], [[1]], [[]]],
    ids=str,
)  # fmt: skip
def test_logits_refuse_ids_by_value_and_shape(tiny, ids):
    with pytest.raises(ValueError, match=r"logits: ids: wanted .*got"):
        tiny.logits(ids)


def test_logits_refuse_ids_beyond_64_bits(tiny):
    with pytest.raises((ValueError, TypeError), match="ids"):
        tiny.logits([2**64])


@pytest.mark.parametrize(
    "ids", [[1.0, 2.0], np.array([1.5]), [True, False], np.array([True]), "text", b"ab", ["a"], [None], [1, None],
            None, 3, {1: 2}, {1, 2}, np.int64(3)],
    ids=str,
)  # fmt: skip
def test_logits_refuse_ids_by_type(tiny, ids):
    with pytest.raises(TypeError, match="ids"):
        tiny.logits(ids)


@pytest.mark.parametrize("ids", [[[1], [2, 3]], [1, [2]]], ids=str)
def test_logits_refuse_ragged_ids(tiny, ids):
    with pytest.raises((ValueError, TypeError), match="ids"):
        tiny.logits(ids)


def test_logits_keep_to_the_context(folder):
    model = cuqwen.load(folder, device="cpu", max_context=9)
    assert model.logits([1] * 9).shape == (9, 517)
    with pytest.raises(ValueError, match=r"wanted .*9.*got 10"):
        model.logits([1] * 10)


def test_logits_are_the_same_alone_and_in_a_prefix(tiny):
    """Causality: what follows a token does not change its logits."""
    ids = checkpoints.token_sequences(517)[0][:20]
    whole = tiny.logits(ids)
    np.testing.assert_allclose(tiny.logits(ids[:7]), whole[:7], rtol=0, atol=1e-4 * np.abs(whole).max())


def test_kv_dtype_on_the_cpu(demo):
    ids = checkpoints.heldout_sequences(1, 64)[0]
    expected = demo.logits(ids)
    np.testing.assert_array_equal(cuqwen.load("demo", device="cpu", kv_dtype="float32").logits(ids), expected)
    errors = {}
    for kv_dtype in ("bfloat16", "float16"):
        logits = cuqwen.load("demo", device="cpu", kv_dtype=kv_dtype).logits(ids)
        errors[kv_dtype] = checkpoints.relative_error([logits], [expected])
    # Keys and values are rounded to 8 bits, errors of 2^-9 relative at most, and five layers add theirs. A wrong cast
    # gives errors near 1, no cast 0. f16 rounds 8 times finer; half of that leaves room for luck.
    assert 0 < 4 * errors["float16"] < errors["bfloat16"] < 0.05
    wide = cuqwen.load("demo", device="cpu", dtype="float64")
    narrow = cuqwen.load("demo", device="cpu", dtype="float64", kv_dtype="float32")
    assert 0 < checkpoints.relative_error([narrow.logits(ids)], [wide.logits(ids)]) < errors["float16"]


# --- streams -------------------------------------------------------------------------------------------------------


def test_one_record_for_each_token(demo, steps, text):
    assert len(steps) == N and text == demo.generate(PROMPT, max_tokens=N, temperature=0)
    assert text == demo.tokenizer.decode(tokens(steps))
    assert [step.finish_reason for step in steps] == [None] * (N - 1) + ["length"]
    assert all(type(step.token) is int and type(step.text) is str for step in steps)


def test_greedy_is_the_argmax_of_the_logits(demo, steps):
    prompt = demo.tokenizer.encode(PROMPT)
    logits = demo.logits(prompt + tokens(steps)[:-1])
    assert logits[len(prompt) - 1 :].argmax(axis=1).tolist() == tokens(steps)


def test_prompt_as_ids(demo, steps):
    ids = demo.tokenizer.encode(PROMPT)
    for prompt in (ids, tuple(ids), np.array(ids)):
        assert tokens(demo.stream(prompt, max_tokens=5, temperature=0)) == tokens(steps)[:5]
    assert demo.generate(ids, max_tokens=N, temperature=0) == demo.generate(PROMPT, max_tokens=N, temperature=0)


@pytest.mark.parametrize("count", [1, 2, 7])
def test_max_tokens(demo, steps, count):
    fewer = list(demo.stream(PROMPT, max_tokens=count, temperature=0))
    assert tokens(fewer) == tokens(steps)[:count] and fewer[-1].finish_reason == "length"
    assert list(demo.stream(PROMPT, max_tokens=np.int64(count), temperature=0)) == fewer


def test_complete_characters_only(tiny):
    """This model writes random bytes. A piece that ended within a character would show U+FFFD too many or too early."""
    for seed in range(4):
        found = list(tiny.stream("é", max_tokens=60, temperature=1.5, seed=seed))
        assert "".join(step.text for step in found) == tiny.tokenizer.decode(tokens(found))
        assert len(found) == 60 or found[-1].finish_reason == "stop"


def test_a_character_that_stays_incomplete_is_shown_at_the_end(tiny):
    """Cut at max_tokens after the first byte of a character: the text is still that of all tokens."""
    cuts = 0
    for seed in range(4):
        arguments = {"prompt": "é", "temperature": 1.5, "seed": seed}
        ids = tokens(tiny.stream(**arguments, max_tokens=60))
        for cut in range(1, len(ids)):
            found = list(tiny.stream(**arguments, max_tokens=cut))
            if tiny.tokenizer.decode(ids[:cut])[-1:] == "\ufffd" and found[-1].finish_reason == "length":
                cuts += 1
                assert "".join(step.text for step in found) == tiny.tokenizer.decode(ids[:cut])
                break
    assert cuts > 0


def test_end_ids_of_generation_config(tmp_path, steps):
    """The second of two end ids ends it; its record is there, its text is not."""
    ids = tokens(steps)
    end = next(i for i in range(4, N) if ids[i] not in ids[:i])
    folder = shutil.copytree(checkpoints.DEMO, tmp_path / "demo")
    for eos in ([4094, ids[end]], ids[end]):
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": eos, "do_sample": False}))
        model = cuqwen.load(folder, device="cpu")
        found = list(model.stream(PROMPT, max_tokens=N))
        assert tokens(found) == ids[: end + 1]
        assert [step.finish_reason for step in found] == [None] * end + ["stop"]
        assert "".join(step.text for step in found) == model.tokenizer.decode(ids[:end])


def test_end_token_at_max_tokens_is_a_stop(tmp_path, steps):
    ids = tokens(steps)
    end = next(i for i in range(2, N) if ids[i] not in ids[:i])
    folder = shutil.copytree(checkpoints.DEMO, tmp_path / "demo")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": ids[end]}))
    found = list(cuqwen.load(folder, device="cpu").stream(PROMPT, max_tokens=end + 1, temperature=0))
    assert len(found) == end + 1 and found[-1].finish_reason == "stop"


def test_refused_when_called_not_when_read(demo):
    with pytest.raises(ValueError, match="max_tokens"):
        demo.stream(PROMPT, max_tokens=0)  # no next()


REFUSED_VALUES = [
    {"max_tokens": 0}, {"max_tokens": -1}, {"max_tokens": 2048}, {"max_tokens": 10**12}, {"temperature": -0.5},
    {"temperature": float("nan")}, {"temperature": float("inf")}, {"top_k": -1}, {"top_p": 0.0}, {"top_p": 1.1},
    {"top_p": -1}, {"top_p": float("nan")}, {"min_p": -0.1}, {"min_p": 1.5}, {"min_p": float("nan")},
    {"repetition_penalty": 0.0}, {"repetition_penalty": -1}, {"repetition_penalty": float("nan")},
    {"presence_penalty": float("nan")}, {"frequency_penalty": float("inf")}, {"seed": -1}, {"stop": ""},
    {"stop": ["a", ""]},
]  # fmt: skip


@pytest.mark.parametrize("arguments", REFUSED_VALUES, ids=str)
def test_impossible_values(demo, arguments):
    with pytest.raises(ValueError, match=r"wanted") as caught:
        demo.stream(PROMPT, **arguments)
    assert next(iter(arguments)) in str(caught.value)
    with pytest.raises(ValueError, match=r"wanted"):
        demo.generate(PROMPT, **arguments)


REFUSED_TYPES = [
    {"max_tokens": 4.0}, {"max_tokens": "4"}, {"max_tokens": True}, {"max_tokens": None}, {"temperature": "hot"},
    {"temperature": True}, {"top_k": 1.5}, {"top_k": "1"}, {"top_p": "1"}, {"min_p": [0.1]}, {"seed": 1.5},
    {"seed": "x"}, {"stop": 5}, {"stop": [5]}, {"stop": b"x"}, {"stop": ["a", None]},
    {"repetition_penalty": "1"}, {"presence_penalty": "1"}, {"frequency_penalty": [1]},
]  # fmt: skip


@pytest.mark.parametrize("arguments", REFUSED_TYPES, ids=str)
def test_wrong_types(demo, arguments):
    with pytest.raises(TypeError, match=r"wanted") as caught:
        demo.stream(PROMPT, **arguments)
    assert next(iter(arguments)) in str(caught.value)


def test_unknown_arguments(demo):
    for call in (demo.stream, demo.generate):
        with pytest.raises(TypeError, match="max_new_tokens"):
            call(PROMPT, max_new_tokens=3)


@pytest.mark.parametrize("prompt", ["", [], (), np.array([], np.int64), [-1], [4096], [[1, 2]], "a\ud800b"], ids=ascii)
def test_impossible_prompts(demo, prompt):
    with pytest.raises(ValueError, match=r"wanted .*got"):
        demo.stream(prompt, max_tokens=1)


@pytest.mark.parametrize("prompt", [None, 7, 1.5, b"text", [1.0], [True], ["a"], {"role": "user"}, [1, {}]], ids=str)
def test_prompts_of_wrong_type(demo, prompt):
    with pytest.raises(TypeError, match=r"prompt.*wanted"):
        demo.stream(prompt, max_tokens=1)


# --- stop strings --------------------------------------------------------------------------------------------------


def assert_stops(model, arguments, stop, steps, text):
    """`stop` ends the text before its first occurrence, at the token that completes it."""
    found = list(model.stream(PROMPT, stop=stop, **arguments))
    strings = [stop] if isinstance(stop, str) else stop
    needed = next(n for n in range(1, len(steps) + 1) if any(s in _text(steps[:n], model) for s in strings))
    assert len(found) == needed and found[-1].finish_reason == "stop"
    first = min(at for at in (_text(steps[:needed], model).find(s) for s in strings) if at >= 0)
    assert "".join(step.text for step in found) == text[:first], stop
    assert [step.token for step in found] == tokens(steps[:needed])


def _text(steps, model):
    return model.tokenizer.decode(tokens(steps))


@pytest.mark.parametrize("length", [1, 2, 7])
def test_stop_strings_cut_at_each_offset(demo, steps, text, length):
    arguments = {"max_tokens": N, "temperature": 0}
    for at in range(30 - length):
        assert_stops(demo, arguments, text[at : at + length], steps, text)


def test_stop_strings_of_broken_and_many_token_characters(tiny):
    """Among random bytes, where a character is up to four tokens and some never become one."""
    arguments = {"max_tokens": 40, "temperature": 1.5, "seed": 3}
    steps = list(tiny.stream(PROMPT, **arguments))
    text = "".join(step.text for step in steps)
    for at in range(0, len(text) - 3, 2):
        stop = text[at : at + 3]
        found = list(tiny.stream(PROMPT, stop=stop, **arguments))
        assert "".join(step.text for step in found) == text[: text.find(stop)]
        assert found[-1].finish_reason == "stop"


def test_several_stop_strings(demo, steps, text):
    arguments = {"max_tokens": N, "temperature": 0}
    early, late = text[8:11], text[20:24]
    for stop in ([early, late], (late, early), ["\0 never", late]):
        first = min(text.find(s) for s in stop if s in text)
        assert demo.generate(PROMPT, stop=stop, **arguments) == text[:first]
    assert_stops(demo, arguments, [text[5:9], text[7:8] + "\0"], steps, text)


def test_two_stop_strings_completed_by_one_token(demo, steps, text):
    """The one that begins first counts, whichever was named first."""
    i = next(i for i in range(2, N) if len(steps[i].text) >= 3)
    at = sum(len(step.text) for step in steps[:i])
    pair = [text[at - 3 : at + 2], text[at - 2 : at + 3]]
    for stop in (pair, pair[::-1]):
        assert_stops(demo, {"max_tokens": N, "temperature": 0}, stop, steps, text)


def test_stop_at_the_very_first_characters(demo, steps, text):
    found = list(demo.stream(PROMPT, max_tokens=N, temperature=0, stop=text[:1]))
    assert len(found) == 1 and found[0].text == "" and found[0].finish_reason == "stop"


def test_stop_string_completed_by_the_last_token(demo, steps, text):
    """At max_tokens and at the stop string at once: the text ends before it, and it is a stop."""
    found = list(demo.stream(PROMPT, max_tokens=N, temperature=0, stop=text[-1] + "\0"))
    assert found[-1].finish_reason == "length"
    head = "".join(step.text for step in steps[:-1])
    stop = text[len(head) - 1 :]
    found = list(demo.stream(PROMPT, max_tokens=N, temperature=0, stop=stop))
    assert "".join(step.text for step in found) == text[: text.find(stop)] and found[-1].finish_reason == "stop"


@pytest.mark.parametrize("kept", [1, 3, 9])
def test_held_back_text_is_released_at_the_end(demo, steps, text, kept):
    """The text ends like the beginning of a stop string that never becomes whole."""
    found = list(demo.stream(PROMPT, max_tokens=N, temperature=0, stop=text[-kept:] + "\0"))
    assert "".join(step.text for step in found) == text
    assert tokens(found) == tokens(steps) and found[-1].finish_reason == "length"


def test_held_back_text_is_released_at_an_end_token(tmp_path, steps):
    ids = tokens(steps)
    end = next(i for i in range(4, N) if ids[i] not in ids[:i])
    folder = shutil.copytree(checkpoints.DEMO, tmp_path / "demo")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": ids[end]}))
    model = cuqwen.load(folder, device="cpu")
    whole = model.tokenizer.decode(ids[:end])
    assert model.generate(PROMPT, max_tokens=N, temperature=0, stop=whole[-4:] + "\0") == whole


def test_text_is_held_back_no_longer_than_needed(demo, steps, text):
    """Once the beginning of a stop string turns out not to be one, it is shown: with the next token at the latest."""
    found = list(demo.stream(PROMPT, max_tokens=N, temperature=0, stop=text[4:7] + "\0"))
    shown = ""
    for n, step in enumerate(found, 1):
        shown += step.text
        assert len(_text(steps[:n], demo)) - len(shown) <= 3
    assert shown == text


def test_a_stop_string_in_the_prompt_does_not_count(demo, text):
    stop = PROMPT[3:]
    assert demo.generate(PROMPT, max_tokens=N, temperature=0, stop=stop) == text[: text.find(stop) % (len(text) + 1)]


# --- sampling ------------------------------------------------------------------------------------------------------


def test_seed_reproduces(demo):
    arguments = {"max_tokens": 16, "temperature": 1.5}
    first = tokens(demo.stream(PROMPT, seed=1, **arguments))
    np.random.seed(0)  # nobody else's generator plays a part
    assert tokens(demo.stream(PROMPT, seed=1, **arguments)) == first
    assert tokens(cuqwen.load("demo", device="cpu").stream(PROMPT, seed=1, **arguments)) == first
    assert len({tuple(tokens(demo.stream(PROMPT, seed=seed, **arguments))) for seed in range(4)}) == 4


def test_without_a_seed_runs_differ(demo):
    runs = [tokens(demo.stream(PROMPT, max_tokens=16, temperature=1.5)) for _ in range(2)]
    np.random.seed(0)
    runs.append(tokens(demo.stream(PROMPT, max_tokens=16, temperature=1.5)))
    np.random.seed(0)
    runs.append(tokens(demo.stream(PROMPT, max_tokens=16, temperature=1.5)))
    assert len({tuple(run) for run in runs}) == 4


@pytest.mark.parametrize("arguments", [{"top_k": 1}, {"top_p": 1e-9}, {"min_p": 1.0}], ids=str)
def test_filters_that_leave_the_most_likely_token(demo, steps, arguments):
    assert tokens(demo.stream(PROMPT, max_tokens=8, temperature=3.0, seed=5, **arguments)) == tokens(steps)[:8]


def test_penalties_change_the_text(demo, steps):
    ids = tokens(demo.stream(PROMPT, max_tokens=N, temperature=0))
    assert len(set(ids)) < N, "a text without repeated tokens shows nothing"
    for arguments in ({"repetition_penalty": 5.0}, {"presence_penalty": 2.0}, {"frequency_penalty": 2.0}):
        assert tokens(demo.stream(PROMPT, max_tokens=N, temperature=0, **arguments)) != ids
    # positive logits of used tokens become next to nothing, so each token comes once, and none of the prompt's
    ids = tokens(demo.stream(PROMPT, max_tokens=N, temperature=0, repetition_penalty=1e6))
    assert len({*ids, *demo.tokenizer.encode(PROMPT)}) == N + len(set(demo.tokenizer.encode(PROMPT)))


def test_arguments_win_over_the_file_and_the_file_over_defaults(tmp_path, steps):
    folder = shutil.copytree(checkpoints.DEMO, tmp_path / "demo")
    settings = {"eos_token_id": 4095, "do_sample": True, "temperature": 5.0, "top_k": 1}
    (folder / "generation_config.json").write_text(json.dumps(settings))
    model = cuqwen.load(folder, device="cpu")
    greedy = tokens(steps)[:8]
    assert tokens(model.stream(PROMPT, max_tokens=8, seed=1)) == greedy  # by the file's top_k
    assert tokens(model.stream(PROMPT, max_tokens=8, seed=1, top_k=0)) != greedy  # at the file's temperature
    assert tokens(model.stream(PROMPT, max_tokens=8, seed=1, top_k=0, temperature=0)) == greedy
    assert tokens(model.stream(PROMPT, max_tokens=8, seed=1, top_k=0, min_p=1.0)) == greedy
    (folder / "generation_config.json").unlink()
    assert tokens(cuqwen.load(folder, device="cpu").stream(PROMPT, max_tokens=8)) == greedy  # the library's


def test_ids_without_a_token_are_never_drawn(copy):
    checkpoints.write_tokenizer(copy, 300)  # of 517 rows
    model = cuqwen.load(copy, device="cpu")
    model.network.weights.lm_head[300:] *= 50  # would win, if they took part
    for temperature in (0, 1.0, 1000.0):
        assert max(tokens(model.stream("a", max_tokens=100, temperature=temperature, seed=0))) < 300


# --- chat messages -------------------------------------------------------------------------------------------------


def test_messages_without_a_template(demo):
    with pytest.raises(ValueError, match="chat template"):
        demo.stream([{"role": "user", "content": "Hi"}])
    with pytest.raises(ValueError, match="chat template"):
        demo.generate([{"role": "user", "content": "Hi"}])


def test_messages_go_through_the_template(copy):
    (copy / "chat_template.jinja").write_text(
        "{% for m in messages %}{{ m.role[0] }}({{ m.content }}){% endfor %}>"
        "{% if enable_thinking is defined %}{{ enable_thinking }}{% endif %}{% if tools %}{{ tools[0].name }}{% endif %}"
    )
    model = cuqwen.load(copy, device="cpu")
    chat = [{"role": "system", "content": "be"}, {"role": "user", "content": "hi"}]
    arguments = {"max_tokens": 8, "temperature": 0}
    for extra, prompt in (
        ({}, "s(be)u(hi)>"),
        ({"enable_thinking": False}, "s(be)u(hi)>False"),
        ({"tools": [{"name": "add"}]}, "s(be)u(hi)>add"),
    ):
        for messages in (chat, tuple(chat)):
            expected = tokens(model.stream(prompt, **arguments))
            assert tokens(model.stream(messages, **extra, **arguments)) == expected
    for broken in ([{"role": "user"}], [{"content": "x"}], [{}], [{"role": "user", "content": 5}], [*chat, 1]):
        with pytest.raises((TypeError, ValueError), match="messages"):
            model.stream(broken, **arguments)


# --- several streams, contexts -------------------------------------------------------------------------------------


def test_abandoned_streams_leave_the_model_usable(demo, steps):
    arguments = {"max_tokens": N, "temperature": 0}
    for taken in (0, 1, 5):
        stream = demo.stream(PROMPT, **arguments)
        for _ in range(taken):
            next(stream)
        stream.close()
        with pytest.raises(StopIteration):
            next(stream)
    demo.stream("Another text, never begun", max_tokens=5)
    kept = demo.stream("Another text, begun and kept", max_tokens=5)
    next(kept)
    assert list(demo.stream(PROMPT, **arguments)) == steps


def test_interleaved_streams_do_not_disturb_each_other(demo, steps):
    hot = {"max_tokens": 12, "temperature": 1.5, "seed": 3}
    alone = list(demo.stream("And the king said", **hot))
    first, second = demo.stream(PROMPT, max_tokens=12, temperature=0), demo.stream("And the king said", **hot)
    found = [[], []]
    for one, two in zip(first, second, strict=True):
        found[0].append(one.token)
        found[1].append(two.token)
        demo.logits([1, 2, 3])
    assert found == [tokens(steps)[:12], tokens(alone)]


def test_a_longer_stream_beside_a_shorter_one(folder):
    """What the model keeps for positions grows with the longest stream; the one that runs must not notice."""
    arguments = {"max_tokens": 10, "temperature": 0}
    expected = tokens(cuqwen.load(folder, device="cpu").stream("ab", **arguments))
    model = cuqwen.load(folder, device="cpu")
    stream = model.stream("ab", **arguments)
    found = [next(stream).token]
    long = model.stream("ab" * 200, max_tokens=100, temperature=0)
    next(long)
    assert found + tokens(stream) == expected
    fresh = cuqwen.load(folder, device="cpu")
    assert tokens(model.stream("ab" * 200, max_tokens=20, temperature=0)) == tokens(
        fresh.stream("ab" * 200, max_tokens=20, temperature=0)
    )


@pytest.mark.parametrize("prompt", [1, 5, 29])
def test_context_is_kept_exactly(folder, prompt):
    model = cuqwen.load(folder, device="cpu", max_context=30)
    ids = list(range(65, 65 + prompt))
    expected = tokens(cuqwen.load(folder, device="cpu").stream(ids, max_tokens=30 - prompt, temperature=0))
    assert tokens(model.stream(ids, max_tokens=30 - prompt, temperature=0)) == expected
    with pytest.raises(ValueError, match=r"30.*got 31"):
        model.stream(ids, max_tokens=31 - prompt)


def test_no_room_for_an_answer(folder):
    model = cuqwen.load(folder, device="cpu", max_context=30)
    for count in (30, 31, 500):
        with pytest.raises(ValueError, match="shorten the prompt"):
            model.stream([65] * count, max_tokens=1)


def test_the_whole_context_of_the_demo(demo):
    """2,048 positions: a prompt of several chunks, and the last position is used."""
    ids = np.resize(checkpoints.heldout_sequences(1, 256)[0], 2044)
    found = list(demo.stream(ids, max_tokens=4, temperature=0))
    assert demo.max_context == 2048 and 1 <= len(found) <= 4
    logits = demo.logits([*ids.tolist(), *tokens(found)])
    assert logits[2043:-1].argmax(axis=1).tolist() == tokens(found)


# --- what must not come out as plausible text --------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_broken_weights_do_not_generate(temperature):
    model = cuqwen.load("demo", device="cpu")
    model.network.weights.norm[3] = np.nan
    with pytest.raises(ValueError, match="NaN"):
        model.generate(PROMPT, max_tokens=3, temperature=temperature)


def test_repetition_penalty_of_the_file_also_counts_for_greedy(tmp_path, demo):
    """As in transformers, where it is no part of sampling."""
    folder = shutil.copytree(checkpoints.DEMO, tmp_path / "demo")
    (folder / "generation_config.json").write_text('{"do_sample": false, "repetition_penalty": 1.5}')
    penalised = cuqwen.load(folder, device="cpu").generate(PROMPT, max_tokens=40)
    assert penalised == demo.generate(PROMPT, max_tokens=40, temperature=0, repetition_penalty=1.5)
    assert penalised != demo.generate(PROMPT, max_tokens=40, temperature=0)
