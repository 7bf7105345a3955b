"""Which ending does a model find likelier? Log-probabilities by teacher forcing.  python examples/score.py [MODEL]"""

import sys

import numpy as np

import cuqwen


def log_likelihood(model: cuqwen.Model, text: str, ending: str) -> float:
    """log p(ending | text), in nats."""
    before, after = model.tokenizer.encode(text), model.tokenizer.encode(ending)
    scores = model.logits(before + after)[len(before) - 1 : -1].astype(np.float64)  # of the tokens of the ending
    scores -= scores.max(axis=1, keepdims=True)
    log_probabilities = scores - np.log(np.exp(scores).sum(axis=1, keepdims=True))
    return float(log_probabilities[np.arange(len(after)), after].sum())


model = cuqwen.load(sys.argv[1] if len(sys.argv) > 1 else "demo", device="cpu")
for ending in (" the king of Israel", " the king of Babylon", " the telephone"):
    print(f"{log_likelihood(model, 'Thus saith', ending):8.2f}  Thus saith{ending}")
