"""What a model keeps from answer to answer: prompts that continue a text, streams that end early or alternate, interrupts."""

import itertools

import checkpoints
import numpy as np
import pytest
from checkpoints import Spec

import cuqwen
from cuqwen import cuda, decode, generate, launch
from cuqwen.model import Qwen3

SPEC = Spec("reused", 2, 1, 64, 64, 128, 264, max_position_embeddings=1024)
IDS = np.random.default_rng(5).integers(0, 256, 1024).tolist()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return checkpoints.write(tmp_path_factory.mktemp("reused"), SPEC)


@pytest.fixture
def read(monkeypatch):
    """The lengths of what is read, prompt by prompt."""
    lengths, original = [], generate.Sequence.read

    def count(self, prompt, cache, progress):
        lengths.append(len(prompt) - cache.length)
        return original(self, prompt, cache, progress)

    monkeypatch.setattr(generate.Sequence, "read", count)
    return lengths


GPU = [pytest.param(side, marks=pytest.mark.gpu) for side in ("gpu", "gpu-one-launch")]


@pytest.fixture(params=["cpu", "emulated", "emulated-one-launch", *GPU])
def load(request, folder, monkeypatch):
    """Call it for a fresh model. On the CPU in float64, where no rounding decides between tokens; with float32 activations
    and cache on the kernels, single tokens by many of them or in one launch."""
    one_launch = request.param.endswith("one-launch")
    monkeypatch.setenv("CUQWEN_PORTABLE", str(int(not one_launch)))
    if request.param.startswith("emulated"):
        settings = request.getfixturevalue("emulated_gpu")
        settings.orders, settings.resident_blocks = ("ascending",), 5
        monkeypatch.setattr(launch, "resident_blocks", lambda *_: 5)
    options = {"device": "cpu", "dtype": "float64"} if request.param == "cpu" else {"device": "cuda", "exact": True, "kv_dtype": "float32"}  # fmt: skip

    def make(**more):
        model = cuqwen.load(folder, **options, **more)
        if one_launch and model.fallback:
            assert request.param == "gpu-one-launch", model.fallback
            pytest.skip(model.fallback)
        return model

    make.least = 1 if request.param == "cpu" else cuda.FEW_ROWS + 1
    make.step = 1 if not request.param.startswith("emulated") else 2
    return make


def tokens(model, prompt, max_tokens=4, **arguments):
    return [step.token for step in model.stream(prompt, max_tokens=max_tokens, **{"temperature": 0, **arguments})]


def rows(model):
    """The kept text: its ids and their keys and values."""
    [sequence] = model._kept
    length = min(sequence.cache.length, len(sequence.ids))
    arrays = (a[:, :length] for a in (sequence.cache.keys, sequence.cache.values))
    return sequence.ids[:length], [a.get() if hasattr(a, "get") else a.copy() for a in arrays]


def assert_same_text(model, other):
    """The kept text of `model` is what `other` has when it reads the very ids: float64, or some float32 roundings."""
    ids, arrays = rows(model)
    tokens(other, [*ids, 0], 1)
    wanted_ids, wanted = rows(other)
    assert wanted_ids[: len(ids)] == ids
    for mine, theirs in zip(arrays, wanted, strict=True):
        bound = 1e-12 if mine.dtype == np.float64 else 1e-5
        assert np.abs(mine - theirs[:, : len(ids)]).max() <= bound * np.abs(theirs).max()


def test_a_chat_reads_each_token_once(load, read):
    model, text = load(), IDS[:30]
    for turn in range(3):
        answer = tokens(model, text)
        assert answer == tokens(load(), text)
        kept = len(text) + 3  # the last token of an answer is never computed with
        text = [*text, *answer, *IDS[100 * turn :][:9]]
        assert rows(model)[0][:kept] == text[:kept]
    assert read[::2] == [30, 10, 10] and read[1::2] == [30, 43, 56]
    assert_same_text(model, load())


@pytest.mark.parametrize("shared", [0, 1, 17, 39, 40, 41])
def test_what_differs_is_read(load, read, shared):
    """After 40 tokens and an answer: prompts that part from that text early, late, within the answer, or never."""
    model = load()
    answer = tokens(model, IDS[:40])
    text = [*IDS[:40], *answer]
    for prompt in ([*text[:shared], 263 - text[shared], *IDS[50:57]], text[: max(shared, 1)]):
        kept = min(shared, len(prompt) - load.least)
        del read[:]
        got = tokens(model, prompt)
        assert read == [len(prompt) - max(kept, 0)]
        assert got == tokens(load(), prompt)
        assert_same_text(model, load())
        tokens(model, IDS[:40])  # the text as it was
        del read[:]


def test_the_last_tokens_are_always_read(load, read):
    model = load()
    first = tokens(model, IDS[:20])
    assert [tokens(model, IDS[:20]) for _ in range(2)] == [first, first]
    assert tokens(model, IDS[:3]) == tokens(load(), IDS[:3])
    assert read[:3] == [20, load.least, load.least] and read[3:] == [min(3, load.least), 3]


