"""Logits to token, in float64. The order of the steps is transformers':

    repetition penalty → presence and frequency penalty → temperature → top_k → top_p → min_p → draw

Each filter sees what the one before it has left. top_k keeps every token that equals the k-th; top_p takes tokens away
from the least likely up, while what is taken away sums to at most 1 - top_p; min_p keeps what is at least min_p times
as likely as the first; the most likely token always stays. All of this is transformers' as well. Among equals top_p
takes the lowest id first, which is one of the results that transformers can give: it leaves that to torch.sort, which
is not stable on long rows. With temperature 0 the token is the argmax after the penalties, the lowest id among equals,
and no filter matters.

The draw, exactly, so that another sampler (on the device, say) can give the same tokens: one uniform u in [0, 1) per
token, from NumPy's `Generator(PCG64(seed)).random()`, none if the temperature is 0. The probabilities that are left
are summed one after another in the order of the ids; the token is the first whose running sum exceeds u times the
whole sum. So a token of probability 0 is never drawn.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from cuqwen.config import SAMPLING_RANGES, check_sampling_value


@dataclass(frozen=True)
class Sampling:
    """How to choose a token. The defaults choose the most likely one.

    Raises TypeError for a value that is not a number, ValueError for one out of range.
    """

    temperature: float = 0.0  # >= 0; 0: the most likely token
    top_k: int = 0  # >= 0; 0: all
    top_p: float = 1.0  # (0, 1]; 1: all
    min_p: float = 0.0  # [0, 1]; 0: all
    repetition_penalty: float = 1.0  # > 0; logits of tokens in prompt or answer: positive ones over, others times this
    presence_penalty: float = 0.0  # [-2, 2]; taken off the logits of tokens in the answer
    frequency_penalty: float = 0.0  # [-2, 2]; the same, for each time the token is there
    seed: int | None = None  # [0, 2^64); None: a fresh one each time

    def __post_init__(self) -> None:
        for name in SAMPLING_RANGES:
            if name != "seed" or self.seed is not None:
                object.__setattr__(self, name, check_sampling_value(name, getattr(self, name)))

    @property
    def has_penalties(self) -> bool:
        return self.repetition_penalty != 1 or self.presence_penalty != 0 or self.frequency_penalty != 0

    @property
    def is_argmax(self) -> bool:
        """Whether the token is plainly the most likely one, so that the choice needs no history and no randomness."""
        return self.temperature == 0 and not self.has_penalties


class Sampler:
    """Chooses the tokens of one answer, one call of `sample` each.

    prompt_ids: the ids of the prompt, which the repetition penalty counts as used. n_ids: ids from n_ids on are never
    chosen, whatever their logits say; the embedding has more rows than the tokenizer has tokens.
    """

    def __init__(self, sampling: Sampling, prompt_ids: Sequence[int] | np.ndarray, n_ids: int) -> None:
        if isinstance(n_ids, bool) or not isinstance(n_ids, (int, np.integer)):
            raise TypeError(f"Sampler: n_ids: wanted an integer, got {n_ids!r}")
        if n_ids < 1:
            raise ValueError(f"Sampler: n_ids: wanted at least 1, got {n_ids}")
        self.sampling = sampling
        self.n_ids = int(n_ids)
        self._counts = np.zeros(self.n_ids, np.int64)  # of each id in the answer
        self._seen = _occurrences(prompt_ids, self.n_ids) > 0  # ids in prompt or answer
        self._generator = np.random.Generator(np.random.PCG64(sampling.seed))

    def sample(self, logits: np.ndarray) -> int:
        """The next token, by `logits` [V] of any real dtype, V >= n_ids; records it for the penalties.

        Raises ValueError for another shape, and where NaN, +inf or nothing but -inf leave no token to choose.
        """
        scores = _scores(logits, self.n_ids)
        uniform = self._generator.random() if self.sampling.temperature > 0 else 0.0
        token = choose(scores, self.sampling, self._seen, self._counts, uniform)
        self._seen[token] = True
        self._counts[token] += 1
        return token

    def history(self) -> np.ndarray:
        """What the penalties need to know, int32 [n_ids]: 0 for a token not seen yet, 1 for one that is in the prompt
        only, c + 1 for one that is c times in the answer."""
        return (self._counts + self._seen).astype(np.int32)

    def uniforms(self, count: int) -> np.ndarray:
        """The random numbers, float64 [count], of as many tokens from here on, which the caller then chooses."""
        return self._generator.random(count)


def choose(scores: np.ndarray, sampling: Sampling, seen: np.ndarray, counts: np.ndarray, uniform: float) -> int:
    """The next token. scores: float64 [n_ids], overwritten; seen: bool [n_ids], prompt and answer; counts: int [n_ids],
    answer; uniform: in [0, 1), of no account if the temperature is 0.

    Raises ValueError where NaN, +inf or nothing but -inf leave no token to choose.
    """
    _penalise(scores, sampling, seen, counts)
    ids, probabilities = _filter(scores, sampling)
    if sampling.temperature == 0:
        return int(ids[0])
    sums = np.cumsum(probabilities)
    return int(ids[np.searchsorted(sums, uniform * sums[-1], side="right")])


def no_choice(scores: np.ndarray) -> ValueError:
    """The error for scores [n_ids] that leave no token to choose."""
    nans, infinities = np.count_nonzero(np.isnan(scores)), np.count_nonzero(scores == np.inf)
    got = f"{nans} NaN and {infinities} +inf" if nans or infinities else "only -inf"
    return ValueError(
        f"logits: wanted finite numbers or -inf, and one finite at least, got {got} among {len(scores)}. "
        f"Check the checkpoint's weights for NaN and infinity"
    )


def filtered_probabilities(
    logits: np.ndarray,
    sampling: Sampling,
    prompt_ids: Sequence[int] | np.ndarray = (),
    generated_ids: Sequence[int] | np.ndarray = (),
    n_ids: int | None = None,
) -> np.ndarray:
    """The probabilities [V], float64, which the next token is drawn by, after penalties and filters.

    They sum to 1; ids from n_ids on have 0. Raises ValueError as `Sampler.sample` does.
    """
    n_ids = np.shape(logits)[-1] if n_ids is None else n_ids
    scores = _scores(logits, n_ids)
    counts = _occurrences(generated_ids, n_ids)
    _penalise(scores, sampling, (counts > 0) | (_occurrences(prompt_ids, n_ids) > 0), counts)
    ids, probabilities = _filter(scores, sampling)
    result = np.zeros(np.shape(logits), np.float64)
    result[ids] = probabilities
    return result


def _scores(logits: np.ndarray, n_ids: int) -> np.ndarray:
    """The first n_ids logits, as a float64 array of their own."""
    if np.ndim(logits) != 1 or np.shape(logits)[0] < n_ids:
        raise ValueError(f"logits: wanted shape [V] with V >= n_ids = {n_ids}, got {list(np.shape(logits))}")
    return np.array(logits[:n_ids], np.float64)


def _occurrences(ids: Sequence[int] | np.ndarray, n_ids: int) -> np.ndarray:
    """How often each id below n_ids is in `ids`: int64 [n_ids]."""
    array = np.asarray(ids)
    if array.size and array.dtype.kind not in "iu":
        raise TypeError(f"token ids: wanted integers, got {array.dtype}")
    if array.size and (array.ndim != 1 or array.min() < 0):
        wanted = "token ids: wanted a list of integers >= 0"
        raise ValueError(f"{wanted}, got {f'shape {list(array.shape)}' if array.ndim != 1 else array.min()}")
    return np.bincount(array[array < n_ids].astype(np.int64), minlength=n_ids)


def _penalise(scores: np.ndarray, sampling: Sampling, seen: np.ndarray, counts: np.ndarray) -> None:
    """In place. scores: [n_ids]; seen: bool [n_ids], prompt and answer; counts: int64 [n_ids], answer."""
    if sampling.repetition_penalty != 1:
        used = scores[seen]
        with np.errstate(over="ignore"):  # an infinity is found below
            scores[seen] = np.where(used < 0, used * sampling.repetition_penalty, used / sampling.repetition_penalty)
    if sampling.presence_penalty != 0 or sampling.frequency_penalty != 0:
        scores -= sampling.presence_penalty * (counts > 0) + sampling.frequency_penalty * counts


def _filter(scores: np.ndarray, sampling: Sampling) -> tuple[np.ndarray, np.ndarray]:
    """The ids that are left, ascending, and their probabilities, float64: both [number left]."""
    first = int(np.argmax(scores))  # that of a NaN, if there is one
    top = scores[first]
    if not np.isfinite(top):
        raise no_choice(scores)
    if sampling.temperature == 0:
        return np.array([first]), np.ones(1)
    ids = np.arange(len(scores))
    if 0 < sampling.top_k < len(scores):
        kept = scores >= np.partition(scores, -sampling.top_k)[-sampling.top_k]
        ids, scores = ids[kept], scores[kept]
    if sampling.top_p < 1:
        kept = _top_p(scores, top, sampling)
        ids, scores = ids[kept], scores[kept]
    weights = _weights(scores, top, sampling.temperature)
    if sampling.min_p > 0:
        kept = weights >= sampling.min_p  # the first token's weight is 1
        ids, weights = ids[kept], weights[kept]
    return ids, weights / weights.sum()


def _top_p(scores: np.ndarray, top: float, sampling: Sampling) -> np.ndarray:
    """Which tokens top_p keeps: bool [number of tokens].

    Most tokens are so unlikely that even all of them together would go; only the others need sorting, and by value
    alone: 4 ms a token at V = 151,936 on one core of an EPYC, where a stable argsort takes 26.
    """
    weights = _weights(scores, top, sampling.temperature)
    allowance = (1 - sampling.top_p) * weights.sum()
    contenders = weights >= allowance / len(weights)  # the most likely token is one: its weight is 1, the largest
    ascending = np.sort(scores[contenders])
    sums = weights[~contenders].sum() + np.cumsum(_weights(ascending, top, sampling.temperature))
    removed = min(int(np.searchsorted(sums, allowance, side="right")), len(ascending) - 1)
    lowest = ascending[removed]
    kept = scores >= lowest
    equals_removed = removed - int(np.searchsorted(ascending, lowest))
    kept[np.flatnonzero(scores == lowest)[:equals_removed]] = False
    return kept


def _weights(scores: np.ndarray, top: float, temperature: float) -> np.ndarray:
    """Probabilities but for a common factor, the largest being 1."""
    with np.errstate(over="ignore", under="ignore"):  # a tiny temperature: -inf, whose weight is 0
        return np.exp((scores - top) / temperature)
