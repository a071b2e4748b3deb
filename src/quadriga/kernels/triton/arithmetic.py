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
