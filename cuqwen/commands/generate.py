"""`cuqwen generate`: continue or answer one prompt."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

from cuqwen.commands import answers, figures, loading, options, terminal

if TYPE_CHECKING:
    from cuqwen.api import Model


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = """Answer a prompt through the checkpoint's chat template, or continue it as it stands (--raw, or
    a checkpoint that has no template). Sampling settings that are not given come from the checkpoint's
    generation_config.json."""
    parser.add_argument(
        "prompt", nargs="?", metavar="PROMPT", help='the text; "-", or nothing in a pipe, reads standard input'
    )
    options.add_model(parser)
    options.add_loading(parser)
    text = parser.add_argument_group("text")
    text.add_argument("--prompt-file", type=Path, metavar="FILE", help="read the prompt from this file")
    options.add_thinking(text)
    text.add_argument("--raw", action="store_true", help="continue the prompt as it stands, without chat template")
    text.add_argument("--max-tokens", type=int, default=256, metavar="N", help="most tokens to generate (default 256)")
    text.add_argument(
        "--stop", action="append", default=[], metavar="TEXT", help="end before this text; may be repeated"
    )
    text.add_argument("--n", type=int, default=1, metavar="N", help="so many answers, with seeds one apart")
    options.add_sampling(parser)
    output = parser.add_argument_group("output")
    output.add_argument("--json", action="store_true", help="print one JSON object at the end instead of text")
    output.add_argument(
        "--logprobs",
        type=int,
        metavar="N",
        help="with --json: each token's log-probability, and the N most likely tokens in its place",
    )
    output.add_argument("--stats", action="store_true", help="a table of what took how long instead of one line")
    output.add_argument("--quiet", action="store_true", help="nothing but the text: no progress, no statistics")


def run(given: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    settings = _check(given, parser)
    prompt = _read_prompt(given, parser)
    started = perf_counter()
    model = loading.load(given)
    load_seconds = perf_counter() - started
    ids = answers.encode(prompt, model, given)
    _check_sizes(len(ids), model, given)
    collected = []
    for number in range(given.n):
        if "seed" in settings:
            settings["seed"] = (given.seed + number) % 2**64
        if number and not given.json:
            terminal.write("---\n")
        collected.append(_answer(model, ids, settings, given, is_first=number == 0))
        if not given.json:
            _tell(collected[-1], load_seconds, given)
    if given.json:
        reports = [_report(answer, load_seconds, given) for answer in collected]
        more = {"answers": reports} if given.n > 1 else {}
        terminal.write(json.dumps(reports[0] | more, ensure_ascii=False) + "\n")
        for answer in collected:
            _tell(answer, load_seconds, given)


def _check(given: argparse.Namespace, parser: argparse.ArgumentParser) -> dict[str, Any]:
    """The arguments of every answer; impossible ones end the program with status 2, before anything is loaded."""
    settings = options.sampling(given, parser)
    options.at_least(given, parser, 1, "max_tokens", "max_context", "thinking_budget", "n", "logprobs")
    if "" in given.stop:
        parser.error("--stop: wanted some text, got an empty one")
    if given.raw and (given.system is not None or given.no_think or given.thinking_budget is not None):
        parser.error("--raw leaves the chat template out, so --system, --no-think and --thinking-budget have no place")
    if given.logprobs is not None and not given.json:
        parser.error("--logprobs: wanted --json, which tells them")
    if given.stats and given.quiet:
        parser.error("--stats: --quiet wants none")
    if given.prompt is not None and given.prompt_file is not None:
        parser.error("--prompt-file: wanted one prompt, got PROMPT as well")
    return settings | {
        "stop": given.stop,
        "max_tokens": given.max_tokens,
        "thinking_budget": given.thinking_budget,
        "logprobs": given.logprobs or 0,
    }


def _check_sizes(prompt: int, model: Model, given: argparse.Namespace) -> None:
    """What only the model knows, in the flags' words."""
    room = model.max_context - prompt
    if given.max_tokens > room:
        remedy = f"use --max-tokens up to {room}" if room > 0 else "shorten the prompt"
        raise ValueError(
            f"prompt of {prompt} tok and --max-tokens {given.max_tokens}: wanted at most {model.max_context} together, the "
            f"context, got {prompt + given.max_tokens}; {remedy}"
        )
    if (given.logprobs or 0) > model.tokenizer.n_ids:
        raise ValueError(
            f"--logprobs: wanted 1..{model.tokenizer.n_ids}, the tokens that there are, got {given.logprobs}"
        )


