"""What the Triton kernels share: keys, noise, products of integers, logits of rows, reductions.

What a kernel computes for one centroid or row does not depend on which other ones its program
holds: functions are elementwise, integer, or reduce a whole axis.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra import libdevice

from flashhead_kernels.noise import NEVER_ONE

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
def gumbel_noise(seed, position, sequence, token_ids, DOMAIN: tl.constexpr = 0):
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


@triton.jit
def row_logits(
    rows_ptr, hidden_ptr, row_ids, real, D: tl.constexpr, BLOCK_D: tl.constexpr
):  # fmt: skip
    """`h . row` float32 of rows `row_ids` int64 of `rows [..., D]`; 0 where not `real`."""
    products = tl.zeros([row_ids.shape[0], BLOCK_D], tl.float32)
    # Loads in flight; four where more would leave an odd rest.
    unroll: tl.constexpr = 8 if D % (8 * BLOCK_D) == 0 else 4
    for first in tl.range(0, D, BLOCK_D, loop_unroll_factor=unroll):
        columns = first + tl.arange(0, BLOCK_D)[None, :]
        inside = columns < D
        # For each row: every thread then has its columns, without shared memory and its barriers.
        at = columns + tl.zeros([row_ids.shape[0], 1], tl.int32)
        hidden = tl.load(hidden_ptr + at, mask=at < D, other=0.0).to(tl.float32)
        rows = tl.load(
            rows_ptr + row_ids[:, None] * D + columns, mask=real[:, None] & inside, other=0.0
        ).to(tl.float32)
        products += rows * hidden
    return tl.sum(products, 1)


@triton.jit
def take(best, greatest, total, logits, ids, LOGSUMEXP: tl.constexpr):
    """Take scored tokens (1-D, id -1 for none) into a program's best keys and log-sum-exp."""
    if LOGSUMEXP:
        greatest, total = lse_add(greatest, total, tl.where(ids >= 0, logits, float("-inf")))
    keys = pack_key(logits, ids)
    count: tl.constexpr = best.shape[0]
    if count == 1:
        best = tl.maximum(best, best_keys(keys, 1))
    else:
        best = tl.topk(merged(best, best_keys(keys, count)), count)
    return best, greatest, total


@triton.jit
def probe_group(
    dots, norm, alpha, group,
    hidden_ptr, rows_ptr, ids_ptr, spread_ptr, pinned_rows_ptr, pinned_ids_ptr,
    first_probe, last_probe,
    HEAD: tl.constexpr, ROWS: tl.constexpr, LOGSUMEXP: tl.constexpr, UNPROBED: tl.constexpr,
):  # fmt: skip
    """One row's best keys `[HEAD.best]` and log-sum-exp (greatest, total) within one group.

    Of its probes, best first, those from first_probe to last_probe (half-open) are scored, ROWS
    rows at a time. With the first one go the pinned tokens and the unprobed clusters.
    Last, for UNPROBED, the key of its best unprobed cluster's score, with id 0; else an empty key.

    dots: `h . centroid` float32 `[HEAD.clusters_pad]`; hidden_ptr: the row's hidden state.
    """
    M: tl.constexpr = HEAD.clusters
    S: tl.constexpr = HEAD.tokens
    S_PAD: tl.constexpr = HEAD.tokens_pad
    BEST: tl.constexpr = HEAD.best
    PROBES_PAD: tl.constexpr = HEAD.probes_pad
    BLOCK: tl.constexpr = ROWS // S_PAD if ROWS > S_PAD else 1
    D: tl.constexpr = HEAD.hidden_size
    BLOCK_D: tl.constexpr = HEAD.block_columns
    slots = tl.arange(0, HEAD.clusters_pad)
    real = slots < M
    cluster = group.to(tl.int64) * M
    spread = tl.load(spread_ptr + cluster + slots, mask=real, other=float("-inf"))
    # 0 * -inf is NaN: a cluster of pads stays at -inf whatever alpha is.
    lift = tl.where(spread == float("-inf"), spread, alpha * norm * spread)
    order = pack_key(dots + lift, tl.where(real, slots, -1))
    top = best_keys(order, PROBES_PAD)
    probed = key_id(top)
    best = tl.full([BEST], EMPTY_KEY, tl.int64)
    greatest = tl.full([], float("-inf"), tl.float32)
    total = tl.zeros([], tl.float32)
    for first in tl.range(first_probe, last_probe, BLOCK):
        rank = first + tl.arange(0, BLOCK)
        # The slot of a rank past the last probe may be -1.
        slot = tl.gather(probed, tl.minimum(rank, PROBES_PAD - 1), 0)
        token = tl.arange(0, S_PAD)[None, :]
        row = tl.reshape((cluster + slot)[:, None] * S + token, [BLOCK * S_PAD])
        chosen = tl.reshape((rank < last_probe)[:, None] & (token < S), [BLOCK * S_PAD])
        ids = tl.load(ids_ptr + row, mask=chosen, other=-1)
        logits = row_logits(rows_ptr, hidden_ptr, row, chosen, D, BLOCK_D)
        best, greatest, total = take(best, greatest, total, logits, ids, LOGSUMEXP)
    left = tl.full([], EMPTY_KEY, tl.int64)
    if first_probe == 0:
        for first in tl.range(0, HEAD.pinned, ROWS):
            slot = first + tl.arange(0, ROWS)
            row = group.to(tl.int64) * HEAD.pinned + slot
            ids = tl.load(pinned_ids_ptr + row, mask=slot < HEAD.pinned, other=-1)
            logits = row_logits(pinned_rows_ptr, hidden_ptr, row, slot < HEAD.pinned, D, BLOCK_D)
            best, greatest, total = take(best, greatest, total, logits, ids, LOGSUMEXP)
        # Keys are distinct: what is not probed lies below the last that is.
        last = tl.min(tl.where(tl.arange(0, PROBES_PAD) < HEAD.probes, top, 2**63 - 1), 0)
        if UNPROBED:
            left = tl.max(tl.where(order < last, order, EMPTY_KEY), 0)
            # The complement of id 0, where the slot's was.
            left = tl.where(left == EMPTY_KEY, left, left | 0xFFFFFFFF)
        if LOGSUMEXP:
            token = tl.arange(0, S_PAD)[None, :]
            row = (cluster + slots)[:, None] * S + token
            ids = tl.load(ids_ptr + row, mask=real[:, None] & (token < S), other=-1)
            count = tl.sum((ids >= 0).to(tl.float32), 1)
            unprobed = real & (order < last) & (count > 0)
            estimate = dots + tl.log(tl.where(unprobed, count, 1.0))
            greatest, total = lse_add(greatest, total, tl.where(unprobed, estimate, float("-inf")))
    return best, greatest, total, left


