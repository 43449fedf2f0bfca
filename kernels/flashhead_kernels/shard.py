"""A rank's part of an index, a query to it, and what a step finds; with the checks of all three.

Letters: `N` probing groups of `M` clusters of `S` tokens, `n` pinned tokens a group, `D` hidden
size, `B` rows of hidden states.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import cached_property

import torch
from torch import Tensor

from flashhead_kernels.quantize import QuantizedCentroids


@dataclass(frozen=True)
class IndexShard:
    """The tensors of N probing groups, all on one device.

    rows: `[N, M, S, D]`, the output embedding's.
    token_ids: int32 `[N, M, S]`, -1 for a pad.
    centroids: leading shape `[N, M]`.
    spread: float32 `[N, M]`, how far a row's logit may lie from the mean's for a hidden state of
        norm 1; -inf for a cluster of pads.
    pinned_rows, pinned_token_ids: `[N, n, D]` and int32 `[N, n]` (-1 pad); scored for every row.
    group_ids: int64 `[N]`, the groups' numbers in the whole index.
    """

    rows: Tensor
    token_ids: Tensor
    centroids: QuantizedCentroids
    spread: Tensor
    pinned_rows: Tensor
    pinned_token_ids: Tensor
    group_ids: Tensor

    @property
    def weight_bytes(self) -> int:
        """Bytes of everything that is read to score tokens."""
        tensors = (self.rows, self.token_ids, self.spread, self.pinned_rows, self.pinned_token_ids)
        return self.centroids.nbytes + sum(tensor.nbytes for tensor in tensors)

    # Cached: a view for each step would cost microseconds.

    @cached_property
    def cluster_rows(self) -> Tensor:
        """`rows` as `[N * M, S, D]`."""
        return self.rows.flatten(0, 1)

    @cached_property
    def cluster_token_ids(self) -> Tensor:
        """`token_ids` as `[N * M, S]`."""
        return self.token_ids.flatten(0, 1)

    @cached_property
    def num_tokens(self) -> Tensor:
        """Tokens in each cluster without pads: int64 `[N, M]`."""
        return (self.token_ids >= 0).sum(2)

    @cached_property
    def table(self) -> tuple[Tensor, Tensor] | None:
        """All rows `[R, D]`, pinned ones last, and their token ids `[R]` (-1 pad).

        None where they are not adjacent in memory, as they are when an index is loaded.
        """
        rows = _adjacent(self.rows.flatten(0, 2), self.pinned_rows.flatten(0, 1))
        token_ids = _adjacent(self.token_ids.flatten(), self.pinned_token_ids.flatten())
        return None if rows is None or token_ids is None else (rows, token_ids)

    def to(self, device: torch.device | str) -> IndexShard:
        """The same values on `device`."""
        return IndexShard(*(getattr(self, field.name).to(device) for field in fields(self)))


def _adjacent(first: Tensor, second: Tensor) -> Tensor | None:
    """`first [R, ...]` and `second [r, ...]` as one `[R + r, ...]`, where one follows the other."""
    if not second.numel():
        return first
    if first.data_ptr() + first.nbytes != second.data_ptr():
        return None
    if first.untyped_storage().data_ptr() != second.untyped_storage().data_ptr():
        return None
    size = (len(first) + len(second), *first.shape[1:])
    return first.as_strided(size, first.stride(), first.storage_offset())


@dataclass(frozen=True)
class Query:
    """What a step does with an `IndexShard`.

    num_probes_per_group: clusters of each group whose rows are scored.
    alpha: weight of the spread in a probing score, see `reference.score_centroids`.
    k: best tokens that are returned.
    need_logsumexp, need_unprobed: see `Candidates`.

    Raises:
        ValueError: k below 1.
    """

    num_probes_per_group: int
    alpha: float
    k: int = 1
    need_logsumexp: bool = False
    need_unprobed: bool = False

    def __post_init__(self) -> None:
        check_k(self.k)


@dataclass(frozen=True)
class Candidates:
    """The best tokens that one rank has seen, per row of the batch.

    keys: int64 `[B, k]`, descending, EMPTY_KEY where the rank scored fewer than k tokens.
    logsumexp: float32 `[B]`, or None where it was not requested. For a retrieval kernel it is the
        closed form over the rank's whole vocabulary shard (see `reference.candidates`).
    unprobed: int64 `[B]`, or None where it was not requested. `pack_keys` of the greatest probing
        score of a cluster that was not probed, with id 0; EMPTY_KEY where all were.
    token_ids, logits: the keys unpacked, int64 and float32 `[B, k]`, where the kernel did that too.
    """

    keys: Tensor
    logsumexp: Tensor | None
    unprobed: Tensor | None = None
    token_ids: Tensor | None = None
    logits: Tensor | None = None


def check_finite(hidden_states: Tensor) -> None:
    """Refuse hidden states `[B, D]` that no argmax is defined for.

    Raises:
        ValueError: names the first row that holds NaN or inf.
    """
    finite = torch.isfinite(hidden_states).all(dim=-1)
    if not bool(finite.all()):
        row = int((~finite).nonzero()[0, 0])
        kind = "NaN" if bool(torch.isnan(hidden_states[row]).any()) else "inf"
        raise ValueError(f"hidden state {row} holds {kind}")


def check_query(hidden_states: Tensor, shard: IndexShard, query: Query) -> None:
    """Raise ValueError where shapes do not fit, or the number of probes is outside 1..M."""
    check_hidden_states(hidden_states, shard.rows.shape[3])
    clusters = shard.rows.shape[1]
    if not 1 <= query.num_probes_per_group <= clusters:
        raise ValueError(
            f"probes per group must lie between 1 and {clusters}, got {query.num_probes_per_group}"
        )


def check_hidden_states(hidden_states: Tensor, hidden_size: int) -> None:
    """Raise ValueError unless `hidden_states` are `[B, hidden_size]`."""
    if hidden_states.ndim != 2 or hidden_states.shape[1] != hidden_size:
        raise ValueError(
            f"hidden states of shape {tuple(hidden_states.shape)} do not fit [B, {hidden_size}]"
        )


def check_k(k: int) -> None:
    """Raise ValueError for a number of best tokens below 1."""
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
