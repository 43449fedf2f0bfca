"""From a probing group's centroid scores to its best key and log-sum-exp, and over all groups.

A program ends by writing its part to memory and counting itself in; the last to arrive reduces all
parts. Nothing has to be set before the launch, and the order of that reduction is fixed.
"""

from __future__ import annotations

import triton
import triton.language as tl

from flashhead_kernels.triton_pieces import (
    EMPTY_KEY,
    best_keys,
    key_id,
    key_logit,
    lse_add,
    merged,
    pack_key,
)


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