@triton.jit
def write_part(
    part, num_parts, best, greatest, total, left, keys_ptr, sums_ptr, LOGSUMEXP: tl.constexpr,
    UNPROBED: tl.constexpr,
):  # fmt: skip
    """Part number `part` of num_parts, all rows counted: its best keys, its log-sum-exp as a pair.

    Keys of unprobed clusters follow those of all parts.
    """
    BEST: tl.constexpr = best.shape[0]
    tl.store(keys_ptr + part * BEST + tl.arange(0, BEST), best)
    if LOGSUMEXP:
        tl.store(sums_ptr + 2 * part, greatest)
        tl.store(sums_ptr + 2 * part + 1, total)
    if UNPROBED:
        tl.store(keys_ptr + num_parts * BEST + part, left)


@triton.jit
def arrive(counter_ptr, number):
    """Whether this program is the last of `number` to arrive; the counter is then 0 again.

    What the programs stored before is visible to the last. The barrier orders the stores of the
    other threads before the one thread's atomic.
    """
    tl.debug_barrier()
    last = tl.atomic_add(counter_ptr, 1, sem="acq_rel", scope="gpu") == number - 1
    tl.debug_barrier()
    if last:
        tl.store(counter_ptr, 0)
    return last


@triton.jit
def reduce_parts(
    row, num_rows, num_parts, keys_ptr, sums_ptr, out_keys_ptr, out_ids_ptr, out_logits_ptr,
    out_logsumexp_ptr,
    BEST: tl.constexpr, BLOCK: tl.constexpr, LOGSUMEXP: tl.constexpr, UNPROBED: tl.constexpr,
):  # fmt: skip
    """The best keys of row `row`'s num_parts parts, packed and unpacked, and their log-sum-exp.

    BLOCK parts at a time. The greatest key of an unprobed cluster follows the best keys of all
    num_rows rows.
    """
    left = tl.full([], EMPTY_KEY, tl.int64)
    best = tl.full([BEST], EMPTY_KEY, tl.int64)
    greatest = tl.full([], float("-inf"), tl.float32)
    total = tl.zeros([], tl.float32)
    place = tl.arange(0, BEST)
    for first in tl.range(0, num_parts, BLOCK):
        part = first + tl.arange(0, BLOCK)
        inside = part < num_parts
        part = row * num_parts + part
        # Past L1, which may hold lines from before the other programs wrote them.
        keys = tl.load(
            keys_ptr + part[:, None] * BEST + place[None, :],
            mask=inside[:, None], other=EMPTY_KEY, cache_modifier=".cg",
        )  # fmt: skip
        if BEST == 1:
            best = tl.maximum(best, best_keys(keys, 1))
        else:
            best = tl.topk(merged(best, best_keys(keys, BEST)), BEST)
        if LOGSUMEXP:
            sums_at = sums_ptr + 2 * part
            high = tl.load(sums_at, mask=inside, other=float("-inf"), cache_modifier=".cg")
            sums = tl.load(sums_at + 1, mask=inside, other=0.0, cache_modifier=".cg")
            new = tl.maximum(greatest, tl.max(high, 0))
            base = tl.where(new == float("-inf"), 0.0, new)
            total = total * tl.exp(greatest - base) + tl.sum(sums * tl.exp(high - base), 0)
            greatest = new
        if UNPROBED:
            left_at = keys_ptr + num_rows * num_parts * BEST + part
            keys = tl.load(left_at, mask=inside, other=EMPTY_KEY, cache_modifier=".cg")
            left = tl.maximum(left, tl.max(keys, 0))
    tl.store(out_keys_ptr + row * BEST + place, best)
    tl.store(out_ids_ptr + row * BEST + place, key_id(best).to(tl.int64))
    tl.store(out_logits_ptr + row * BEST + place, key_logit(best))
    if LOGSUMEXP:
        tl.store(out_logsumexp_ptr + row, greatest + tl.log(total))
    if UNPROBED:
        tl.store(out_keys_ptr + num_rows * BEST + row, left)


