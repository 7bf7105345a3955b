"""Many steps in one launch, their tokens chosen there: the same as one by one, emulated and on a GPU."""

import contextlib

import numpy as np
import pytest
from test_decode_step import BF16, F32, SPECS, Spec, host, load, put, start, write  # noqa: F401

from cuqwen import decode, decode_step, launch, sources
from cuqwen.decode import Choice, Decoder
from cuqwen.decode_step import ENDED, NO_CHOICE, NOT_YET, DecodeStep
from cuqwen.generate import Sequence
from cuqwen.model import Device
from cuqwen.sampling import Sampling

SETTINGS = [
    Sampling(),
    Sampling(temperature=0.7, top_k=20, top_p=0.95, seed=1),
    Sampling(temperature=1.5, top_k=3, top_p=0.95, seed=5),  # the groups' largest decide
    Sampling(temperature=1.0, seed=2),
    Sampling(temperature=1.5, top_p=0.8, min_p=0.01, seed=3),
    Sampling(repetition_penalty=1.3, presence_penalty=0.5, frequency_penalty=0.4),
    Sampling(temperature=0.9, top_k=30, repetition_penalty=1.2, seed=4),
]


def begin(step, token, position):
    put(step.ids, [token]), put(step.position, [position])
    step.tokens[...] = NOT_YET


@pytest.mark.parametrize("kv", [F32, BF16])
@pytest.mark.parametrize("name,blocks", [("two_heads_a_key_head", 5), ("untied_no_gain_biases", 8)])
def test_many_steps_are_single_ones(start, tmp_path, name, blocks, kv):  # noqa: F811
    """One launch of six steps and six of one: the same bits of logits, tokens and cache, and both can go on."""
    network = load(write(tmp_path, SPECS[name]), start(blocks, one_order=kv is F32), kv)
    caches = [network.new_cache(9) for _ in range(2)]
    for cache in caches:
        put(cache.keys, np.full(cache.keys.shape, np.nan)), put(cache.values, np.full(cache.values.shape, np.nan))
    one, many = (DecodeStep(network, cache, 250) for cache in caches)
    begin(one, 3, 0), begin(many, 3, 0)
    ids = []
    for _ in range(8):
        one()
        ids.append(int(host(one.ids)[0]))
        assert one.tokens[len(ids)] == ids[-1]
    many(5), many(3)
    launch.wait()
    assert many.tokens.tolist() == [NOT_YET, *ids, NOT_YET]
    assert host(many.state).tolist() == [ids[-1], 0] and host(many.position)[0] == 8
    assert np.array_equal(host(one.logits), host(many.logits))
    for mine, theirs in zip((caches[0].keys, caches[0].values), (caches[1].keys, caches[1].values), strict=True):
        assert host(mine).tobytes() == host(theirs).tobytes()


@pytest.mark.parametrize("heads,blocks,cached", [(2, 8, 190), (1, 16, 380)])
def test_many_steps_while_the_split_of_the_keys_changes(start, tmp_path, heads, blocks, cached, monkeypatch):  # noqa: F811
    """At 193 keys two blocks share a head's, at 385 four, and from 195 on two heads are computed together: also in the middle
    of a launch."""
    monkeypatch.setattr(decode_step, "MANY_KEYS", 195)
    spec = Spec("long", heads, 1, 64, 128, 192, 264, num_hidden_layers=2, k_gains="ordinary")
    network = load(write(tmp_path, spec), start(blocks, one_order=True), BF16)
    rng = np.random.default_rng(cached)
    rows = [rng.standard_normal((2, cached, 1, 64)) for _ in range(2)]
    steps = []
    for _ in range(2):
        cache = network.new_cache(cached + 10)
        for array, known in zip((cache.keys, cache.values), rows, strict=True):
            filled = np.full(array.shape, np.nan)
            filled[:, :cached] = known
            put(array, filled)
        steps.append(DecodeStep(network, cache, 264))
        begin(steps[-1], 7, cached)
    for more in range(8):
        steps[0](cached=cached + more)
    steps[1](8, cached=cached)
    launch.wait()
    assert np.array_equal(steps[0].tokens, steps[1].tokens)
    assert np.array_equal(host(steps[0].logits), host(steps[1].logits)) and np.isfinite(host(steps[0].logits)).all()


