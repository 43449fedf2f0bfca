"""The dense head in Triton: one scan of the rows, reduced to keys and log-sum-exps as it goes.

The fair opponent of `triton_head`: one launch, each row read once, no logit written to memory.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from flashhead_kernels.noise import FinalLogits
from flashhead_kernels.shard import Candidates
from flashhead_kernels.triton_reduce import (
    EMPTY_KEY,
    arrive,
    gumbel_noise,
    noise_place,
    pack_key,
    reduce_parts,
    transform,
)
from flashhead_kernels.triton_shapes import (
    counters,
    is_interpreted,
    num_processors,
    on_device,
    part_block,
    power_of_two,
    signed_seed,
)


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
    num_tokens, first_token_id, num_rows, inverse_temperature, softcap, seed: tl.int64,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, BATCH: tl.constexpr,
    BEST: tl.constexpr, MATMUL: tl.constexpr, TABLE: tl.constexpr, SOFTCAP: tl.constexpr,
    SAMPLE: tl.constexpr, SEQUENCES: tl.constexpr, LOGSUMEXP: tl.constexpr,
    PART_BLOCK: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
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
            final += gumbel_noise(seed, position[:, None], sequence[:, None], ids)
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


_MAX_BATCH_OF_PRODUCTS = 4
"""Rows up to which products on CUDA cores keep up with memory; above, tensor cores."""
_LEAST_BATCH_OF_MATMUL = 16
_MAX_BATCH_OF_MATMUL = 64
_MAX_BATCH_OF_FLOAT32 = 32
"""Float32 matrices are multiplied in three parts each, which take registers."""
_PROGRAMS_A_PROCESSOR = 4


def launch_dense(
    hidden_states: Tensor,
    rows: Tensor,
    first_token_id: int,
    k: int,
    need_logsumexp: bool,
    token_ids: Tensor | None,
    final: FinalLogits,
) -> Candidates:
    """See `reference.dense_candidates`; 1 to MAX_ROWS hidden states, k up to MAX_BEST."""
    batch, size = hidden_states.shape
    count, best = rows.shape[0], power_of_two(k)
    device, noise = hidden_states.device, final.noise
    blocks = dense_blocks(
        batch, size, best, wide=torch.float32 in (hidden_states.dtype, rows.dtype)
    )
    programs = num_processors(device) * _PROGRAMS_A_PROCESSOR
    grid = (min(programs, triton.cdiv(count, blocks["BLOCK_V"])), -(-batch // blocks["BATCH"]))
    keys = torch.empty((batch, best), dtype=torch.int64, device=device)
    ids = torch.empty_like(keys)
    logits = torch.empty((batch, best), dtype=torch.float32, device=device)
    logsumexp = torch.empty(batch, dtype=torch.float32, device=device)
    part_keys = torch.empty(batch * grid[0] * best, dtype=torch.int64, device=device)
    part_sums = torch.empty(2 * batch * grid[0], dtype=torch.float32, device=device)
    counter = counters(device)
    sequences = None if noise is None else noise.sequences
    # Most that a thread may have: left to itself the compiler spills a few, for another program.
    registers = None
    if blocks["MATMUL"]:
        plain = noise is None and blocks["BLOCK_D"] == 64
        registers = 128 if plain and blocks["BATCH"] < _MAX_BATCH_OF_MATMUL else 255
    with on_device(hidden_states):
        # A pointer has to be given even where nothing is read from it.
        dense_kernel[grid](
            hidden_states, rows, counter if token_ids is None else token_ids,
            counter if noise is None else noise.positions,
            counter if sequences is None else sequences,
            part_keys, part_sums, counter, keys, ids, logits, logsumexp,
            count, first_token_id, batch, 1 / final.temperature, final.softcap,
            0 if noise is None else signed_seed(noise.seed),
            **blocks,
            TABLE=token_ids is not None, SOFTCAP=final.softcap > 0, SAMPLE=noise is not None,
            SEQUENCES=sequences is not None, LOGSUMEXP=need_logsumexp,
            PART_BLOCK=part_block(best), UPCAST=is_interpreted(), num_warps=4, maxnreg=registers,
        )  # fmt: skip
    return Candidates(
        keys[:, :k], logsumexp if need_logsumexp else None, None, ids[:, :k], logits[:, :k]
    )


def dense_blocks(batch: int, hidden_size: int, best: int, *, wide: bool) -> dict[str, Any]:
    """The kernel's constants for `batch` rows and `best` (a power of two) keys kept.

    wide: hidden states or rows are float32.
    """
    matmul = batch > _MAX_BATCH_OF_PRODUCTS
    rows = power_of_two(batch)
    if matmul:
        most = _MAX_BATCH_OF_FLOAT32 if wide else _MAX_BATCH_OF_MATMUL
        rows = min(max(_LEAST_BATCH_OF_MATMUL, rows), most)
    return {
        "D": hidden_size,
        "BLOCK_D": (32 if wide else 64) if matmul else min(128, power_of_two(hidden_size)),
        "BLOCK_V": max(64 if matmul else 32, best),
        "BATCH": rows,
        "BEST": best,
        "MATMUL": matmul,
    }
