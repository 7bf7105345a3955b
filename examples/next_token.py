"""The most likely next tokens and their probabilities.  python examples/next_token.py [MODEL]"""

import sys

import numpy as np

import cuqwen

model = cuqwen.load(sys.argv[1] if len(sys.argv) > 1 else "demo", device="cpu")
text = "And God said, Let there be"
logits = model.logits(model.tokenizer.encode(text))[-1]  # [V]; CuPy on a GPU, NumPy on the CPU
probabilities = np.exp(logits - logits.max())
probabilities /= probabilities.sum()
print(text)
for token in np.argsort(-probabilities)[:5]:
    print(f"{probabilities[token]:7.1%}  {model.tokenizer.decode([token])!r}")