def test_streams_that_end_early(load, read):
    """Closed, forgotten, ended by a stop string: what has been computed is kept, whatever was under way."""
    wanted = tokens(load(), IDS[:20], 8)
    model = load()
    for taken in range(0, 6, load.step):
        stream = model.stream(IDS[:20], max_tokens=8, temperature=0)
        assert [step.token for step in itertools.islice(stream, taken)] == wanted[:taken]
        stream.close()
        if taken:
            assert rows(model)[0] in ([*IDS[:20], *wanted[: taken - 1]], [*IDS[:20], *wanted[:taken]])
    assert len(model._kept) == 1
    del stream
    del read[:]
    assert tokens(model, [*IDS[:20], *wanted[:3], 7]) == tokens(load(), [*IDS[:20], *wanted[:3], 7])
    assert read[0] == load.least
    assert_same_text(model, load())


def test_streams_that_alternate_have_a_text_each(load, read):
    prompts = IDS[:20], IDS[300:330], [*IDS[:20], 9, 8, 7, 6, 5, 4]
    wanted = [tokens(load(), prompt, 6) for prompt in prompts]
    model = load()
    del read[:]
    streams = [model.stream(prompt, max_tokens=6, temperature=0) for prompt in prompts]
    found = [[step.token for step in steps] for steps in zip(*streams, strict=True)]
    assert [list(column) for column in zip(*found, strict=True)] == wanted
    assert read == [20, 30, 26]
    assert len(model._kept) == 1 and rows(model)[0][:26] == prompts[2]  # the text of the one that ended last
    kept = model.stream(prompts[0], max_tokens=6, temperature=0)  # takes it, and is never read on
    next(kept)
    for _ in range(2):
        assert tokens(model, prompts[1], 6) == wanted[1]
    assert read[3:] == [load.least, 30, load.least]
    assert [next(kept).token, *(step.token for step in kept)] == wanted[0][1:]


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_interrupt_keeps_what_is_read(load, read, error):
    prompt = IDS[:50]
    wanted = tokens(load(), prompt)
    model = load()
    model.network.chunk = 12
    calls = []

    def progress(done, total):
        calls.append((done, total))
        if len(calls) == 2:
            raise error("enough")

    with pytest.raises(error, match="enough"):
        tokens(model, prompt, progress=progress)
    assert calls == [(12, 50), (24, 50)]
    ids = rows(model)[0]
    assert ids == prompt[: len(ids)] and len(ids) in (24, 36)
    del read[:]
    calls.clear()
    assert tokens(model, prompt, progress=lambda *call: calls.append(call)) == wanted
    assert read == [50 - len(ids)] and calls[-1] == (50, 50) and calls == sorted(calls) and calls[0][0] > len(ids)
    assert_same_text(model, load())


def test_progress_of_a_prompt_in_one_piece(load):
    calls = []
    tokens(load(), IDS[:9], progress=lambda *call: calls.append(call))
    assert calls == [(9, 9)]
    with pytest.raises(TypeError, match="progress: wanted a function or None, got int"):
        load().stream(IDS[:9], progress=5)


def test_a_cache_grows_with_its_texts(load, monkeypatch):
    """To twice the rows, with what is in it, while both fit into the context; without it afterwards."""
    monkeypatch.setattr(generate, "CACHE_GRAIN", 16)
    model, text, capacities = load(max_context=160), IDS[:20], []
    while len(text) < 120:
        answer = tokens(model, text)
        assert answer == tokens(load(), text)
        capacities.append(model._kept[0].cache.capacity)
        text = [*text, *answer, *IDS[len(text) :][:10]]
    assert capacities == [32, 64, 64, 128, 128, 128, 128, 128]
    assert_same_text(model, load())
    assert tokens(model, IDS[:150], 10) == tokens(load(), IDS[:150], 10)
    assert model._kept[0].cache.capacity == 160
    with pytest.raises(ValueError, match="wanted at most 160 together"):
        tokens(model, IDS[:151], 10)


def test_no_more_memory_than_planned_while_a_cache_grows(load, monkeypatch, read):
    """64 rows and 128 exceed a context of 160: the first ones go before, and the text is read again."""
    monkeypatch.setattr(generate, "CACHE_GRAIN", 16)
    model = load(max_context=160)
    first = tokens(model, IDS[:60])
    del read[:]
    text = [*IDS[:60], *first, *IDS[70:80]]
    assert tokens(model, text) == tokens(load(), text) and read == [74, 74]
    assert model._kept[0].cache.capacity == 128


def test_nothing_is_kept_after_a_lost_device(load, monkeypatch, read):
    model = load()
    tokens(model, IDS[:20])
    with monkeypatch.context() as patch:
        patch.setattr(decode.Choice, "check", lambda *_: (_ for _ in ()).throw(launch.DeviceError("lost")))
        with pytest.raises(cuqwen.DeviceError, match="lost"):
            tokens(model, IDS[:25])
    assert model._kept[0].cache is None
    del read[:]
    assert tokens(model, IDS[:25]) == tokens(load(), IDS[:25]) and read == [25, 25]


