"""How far float32 is from the truth: the same model in float64, on the CPU.  python examples/precision.py [MODEL]"""

import sys

import numpy as np

import cuqwen

name = sys.argv[1] if len(sys.argv) > 1 else "demo"
truth = cuqwen.load(name, device="cpu", dtype="float64")  # float64 throughout, angles and all
ids = truth.tokenizer.encode("The LORD is my shepherd; I shall not want.")
exact = truth.logits(ids)
for kv_dtype in ("float32", "bfloat16"):
    logits = cuqwen.load(name, device="cpu", kv_dtype=kv_dtype).logits(ids)
    error = np.linalg.norm(logits - exact) / np.linalg.norm(exact)
    same = np.mean(logits.argmax(1) == exact.argmax(1))
    print(f"float32 with a {kv_dtype} cache: relative error {error:.1e}, same most likely token {same:.0%}")
