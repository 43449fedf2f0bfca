"""The dense head in Triton: one scan of the rows, reduced to keys and log-sum-exps as it goes.

The fair opponent of `triton_head`: one launch, each row read once, no logit written to memory.
"""

from __future__ import annotations

import triton
import triton.language as tl

from flashhead_kernels.triton_pieces import EMPTY_KEY, gumbel, noise_place, pack_key, transform
from flashhead_kernels.triton_reduce import arrive, reduce_parts


@triton.jit
def block_logits(
    hidden_ptr, rows_ptr, first_row, num_rows, tokens, inside,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BATCH: tl.constexpr,
    MATMUL: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Logits float32 `[BATCH, tokens]`, by fused products or (MATMUL) on tensor cores.

    Tensor cores take float32 in three products of tf32, whose error is near that of float32.
    UPCAST: multiply matrices in float32; the interpreter multiplies no others of bfloat16.
    """
    batch = tl.arange(0, BATCH)
    logits = tl.zeros([BATCH, tokens.shape[0]], tl.float32)
    for first in tl.range(0, D, BLOCK_D):
        columns = first + tl.arange(0, BLOCK_D)
        weights = tl.load(
            rows_ptr + tokens.to(tl.int64)[:, None] * D + columns[None, :],
            mask=inside[:, None] & (columns < D)[None, :],
            other=0.0,
        )
        if MATMUL:
            at = (first_row + batch)[:, None] * D + columns[None, :]
            real = ((first_row + batch) < num_rows)[:, None] & (columns < D)[None, :]
            hidden = tl.load(hidden_ptr + at, mask=real, other=0.0)
            if UPCAST or hidden.dtype != weights.dtype:
                hidden, weights = hidden.to(tl.float32), weights.to(tl.float32)
            logits = tl.dot(hidden, tl.trans(weights), logits, input_precision="tf32x3")
        else:
            for b in tl.static_range(BATCH):
                row = tl.minimum(first_row + b, num_rows - 1)
                hidden = tl.load(hidden_ptr + row * D + columns, mask=columns < D, other=0.0)
                part = tl.sum(weights.to(tl.float32) * hidden.to(tl.float32)[None, :], 1)
                logits += tl.where(batch[:, None] == b, part[None, :], 0.0)
    return logits


# A batch of one, a rank that begins at token 0, or a small seed must not compile a kernel anew.
_UNSPECIALISED = ("num_tokens", "first_token_id", "num_rows", "seed")


@triton.jit(do_not_specialize=_UNSPECIALISED)
def dense_kernel(
    hidden_ptr,  # [B, D]
    rows_ptr,  # [num_tokens, D]
    ids_ptr,  # int32 [num_tokens] where TABLE: the rows' tokens, -1 for a pad
    positions_ptr,  # [B] where SAMPLE, see `logits.GumbelNoise`
    sequences_ptr,  # [B] where SEQUENCES
    keys_ptr,  # OUT: int64 [B, programs, BEST], parts
    sums_ptr,  # OUT: float32 [B, programs, 2]
    counters_ptr,  # int32 [blocks of B], 0 before and after
    out_keys_ptr,  # OUT: int64 [B, BEST]
    out_ids_ptr,  # OUT: int64 [B, BEST]
    out_logits_ptr,  # OUT: float32 [B, BEST]
    out_logsumexp_ptr,  # OUT: float32 [B]
    num_tokens,
    first_token_id,
    num_rows,
    inverse_temperature,
    softcap,
    seed: tl.int64,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BATCH: tl.constexpr,
    BEST: tl.constexpr,
    MATMUL: tl.constexpr,
    TABLE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    SAMPLE: tl.constexpr,
    SEQUENCES: tl.constexpr,
    LOGSUMEXP: tl.constexpr,
    PART_BLOCK: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Grid `[programs, blocks of BATCH rows]`: a program takes every programs-th BLOCK_V tokens."""
    first_row = tl.program_id(1) * BATCH
    num_parts = tl.num_programs(0)
    batch = first_row + tl.arange(0, BATCH)
    real = batch < num_rows
    best = tl.full([BATCH, BEST], EMPTY_KEY, tl.int64)
    greatest = tl.full([BATCH], float("-inf"), tl.float32)
    total = tl.zeros([BATCH], tl.float32)
    for block in tl.range(tl.program_id(0), tl.cdiv(num_tokens, BLOCK_V), num_parts):
        tokens = block * BLOCK_V + tl.arange(0, BLOCK_V)
        inside = tokens < num_tokens
        logits = block_logits(hidden_ptr, rows_ptr, first_row, num_rows, tokens, inside,
                              D, BLOCK_D, BATCH, MATMUL, UPCAST)  # fmt: skip
        final = transform(logits, inverse_temperature, softcap, SOFTCAP)
        ids = tl.where(inside, first_token_id + tokens, -1)
        if TABLE:
            ids = tl.load(ids_ptr + tokens, mask=inside, other=-1)
        if LOGSUMEXP:
            counted = tl.where((ids >= 0)[None, :], final, float("-inf"))
            new = tl.maximum(greatest, tl.max(counted, 1))
            # A block of pads alone: no NaN of inf - inf.
            base = tl.where(new == float("-inf"), 0.0, new)
            scaled = tl.sum(tl.exp(counted - base[:, None]), 1)
            total = total * tl.exp(greatest - base) + scaled
            greatest = new
        ids = ids[None, :] + tl.zeros([BATCH, BLOCK_V], tl.int32)
        if SAMPLE:
            row = tl.minimum(batch, num_rows - 1)
            position, sequence = noise_place(positions_ptr, sequences_ptr, row, SAMPLE, SEQUENCES)
            final += gumbel(seed, position[:, None], sequence[:, None], ids)
        keys = pack_key(final, ids)
        if BEST == 1:
            best = tl.maximum(best, tl.max(keys, 1)[:, None])
        else:
            both = tl.join(best, tl.topk(keys, BEST))
            best = tl.topk(tl.reshape(both, [BATCH, 2 * BEST]), BEST)
    part = batch * num_parts + tl.program_id(0)
    place = part[:, None] * BEST + tl.arange(0, BEST)[None, :]
    tl.store(keys_ptr + place, best, mask=real[:, None])
    if LOGSUMEXP:
        tl.store(sums_ptr + 2 * part, greatest, mask=real)
        tl.store(sums_ptr + 2 * part + 1, total, mask=real)
    if arrive(counters_ptr + tl.program_id(1), num_parts):
        for b in tl.range(first_row, tl.minimum(first_row + BATCH, num_rows)):
            reduce_parts(b, num_rows, num_parts, keys_ptr, sums_ptr, out_keys_ptr, out_ids_ptr,
                         out_logits_ptr, out_logsumexp_ptr, BEST, PART_BLOCK, LOGSUMEXP,
                         False)  # fmt: skip