@pytest.mark.parametrize("heads,blocks,cached", [(2, 8, 180), (1, 16, 370)])
def test_thirty_two_tokens_are_those_of_float64(start, tmp_path, heads, blocks, cached):  # noqa: F811
    """In one launch, in which two blocks begin to share a head's keys, or four."""
    spec = Spec("long", heads, 1, 64, 128, 192, 264, num_hidden_layers=2, k_gains="ordinary")
    folder = write(tmp_path, spec)
    rng = np.random.default_rng(cached)
    rows = [rng.standard_normal((2, cached, 1, 64)).astype(F32) for _ in range(2)]
    reference = load(folder, Device.cpu(np.float64), np.float64)
    truth = reference.new_cache(cached + 33)
    truth.keys[:, :cached], truth.values[:, :cached], truth.length = *rows, cached
    wanted = [7]
    for _ in range(32):
        logits = reference.forward(np.array(wanted[-1:]), truth)[0]
        wanted.append(int(np.argmax(logits)))
    cache = (network := load(folder, start(blocks))).new_cache(cached + 33)
    for array, known in zip((cache.keys, cache.values), rows, strict=True):
        filled = np.full(array.shape, np.nan, F32)
        filled[:, :cached] = known
        put(array, filled)
    step = DecodeStep(network, cache, 264)
    begin(step, 7, cached)
    step(32, cached=cached)
    launch.wait()
    assert step.tokens[cached + 1 : cached + 33].tolist() == wanted[1:]
    assert np.linalg.norm(host(step.logits)[0] - logits) <= 1e-5 * np.linalg.norm(logits)


def test_an_answer_grows_to_many_keys(start, tmp_path, monkeypatch):  # noqa: F811
    """The kernel for them is launched when they are there, and the tokens are those of the other."""
    network = load(write(tmp_path, SPECS["two_heads_a_key_head"]), start(5, one_order=True), F32)
    prompt, answers, launches = np.array([5, 200, 9], np.int32), [], []
    real = DecodeStep._launch

    def launch_build(self, many_keys, *args):
        launches[-1].append(many_keys)
        real(self, many_keys, *args)

    monkeypatch.setattr(DecodeStep, "_launch", launch_build)
    for many_keys in (1000, 9):
        monkeypatch.setattr(decode_step, "MANY_KEYS", many_keys)
        launches.append([])
        cache = network.new_cache(40)
        logits = network.read(prompt, cache)
        decoder = Decoder(network, cache, Choice(network, Sampling(), prompt, 256, 30))
        with monkeypatch.context() as patch:
            patch.setattr(decode, "BATCH", 4)
            answers.append([token for token, _ in decoder.answer(logits, 20)])
        following = host(decoder.step(decoder.ids))
        answers[-1].append(int(np.argmax(following[0, :256])))
    assert answers[0] == answers[1]
    assert not any(launches[0]) and sum(launches[1]) >= 3
    assert [decode_step._unit_heads(network.config, many) for many in (False, True)] == [1, 2]


def answers_by(start, folder, vocabulary, sampling, n_ids, count, monkeypatch, change=lambda network: None):  # noqa: F811
    """Two by single steps with `sample` after each, and two by launches of several tokens: a second answer begins anew."""
    spec = Spec("sampled", 2, 1, 64, 128, 192, vocabulary, num_hidden_layers=1)
    network = load(write(folder, spec), start(3, one_order=True), BF16)
    change(network)
    prompt = np.array([5, 300, 5, 9], np.int32)
    answers = []
    for by_itself in (False, True):
        cache = network.new_cache(32)
        logits = network.read(prompt, cache)
        choice = Choice(network, sampling, prompt, n_ids, count)
        with monkeypatch.context() as patch:
            patch.setattr(decode, "BATCH", 5)
            if not by_itself:
                patch.setattr(Decoder, "goes_on", False)
            decoder = Decoder(network, cache, choice)
            assert decoder.one_launch is not None and decoder.goes_on == by_itself
            for _ in range(2):
                cache.length = len(prompt)
                answers.append([token for token, _ in decoder.answer(logits, count)])
                assert cache.length == len(prompt) + count - 1
                assert choice.restart(sampling, prompt, count)
    assert len(answers[0]) == count and max(answers[0]) < n_ids
    return answers


@pytest.mark.parametrize("sampling,n_ids", [*((each, 500) for each in SETTINGS), (SETTINGS[2], 400)], ids=str)
def test_a_launch_chooses_as_the_sampler_does(start, tmp_path, sampling, n_ids, monkeypatch):  # noqa: F811
    """With 400 ids the second half of the last group's logits is nobody's."""
    answers = answers_by(start, tmp_path, 520, sampling, n_ids, 12, monkeypatch)
    assert answers == answers[:1] * 4