@triton.jit
def quantize_groups(
    state_ptr, words_ptr, scales_ptr, first_group, COUNT: tl.constexpr, CENTROIDS: tl.constexpr
):
    """Round COUNT scale groups, from first_group on, of the hidden state at state_ptr to int8.

    words_ptr: int32 `[2, groups, words]` OUT, for 4 bits the columns that the low halves of the
        bytes hold, then those of the high halves; for 8 bits only the first is used.
    scales_ptr: float32 `[2, groups]` OUT: scale, then (4 bits) 8 times the sum of the integers.
    """
    words: tl.constexpr = CENTROIDS.words
    groups: tl.constexpr = CENTROIDS.groups
    words_pad: tl.constexpr = CENTROIDS.words_pad
    width: tl.constexpr = CENTROIDS.width
    half: tl.constexpr = CENTROIDS.group_size // 2
    group = first_group + tl.arange(0, COUNT)
    word = tl.arange(0, words_pad)
    real = (group < groups)[:, None] & (word < words)[None, :]
    at = group[:, None] * words + word[None, :]
    column = group[:, None] * CENTROIDS.group_size + word[None, :] * width
    largest = tl.zeros([COUNT, words_pad], tl.float32)
    for byte in tl.static_range(width):
        value = tl.load(state_ptr + column + byte, mask=real, other=0.0).to(tl.float32)
        largest = tl.maximum(largest, tl.abs(value))
        if CENTROIDS.bits == 4:
            value = tl.load(state_ptr + column + byte + half, mask=real, other=0.0).to(tl.float32)
            largest = tl.maximum(largest, tl.abs(value))
    scales = tl.div_rn(tl.max(largest, 1), 127.0)
    low = tl.zeros([COUNT, words_pad], tl.int32)
    high = tl.zeros([COUNT, words_pad], tl.int32)
    total = tl.zeros([COUNT, words_pad], tl.int32)
    for byte in tl.static_range(width):
        value = tl.load(state_ptr + column + byte, mask=real, other=0.0).to(tl.float32)
        integer = round_to_int8(value, scales[:, None])
        low |= (integer & 255) << (8 * byte)
        total += integer
        if CENTROIDS.bits == 4:
            value = tl.load(state_ptr + column + byte + half, mask=real, other=0.0).to(tl.float32)
            integer = round_to_int8(value, scales[:, None])
            high |= (integer & 255) << (8 * byte)
            total += integer
    tl.store(words_ptr + at, low, mask=real)
    tl.store(scales_ptr + group, scales, mask=group < groups)
    if CENTROIDS.bits == 4:
        tl.store(words_ptr + groups * words + at, high, mask=real)
        offset = 8 * tl.sum(total, 1)
        tl.store(scales_ptr + groups + group, offset.to(tl.float32), mask=group < groups)


@triton.jit
def hidden_norm(hidden_ptr, D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr):
    """Euclidean norm of the hidden state at hidden_ptr, float32; summed as a row's logit is."""
    row = tl.arange(0, ROWS)
    squares = row_logits(hidden_ptr, hidden_ptr, row.to(tl.int64) * 0, row < 1, D, BLOCK_D)
    return tl.sqrt_rn(tl.sum(squares, 0))
