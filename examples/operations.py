"""One attention head by hand: the operations on NumPy arrays, or on CuPy arrays where there is a GPU.

python examples/operations.py
"""

import numpy as np

import cuqwen
from cuqwen import launch, ops

place = launch.upload if launch.has_gpu() else np.asarray  # the arrays' type decides where an operation runs
rng = np.random.default_rng(0)
T, C, D = 3, 64, 32  # tokens, hidden size, head size


def random(*shape: int) -> np.ndarray:
    return place(rng.standard_normal(shape, np.float32))


positions = place(np.arange(T, dtype=np.int32))
cos, sin = map(place, cuqwen.rope_table(D, length=16, theta=1e6))
h = cuqwen.rmsnorm(random(T, C), random(C))
q, k, v, q_ms, k_ms = cuqwen.qkv_rope(h, random(D, C), random(D, C), random(D, C), cos, sin, positions)
q, k = cuqwen.qk_norm(q, k, q_ms, k_ms)  # after the rotation, exactly: it keeps a head's sum of squares
attended = ops.attention(q, k, v, positions)
print(type(attended).__module__, attended.shape, attended.dtype)
print("the first token sees itself only:", bool(abs(attended[0] - v[0]).max() < 1e-6))