@pytest.mark.parametrize("logits", ["random", "equal", "some equal", "some close"])
@pytest.mark.parametrize("sampling", [SETTINGS[1], Sampling(temperature=3.0, top_k=40, min_p=0.01, seed=9)], ids=str)
def test_a_launch_chooses_among_many(start, tmp_path, sampling, logits, monkeypatch):  # noqa: F811
    """Lots that are looked at while the head goes on, and those of its end; with equal logits more than a list holds."""

    def change(network):
        rows = host(network.weights.lm_head).copy()
        if logits == "equal":
            rows[:] = 0
        elif logits == "some equal":
            rows[some] = 40 * rows[7] * signs
        elif logits == "some close":  # by some units in the last place
            rows[some] = 40 * rows[7] * signs
            rows[some, 0] = rng.standard_normal(1000) * 3e-5
        put(network.weights.lm_head, rows)

    rng = np.random.default_rng(8)
    some, signs = (
        rng.choice(6144, 1000, replace=False),
        rng.choice([-1, 1], (1000, 1)).astype(BF16),
    )  # half of them on top
    answers = answers_by(start, tmp_path, 6144, sampling, 6100, 4, monkeypatch, change)
    assert answers == answers[:1] * 4


def test_an_answer_ends_where_it_is_told_to(start, tmp_path, monkeypatch):  # noqa: F811
    """At an end id, when the caller stops, at `max_tokens`; each time the next answer goes on from what was kept."""
    network = load(write(tmp_path, SPECS["two_heads_a_key_head"]), start(5, one_order=True), BF16)
    monkeypatch.setattr(decode, "BATCH", 4)
    prompt = np.array([5, 200, 9], np.int32)

    def answers(*args, **kwargs):
        cache.length = len(prompt)
        return decoder.answer(logits, *args, **kwargs)

    cache = network.new_cache(40)
    logits = network.read(prompt, cache)
    decoder = Decoder(network, cache, Choice(network, Sampling(), prompt, 256, 30))
    free = [token for token, _ in answers(30)]
    assert len(free) == 30 and cache.length == 32
    assert [token for token, _ in answers(1)] == free[:1] and cache.length == 3
    end = next(token for token in free[3:] if token not in free[:3])
    until = free[: free.index(end) + 1]
    assert [token for token, _ in answers(30, (999, end))] == until
    # the token after the end id was asked for and never computed
    assert cache.length == len(prompt) + len(until) - 1
    assert host(decoder.state).tolist() == [end, ENDED]
    assert [token for token, _ in answers(30, (999,))] == free
    with contextlib.closing(answers(30)) as tokens:
        assert [next(tokens)[0] for _ in range(3)] == free[:3]
    assert cache.length <= len(prompt) + 8 and decoder.one_launch.halt[0]
    following = int(np.argmax(host(decoder.step(decoder.ids))[0, :256]))
    assert following == free[cache.length - len(prompt)]
    assert [token for token, _ in answers(30)] == free


def test_halt_ends_a_launch(start, tmp_path):  # noqa: F811
    network = load(write(tmp_path, SPECS["two_heads_a_key_head"]), start(5, one_order=True), BF16)
    step = DecodeStep(network, network.new_cache(30), 256)
    begin(step, 3, 0)
    step.halt[0] = 1
    step(20)
    assert host(step.state)[1] == ENDED and host(step.position)[0] == 1
    assert (step.tokens[2:] == NOT_YET).all() and step.tokens[1] == host(step.ids)[0]
    step(20, fresh=False)
    assert host(step.position)[0] == 1
    step.halt[0] = 0
    step(20)
    assert host(step.position)[0] == 21 and (step.tokens[1:22] >= 0).all()


@pytest.mark.parametrize("sampling", SETTINGS[:2], ids=str)
def test_an_answer_of_broken_weights_says_so(start, tmp_path, sampling):  # noqa: F811
    """The cache is full of NaN after the prompt: the second token has no choice, and nothing follows."""
    spec = Spec("sampled", 2, 1, 64, 128, 192, 520, num_hidden_layers=1)
    network = load(write(tmp_path, spec), start(3, one_order=True), BF16)
    prompt = np.array([5, 200, 9], np.int32)
    cache = network.new_cache(40)
    logits = network.read(prompt, cache)
    decoder = Decoder(network, cache, Choice(network, sampling, prompt, 256, 30))
    put(network.weights.norm, np.full(128, np.nan))
    answer = decoder.answer(logits, 30)
    assert next(answer)[0] >= 0
    with pytest.raises(ValueError, match="NaN"):
        next(answer)
    assert host(decoder.state).tolist() == [NO_CHOICE, ENDED] and cache.length == len(prompt) + 1


