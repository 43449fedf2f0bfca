"""The head's operations on CUDA: Triton kernels, and torch for what no step of decoding needs.

Functions have the names and signatures of `reference`. Under TRITON_INTERPRET=1 they run on CPU
tensors. A kernel that does not compile raises Triton's error: nothing falls back in silence.

A step that only wants the best token goes through `triton_head` or `triton_dense`, which write no
logits to memory. The kernels here write them, for sampling, log-probabilities and rows of logits.
Batch sizes are grids or plain arguments: none is compiled for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from flashhead_kernels import reference
from flashhead_kernels.noise import PLAIN, FinalLogits
from flashhead_kernels.quantize import QuantizedCentroids
from flashhead_kernels.shard import (
    Candidates,
    IndexShard,
    Query,
    check_hidden_states,
    check_k,
    check_query,
)
from flashhead_kernels.triton_dense import launch_dense
from flashhead_kernels.triton_exchange import unpack_kernel
from flashhead_kernels.triton_launch import launch_dots, launch_head
from flashhead_kernels.triton_reduce import hidden_norm, row_logits
from flashhead_kernels.triton_shapes import (
    MAX_BEST,
    MAX_ROWS,
    ROWS_A_WARP,
    is_interpreted,
    on_device,
    power_of_two,
)

WARPS = 4
REGISTERS = 255
"""Most that a thread may have: left to itself the compiler spills a few, for another program."""
ROWS_A_BLOCK = ROWS_A_WARP * WARPS
"""Rows that a program scores at a time."""
_COLUMNS_A_BLOCK = 128
_BATCH_OF_MATMUL = 16


@triton.jit(do_not_specialize=["count"])
def score_rows_kernel(
    hidden_ptr, rows_ptr, cluster_ids_ptr, logits_ptr, count,
    S: tl.constexpr, S_PAD: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid `[B, blocks of n]`: logits float32 `[B, n, S]` of `cluster_ids [B, n]`, count = n."""
    batch = tl.program_id(0).to(tl.int64)
    place = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    at = batch * count + place
    cluster = tl.load(cluster_ids_ptr + at, mask=place < count, other=-1).to(tl.int64)
    token = tl.arange(0, S_PAD)[None, :]
    row = tl.reshape(cluster[:, None] * S + token, [BLOCK * S_PAD])
    real = tl.reshape((cluster >= 0)[:, None] & (token < S), [BLOCK * S_PAD])
    found = row_logits(rows_ptr, hidden_ptr + batch * D, row, real, D, BLOCK_D)
    found = tl.reshape(tl.where(real, found, float("-inf")), [BLOCK, S_PAD])
    inside = (place < count)[:, None] & (token < S)
    tl.store(logits_ptr + at[:, None] * S + token, found, mask=inside)


