"""What the Triton kernels share: packed keys, integer dot products, logit transforms, log-sum-exp.

Everything here is elementwise, integer, or a reduction over a whole axis, so that what a kernel
computes for one centroid or row does not depend on which other ones its program holds.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra import libdevice

from flashhead_kernels.logits import NEVER_ONE

EMPTY_KEY = tl.constexpr(-(2**63))
_ID_MASK = tl.constexpr(0xFFFFFFFF)
# Adding 1.5 * 2^23 and taking it away rounds a float32 below 2^22 to an integer, ties to even.
_ROUNDING = tl.constexpr(12582912.0)
_NEVER_ONE = tl.constexpr(NEVER_ONE)


@triton.jit
def pack_key(logits, token_ids):
    """`keys.pack_keys` of float32 logits and int32 ids; a negative id gives an empty key."""
    # Adding zero turns -0.0 into 0.0: they are equal as logits and must be equal as keys.
    bits = (logits + 0.0).to(tl.int32, bitcast=True)
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    ids = token_ids.to(tl.int64)
    keys = (ordered.to(tl.int64) << 32) | (ids ^ _ID_MASK)
    return tl.where(ids >= 0, keys, EMPTY_KEY)


@triton.jit
def key_id(keys):
    """The int32 id of `keys`; -1 for an empty one."""
    return tl.where(keys == EMPTY_KEY, -1, ((keys & _ID_MASK) ^ _ID_MASK).to(tl.int32))


@triton.jit
def key_logit(keys):
    """The float32 logit of `keys`; -inf for an empty one."""
    ordered = (keys >> 32).to(tl.int32)
    bits = ordered ^ ((ordered >> 31) & 0x7FFFFFFF)
    return tl.where(keys == EMPTY_KEY, float("-inf"), bits.to(tl.float32, bitcast=True))


@triton.jit
def _dp4a(a, b, accumulated):
    return tl.inline_asm_elementwise(
        "dp4a.s32.s32 $0, $1, $2, $3;", "=r,r,r,r", [a, b, accumulated], tl.int32, True, 1
    )


@triton.jit
def rounded_product(a, b, COMPILED: tl.constexpr):
    """`a * b` in float32, rounded before anything is added to it.

    Left to itself the compiler fuses some products into the sum behind them, and which ones depends
    on the layout that it gives a kernel. PTX never fuses a product with a rounding modifier.
    """
    return libdevice.mul_rn(a, b) if COMPILED else a * b


@triton.jit
def dot_words(
    weights, hidden, total, BITS: tl.constexpr, WIDTH: tl.constexpr, COMPILED: tl.constexpr
):  # fmt: skip
    """`total` and the products of the integers packed in each pair of words, int32.

    weights: int32 words of WIDTH bytes. 8 bits: signed bytes. 4 bits: the LOW halves of the bytes,
    unsigned; the caller shifts for the high halves and takes the offset of 8 away.
    hidden: int32 words of WIDTH signed bytes.
    """
    if BITS == 4:
        weights = weights & 0x0F0F0F0F
    if COMPILED and WIDTH == 4:
        total = _dp4a(weights, hidden, total)
    else:
        for i in tl.static_range(WIDTH):
            total += ((weights << (24 - 8 * i)) >> 24) * ((hidden << (24 - 8 * i)) >> 24)
    return total


@triton.jit
def four_words(ptr, COMPILED: tl.constexpr):
    """Four int32 scalars from `ptr`, 16-byte aligned: one load, where Triton would make four."""
    if COMPILED:
        # Impure, as what it reads was stored by this program.
        one, two, three, four = tl.inline_asm_elementwise(
            "ld.global.v4.b32 {$0, $1, $2, $3}, [$4];", "=r,=r,=r,=r,l", [ptr],
            (tl.int32, tl.int32, tl.int32, tl.int32), False, 1,
        )  # fmt: skip
    else:
        one, two, three, four = tl.load(ptr), tl.load(ptr + 1), tl.load(ptr + 2), tl.load(ptr + 3)
    return one, two, three, four


@triton.jit
def round_to_int8(values, scales):
    """`values / scales` to the nearest integer in -127..127, as int32; 0 where the scale is 0."""
    positive = scales > 0
    quotient = tl.div_rn(values, tl.where(positive, scales, 1.0))
    rounded = (quotient + _ROUNDING) - _ROUNDING
    rounded = tl.minimum(tl.maximum(rounded, -127.0), 127.0)
    return tl.where(positive, rounded, 0.0).to(tl.int32)


@triton.jit
def transform(logits, inverse_temperature, softcap, SOFTCAP: tl.constexpr):
    """`cap * tanh(logit / cap) / T`; float32."""
    if SOFTCAP:
        # tanh by exp: 1 - 2 / (e^2x + 1), which ends in 1 and -1 where e^2x overflows or vanishes.
        logits = softcap * (1.0 - 2.0 / (tl.exp(2.0 * logits / softcap) + 1.0))
    return logits * inverse_temperature


@triton.jit
def gumbel(seed, position, sequence, token_ids, DOMAIN: tl.constexpr = 0):
    """`logits.gumbel` of int32 `token_ids`; position, sequence: int32 that broadcast with them.

    DOMAIN: a `logits.Domain`, that of tokens unless another is given.
    """
    zero = tl.zeros_like(token_ids)
    word, _, _, _ = tl.philox(seed, token_ids, zero + position, zero + sequence, zero + DOMAIN)
    v = tl.minimum(((word ^ 0xFFFFFFFF).to(tl.float32) + 0.5) * (1.0 / 4294967296.0), _NEVER_ONE)
    # log(1 - v) however small v is (Kahan): what 1 - v was rounded by is divided out.
    rest = 1.0 - v
    taken = 1.0 - rest
    exact = tl.log(rest) * tl.div_rn(v, tl.where(taken > 0, taken, 1.0))
    return -tl.log(tl.where(taken > 0, -exact, v))


@triton.jit
def noise_place(
    positions_ptr, sequences_ptr, row, SAMPLE: tl.constexpr, SEQUENCES: tl.constexpr
):  # fmt: skip
    """Position and sequence of row(s) `row`, their low 32 bits; 0 where nothing is sampled."""
    position = row * 0
    sequence = row * 0
    if SAMPLE:
        position = tl.load(positions_ptr + row).to(tl.int32)
        if SEQUENCES:
            sequence = tl.load(sequences_ptr + row).to(tl.int32)
    return position, sequence


@triton.jit
def lse_add(greatest, total, values):
    """Take `values` (any shape, -inf for none) into the log-sum-exp `greatest + log(total)`."""
    flat = tl.reshape(values, [values.numel])
    new = tl.maximum(greatest, tl.max(flat, 0))
    # All of them -inf: keep the sum at 0 without making NaN of inf - inf.
    base = tl.where(new == float("-inf"), 0.0, new)
    scaled = total * tl.exp(greatest - base) + tl.sum(tl.exp(flat - base), 0)
    return new, scaled


@triton.jit
def best_keys(keys, COUNT: tl.constexpr):
    """The COUNT (a power of two) greatest of `keys`, descending, filled up with empty ones; 1-D."""
    flat = tl.reshape(keys, [keys.numel])
    size: tl.constexpr = flat.shape[0]
    if COUNT == 1:
        best = tl.expand_dims(tl.max(flat, 0), 0)
    elif size <= COUNT:
        best = flat
        for _ in tl.static_range(_doublings(size, COUNT)):
            best = merged(best, tl.full(best.shape, EMPTY_KEY, tl.int64))
        best = tl.sort(best, descending=True)
    else:
        best = tl.topk(flat, COUNT)
    return best


@triton.constexpr_function
def _doublings(size, count):
    number = 0
    while size < count:
        size, number = size * 2, number + 1
    return number


@triton.jit
def merged(a, b):
    """Both 1-D tensors of one length in one, in no order to rely on."""
    return tl.reshape(tl.join(a, b), [2 * a.shape[0]])
