"""The public face: `load` and the `Model` that it returns."""

from __future__ import annotations

import os
import sys
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from cuqwen import driver, hub, launch, memory, startup, thinking, weights
from cuqwen.beside import Beside
from cuqwen.config import CheckpointError, Config, GenerationConfig
from cuqwen.decode import why_portable
from cuqwen.generate import Sequence as TokenSequence
from cuqwen.generate import Step, generate_steps
from cuqwen.memory import MemoryPlan
from cuqwen.model import Device, Progress, Qwen3
from cuqwen.sampling import Sampling
from cuqwen.tokenizer import Tokenizer

Prompt = str | Sequence[int] | Sequence[dict[str, Any]]
KV_DTYPES = {"bfloat16": ml_dtypes.bfloat16, "float16": np.float16, "float32": np.float32, "float64": np.float64}


def load(
    model: str | os.PathLike[str],
    *,
    device: str | None = None,
    dtype: str | None = None,
    kv_dtype: str | None = None,
    max_context: int | None = None,
    exact: bool = False,
    revision: str | None = None,
    progress: Progress | None = None,
    check_weights: bool = False,
    show_download: bool = False,
    compile_progress: Progress | None = None,
) -> Model:
    """Load a Qwen3 or Qwen2.5 checkpoint.

    model: a hub id ("Qwen/Qwen3-0.6B", fetched into the hub's cache), a checkpoint's folder, or "demo", the small model
    that comes with the package. revision: branch, tag or commit on the hub.
    device: "cuda", "cpu", or None for the GPU if there is one.
    dtype: what the CPU computes in, "float32" (default) or "float64"; the GPU computes in float32 from weights as stored.
    kv_dtype: how keys and values are cached: "bfloat16" (the GPU's default), "float16", "float32" (its default with `exact`)
    or, on the CPU, "float64"; the CPU's default is its `dtype`.
    max_context: most tokens of prompt and answer together, at most the model's own (`config.context_length`). None: that, or
    as many as fit into the memory that is free. What is not used is not allocated: the cache grows with the texts.
    exact: on a GPU, round nothing to bf16: read prompts with float32 activations, as single tokens always are, and keep the
    cache in float32 unless `kv_dtype` says otherwise. Without it, prompts of more than four tokens hand activations from
    operation to operation in bf16 (the residual stream, sums, norms and softmax are float32 in any case), which is what most
    of the speed of tensor cores rests on: with it products take three times the arithmetic, attention six times, and the
    cache twice the memory. The CPU is always exact.
    progress: called with (bytes read, bytes in all) while weights are read. show_download: the hub's own bars on stderr.
    compile_progress: called with (kernels compiled, kernels in all) when weights are read and the first start on a machine
    still compiles. check_weights: read all weights once more and refuse NaN and infinity.

    What the model needs is compared with what is free before anything is loaded: `memory_plan` of the result.

    Raises CheckpointError for anything wrong with the files, DeviceError if the device cannot be used, MemoryError if the
    model does not fit, ValueError for other impossible arguments.
    """
    if not isinstance(exact, bool):
        raise TypeError(f"load: exact: wanted True or False, got {type(exact).__name__}")
    wants_gpu = device in (None, "cuda") and dtype != "float64"
    with Beside() as beside:  # what takes long and needs nothing else
        if wants_gpu and "cupy" not in sys.modules:  # with CuPy another GPU than the first may have been chosen
            driver.wake()
        # imports CuPy, in a thread because an interrupt would break the import
        cupy_is_there = beside.submit(launch.has_gpu if wants_gpu else bool)
        if not hub.is_local(model):
            cupy_is_there.result()
            # nothing is downloaded for a device that is not there, or a type that it does not have
            _choose_kv_dtype(kv_dtype, _choose_device(device, dtype), exact)
        folder = hub.resolve(model, revision=revision, progress=show_download)
        config = Config.from_folder(folder)
        read_tokenizer = beside.submit(Tokenizer.from_folder, folder, config)
        cupy_is_there.result()
        place = _choose_device(device, dtype)
        kv = _choose_kv_dtype(kv_dtype, place, exact)
        _check_context(max_context, config)
        generation = GenerationConfig.from_folder(folder, config)
        if place.name == "cuda" and (config.head_dim % 8 or config.head_dim > 256):
            raise CheckpointError(
                f'{folder}: head_dim: wanted a multiple of 8 up to 256 on the GPU, got {config.head_dim}; use device="cpu"'
            )
        tokenizer = read_tokenizer.result()
        plan = memory.plan(folder, config, place, kv, max_context, exact=exact)
        if check_weights:
            weights.check_finite(folder, config)
        compiling: AbstractContextManager[None] = nullcontext()
        if place.name == "cuda":
            requests = startup.kernels(folder, config, place, kv, plan, exact=exact)
            compiling = startup.compiling(requests, compile_progress)
        try:
            with compiling:
                arrays = weights.read(
                    folder, config, place.place_weight, reserve=place.reserve_weight, progress=progress
                )
                network = Qwen3(config, arrays, place, kv, exact=exact, chunk=plan.chunk)
        except Exception as error:
            if launch.is_out_of_memory(error):
                raise MemoryError(
                    f"{folder}: the weights do not fit into memory{_free(place)}; use a smaller model"
                ) from None
            raise
    return Model(folder, network, tokenizer, generation, plan)