def test_memory_errors_say_what_was_wanted(load, monkeypatch):
    model = load()
    tokens(model, IDS[:20])
    with monkeypatch.context() as patch:
        patch.setattr(Qwen3, "new_cache", lambda *_: (_ for _ in ()).throw(MemoryError()))
        with pytest.raises(MemoryError, match=r"604 tokens need 0\.\d\d GB of cache .*use fewer tokens"):
            tokens(model, IDS[:600])
        with pytest.raises(
            MemoryError, match=r"600 tokens need .* cache, 0\.00 GB for their logits \[600, 264\] and some"
        ):
            model.logits(IDS[:600])
    assert model._kept[0].cache is None and tokens(model, IDS[:20]) == tokens(load(), IDS[:20])


@pytest.mark.parametrize("settings", [{}, {"temperature": 0.7, "top_k": 20, "repetition_penalty": 1.2}], ids=str)
def test_an_answer_like_the_last_one_records_nothing_anew(load, monkeypatch, settings):
    """And draws what a fresh model draws, by the seed of its own."""
    records = []
    original = launch.record
    monkeypatch.setattr(launch, "record", lambda work: records.append(work) or original(work))
    model = load()
    runs = [tokens(model, IDS[:20], 6, seed=seed, **settings) for seed in (1, 2, 1)]
    recorded = len(records)
    decoders = {id(sequence.decoder) for sequence in model._kept}
    assert runs[0] == runs[2] and len(decoders) == 1
    assert runs[1] == tokens(load(), IDS[:20], 6, seed=2, **settings)
    if model.device == "cuda":
        many = model.fallback is not None
        assert recorded == 1 + many  # the prompt when it came again, and a step of many kernels
        del records[:]
        other = tokens(model, IDS[:20], 6, seed=3, temperature=1.5, top_k=3)
        assert len(records) == many and other == tokens(load(), IDS[:20], 6, seed=3, temperature=1.5, top_k=3)
    assert tokens(model, IDS[:20], 260, seed=1, **settings)[:6] == runs[0]
    assert model._kept[0].choice.room >= 260  # more random numbers than there were


@pytest.mark.parametrize("sampled", [False, True])
def test_logprobs(load, sampled):
    """Those of the logits of the whole text; the tokens are what they are without."""
    model, settings = load(), {"temperature": 0.9, "seed": 3} if sampled else {}
    steps = list(model.stream(IDS[:20], max_tokens=5, logprobs=3, **{"temperature": 0, **settings}))
    chosen = [step.token for step in steps]
    assert chosen == tokens(load(), IDS[:20], 5, **settings)
    logits = load().logits([*IDS[:20], *chosen[:-1]])
    logits = (logits.get() if hasattr(logits, "get") else logits)[19:, : model.tokenizer.n_ids].astype(np.float64)
    logprobs = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    for step, row in zip(steps, logprobs, strict=True):
        best = np.argsort(-row)[:3]
        assert [token for token, _ in step.top_logprobs] == best.tolist()
        assert np.allclose([logprob for _, logprob in step.top_logprobs], row[best], atol=2e-5)
        assert abs(step.logprob - row[step.token]) <= 2e-5
    plain = next(model.stream(IDS[:20], max_tokens=1))
    assert plain.logprob is None and plain.top_logprobs is None
    everything = next(model.stream(IDS[:20], max_tokens=1, logprobs=model.tokenizer.n_ids))
    assert abs(np.exp([logprob for _, logprob in everything.top_logprobs]).sum() - 1) < 1e-9
    for bad in (-1, model.tokenizer.n_ids + 1):
        with pytest.raises(ValueError, match="logprobs: wanted"):
            model.stream(IDS[:20], logprobs=bad)
    with pytest.raises(TypeError, match="logprobs: wanted"):
        model.stream(IDS[:20], logprobs=True)


def test_a_closed_model(load):
    with load() as model:
        stream = model.stream(IDS[:20], max_tokens=3, temperature=0)
        begun = [next(stream).token]
        assert tokens(model, IDS[:20], 3)[:1] == begun
    assert model._kept == [] and "closed" not in repr(model)
    assert len(begun + [step.token for step in stream]) == 3  # with what it holds
    assert model._kept == []
    for call in (
        lambda: model.stream(IDS[:20]),
        lambda: model.logits(IDS[:20]),
        lambda: model.generate("a"),
        lambda: model.network,
    ):
        with pytest.raises(ValueError, match="wanted an open model, got one that is closed; load it again"):
            call()
    model.close()
    assert model.config.vocab_size == 264 and model.tokenizer.encode("a")


def test_a_fallback_is_told(load, monkeypatch):
    model = load()
    monkeypatch.setenv("CUQWEN_PORTABLE", "1")
    assert model.fallback == (None if model.device == "cpu" else "CUQWEN_PORTABLE is set")
    monkeypatch.delenv("CUQWEN_PORTABLE")
    monkeypatch.setattr(decode, "obstacle", lambda network: "it takes another GPU")
    assert model.fallback == (None if model.device == "cpu" else "it takes another GPU")
