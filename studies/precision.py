"""Where may precision change hands in Qwen3's attention input? Measured against float64.

    python -m studies.precision [--out FOLDER] [--only demo ordinary heavy] [--demo-tokens 2000] [--tokens 512]
    python -m studies.precision --plot-only

Teacher-forced, on `demo` (trained, K-norm gains up to 96.5) over held-out text and on two random checkpoints of
Qwen3-0.6B's shape, with ordinary K gains and with heavy ones (up to 96.5 in every layer): the relative error of the residual
stream after each layer and mean KL, argmax agreement and relative error of the logits, of

    the fused kernel of the earlier attempt (fused_norm_qkv.cu) in place of rmsnorm, qkv_rope and qk_norm
    cuqwen, with its bf16 cache and with a float32 cache
    transformers in bf16 and float32
    cuqwen with each single boundary in bf16, the rest and the cache in float32; and with all of them
    the literal order "norm after RoPE"

and two experiments on the gains. Writes studies/results/precision.json, the plots docs/images/precision-*.svg and the
table in docs/precision.md; with --out only the record and the plots, both into FOLDER. --plot-only draws all of it anew
from the record.

Measuring needs torch, transformers, matplotlib, CuPy and cuqwen, and no network. `--device cpu` is a rehearsal without a
GPU: the random checkpoints are tiny and the fused kernel runs on tests/emulator.py. Ends with status 1 if the study's
forward pass is not the package's.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from studies import report

ROOT = Path(__file__).resolve().parent.parent
RESULTS, IMAGES, PAGE = ROOT / "studies" / "results", ROOT / "docs" / "images", ROOT / "docs" / "precision.md"
# The most by which the study's forward pass may differ from the package's, in errors of the package, where nothing is
# chaotic. The same kernels in the same order give the same bits; where the package has other ones, a few more numbers in
# 10,000 are rounded the other way, which moves the logits by a hundredth of their error.
SAME = 0.1


def measure(arguments: argparse.Namespace, path: Path) -> bool:
    """Run the study and write the record after each part; returns whether all checks hold."""
    import torch

    from benchmarks.accuracy import Machine
    from benchmarks.record import write_record
    from studies import measure as m

    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    torch.set_float32_matmul_precision("highest")
    machine, passed = Machine(arguments.device), True
    record: dict[str, Any] = {"command": " ".join(["python", "-m", "studies.precision", *sys.argv[1:]])}
    record |= {"device": arguments.device, "checkpoints": {}}
    tiny = arguments.device == "cpu"
    with tempfile.TemporaryDirectory(prefix="cuqwen-precision-") as scratch:
        for name in arguments.only:
            start = time.perf_counter()
            tokens = arguments.demo_tokens if name == "demo" else arguments.tokens
            folder, ids = m.prepare(name, tokens, Path(scratch), tiny)
            truth = m.truth_of(folder, ids, machine)
            machine.synchronize()
            print(f"{name}: {tokens} tokens, ready in {time.perf_counter() - start:.1f} s", flush=True)
            check = m.check(folder, ids, machine)
            print(f"  the package's forward pass: {check}", flush=True)
            figures = {}
            for key, contender in m.contenders(folder, ids, machine).items():
                f = figures[key] = m.figures_of(contender, truth, machine)
                machine.free()
                print(
                    f"  {report.LABELS[key]:52s} KL {f['mean_kl']:9.2e}  argmax {f['argmax_agreement']:7.2%}"
                    f"  error {f['relative_error']:9.2e}  after layer 1 {f['error_by_layer'][0]:9.2e}  {f['seconds']:5.1f} s",
                    flush=True,
                )
            passed &= name == "heavy" or check["relative_difference"] <= SAME * figures["ours"]["relative_error"]
            record["checkpoints"][name] = {"tokens": tokens, "tiny": tiny and name != "demo", "check": check}
            record["checkpoints"][name]["figures"] = figures
            if name == "demo":
                record["moved_gains"] = m.moved_gains(min(tokens, 512), Path(scratch), machine)
                print(f"  gains moved from K to Q: {record['moved_gains']}", flush=True)
            if name == "heavy":
                record["sweep"] = m.sweep(folder, ids, machine)
            write_record(path, record)  # what there is, should the rest fail
            m.forget()
            del truth
            machine.free()
    return passed


def main() -> int:
    parser = argparse.ArgumentParser(description="Where may precision change hands in Qwen3's attention input?")
    parser.add_argument("--out", type=Path, help="folder of record and plots; docs/precision.md is then left alone")
    parser.add_argument("--only", nargs="+", choices=report.CHECKPOINTS, default=list(report.CHECKPOINTS))
    parser.add_argument("--demo-tokens", type=int, default=2000, help="tokens of held-out text (default 2000)")
    parser.add_argument("--tokens", type=int, default=512, help="tokens for the random checkpoints (default 512)")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--plot-only", action="store_true", help="draw plots and table anew from the record")
    arguments = parser.parse_args()
    path = (arguments.out or RESULTS) / "precision.json"
    passed = arguments.plot_only or measure(arguments, path)
    record = json.loads(path.read_text(encoding="utf-8"))
    report.draw(record, arguments.out or IMAGES)
    if arguments.out is None:
        report.fill_in(PAGE, record)
    print("passed" if passed else "FAILED: the study's forward pass is not the package's")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