def _read_prompt(given: argparse.Namespace, parser: argparse.ArgumentParser) -> str:
    if given.prompt is None and given.prompt_file is None and sys.stdin.isatty():
        parser.error('PROMPT: wanted a text or "-" for standard input')
    if given.prompt_file is not None:
        prompt = _without_newline(read_text(given.prompt_file))
    elif given.prompt in (None, "-"):
        prompt = _without_newline(read_text(None))
    else:
        prompt = given.prompt
        if any("\ud800" <= character <= "\udfff" for character in prompt):  # how Python shows bytes that are not UTF-8
            raise ValueError("prompt: wanted UTF-8 text, got other bytes; convert it, for instance with iconv")
    if not prompt:
        raise ValueError("prompt: wanted some text, got none")
    return prompt


def read_text(path: Path | None) -> str:
    """The text of a file, or of standard input."""
    where = "standard input" if path is None else str(path)
    try:
        data = sys.stdin.buffer.read() if path is None else path.read_bytes()
    except OSError as error:
        raise OSError(f"{where}: cannot be read ({error.strerror}); check the path and its permissions") from None
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{where}: wanted UTF-8 text, got byte 0x{data[error.start]:02x} at offset {error.start}; "
            "convert it, for instance with iconv"
        ) from None


def _without_newline(text: str) -> str:
    """An editor or `echo` puts one at the end."""
    return text.removesuffix("\n").removesuffix("\r")


def _answer(
    model: Model, ids: list[int], settings: dict[str, Any], given: argparse.Namespace, *, is_first: bool
) -> figures.Answer:
    """One answer, printed as it comes unless --json is given. Those after the first find the prompt in the cache."""
    terminal.use_utf8()
    answer = figures.Answer(model, len(ids) if is_first else 0, len(ids))
    ends_line = True
    show = terminal.for_a_person(given.quiet)
    with terminal.bar("prompt", "tok", show=show, least=answers.PROGRESS_FROM_TOKENS) as progress:
        for step in answer.watch(model.stream(ids, progress=progress, **settings)):
            if step.text and not given.json:
                terminal.write(step.text)
                ends_line = step.text.endswith("\n")
    if not ends_line:
        terminal.write("\n")
    return answer


def _tell(answer: figures.Answer, load_seconds: float, given: argparse.Namespace) -> None:
    if not given.quiet:
        terminal.note(answer.table(load_seconds) if given.stats else answer.line())


def _report(answer: figures.Answer, load_seconds: float, given: argparse.Namespace) -> dict[str, Any]:
    timings = {"load_seconds": load_seconds, **answer.timings}
    report = {
        "text": answer.text,
        "tokens": answer.tokens,
        "finish_reason": answer.steps[-1].finish_reason,
        "prompt_tokens": answer.context,
        "model": given.model,
        "device": answer.model.device,
        "timings": {key: round(value, 6) for key, value in timings.items()},
    }
    if given.logprobs is None:
        return report

    def entry(token: int, logprob: float | None) -> dict[str, Any]:
        text = answer.model.tokenizer.decode([token], skip_special_tokens=False)
        return {"token": token, "text": text, "logprob": None if logprob is None else round(logprob, 6)}

    tops = [[entry(*pair) for pair in step.top_logprobs or ()] for step in answer.steps]
    steps = zip(answer.steps, tops, strict=True)
    return report | {"logprobs": [{**entry(step.token, step.logprob), "top": top} for step, top in steps]}
