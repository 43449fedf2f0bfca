"""Gumbel noise for the CPU loops: the twin of `logits.gumbel`, vectors at a time.

The logarithm is spelled out, not the C library's: a loop over it becomes vector code, and a token's
noise is the same bits wherever it stands in an array.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from flashhead_kernels.cpu_primitives import jit
from flashhead_kernels.llvm_vectors import bfloat16_value, float_bits
from flashhead_kernels.logits import NEVER_ONE

_WORD = 0xFFFFFFFF
_STEP0, _STEP1 = 0x9E3779B9, 0xBB67AE85
_HALF, _ONE, _TWO = np.float32(0.5), np.float32(1), np.float32(2)
_UNIT = np.float32(2**-32)
_NEVER_ONE = np.float32(NEVER_ONE)
_ROOT_HALF_BITS = np.int32(0x3F3504F3)
_LOG2_HIGH, _LOG2_LOW = np.float32(6.9313812256e-01), np.float32(9.0580006145e-06)
_LOG2_E, _LEAST = np.float32(1.4426950408889634), np.float32(-87)
_E2, _E3, _E4 = np.float32(1 / 2), np.float32(1 / 6), np.float32(1 / 24)
_E5, _E6, _E7 = np.float32(1 / 120), np.float32(1 / 720), np.float32(1 / 5040)
# log(1 + f) for f within sqrt(1/2) - 1 .. sqrt(2) - 1, the coefficients of FreeBSD's e_logf.c.
_L1, _L2 = np.float32(0.66666662693), np.float32(0.40000972152)
_L3, _L4 = np.float32(0.28498786688), np.float32(0.24279078841)


@jit
def log(x: float) -> Any:
    """Natural logarithm of a positive, normal float32, to about one unit in the last place."""
    exponent = (float_bits(x) - _ROOT_HALF_BITS) >> np.int32(23)
    scale = bfloat16_value(np.uint16((np.int32(127) - exponent) << np.int32(7)))
    f = x * scale - _ONE
    s = f / (_TWO + f)
    z = s * s
    w = z * z
    rest = z * (_L1 + w * _L3) + w * (_L2 + w * _L4)
    half = _HALF * f * f
    k = np.float32(exponent)
    return s * (half + rest) + k * _LOG2_LOW - half + f + k * _LOG2_HIGH


@jit
def exp(x: float) -> Any:
    """Exponential of a float32 that is not positive; below -87 that of -87 (1.6e-38)."""
    y: Any = max(x, _LEAST)
    k = np.rint(y * _LOG2_E)
    r = (y - k * _LOG2_HIGH) - k * _LOG2_LOW
    # Taylor's polynomial: its next term is below 2^-24 for |r| <= log(2) / 2.
    p = _ONE + r * (_ONE + r * (_E2 + r * (_E3 + r * (_E4 + r * (_E5 + r * (_E6 + r * _E7))))))
    return p * bfloat16_value(np.uint16((np.int32(k) + np.int32(127)) << np.int32(7)))


@jit
def _two_rounds(c0: int, c1: int, c2: int, c3: int, k0: int, k1: int) -> Any:
    # The product of two 32-bit words wraps in int64, but its bits are right.
    low, high = 0xD2511F53 * c0, 0xCD9E8D57 * c2
    c0 = ((high >> 32) & _WORD) ^ c1 ^ (k0 & _WORD)
    c2 = ((low >> 32) & _WORD) ^ c3 ^ (k1 & _WORD)
    c1, c3 = high & _WORD, low & _WORD
    low, high = 0xD2511F53 * c0, 0xCD9E8D57 * c2
    c0 = ((high >> 32) & _WORD) ^ c1 ^ ((k0 + _STEP0) & _WORD)
    c2 = ((low >> 32) & _WORD) ^ c3 ^ ((k1 + _STEP1) & _WORD)
    return c0, high & _WORD, c2, low & _WORD


@jit
def from_word(word: int) -> Any:
    """Noise float32 of a Philox word, which the greatest word makes greatest."""
    v = min((np.float32(word ^ _WORD) + _HALF) * _UNIT, _NEVER_ONE)
    u = _ONE - v
    # What rounding took from u is given back: log1p(-v).
    return -log(((u - _ONE) + v) / u - log(u))


@jit
def add_noise(
    seed: int, items: Any, position: int, sequence: int, domain: int, values: Any
) -> None:
    """Add the noise of `items [n]` (int32) to float32 `values [n]`; seed: int64, its 64 bits."""
    k0, k1 = seed & _WORD, (seed >> 32) & _WORD
    position, sequence, domain = position & _WORD, sequence & _WORD, domain & _WORD
    # Counted from 0, and rounds written out: only then does the loop become vector code.
    for i in range(values.shape[0]):
        c = _two_rounds(np.int64(items[i]) & _WORD, position, sequence, domain, k0, k1)
        c = _two_rounds(c[0], c[1], c[2], c[3], k0 + 2 * _STEP0, k1 + 2 * _STEP1)
        c = _two_rounds(c[0], c[1], c[2], c[3], k0 + 4 * _STEP0, k1 + 4 * _STEP1)
        c = _two_rounds(c[0], c[1], c[2], c[3], k0 + 6 * _STEP0, k1 + 6 * _STEP1)
        c = _two_rounds(c[0], c[1], c[2], c[3], k0 + 8 * _STEP0, k1 + 8 * _STEP1)
        values[i] += from_word(c[0])
