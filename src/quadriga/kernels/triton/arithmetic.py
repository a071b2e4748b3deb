"""Pieces of kernels: the matrix product of a tile, and activations. All numbers float32 unless said otherwise."""

import triton
import triton.language as tl

from quadriga.kernels.triton.launch import INTERPRETED

_INTERPRETED = tl.constexpr(INTERPRETED)


@triton.jit
def product(a, b, acc):
    """acc + a b: a (M, K) and b (K, N) of one dtype, acc (M, N) float32. float32 operands are not rounded to TF32.

    Triton 3.7 and 3.9 multiply the bits of bfloat16 operands as whole numbers when they interpret. There they are
    widened, which changes no product: that of two bfloat16 numbers is exact in float32.
    """
    if _INTERPRETED:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def sigmoid(x):
    """1 / (1 + e^-x), of a power that never overflows."""
    power = tl.exp(-tl.abs(x))
    return tl.where(x >= 0, 1.0, power) / (1.0 + power)


@triton.jit
def activate(x, ACTIVATION: tl.constexpr):
    """``ops.activate``."""
    if ACTIVATION == "silu":
        y = x * sigmoid(x)
    elif ACTIVATION == "relu":
        y = tl.maximum(x, 0.0)
    elif ACTIVATION == "relu2":
        y = tl.maximum(x, 0.0) * tl.maximum(x, 0.0)
    elif ACTIVATION == "gelu":
        y = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    else:
        tl.static_assert(ACTIVATION == "gelu_tanh", "an activation of ops.activate")
        inner = 0.7978845608028654 * (x + 0.044715 * x * x * x)
        y = x * sigmoid(2.0 * inner)  # 0.5 (1 + tanh(z)) = sigmoid(2 z)
    return y


@triton.jit
def gated(gate, up, ACTIVATION: tl.constexpr):
    """``ops.gated``."""
    if ACTIVATION == "clamped_glu":
        g = tl.minimum(gate, 7.0)
        y = (tl.minimum(tl.maximum(up, -7.0), 7.0) + 1.0) * g * sigmoid(1.702 * g)
    else:
        y = activate(gate, ACTIVATION) * up
    return y