class Model:
    """A loaded checkpoint. Made by `load`.

    config: the architecture, fields named as in config.json. tokenizer: text to ids and back. device: "cuda" or "cpu".
    max_context: most tokens of prompt and answer together. generation_config: the checkpoint's sampling defaults.
    memory_plan: what it needs; `str(memory_plan)` says so in one line.

    A model keeps the text of its last answer, prompt and all: a prompt that begins as that does is read from where the two
    part. A stream takes that text with it when its first token is asked for, and leaves its own when it ends, is closed or
    goes out of use; a stream that begins meanwhile begins a text of its own. So streams never disturb each other, and there
    are as many caches as streams that have begun and not ended, and one more.

    Used as a context manager, it is closed at the end of the block.
    """

    def __init__(
        self,
        folder: Path,
        network: Qwen3,
        tokenizer: Tokenizer,
        generation_config: GenerationConfig,
        memory_plan: MemoryPlan,
    ) -> None:
        self.folder, self.tokenizer, self.memory_plan = folder, tokenizer, memory_plan
        self.generation_config, self.max_context = generation_config, memory_plan.context
        self.config, self.device = network.config, network.device.name
        self._network: Qwen3 | None = network
        self._kept: list[TokenSequence] = []  # one at most

    def __repr__(self) -> str:
        return f"<cuqwen.Model {self.folder} on {self.device}, {self.config.num_hidden_layers} layers>"

    @property
    def network(self) -> Qwen3:
        """The forward pass. Raises ValueError when the model is closed."""
        if self._network is None:
            raise ValueError(f"{self!r}: wanted an open model, got one that is closed; load it again")
        return self._network

    @property
    def fallback(self) -> str | None:
        """Why a GPU makes single tokens by many small kernels instead of in one launch, and so more slowly; None where it does
        not, and on the CPU."""
        return None if self.device == "cpu" else why_portable(self.network)

    def close(self) -> None:
        """Free the weights and the text. A stream that has begun keeps what it needs until it ends. May be called twice."""
        self._network = None
        self._kept.clear()
        if self.device == "cuda":
            launch.release_memory()

    def __enter__(self) -> Model:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def logits(self, ids: Sequence[int] | np.ndarray) -> Any:
        """The logits of the next token after each of `ids` (teacher forcing).

        ids [T], integers in 0..V-1, 1 <= T <= max_context; returns [T, V]: NumPy of the computing dtype on the CPU, CuPy
        float32 on the GPU. Raises ValueError or TypeError for other ids, MemoryError.
        """
        network, prompt = self.network, self._check_ids(ids, "logits: ids")
        if len(prompt) > self.max_context:
            raise ValueError(f"logits: ids: wanted at most the context of {self.max_context} tokens, got {len(prompt)}")
        with self._memory_errors(len(prompt), logits=len(prompt)):
            return network.read(prompt, network.new_cache(len(prompt)), every_row=True)

    def stream(
        self,
        prompt: Prompt,
        *,
        max_tokens: int = 256,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        repetition_penalty: float | None = None,
        presence_penalty: float = 0.0,
        frequency_penalty: float = 0.0,
        seed: int | None = None,
        stop: str | Iterable[str] = (),
        enable_thinking: bool | None = None,
        thinking_budget: int | None = None,
        tools: list[dict[str, Any]] | None = None,
        logprobs: int = 0,
        progress: Progress | None = None,
    ) -> Iterator[Step]:
        """Continue a prompt and yield a `Step` for each token: `step.text`, `step.token`, `step.finish_reason`.

        prompt: text, taken as it stands; a list of chat messages such as [{"role": "user", "content": "Hi"}], put through the
        checkpoint's chat template (with `enable_thinking` and `tools`); or a list of token ids.
        temperature, top_k, top_p, min_p, repetition_penalty: None takes the checkpoint's generation_config.json, and where
        that says nothing the most likely token is taken (temperature 0) and no filter applies. An explicit value wins; with
        any of the filters given but no temperature anywhere, the temperature is 1.
        presence_penalty, frequency_penalty: subtracted from the logits of tokens already generated (once; per occurrence).
        seed: the same seed gives the same tokens, but for near ties, which roundings decide: on the GPU they depend on how
        much of the prompt was in the cache and on the cache's size.
        stop: strings that end the answer; they are not part of the text.
        thinking_budget: most tokens of a thinking block. An answer that is still thinking then is continued with the sentence
        that Qwen published for this and the end of the block, whose tokens are steps as well. What follows it draws numbers of
        its own from the seed, and its presence and frequency penalties count anew. Nothing happens where max_tokens leaves no
        room for that sentence and a token.
        logprobs: how many of the most likely tokens `step.top_logprobs` names, and with it `step.logprob`; 0 leaves both None.
        Each step then waits for its logits on the host, which costs some milliseconds a token on a GPU.
        progress: called with (tokens of the prompt that are read, tokens in all) while a prompt is read, some thousand at a
        time. What it raises ends the stream; the model remains usable, and keeps what is read.

        All arguments are checked before the first token is computed. Raises ValueError (an empty prompt, impossible values,
        prompt and max_tokens beyond `max_context`), TypeError, MemoryError.
        """
        _ = self.network  # if it is open
        ids = self._encode(prompt, enable_thinking, tools)
        sampling = self._sampling(
            temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, repetition_penalty=repetition_penalty,
            presence_penalty=presence_penalty, frequency_penalty=frequency_penalty, seed=seed,
        )  # fmt: skip
        if isinstance(max_tokens, bool) or not isinstance(max_tokens, (int, np.integer)):
            raise TypeError(f"stream: max_tokens: wanted an int, got {type(max_tokens).__name__}")
        if max_tokens < 1:
            raise ValueError(f"stream: max_tokens: wanted at least 1, got {max_tokens}")
        if len(ids) + max_tokens > self.max_context:
            room = self.max_context - len(ids)
            remedy = f"use max_tokens up to {room}" if room > 0 else "shorten the prompt"
            raise ValueError(
                f"stream: prompt of {len(ids)} tokens and max_tokens {max_tokens}: wanted at most {self.max_context} "
                f"together, the context, got {len(ids) + max_tokens}; {remedy}"
            )
        if thinking_budget is not None:
            if isinstance(thinking_budget, bool) or not isinstance(thinking_budget, (int, np.integer)):
                raise TypeError(f"stream: thinking_budget: wanted an int or None, got {type(thinking_budget).__name__}")
            if thinking_budget < 1:
                raise ValueError(
                    f"stream: thinking_budget: wanted at least 1, got {thinking_budget}; enable_thinking=False allows none"
                )
        if isinstance(logprobs, bool) or not isinstance(logprobs, (int, np.integer)):
            raise TypeError(f"stream: logprobs: wanted an int, got {type(logprobs).__name__}")
        if not 0 <= logprobs <= self.tokenizer.n_ids:
            raise ValueError(f"stream: logprobs: wanted 0..{self.tokenizer.n_ids}, got {logprobs}")
        if progress is not None and not callable(progress):
            raise TypeError(f"stream: progress: wanted a function or None, got {type(progress).__name__}")
        if not isinstance(stop, Iterable):
            raise TypeError(f"stream: stop: wanted a string or several, got {type(stop).__name__}")
        stops = (stop,) if isinstance(stop, str) else tuple(stop)
        for string in stops:
            if not isinstance(string, str):
                raise TypeError(f"stream: stop: wanted strings, got {type(string).__name__}")
            if not string:
                raise ValueError("stream: stop: wanted non-empty strings, got an empty one")
        rest = stops, int(logprobs)
        if thinking_budget is None:
            return self._run(ids.tolist(), int(max_tokens), sampling, *rest, progress)
        other = None if sampling.seed is None else (sampling.seed + 2**63) % 2**64  # no number is drawn twice
        first, second = (
            lambda ids, count, rules=rules, progress=progress: self._run(ids, count, rules, *rest, progress)
            for rules, progress in ((sampling, progress), (replace(sampling, seed=other), None))
        )
        return thinking.bounded(first, second, self.tokenizer, ids.tolist(), int(max_tokens), int(thinking_budget))

    def generate(self, prompt: Prompt, **arguments: Any) -> str:
        """The whole text that `stream` would yield; the same arguments."""
        return "".join(step.text for step in self.stream(prompt, **arguments))

    def _run(
        self,
        prompt: list[int],
        max_tokens: int,
        sampling: Sampling,
        stops: tuple[str, ...],
        logprobs: int,
        progress: Progress | None,
    ) -> Generator[Step, None, None]:
        network = self.network
        sequence = self._kept.pop() if self._kept else TokenSequence(network, self.max_context)
        try:
            with self._memory_errors(len(prompt) + max_tokens):
                yield from generate_steps(
                    sequence, self.tokenizer, prompt, sampling=sampling, max_tokens=max_tokens, stop=stops,
                    end_ids=self.generation_config.eos_token_id, progress=progress, logprobs=logprobs,
                )  # fmt: skip
        except (launch.DeviceError, MemoryError):
            sequence.drop()
            raise
        finally:
            if self._network is not None:
                self._kept[:] = [sequence]

    def _encode(self, prompt: Prompt, enable_thinking: bool | None, tools: list[dict[str, Any]] | None) -> np.ndarray:
        if isinstance(prompt, (list, tuple)) and prompt and isinstance(prompt[0], dict):
            messages = list(prompt)
            prompt = self.tokenizer.apply_chat_template(messages, enable_thinking=enable_thinking, tools=tools)
        if isinstance(prompt, str):
            prompt = self.tokenizer.encode(prompt)
        return self._check_ids(prompt, "stream: prompt")

    def _check_ids(self, ids: Any, where: str) -> np.ndarray:
        if not isinstance(ids, (Sequence, np.ndarray)) or isinstance(ids, (str, bytes)):
            raise TypeError(f"{where}: wanted a flat list of token ids, got {type(ids).__name__}")
        if len(ids) == 0:
            raise ValueError(f"{where}: wanted at least one token, got none; give some text")
        try:
            array = np.asarray(ids)
        except ValueError:  # ragged
            raise ValueError(f"{where}: wanted a flat list of token ids, got nested ones of several lengths") from None
        if array.ndim != 1:
            raise ValueError(f"{where}: wanted a flat list of token ids, got shape {list(array.shape)}")
        if array.dtype == object and all(isinstance(i, int) for i in ids):
            raise ValueError(f"{where}: wanted ids in 0..{self.config.vocab_size - 1}, got integers beyond 64 bits")
        if array.dtype.kind not in "iu":
            raise TypeError(f"{where}: wanted a list of integers, got {array.dtype}")
        if array.min() < 0 or array.max() >= self.config.vocab_size:
            raise ValueError(
                f"{where}: wanted ids in 0..{self.config.vocab_size - 1}, got {array.min()}..{array.max()}"
            )
        return array.astype(np.int32)

    def _sampling(self, *, temperature: float | None, **given: Any) -> Sampling:
        defaults = self.generation_config
        filters = ("top_k", "top_p", "min_p")
        asked = any(given[key] is not None for key in filters)
        if temperature is None:
            temperature = (1.0 if asked else 0.0) if not defaults.do_sample else defaults.temperature
            temperature = 1.0 if temperature is None else temperature
        for key in (*filters, "repetition_penalty"):
            # as in transformers, where the penalty also applies to greedy search
            recommended = getattr(defaults, key) if defaults.do_sample or key == "repetition_penalty" else None
            given[key] = recommended if given[key] is None else given[key]
        return Sampling(temperature=temperature, **{key: value for key, value in given.items() if value is not None})

    def _memory_errors(self, tokens: int, logits: int = 0) -> _MemoryErrors:
        """For work with so many tokens in the cache, whose result is so many rows of logits."""
        network, vocabulary = self.network, self.config.vocab_size
        need = f"{tokens} tokens need {tokens * self.memory_plan.bytes_per_token / 1e9:.2f} GB of cache"
        if logits:
            size = logits * vocabulary * network.device.dtype.itemsize / 1e9
            need += f", {size:.2f} GB for their logits [{logits}, {vocabulary}]"
        return _MemoryErrors(f"{need} and some workspace", network.device)


