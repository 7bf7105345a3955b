"""The operation `sample`: the very token that `Sampler.sample` chooses for the same logits and random numbers.

On the reference, on the CUDA source run on the CPU, and with `-m gpu` on a GPU. Both sides' bounds (of top_p, min_p and
the draw) are sums and exponentials rounded differently: where a uniform number or p comes nearer to a bound than 1e-9 of
the whole sum, 30 times the error bound in the kernel's head, the tokens might rightly differ. The seeds here are fixed, and
no case is that near: equality is asserted without exception.
"""

import checkpoints
import numpy as np
import pytest

import cuqwen
from cuqwen import cuda, launch, ops
from cuqwen.sampling import Sampler, Sampling

NAMES = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty")


@pytest.fixture(params=["reference", "emulated", pytest.param("gpu", marks=pytest.mark.gpu)])
def side(request, monkeypatch):
    if request.param == "emulated":
        settings = request.getfixturevalue("emulated_gpu")
        settings.orders = ("shuffled",)
    if request.param != "gpu":
        monkeypatch.setattr(cuda, "SAMPLE_IDS_PER_LANE", 1)  # more groups of fewer ids
    return request.param


class Device:
    """The arrays of one answer where the operation wants them."""

    def __init__(self, side, sampler, tokens):
        put = (lambda a: launch.upload(a)) if side != "reference" else np.copy
        self.side, self.sampling = side, sampler.sampling
        self.settings = {name: getattr(sampler.sampling, name) for name in NAMES}
        self.history = put(sampler.history()) if sampler.sampling.has_penalties else None
        self.uniforms, self.step = put(sampler.uniforms(tokens)), put(np.zeros(1, np.int32))
        self.put = put

    def sample(self, logits):
        out = self.put(np.full(1, -7, np.int32))
        state = {"uniforms": self.uniforms, "step": self.step, "history": self.history}
        assert ops.sample(self.put(logits), **self.settings, **state, out=out) is out
        return int(out[0])


def compare(side, logits, prompt=(), **settings):
    """Each row's token against the sampler's, the history growing from row to row."""
    settings = {"seed": 5, **settings}
    sampler, twin = (Sampler(Sampling(**settings), prompt, logits.shape[-1]) for _ in range(2))
    device = Device(side, twin, len(logits))
    for row in logits:
        assert device.sample(row) == sampler.sample(row), settings
    if device.history is not None:
        history = device.history if side != "gpu" else device.history.get()
        assert np.array_equal(history, sampler.history())
    if settings.get("temperature", 0) > 0:
        assert int(device.step[0]) == len(logits)


def random_logits(rng, rows, n, kind="normal"):
    x = rng.standard_normal((rows, n)) * 3
    if kind == "equals":
        x = np.round(x)
    if kind == "masked":
        x[rng.random((rows, n)) < 0.7] = -np.inf
        x[:, 0] = 0.5
    if kind == "peaked":
        x = x * 0.5 - 3 * np.log(1 + np.argsort(rng.random((rows, n)), axis=1))
    return x.astype(np.float32)


SETTINGS = [
    {},
    {"temperature": 0.6, "top_k": 20, "top_p": 0.95},
    {"temperature": 0.7, "top_k": 20, "top_p": 0.8, "min_p": 0.05},
    {"temperature": 1.0},
    {"temperature": 1.0, "top_k": 5},
    {"temperature": 1.0, "top_k": 1},
    {"temperature": 1.0, "top_p": 0.9},
    {"temperature": 0.6, "top_p": 0.3},
    {"temperature": 1.0, "min_p": 0.1},
    {"temperature": 1.5, "top_p": 0.95, "min_p": 0.02},
    {"temperature": 1.0, "top_k": 300, "top_p": 0.7},
    {"temperature": 1e-3, "top_k": 20, "top_p": 0.9},
    {"temperature": 1e-3},
    {"temperature": 1e-3, "top_p": 0.5},
    {"temperature": 100.0, "top_p": 0.9},
    {"temperature": 100.0, "top_k": 50, "top_p": 0.99999},
    {"temperature": 100.0},
    {"temperature": 1.0, "top_p": 1e-9},
    {"temperature": 1.0, "top_p": 1e-30},
    {"temperature": 1.0, "top_p": 0.9999999},
    {"temperature": 1.0, "min_p": 1.0},
    {"temperature": 1.0, "min_p": 1e-6},
    {"temperature": 1.0, "top_k": 10**6, "top_p": 0.9},
]
PENALTIES = [
    {"repetition_penalty": 1.05},
    {"repetition_penalty": 1.3, "presence_penalty": 0.7, "frequency_penalty": 0.1},
    {"presence_penalty": 1.5},
    {"frequency_penalty": -0.3, "repetition_penalty": 0.8},
]


