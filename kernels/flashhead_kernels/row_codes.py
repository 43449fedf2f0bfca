"""Candidate rows rounded to int8, by which each probing group's best few are found.

The few are then scored by their own rows, so the logits that leave a group are exact, and which
rows are kept depends on the group alone: the answer is the same at every tp_size. No head uses it:
docs/decisions.md has what it was measured to give (`launch/bench_cpu.py --int8-rows`).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from flashhead_kernels.candidates import check_candidate_arguments, quantize_hidden_states
from flashhead_kernels.cpu_memory import empty_on_large_pages
from flashhead_kernels.keys import pack_keys, unpack_keys
from flashhead_kernels.quantize import QuantizedCentroids, quantize_centroids
from flashhead_kernels.reference import best_keys, score_centroids, score_rows, select_probes

GROUP_SIZE = 64
"""Columns of a scale, at most: 660 bytes for a row of 640 in place of 1,280."""
KEPT = 2
"""Rows of a probing group, at least, that are scored by their own rows."""


@dataclass(frozen=True)
class RowCodes:
    """Rows `[N, M, S, D]` in int8 with bfloat16 scales.

    data: uint8 `[N, M, S * (D + 2 * D / group_size)]`, a cluster in one piece: the int8 rows, one
        after the other, then the scales of each.
    """

    data: Tensor
    tokens: int
    hidden_size: int
    group_size: int

    def dequantize(self, cluster_ids: Tensor) -> Tensor:
        """Float32 rows `[..., S, D]` of flat `cluster_ids [...]`."""
        data = self.data.flatten(0, 1)[cluster_ids.long()]
        split = self.tokens * self.hidden_size
        shape = (*cluster_ids.shape, self.tokens, self.hidden_size // self.group_size)
        values = data[..., :split].contiguous().view(torch.int8).float()
        scales = data[..., split:].contiguous().view(torch.bfloat16).float()
        values = values.reshape(*shape, self.group_size)
        return (values * scales.reshape(shape).unsqueeze(-1)).flatten(-2)


def code_rows(rows: Tensor) -> RowCodes:
    """Round `rows [N, M, S, D]`, nearest, as centroids of 8 bits are.

    Raises:
        ValueError: a hidden size that is no multiple of 32.
    """
    groups, clusters, tokens, size = rows.shape
    if size % 32:
        raise ValueError(f"rows of {size} columns have no int8 codes: a multiple of 32 has")
    group_size = GROUP_SIZE if size % GROUP_SIZE == 0 else 32
    width = tokens * (size + 2 * (size // group_size))
    data = empty_on_large_pages((groups, clusters, width), torch.uint8)
    for group in range(groups):
        coded = quantize_centroids(rows[group], 8, group_size)
        assert coded.scales is not None
        data[group, :, : tokens * size] = coded.values.view(torch.uint8).flatten(1)
        data[group, :, tokens * size :] = coded.scales.view(torch.uint8).flatten(1)
    return RowCodes(data, tokens, size, group_size)


def coded_candidates(
    hidden_states: Tensor,
    codes: RowCodes,
    rows: Tensor,
    token_ids: Tensor,
    centroids: QuantizedCentroids,
    spread: Tensor,
    alpha: float,
    num_probes_per_group: int,
    pinned_rows: Tensor,
    pinned_token_ids: Tensor,
    *,
    k: int = 1,
) -> Tensor:
    """Best keys int64 `[B, k]`, as `reference.flashhead_candidates` with rows found by `codes`.

    Of each group the max(KEPT, k) best of the probed rows by their codes are scored by their own
    rows; of equal ones the lower row is kept. Pinned tokens are scored by their own rows. The
    definition that the kernel in `cpu_row_codes` is tested against.

    Raises:
        ValueError: shapes that do not fit, or a number of probes outside 1..M.
    """
    groups, clusters, tokens, size = rows.shape
    check_candidate_arguments(hidden_states, size, num_probes_per_group, clusters, k)
    scores = score_centroids(hidden_states, centroids, spread, alpha)
    probes = select_probes(scores, num_probes_per_group).long()
    cluster_ids = probes + clusters * torch.arange(groups)[:, None]
    places = (cluster_ids.unsqueeze(-1) * tokens + torch.arange(tokens)).flatten(2)
    integers, scales = quantize_hidden_states(hidden_states, codes.group_size)
    rounded = integers * scales.repeat_interleave(codes.group_size, dim=-1)
    logits = torch.einsum("bd,bgptd->bgpt", rounded, codes.dequantize(cluster_ids)).flatten(2)
    pads = token_ids.flatten()[places] < 0
    keys = pack_keys(logits, places.masked_fill(pads, -1))
    kept = keys.topk(min(max(KEPT, k), keys.shape[2]), dim=2).values
    chosen = unpack_keys(kept)[1].flatten(1)
    exact = score_rows(hidden_states, rows.flatten(0, 2).unsqueeze(1), chosen)[..., 0]
    ids = token_ids.flatten()[chosen.clamp(min=0)].masked_fill(chosen < 0, -1)
    pinned = torch.einsum("bd,nqd->bnq", hidden_states.float(), pinned_rows.float()).flatten(1)
    pinned_ids = pinned_token_ids.flatten().expand(len(hidden_states), -1)
    return best_keys(torch.cat([exact, pinned], dim=1), torch.cat([ids, pinned_ids], dim=1), k)