class _MemoryErrors:
    """Turns an allocation failure inside the `with` block into one MemoryError that says what was needed."""

    def __init__(self, need: str, device: Device) -> None:
        self.need, self.device = need, device

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        if error is not None and launch.is_out_of_memory(error):
            remedy = "use fewer tokens or a smaller model"
            raise MemoryError(f"{self.need}, more than there is{_free(self.device)}; {remedy}") from None


def _free(device: Device) -> str:
    return f" ({launch.free_bytes() / 1e9:.2f} GB free on the GPU)" if device.name == "cuda" else ""


def _choose_device(device: str | None, dtype: str | None) -> Device:
    if device not in (None, "cuda", "cpu"):
        raise ValueError(f'load: device: wanted "cuda", "cpu" or None, got {device!r}')
    if dtype not in (None, "float32", "float64"):
        raise ValueError(f'load: dtype: wanted "float32" or "float64", got {dtype!r}')
    if device is None:
        device = "cuda" if dtype != "float64" and launch.has_gpu() else "cpu"
    if device == "cpu":
        return Device.cpu(dtype or "float32")
    if dtype == "float64":
        raise ValueError('load: dtype: wanted "float32" on the GPU, got "float64"; use device="cpu" for float64')
    launch.cupy()  # raises DeviceError with the remedy
    return Device.cuda()


