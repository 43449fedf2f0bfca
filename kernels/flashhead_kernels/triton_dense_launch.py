"""Launches the dense kernel on a rank's rows."""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from flashhead_kernels.logits import FinalLogits
from flashhead_kernels.shard import Candidates
from flashhead_kernels.triton_dense import dense_kernel
from flashhead_kernels.triton_device import counters, num_processors, on_device, signed_seed
from flashhead_kernels.triton_shapes import is_interpreted, part_block, power_of_two

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
