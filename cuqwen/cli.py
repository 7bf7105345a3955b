"""The command line: argparse and printing. The only module that prints.

Text goes to stdout, everything else to stderr. Exit status 0; 1 for a failure, told in one line; 2 for wrong usage; 130
for an interrupted run.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from cuqwen import __version__

if TYPE_CHECKING:
    from cuqwen.api import Model
    from cuqwen.generate import Step

INTERRUPTED = 130
PROGRESS_FROM_BYTES = 200_000_000  # smaller files are read before a bar can be seen


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit status."""
    _open_missing_streams()
    try:
        options = _parser().parse_args(argv)
        options.run(options, options.parser)
        sys.stdout.flush()
        return 0
    except (Exception, KeyboardInterrupt) as error:
        _give_up_stdout()
        if isinstance(error, KeyboardInterrupt):
            print("\ncuqwen: interrupted", file=sys.stderr)
            return INTERRUPTED
        if isinstance(error, BrokenPipeError):  # whoever read our output has had enough: nothing failed
            return 0
        if isinstance(error, (ValueError, RuntimeError, MemoryError, OSError)):
            print(f"cuqwen: error: {' '.join(str(error).split())}", file=sys.stderr)
            return 1
        raise


@contextlib.contextmanager
def _hold_interrupts() -> Iterator[None]:
    """Let an interrupt wait until the end of the block. In the middle of importing a C extension it would come out as an
    ImportError, after the extension has printed a traceback of its own."""
    if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:  # ignored, as under nohup
        yield
        return
    received: list[int] = []
    signal.signal(signal.SIGINT, lambda number, frame: received.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if received:
        raise KeyboardInterrupt


def _open_missing_streams() -> None:
    """Some schedulers start programs with standard streams closed. The next file to be opened would take such a
    stream's number, and receive what is printed."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115


def _give_up_stdout() -> None:
    """Write out what can be written, and keep the interpreter from trying again, and complaining, when it ends."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="cuqwen", description="Qwen3 on one NVIDIA GPU, without PyTorch.")
    parser.add_argument("--version", action="version", version=f"cuqwen {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_generate(commands.add_parser("generate", help="continue or answer a prompt", description=_GENERATE))
    return parser


_GENERATE = """Answer a prompt through the checkpoint's chat template, or continue it as it stands (--raw, or a checkpoint
that has no template). Sampling settings that are not given come from the checkpoint's generation_config.json."""


def _add_generate(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(run=_generate, parser=parser)
    add = parser.add_argument
    add("prompt", nargs="?", metavar="PROMPT", help='the text; "-" or nothing reads standard input')
    add(
        "--model",
        required=True,
        metavar="ID|DIR|demo",
        help="a hub id, a checkpoint's folder, or the model in the package",
    )
    add("--revision", metavar="REV", help="branch, tag or commit of a hub id")
    add("--device", choices=("cuda", "cpu"), help="default: the GPU if there is one")
    add("--max-context", type=int, metavar="N", help="most tokens of prompt and answer together")
    add("--check-weights", action="store_true", help="look for NaN and infinity in the weights first")
    text = parser.add_argument_group("text")
    text.add_argument("--system", metavar="TEXT", help="system message of the chat template")
    text.add_argument("--raw", action="store_true", help="continue the prompt as it stands, without chat template")
    text.add_argument("--no-think", action="store_true", help="switch thinking off in the chat template")
    text.add_argument("--max-tokens", type=int, default=256, metavar="N", help="most tokens to generate (default 256)")
    text.add_argument(
        "--stop", action="append", default=[], metavar="TEXT", help="end before this text; may be repeated"
    )
    sampling = parser.add_argument_group("sampling")
    sampling.add_argument("--temperature", type=float, metavar="X", help="0 takes the most likely token")
    sampling.add_argument("--top-k", type=int, metavar="N", help="keep the N most likely tokens (0: all)")
    sampling.add_argument("--top-p", type=float, metavar="X", help="keep the fewest tokens whose probabilities reach X")
    sampling.add_argument(
        "--min-p", type=float, metavar="X", help="keep tokens at least X times as likely as the first"
    )
    sampling.add_argument("--repetition-penalty", type=float, metavar="X", help="above 1: repeat less")
    sampling.add_argument(
        "--presence-penalty", type=float, default=0.0, metavar="X", help="less of tokens already used"
    )
    sampling.add_argument("--frequency-penalty", type=float, default=0.0, metavar="X", help="the same for each use")
    sampling.add_argument("--seed", type=int, metavar="N", help="the same seed gives the same text")
    output = parser.add_argument_group("output")
    output.add_argument("--json", action="store_true", help="print one JSON object at the end instead of text")
    output.add_argument("--quiet", action="store_true", help="nothing but the text: no progress, no statistics")


def _generate(options: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    arguments = _sampling_arguments(options, parser)
    prompt = _read_prompt(options, parser)
    started = time.perf_counter()
    model = _load(options)
    loaded = time.perf_counter()
    ids = _encode(prompt, model, options)
    steps = model.stream(ids, max_tokens=options.max_tokens, stop=options.stop, **arguments)
    taken = _print_steps(steps, silent=options.json)
    timings = {"load_seconds": loaded - started, **_timings(taken, loaded)}
    if options.json:
        report = _report(options, model, len(ids), [step for step, _ in taken], timings)
        _write(json.dumps(report, ensure_ascii=False) + "\n")
    if not options.quiet:
        print(_statistics(model, len(ids), len(taken), timings), file=sys.stderr)


def _sampling_arguments(options: argparse.Namespace, parser: argparse.ArgumentParser) -> dict[str, Any]:
    """The sampling settings that were given; impossible ones end the program with status 2, before anything is loaded."""
    from cuqwen.config import SAMPLING_RANGES, check_sampling_value

    given = {name: getattr(options, name) for name in SAMPLING_RANGES if getattr(options, name) is not None}
    try:
        for name, value in given.items():
            check_sampling_value(name, value)
    except ValueError as error:
        parser.error(f"--{str(error).replace('_', '-')}")
    if options.max_tokens < 1:
        parser.error(f"--max-tokens: wanted at least 1, got {options.max_tokens}")
    if options.max_context is not None and options.max_context < 1:
        parser.error(f"--max-context: wanted at least 1, got {options.max_context}")
    if "" in options.stop:
        parser.error("--stop: wanted some text, got an empty one")
    if options.raw and (options.system is not None or options.no_think):
        parser.error("--raw leaves the chat template out, so --system and --no-think have no place in it")
    return given


def _read_prompt(options: argparse.Namespace, parser: argparse.ArgumentParser) -> str:
    if options.prompt is None and sys.stdin.isatty():
        parser.error('PROMPT: wanted a text or "-" for standard input')
    if options.prompt in (None, "-"):
        data = sys.stdin.buffer.read()
        try:
            prompt = data.decode("utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(
                f"standard input: wanted UTF-8 text, got byte 0x{data[error.start]:02x} at offset {error.start}; "
                "convert it, for instance with iconv"
            ) from None
        prompt = prompt.removesuffix("\n")
    else:
        prompt = options.prompt
        if any("\ud800" <= character <= "\udfff" for character in prompt):  # how Python shows bytes that are not UTF-8
            raise ValueError("prompt: wanted UTF-8 text, got other bytes; convert it, for instance with iconv")
    if not prompt:
        raise ValueError("prompt: wanted some text, got none")
    return prompt


def _load(options: argparse.Namespace) -> Model:
    with _hold_interrupts():
        from cuqwen import launch
        from cuqwen.api import load

        if options.device != "cpu":
            launch.has_gpu()  # imports CuPy

    show = sys.stderr.isatty() and not options.quiet
    bar: Any = None

    def progress(done: int, total: int) -> None:
        nonlocal bar
        if total < PROGRESS_FROM_BYTES:
            return
        if bar is None:
            from tqdm import tqdm

            bar = tqdm(total=total, unit="B", unit_scale=True, desc="load", file=sys.stderr, leave=False)
        bar.update(done - bar.n)

    try:
        return load(
            options.model,
            device=options.device,
            max_context=options.max_context,
            revision=options.revision,
            check_weights=options.check_weights,
            progress=progress if show else None,
            show_download=show,
        )
    finally:
        if bar is not None:
            bar.close()


def _encode(prompt: str, model: Model, options: argparse.Namespace) -> list[int]:
    """Token ids of the prompt as it stands, or put through the chat template where the checkpoint has one."""
    tokenizer = model.tokenizer
    if not options.raw and (tokenizer.has_chat_template or options.system is not None or options.no_think):
        system = [] if options.system is None else [{"role": "system", "content": options.system}]
        messages = [*system, {"role": "user", "content": prompt}]
        prompt = tokenizer.apply_chat_template(messages, enable_thinking=False if options.no_think else None)
    return tokenizer.encode(prompt)


def _print_steps(steps: Any, *, silent: bool) -> list[tuple[Step, float]]:
    """Print the text of each step as it comes; return the steps with the time at which each was there."""
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(encoding="utf-8")
    taken = []
    ends_line = True
    for step in steps:
        taken.append((step, time.perf_counter()))
        if step.text and not silent:
            _write(step.text)
            ends_line = step.text.endswith("\n")
    if not ends_line:
        _write("\n")
    return taken


def _write(text: str) -> None:
    """Show text on standard output at once."""
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        raise OSError(
            f"standard output: cannot be written ({error.strerror}); free some space or send it elsewhere"
        ) from None


def _timings(taken: list[tuple[Step, float]], loaded: float) -> dict[str, float]:
    """Seconds to the first token, seconds for the others, and tokens a second among those."""
    first, last = taken[0][1], taken[-1][1]
    rate = (len(taken) - 1) / (last - first) if len(taken) > 1 else 0.0
    return {"first_token_seconds": first - loaded, "decode_seconds": last - first, "tokens_per_second": rate}


def _report(
    options: argparse.Namespace, model: Model, prompt_tokens: int, steps: list[Step], timings: dict[str, float]
) -> dict[str, Any]:
    return {
        "text": "".join(step.text for step in steps),
        "tokens": [step.token for step in steps],
        "finish_reason": steps[-1].finish_reason,
        "prompt_tokens": prompt_tokens,
        "model": options.model,
        "device": model.device,
        "timings": {key: round(value, 6) for key, value in timings.items()},
    }


def _statistics(model: Model, prompt_tokens: int, tokens: int, timings: dict[str, float]) -> str:
    from cuqwen import launch

    rate = timings["tokens_per_second"]
    parts = [
        f"load {timings['load_seconds']:.2f} s",
        f"prompt {prompt_tokens} tok · {1e3 * timings['first_token_seconds']:.0f} ms",
    ]
    if rate:
        bandwidth = rate * model.network.read_bytes_per_token(prompt_tokens + tokens // 2)
        parts += [f"{tokens} tok · {rate:,.0f} tok/s · {bandwidth / 1e9:.1f} GB/s"]
        peak = launch.peak_bandwidth() if model.device == "cuda" else 0.0  # some GPUs report none
        if peak:
            parts[-1] += f" · {100 * bandwidth / peak:.0f} % of this GPU's memory"
    return " | ".join(parts)


if __name__ == "__main__":
    sys.exit(main())
