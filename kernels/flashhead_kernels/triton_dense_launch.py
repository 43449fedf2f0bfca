"""Launches the dense kernel on a rank's rows."""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
from torch import Tensor

from flashhead_kernels.candidates import Candidates
from flashhead_kernels.logits import FinalLogits
from flashhead_kernels.triton_dense import dense_kernel
from flashhead_kernels.triton_shapes import is_interpreted, part_block, power_of_two
from flashhead_kernels.triton_workspace import workspace

_MAX_BATCH_OF_PRODUCTS = 4
"""Rows up to which products on CUDA cores keep up with memory; above, tensor cores."""
_MAX_BATCH_OF_MATMUL = 64
_PROGRAMS_A_PROCESSOR = 4
_INTERPRETED_PROGRAMS = 3


def launch_dense(
    hidden_states: Tensor,
    rows: Tensor,
    first_token_id: int,
    k: int,
    need_logsumexp: bool,
    token_ids: Tensor | None,
    bias: Tensor | None,
    final: FinalLogits,
) -> Candidates:
    """See `reference.dense_candidates`; one row and hidden state at least, k up to MAX_BEST."""
    batch, size = hidden_states.shape
    count, best = rows.shape[0], power_of_two(k)
    blocks = dense_blocks(batch, size, best)
    programs = min(_programs(rows.device), triton.cdiv(count, blocks["BLOCK_V"]))
    grid = (programs, triton.cdiv(batch, blocks["BATCH"]))
    device = hidden_states.device
    space = workspace(
        device, words=0, scales=0, dots=0, parts=batch * programs, best=best, rows=grid[1]
    )
    keys = torch.empty((batch, best), dtype=torch.int64, device=device)
    logsumexp = torch.empty(batch if need_logsumexp else 0, device=device)
    noise = final.noise
    dense_kernel[grid](
        hidden_states, rows, space.counters if token_ids is None else token_ids,
        rows if bias is None else bias,
        space.counters if noise is None else noise.positions,
        space.counters if noise is None or noise.sequences is None else noise.sequences,
        space.keys, space.sums, space.counters, keys, logsumexp,
        count, first_token_id, batch, 1 / final.temperature, final.softcap,
        0 if noise is None else noise.seed,
        **blocks,
        TABLE=token_ids is not None, BIAS=bias is not None, SOFTCAP=final.softcap > 0,
        SAMPLE=noise is not None, SEQUENCES=noise is not None and noise.sequences is not None,
        LOGSUMEXP=need_logsumexp,
        PART_BLOCK=part_block(programs, best), UPCAST=is_interpreted(),
        num_warps=4,
    )  # fmt: skip
    return Candidates(keys[:, :k], logsumexp if need_logsumexp else None)


def dense_blocks(batch: int, hidden_size: int, best: int) -> dict[str, Any]:
    """The kernel's constants for `batch` rows and `best` (a power of two) keys kept."""
    matmul = batch > _MAX_BATCH_OF_PRODUCTS
    rows_pad = min(max(16, power_of_two(batch)), _MAX_BATCH_OF_MATMUL)
    return {
        "D": hidden_size,
        "BLOCK_D": 64 if matmul else min(128, power_of_two(hidden_size)),
        "BLOCK_V": max(64 if matmul else 32, best),
        "BATCH": min(batch, rows_pad) if matmul else batch,
        "BATCH_PAD": rows_pad if matmul else power_of_two(batch),
        "BEST": best,
        "MATMUL": matmul,
    }


@functools.cache
def _programs(device: torch.device) -> int:
    """Programs that fill the device at once."""
    if device.type != "cuda":
        return _INTERPRETED_PROGRAMS
    processors = torch.cuda.get_device_properties(device).multi_processor_count
    return int(processors) * _PROGRAMS_A_PROCESSOR