@pytest.mark.parametrize(
    "line,lost",
    [
        ("    if (!fresh && ids[1] == ENDED) return;", "    if (first_turn > 4 && blockIdx.x == 1) return;"),
        (
            "            if (me.patience.lost) shared.lost = 1;",
            "            if (first_turn > 4 && blockIdx.x == 1) shared.lost = 1;",
        ),
    ],
    ids=["ends", "goes on"],
)
def test_a_block_that_is_lost_later_is_noticed(emulated_gpu, tmp_path, monkeypatch, line, lost):
    """The words of one that ends are those of the token before: what the chooser gathers by them may never come. One that goes on
    with what it has tells the others."""
    emulated_gpu.orders, emulated_gpu.resident_blocks, emulated_gpu.patience = ("ascending",), 3, 20
    monkeypatch.setattr(launch, "resident_blocks", lambda *_: 3)
    text_of, defines = sources.source, decode_step.defines

    def source(file, *entry):
        return text_of(file, *entry).replace(line, f"{lost}\n{line}")

    def own_defines(*arguments):  # kernels are kept by their constants
        return *defines(*arguments), ("A_BLOCK_IS_LOST", str(len(lost)))

    monkeypatch.setattr(decode_step, "defines", own_defines)
    monkeypatch.setattr(sources, "source", source)
    monkeypatch.setattr(decode, "BATCH", 2)
    spec = Spec("sampled", 2, 1, 64, 128, 192, 520, num_hidden_layers=1)
    network = load(write(tmp_path, spec), Device.cuda(), BF16)
    prompt = np.array([5, 300, 5, 9], np.int32)
    cache = network.new_cache(32)
    logits = network.read(prompt, cache)
    answer = Decoder(network, cache, Choice(network, SETTINGS[2], prompt, 500, 20)).answer(logits, 20)
    tokens = []
    with pytest.raises(launch.DeviceError, match="a block waited two seconds"):
        for token, _ in answer:
            tokens.append(token)
    assert len(tokens) == 5  # the prompt's and those of four turns


def test_what_does_not_fit_into_the_ring_is_sampled_outside(start, tmp_path, monkeypatch):  # noqa: F811
    network = load(write(tmp_path, SPECS["two_heads_a_key_head"]), start(5, one_order=True), BF16)
    monkeypatch.setattr(decode_step, "SLOTS", 5)
    prompt = np.array([5, 200, 9], np.int32)
    for sampling, goes_on in ((Sampling(), True), (Sampling(temperature=1.0, top_k=5, seed=0), False)):
        cache = network.new_cache(20)
        logits = network.read(prompt, cache)
        decoder = Decoder(network, cache, Choice(network, sampling, prompt, 256, 10))
        assert decoder.one_launch is not None and decoder.goes_on == goes_on
        assert len(list(decoder.answer(logits, 10))) == 10


def answer_of(sequence, sampling):
    prompt = [5, 300, 5, 9, 7, 8, 1]
    cache = sequence.begin(prompt, 12)
    logits = sequence.read(prompt, cache, None)
    return [token for token, _ in sequence.decode(cache, sampling, prompt, 500, 12).answer(logits, 12)]


@pytest.mark.parametrize("where", ["compiling", "launching"])
def test_after_an_interrupt_the_next_answer_is_right(start, tmp_path, monkeypatch, where):  # noqa: F811
    """Ctrl-C while the kernel for another way to choose is compiled, or in a launch that is on its way."""
    spec = Spec("sampled", 2, 1, 64, 128, 192, 520, num_hidden_layers=1)
    network = load(write(tmp_path, spec), start(3, one_order=True), BF16)
    sequence, sampling = Sequence(network, 64), Sampling(temperature=3.0, seed=1)
    wanted = answer_of(Sequence(network, 64), sampling)
    answer_of(sequence, Sampling())
    real, of_a_step = launch.load_function, DecodeStep.__call__

    def load_function(file, *arguments):
        if file == "decode_step":
            raise KeyboardInterrupt
        return real(file, *arguments)

    def run(*arguments, **keywords):
        of_a_step(*arguments, **keywords)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        if where == "compiling":
            patch.setattr(launch, "load_function", load_function)
        else:
            patch.setattr(DecodeStep, "__call__", run)
        answer_of(sequence, sampling)
    if where == "launching":
        assert sequence.decoder.one_launch.halt[0]
    assert answer_of(sequence, sampling) == wanted