def score_rows(hidden_states: Tensor, rows: Tensor, cluster_ids: Tensor) -> Tensor:
    """See `reference.score_rows`."""
    batch, count = cluster_ids.shape
    tokens, size = rows.shape[1:]
    logits = torch.empty((batch, count, tokens), dtype=torch.float32, device=rows.device)
    if logits.numel() == 0:
        return logits
    tokens_pad = power_of_two(tokens)
    block = min(power_of_two(count), max(1, ROWS_A_BLOCK // tokens_pad))
    with on_device(rows):
        score_rows_kernel[(batch, triton.cdiv(count, block))](
            hidden_states.contiguous(), rows, cluster_ids.contiguous(), logits, count,
            S=tokens, S_PAD=tokens_pad, D=size, BLOCK_D=columns_a_block(size), BLOCK=block,
            num_warps=WARPS,
        )  # fmt: skip
    return logits


def columns_a_block(size: int) -> int:
    """Columns that `row_logits` takes at a time."""
    return min(power_of_two(size), _COLUMNS_A_BLOCK)


def probed_candidates(
    hidden_states: Tensor, rows: Tensor, token_ids: Tensor, cluster_ids: Tensor, *, k: int = 1
) -> Tensor:
    """See `reference.probed_candidates`."""
    logits = score_rows(hidden_states, rows, cluster_ids)
    ids = token_ids[cluster_ids.clamp(min=0).long()]
    ids = ids.masked_fill((cluster_ids < 0).unsqueeze(-1), -1)
    return reference.best_keys(logits.flatten(1), ids.flatten(1), k)


@triton.jit(do_not_specialize=["num_rows", "num_tokens"])
def logits_kernel(
    hidden_ptr, rows_ptr, logits_ptr, num_rows, num_tokens,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BATCH: tl.constexpr, BLOCK_V: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    """Grid `[blocks of B, blocks of R]`: logits float32 `[B, R]` of all `rows [R, D]`.

    Blocks of B come first, so that programs that run together share a block of rows in L2.
    UPCAST: multiply matrices in float32.
    """
    batch = tl.program_id(0) * BATCH + tl.arange(0, BATCH)
    token = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    real, inside = batch < num_rows, token < num_tokens
    logits = tl.zeros([BATCH, BLOCK_V], tl.float32)
    for first in tl.range(0, D, BLOCK_D):
        column = first + tl.arange(0, BLOCK_D)
        hidden = tl.load(
            hidden_ptr + batch[:, None] * D + column[None, :],
            mask=real[:, None] & (column < D)[None, :], other=0.0,
        )  # fmt: skip
        weights = tl.load(
            rows_ptr + token.to(tl.int64)[:, None] * D + column[None, :],
            mask=inside[:, None] & (column < D)[None, :], other=0.0,
        )  # fmt: skip
        if UPCAST:
            hidden, weights = hidden.to(tl.float32), weights.to(tl.float32)
        logits = tl.dot(hidden, tl.trans(weights), logits, input_precision="ieee")
    at = batch.to(tl.int64)[:, None] * num_tokens + token[None, :]
    tl.store(logits_ptr + at, logits, mask=real[:, None] & inside[None, :])


def score_all(hidden_states: Tensor, rows: Tensor) -> Tensor:
    """Logits float32 `[B, R]` of hidden states `[B, D]` and all `rows [R, D]`."""
    batch, count = len(hidden_states), len(rows)
    logits = torch.empty((batch, count), dtype=torch.float32, device=rows.device)
    if logits.numel() == 0:
        return logits
    blocks = logits_blocks(hidden_states.dtype, rows.dtype, rows.shape[1])
    with on_device(rows):
        logits_kernel[(triton.cdiv(batch, blocks["BATCH"]), triton.cdiv(count, blocks["BLOCK_V"]))](
            hidden_states.contiguous(), rows, logits, batch, count, **blocks, num_warps=WARPS,
            maxnreg=REGISTERS,
        )  # fmt: skip
    return logits


def logits_blocks(hidden: torch.dtype, rows: torch.dtype, size: int) -> dict[str, int]:
    """The constants of `logits_kernel` for these dtypes and hidden size."""
    # The interpreter multiplies no matrices of bfloat16.
    upcast = hidden != rows or rows == torch.float32 or is_interpreted()
    return {
        "D": size,
        "BLOCK_D": 32 if upcast else 64,
        "BATCH": _BATCH_OF_MATMUL,
        "BLOCK_V": 64,
        "UPCAST": upcast,
    }


@triton.jit
def probing_scores(dots, spread, norm, alpha):
    """`reference.score_centroids` of one group and row, by `dots` and the row's norm."""
    # 0 * -inf is NaN: a cluster of pads stays at -inf whatever alpha is.
    return dots + tl.where(spread == float("-inf"), spread, alpha * norm * spread)


@triton.jit
def scores_of_centroids_kernel(
    hidden_ptr, dots_ptr, spread_ptr, scores_ptr, alpha,
    M: tl.constexpr, M_PAD: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    """Grid `[N, B]`: probing scores float32 `[B, N, M]` from `dots [B, N, M]`."""
    group, row = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    slot = tl.arange(0, M_PAD)
    at = (row * tl.num_programs(0) + group) * M + slot
    dots = tl.load(dots_ptr + at, mask=slot < M, other=0.0)
    spread = tl.load(spread_ptr + group * M + slot, mask=slot < M, other=float("-inf"))
    norm = hidden_norm(hidden_ptr + row * D, D, BLOCK_D, ROWS)
    tl.store(scores_ptr + at, probing_scores(dots, spread, norm, alpha), mask=slot < M)


def score_centroids(hidden_states: Tensor, shard: IndexShard, alpha: float) -> Tensor:
    """See `reference.score_centroids`."""
    hidden_states = hidden_states.contiguous()
    dots = centroid_dots(hidden_states, shard.centroids)
    scores = torch.empty_like(dots)
    (groups, clusters), size = shard.spread.shape, hidden_states.shape[1]
    if dots.numel():
        with on_device(dots):
            scores_of_centroids_kernel[(groups, len(hidden_states))](
                hidden_states, dots, shard.spread, scores, alpha,
                M=clusters, M_PAD=power_of_two(clusters), D=size, BLOCK_D=columns_a_block(size),
                ROWS=ROWS_A_BLOCK, num_warps=WARPS,
            )  # fmt: skip
    return scores


def centroid_dots(hidden_states: Tensor, centroids: QuantizedCentroids) -> Tensor:
    """See `reference.centroid_dots`."""
    groups, clusters = centroids.values.shape[0], centroids.num_clusters
    if len(hidden_states) == 0 or groups == 0:
        size = (len(hidden_states), groups, clusters)
        return torch.empty(size, dtype=torch.float32, device=hidden_states.device)
    parts = torch.split(hidden_states.contiguous(), MAX_ROWS)
    return torch.cat([launch_dots(part, centroids) for part in parts])


all_finite = reference.all_finite
select_probes = reference.select_probes
best_keys = reference.best_keys
_UNPACKED_AT_ONCE = 256


def candidates(
    hidden_states: Tensor,
    shard: IndexShard,
    query: Query,
    *,
    launches: int | None = None,
    between: Callable[[], object] | None = None,
) -> Candidates:
    """See `reference.candidates`.

    launches: 1 or 2, besides one that quantises hidden states for larger batches; where None,
        whichever was measured to be faster (`launch_choice`), or 2 where something is to be called
        between them.

    Raises:
        ValueError: as the reference does; one launch for a shape that it cannot serve.
    """
    check_query(hidden_states, shard, query)
    if query.k > MAX_BEST or len(hidden_states) == 0 or len(shard.rows) == 0:
        return reference.candidates(hidden_states, shard, query, between=between)
    found = []
    for part in _parts(hidden_states):
        found.append(launch_head(part, shard, query, launches, between))
        between = None if between is None else _nothing
    return _joined(found)


def unpack_keys(keys: Tensor) -> tuple[Tensor, Tensor]:
    """See `keys.unpack_keys`; one launch."""
    keys = keys.contiguous()
    token_ids, logits = torch.empty_like(keys), torch.empty_like(keys, dtype=torch.float32)
    unpack_keys_into(keys, token_ids, logits)
    return logits, token_ids


def unpack_keys_into(keys: Tensor, token_ids: Tensor, logits: Tensor) -> None:
    """See `keys.unpack_keys_into`; one launch. All contiguous."""
    count = keys.numel()
    if count:
        with on_device(keys):
            unpack_kernel[(-(-count // _UNPACKED_AT_ONCE),)](
                keys, token_ids, logits, count, BLOCK=_UNPACKED_AT_ONCE
            )


def dense_candidates(
    hidden_states: Tensor,
    rows: Tensor,
    first_token_id: int,
    *,
    k: int = 1,
    need_logsumexp: bool = False,
    token_ids: Tensor | None = None,
    final: FinalLogits = PLAIN,
) -> Candidates:
    """See `reference.dense_candidates`."""
    check_hidden_states(hidden_states, rows.shape[1])
    check_k(k)
    batch = len(hidden_states)
    if k > MAX_BEST or batch == 0 or rows.shape[0] == 0:
        return reference.dense_candidates(
            hidden_states, rows, first_token_id, k=k, need_logsumexp=need_logsumexp,
            token_ids=token_ids, final=final,
        )  # fmt: skip
    states = _parts(hidden_states)
    return _joined([
        launch_dense(
            part, rows, first_token_id, k, need_logsumexp, token_ids,
            _rows_of(final, place * MAX_ROWS, len(part)),
        )
        for place, part in enumerate(states)
    ])  # fmt: skip


def _parts(hidden_states: Tensor) -> Sequence[Tensor]:
    """Rows that one launch serves, `[MAX_ROWS, D]` or fewer each."""
    states = hidden_states.contiguous()
    return [states] if len(states) <= MAX_ROWS else torch.split(states, MAX_ROWS)


def _nothing() -> None:
    """Between the launches of later rows: it was called for the first."""


def _rows_of(final: FinalLogits, first: int, count: int) -> FinalLogits:
    if final.noise is None:
        return final
    return replace(final, noise=final.noise.rows(slice(first, first + count)))


def _joined(found: list[Candidates]) -> Candidates:
    if len(found) == 1:
        return found[0]

    def join(name: str) -> Tensor | None:
        parts = [getattr(one, name) for one in found]
        return None if parts[0] is None else torch.cat(parts)

    keys = torch.cat([one.keys for one in found])
    rest = (join(name) for name in ("logsumexp", "unprobed", "token_ids", "logits"))
    return Candidates(keys, *rest)