def _choose_kv_dtype(kv_dtype: str | None, device: Device, exact: bool) -> Any:
    if kv_dtype is None:
        return device.dtype if device.name == "cpu" or exact else np.dtype(ml_dtypes.bfloat16)
    allowed = [name for name in KV_DTYPES if name != "float64" or device.name == "cpu"]
    if kv_dtype not in allowed:
        raise ValueError(f"load: kv_dtype: wanted {' or '.join(allowed)}, got {kv_dtype!r}")
    return np.dtype(KV_DTYPES[kv_dtype])


def _check_context(max_context: int | None, config: Config) -> None:
    if max_context is None:
        return
    if isinstance(max_context, bool) or not isinstance(max_context, (int, np.integer)):
        raise TypeError(f"load: max_context: wanted an int, got {type(max_context).__name__}")
    longest = config.context_length
    if not 1 <= max_context <= longest:
        name, remedy = "factor x original_max_position_embeddings", ""
        if config.rope_scaling is None:
            name = "max_position_embeddings"
            trained = min(longest, 32768)
            factor = float(-(-max_context // trained))
            keys = f'"rope_type": "yarn", "factor": {factor}, "original_max_position_embeddings": {trained}'
            remedy = f'; for more, switch YaRN on by adding to its config.json "rope_scaling": {{{keys}}}'
        raise ValueError(
            f"load: max_context: wanted 1..{longest}, the model's {name}, got {max_context}"
            + (remedy if max_context > longest else "")
        )
