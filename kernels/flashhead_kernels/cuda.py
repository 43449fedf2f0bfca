"""The head's operations on CUDA: Triton kernels, and torch for what no step of decoding needs.

Functions have the names and signatures of `reference`. Under TRITON_INTERPRET=1 they run on CPU
tensors. A kernel that does not compile raises Triton's error: nothing falls back in silence.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from flashhead_kernels import reference, triton_rows
from flashhead_kernels.logits import PLAIN, FinalLogits, GumbelNoise
from flashhead_kernels.shard import (
    Candidates,
    IndexShard,
    Query,
    check_hidden_states,
    check_k,
    check_query,
)
from flashhead_kernels.triton_dense_launch import launch_dense
from flashhead_kernels.triton_device import on_device
from flashhead_kernels.triton_exchange import unpack_kernel
from flashhead_kernels.triton_launch import launch_head
from flashhead_kernels.triton_shapes import MAX_BEST, MAX_ROWS

all_finite = reference.all_finite
centroid_dots = triton_rows.centroid_dots
score_centroids = triton_rows.score_centroids
select_probes = reference.select_probes
score_rows = triton_rows.score_rows
probed_candidates = triton_rows.probed_candidates
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
    noise = final.noise
    if noise is None:
        return final
    chosen = slice(first, first + count)
    sequences = None if noise.sequences is None else noise.sequences[chosen]
    of_rows = GumbelNoise(noise.seed, noise.positions[chosen], sequences)
    return FinalLogits(final.softcap, final.temperature, of_rows)


def _joined(found: list[Candidates]) -> Candidates:
    if len(found) == 1:
        return found[0]

    def join(name: str) -> Tensor | None:
        parts = [getattr(one, name) for one in found]
        return None if parts[0] is None else torch.cat(parts)

    keys = torch.cat([one.keys for one in found])
    rest = (join(name) for name in ("logsumexp", "unprobed", "token_ids", "logits"))
    return Candidates(keys, *rest)