@pytest.mark.parametrize("kind", ["normal", "equals", "masked", "peaked"])
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_sample(side, settings, kind):
    rng = np.random.default_rng(len(kind))
    compare(side, random_logits(rng, 12 if side == "gpu" else 1, 151669, kind), **settings)
    compare(side, random_logits(rng, 3, 2000, kind), **settings)


@pytest.mark.parametrize("penalties", PENALTIES, ids=str)
@pytest.mark.parametrize("settings", SETTINGS[:7], ids=str)
def test_sample_with_penalties(side, settings, penalties):
    n, rows = (151669, 30) if side == "gpu" else (300, 6)
    rng = np.random.default_rng(1)
    logits = np.repeat(random_logits(rng, 1, n, "equals"), rows, axis=0)  # the same again, so that penalties decide
    compare(side, logits, prompt=rng.integers(0, n, n // 3), **settings, **penalties)


@pytest.mark.parametrize("n", [1, 2, 31, 32, 33, 64, 65, 127, 513, 2049])
def test_sample_sizes(side, n):
    rng = np.random.default_rng(n)
    for settings in SETTINGS[:9]:
        compare(side, random_logits(rng, 1, n), **settings)
    compare(side, np.zeros((1, n), np.float32), temperature=1.0, top_k=max(1, n // 2), top_p=0.75)
    compare(side, np.zeros((1, n), np.float32), temperature=1.0, top_p=0.75)


@pytest.mark.parametrize("n", [4, 40, 400, 5000])
@pytest.mark.parametrize("top_p", [0.25, 0.5, 0.75, 0.76, 1e-30, 1.0])
def test_sample_of_equals(side, n, top_p):
    """Sums of ones are exact: a bound that is hit exactly is decided the same way. 400 exceed the short
    list, 5,000 the long one."""
    for top_k in (0, 1, 3):
        compare(side, np.zeros((2, n), np.float32), temperature=0.7, top_k=top_k, top_p=top_p)
    compare(side, np.zeros((2, n), np.float32), temperature=0.7, top_p=top_p, min_p=1.0)
    two = np.where(np.arange(n) % 3 == 0, np.float32(1.5), np.float32(-1.5))[None]
    compare(side, two, temperature=0.9, top_p=top_p)
    compare(side, -two, temperature=1e-3, top_k=2, top_p=top_p)


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 3.0, "top_p": 0.9},
        {"temperature": 3.0, "top_p": 0.9, "min_p": 0.1},
        {"temperature": 3.0, "min_p": 1e-3},
        {"temperature": 1.0, "top_k": 2500, "top_p": 0.9},
        {"temperature": 1.0, "top_k": 2500},
        {"temperature": 3.0, "top_p": 0.9, "presence_penalty": 0.5},
        {"temperature": 1.0, "top_k": 2500, "top_p": 0.99, "repetition_penalty": 1.2},
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", ["normal", "equals"])
def test_sample_from_more_than_the_list_holds(side, settings, kind):
    rng, n = np.random.default_rng(2), 151669
    compare(side, random_logits(rng, 2, n, kind), prompt=rng.integers(0, n, n // 2), **settings)


def test_sample_one_finite_and_special_values(side):
    rng = np.random.default_rng(3)
    lone = np.full((1, 200), -np.inf, np.float32)
    lone[0, 77] = -3e38
    tiny = (rng.integers(-3, 4, (2, 200)) * 1e-45).astype(np.float32)  # subnormal
    tiny[:, ::7] = -0.0
    huge = (rng.standard_normal((2, 200)) * 1e38).astype(np.float32)
    for settings in SETTINGS:
        for logits in (lone, tiny, huge):
            compare(side, logits, **settings)
    compare(side, tiny, temperature=1e-45, top_k=3, top_p=0.5)
    compare(side, huge, temperature=1e300, top_k=3, top_p=0.5)


@pytest.mark.parametrize("at", [0, 99, 199])
@pytest.mark.parametrize("value", [np.nan, -np.nan, np.inf, None])
def test_sample_refuses_logits_without_a_choice(side, at, value):
    logits = np.linspace(0, 1, 200, dtype=np.float32) if value is not None else np.full(200, -np.inf, np.float32)
    logits[at] = logits[at] if value is None else np.float32(value)
    for settings in ({}, {"temperature": 1.0}, {"temperature": 1.0, "top_k": 3}, {"temperature": 1.0, "top_p": 0.5}):
        device = Device(side, Sampler(Sampling(seed=0, presence_penalty=0.5, **settings), [], 200), 1)
        if side == "reference":
            with pytest.raises(ValueError, match="logits: wanted finite numbers"):
                device.sample(logits)
        else:
            assert device.sample(logits) == -1
        assert int(device.step[0]) == 0 and not device.history.any()


def test_sample_beyond_the_uniforms(side):
    logits = np.zeros(9, np.float32)
    device = Device(side, Sampler(Sampling(temperature=1.0, seed=0), [], 9), 2)
    assert all(device.sample(logits) >= 0 for _ in range(2))
    if side == "reference":
        with pytest.raises(ValueError, match=r"sample: step: wanted 0\.\.1, an index of uniforms, got 2"):
            device.sample(logits)
    else:
        assert device.sample(logits) == -1 and int(device.step[0]) == 2


def test_sample_follows_the_probabilities(side):
    """Chi-squared with 5 degrees of freedom: 20.5 is exceeded once in a thousand times."""
    p = np.array([0.4, 0.2, 0.15, 0.12, 0.08, 0.05])
    logits = np.full(40, -30, np.float32)
    logits[[3, 8, 9, 30, 31, 39]] = np.log(p)
    n = 300 if side == "emulated" else 3000
    device = Device(side, Sampler(Sampling(temperature=1.0, top_k=6, seed=6), [], 40), n)
    counts = np.bincount([device.sample(logits) for _ in range(n)], minlength=40)
    assert counts.sum() == counts[[3, 8, 9, 30, 31, 39]].sum()
    assert ((counts[[3, 8, 9, 30, 31, 39]] - n * p) ** 2 / (n * p)).sum() < 20.5


@pytest.mark.parametrize("uniform", [0.0, 0.2499999, 0.25, 0.5, 0.75, 1 - 2**-53])
def test_sample_draw_at_the_ends_and_on_the_bounds(side, uniform):
    logits = np.full(70, -np.inf, np.float32)
    logits[[1, 33, 40, 69]] = 0
    device = Device(side, Sampler(Sampling(temperature=1.0, seed=0), [], 70), 1)
    device.uniforms = device.put(np.array([uniform]))
    assert device.sample(logits) == (1, 33, 40, 69)[int(4 * uniform)]
    device.step = device.put(np.zeros(1, np.int32))
    device.settings["min_p"] = 0.5
    assert device.sample(logits) == (1, 33, 40, 69)[int(4 * uniform)]


@pytest.mark.parametrize(
    "settings", [SETTINGS[1], SETTINGS[3], SETTINGS[6], {"temperature": 3.0, "top_p": 0.9}], ids=str
)
def test_sample_in_every_thread_order_and_recorded(emulated_gpu, monkeypatch, settings):
    """The same bytes in each order of threads; a recording replayed gives the tokens of single calls."""
    monkeypatch.setattr(cuda, "SAMPLE_IDS_PER_LANE", 1)
    rng = np.random.default_rng(4)
    rows = random_logits(rng, 3, 3000)
    sampler = Sampler(Sampling(seed=9, repetition_penalty=1.1, **settings), [3], 3000)
    device = Device("emulated", Sampler(sampler.sampling, [3], 3000), 3)
    logits, out = launch.upload(rows[0]), launch.empty((1,), np.int32)
    state = {"uniforms": device.uniforms, "step": device.step, "history": device.history}
    replay, _ = launch.record(lambda: ops.sample(logits, **device.settings, **state, out=out))
    for row in rows:
        launch.copy(logits, launch.upload(row))
        replay()
        assert int(out[0]) == sampler.sample(row)


@pytest.mark.gpu
@pytest.mark.parametrize("settings", [*SETTINGS[1:13], {"temperature": 3.0, "top_p": 0.9}], ids=str)
def test_sample_is_the_same_a_hundred_times(settings):
    rng = np.random.default_rng(8)
    logits = launch.upload(random_logits(rng, 1, 151936)[0])
    uniforms = launch.upload(rng.random(1))
    for name in ("graph", "calls"):
        step, out, tokens = launch.upload(np.zeros(1, np.int32)), launch.empty((1,), np.int32), set()
        call = lambda: ops.sample(logits, **settings, uniforms=uniforms, step=step, out=out)  # noqa: E731, B023
        call()
        if name == "graph":
            call, _ = launch.record(call)
        for _ in range(100):
            step[...] = 0
            call()
            tokens.add(int(out[0]))
        assert len(tokens) == 1 and -1 not in tokens


REFUSED = [
    (lambda a: {"logits": a((2, 3))}, ValueError, r"sample: logits: wanted shape \[N\], got \[2, 3\]"),
    (lambda a: {"logits": a(0)}, ValueError, "sample: logits: wanted at least one element"),
    (lambda a: {"logits": a(3, np.int32)}, TypeError, "sample: logits: wanted dtype float"),
    (lambda a: {"logits": a(3), "temperature": 1.0}, ValueError, "sample: wanted uniforms and step for a temperature"),
    (lambda a: {"logits": a(3), "presence_penalty": 1.0}, ValueError, "sample: wanted history for penalties, got None"),
    (lambda a: {"logits": a(3), "top_p": 0.0}, ValueError, "sample: top_p: wanted "),
    (lambda a: {"logits": a(3), "top_k": 1.5}, TypeError, "sample: top_k: wanted "),
    (
        lambda a: {"logits": a(3), "history": a(4, np.int32)},
        ValueError,
        r"sample: history: wanted shape \[N\] with N = 3",
    ),
    (lambda a: {"logits": a(3), "step": a(2, np.int32)}, ValueError, r"sample: step: wanted shape \[1\], got \[2\]"),
    (lambda a: {"logits": a(3), "uniforms": a(4, np.float32)}, TypeError, "sample: uniforms: wanted dtype float64"),
    (lambda a: {"logits": a(3), "out": a(1, np.int64)}, TypeError, "sample: out: wanted dtype int32"),
]


@pytest.mark.parametrize(("arguments", "kind", "message"), REFUSED, ids=[case[2] for case in REFUSED])
def test_sample_refuses(side, arguments, kind, message):
    put = (lambda a: launch.upload(a)) if side != "reference" else np.copy
    with pytest.raises(kind, match=message):
        ops.sample(**arguments(lambda shape, dtype=np.float32: put(np.zeros(shape, dtype))))


# ---- a whole answer ----

ANSWERS = [
    {},
    {"temperature": 1.0, "top_k": 20, "top_p": 0.95, "seed": 1},
    {"temperature": 1.5, "seed": 2, "repetition_penalty": 1.2, "presence_penalty": 0.5},
    {"repetition_penalty": 1.3},
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return checkpoints.write(tmp_path_factory.mktemp("tiny"), checkpoints.SPECS["head_128"])


@pytest.mark.parametrize("settings", ANSWERS, ids=str)
def test_an_answer_is_what_the_sampler_chooses_from_the_logits(folder, settings):
    model = cuqwen.load(folder, device="cpu")
    steps = [step.token for step in model.stream([5, 6, 7], max_tokens=12, **settings)]
    sampler, ids = Sampler(Sampling(**settings), [5, 6, 7], model.tokenizer.n_ids), [5, 6, 7]
    for token in steps:
        assert token == sampler.sample(model.logits(ids)[-1])
        ids.append(token)


@pytest.fixture(params=["emulated", pytest.param("gpu", marks=pytest.mark.gpu)])
def kernels(request, monkeypatch):
    if request.param == "emulated":
        request.getfixturevalue("emulated_gpu").orders = ("ascending",)
    return request.param


@pytest.mark.parametrize("settings", ANSWERS, ids=str)
def test_an_answer_is_the_same_on_both_sides(kernels, folder, settings):
    """Eager first step, recorded ones after it, one integer read for each."""
    arguments = {"prompt": [5, 6, 7], "max_tokens": 7 if kernels == "emulated" else 40, **settings}
    expected = list(cuqwen.load(folder, device="cpu").stream(**arguments))
    assert list(cuqwen.load(folder, device="cuda", kv_dtype="float32").stream(**arguments)) == expected


def test_broken_weights_are_refused_on_the_device_too(kernels, folder):
    """At the first token as at a later one: -1 comes back, and the host raises what `Sampler` raises."""
    model = cuqwen.load(folder, device="cuda", kv_dtype="float32")
    steps = model.stream([5, 6, 7], max_tokens=9, temperature=1.0, seed=0)
    for _ in range(3):
        next(steps)
    model.network.weights.norm[0] = np.nan
    next(steps)  # made before
    with pytest.raises(ValueError, match=r"logits: wanted finite numbers.*got \d+ NaN .*Check the checkpoint"):
        next(steps)
    with pytest.raises(ValueError, match="logits: wanted finite numbers"):
        next(model.stream([5, 6, 7], max_tokens=9))
