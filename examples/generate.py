"""Text as it comes, and how fast.  python examples/generate.py [MODEL]"""

import sys
import time

import cuqwen

with cuqwen.load(sys.argv[1] if len(sys.argv) > 1 else "demo") as model:
    started, tokens = time.perf_counter(), 0
    for step in model.stream("In the beginning", max_tokens=40, temperature=0.8, top_p=0.9, seed=4):
        print(step.text, end="", flush=True)
        tokens += 1
    seconds = time.perf_counter() - started
    print(f"\n{tokens} tokens on {model.device}, {tokens / seconds:,.0f} tok/s, finished by {step.finish_reason}")
