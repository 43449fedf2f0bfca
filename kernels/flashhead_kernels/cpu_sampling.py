"""`sampling` on a CPU: the names and signatures, on compiled loops.

Every number depends on its own row, group or token alone, bit for bit: a draw is the same whoever
holds which groups, and however many rows and draws stand beside it.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flashhead_kernels import cpu_sampling_loops as loops
from flashhead_kernels.cpu import flat, float_states, make_query, score_rows
from flashhead_kernels.cpu_threads import share
from flashhead_kernels.keys import pack_keys, unpack_keys
from flashhead_kernels.noise import Domain, FinalLogits, GumbelNoise
from flashhead_kernels.sampling import (
    LocalScores,
    Weighed,
    own_and_all,
)
from flashhead_kernels.sampling import every_logit as every_logit
from flashhead_kernels.sampling import some_or_all as some_or_all
from flashhead_kernels.shard import IndexShard, Query

_HALF = 2**63
_BLOCK = 64
"""Rows of a dense shard that are scored as one cluster."""
_CHUNK = 4096
"""Candidates that one thread takes at a time."""


def local_scores(hidden_states: Tensor, shard: IndexShard, query: Query) -> LocalScores:
    """See `sampling.local_scores`."""
    (groups, clusters, tokens, size), batch = shard.rows.shape, hidden_states.shape[0]
    probes, pinned = query.num_probes_per_group, shard.pinned_rows.shape[1]
    width = probes * tokens + pinned
    means = np.empty(batch * groups * clusters, np.float32)
    logits = np.empty(batch * groups * width, np.float32)
    ids = np.empty(batch * groups * width, np.int32)
    if batch:
        centroids = shard.centroids
        states, values, scales, bias = make_query(hidden_states, centroids, query.alpha)
        rows, token_ids, spread = flat(shard.rows), flat(shard.token_ids), flat(shard.spread)
        pinned_rows, pinned_ids = flat(shard.pinned_rows), flat(shard.pinned_token_ids)
        share(
            groups,
            lambda first, last: loops.probe_and_keep(
                first, last, states, batch, size, values, scales, centroids.group_size,
                centroids.tile, spread, bias, clusters, probes, rows, token_ids, tokens,
                pinned_rows, pinned_ids, pinned, groups, means, logits, ids,
            ),
        )  # fmt: skip
    return LocalScores(
        torch.from_numpy(logits).view(batch, groups * width),
        torch.from_numpy(ids).view(batch, groups * width),
        torch.from_numpy(means).view(batch, groups, clusters),
    )


def dense_scores(hidden_states: Tensor, rows: Tensor, first_token_id: int) -> LocalScores:
    """See `sampling.dense_scores`."""
    batch, whole = len(hidden_states), len(rows) - len(rows) % _BLOCK
    parts = []
    for part, size in ((rows[:whole], _BLOCK), (rows[whole:], 1)):
        blocks = part.view(-1, size, rows.shape[1])
        every = torch.arange(len(blocks)).expand(batch, -1)
        parts.append(score_rows(hidden_states, blocks, every).flatten(1))
    logits = torch.cat(parts, dim=1)
    ids = torch.arange(first_token_id, first_token_id + len(rows), dtype=torch.int32)
    return LocalScores(logits, ids.unsqueeze(0), torch.empty(batch, 0, 0))


def final_logits(logits: Tensor, final: FinalLogits) -> Tensor:
    """See `sampling.final_logits`."""
    if final.softcap == 0:
        # One product of two floats: torch gives the same bits anywhere.
        return logits * (1 / final.temperature)
    out = np.empty(logits.numel(), np.float32)
    loops.cap(flat(logits), np.float32(final.softcap), np.float32(1 / final.temperature), out)
    return torch.from_numpy(out).view(logits.shape)


def cluster_log_mass(
    hidden_states: Tensor,
    shard: IndexShard,
    means: Tensor,
    scored: Tensor,
    shrinkage: float,
    final: FinalLogits,
) -> Tensor:
    """See `sampling.cluster_log_mass`."""
    batch, groups, clusters = means.shape
    mass = np.empty(means.numel(), np.float32)
    if means.numel() == 0:
        return torch.empty(means.shape)
    factor = np.empty(batch, np.float32)
    loops.norms(float_states(hidden_states), 1 / final.temperature, factor)
    spread, num_tokens = flat(shard.spread), shard.num_tokens
    # By a table: torch's logarithm of an element may depend on its place in the tensor.
    table = [math.log(count) if count else -math.inf for count in range(int(num_tokens.max()) + 1)]
    log_of, counts = np.array(table, np.float32), flat(num_tokens)
    flat_means, flat_scored, full = flat(means), flat(scored), np.float32(shrinkage)
    softcap, inverse = np.float32(final.softcap), np.float32(1 / final.temperature)
    share(
        batch * groups,
        lambda first, last: loops.weigh_clusters(
            first, last, flat_means, counts, log_of, spread, flat_scored, factor, full,
            softcap, inverse, clusters, mass,
        ),
    )  # fmt: skip
    return torch.from_numpy(mass).view(means.shape)


def group_log_mass(log_mass: Tensor) -> Tensor:
    """See `sampling.group_log_mass`."""
    batch, groups, clusters = log_mass.shape
    out = np.empty(batch * groups, np.float32)
    if log_mass.numel():
        masses = flat(log_mass)
        share(
            batch * groups,
            lambda first, last: loops.sum_groups(first, last, masses, clusters, out),
        )
    return torch.from_numpy(out).view(batch, groups)


def draw_candidates(
    final: Tensor, token_ids: Tensor, row_of_draw: Tensor, noise: GumbelNoise
) -> Tensor:
    """See `sampling.draw_candidates`."""
    draws, width = len(row_of_draw), final.shape[1]
    chunks = max(1, -(-width // _CHUNK))
    keys = np.empty(draws * chunks, np.int64)
    logits, ids, rows = flat(final), flat(token_ids), row_of_draw.numpy()
    shared = len(token_ids) == 1
    seed, positions, sequences = _counters(noise)
    share(
        draws * chunks,
        lambda first, last: loops.best_noisy(
            first, last, chunks, _CHUNK, logits, width, ids, shared, rows, seed, positions,
            sequences, keys,
        ),
    )  # fmt: skip
    return torch.from_numpy(keys.reshape(draws, chunks)).amax(1)


def draw_groups(
    hidden_states: Tensor,
    shard: IndexShard,
    weighed: Weighed,
    row_of_draw: Tensor,
    final: FinalLogits,
) -> Tensor:
    """See `sampling.draw_groups`; of the groups of a draw only the best opens a cluster."""
    noise = final.noise
    assert noise is not None
    keys = draw_candidates(weighed.logits, weighed.token_ids, row_of_draw, noise)
    value, cluster = _draw_clusters(weighed, shard.group_ids, row_of_draw, noise)
    # Only a group that may win is opened: the candidates' best noisy logit is in their key.
    wins = (value >= unpack_keys(keys)[0]) & (value > float("-inf"))
    draws = wins.nonzero()[:, 0]
    if len(draws) == 0:
        return keys
    hidden, opened = hidden_states[row_of_draw[draws]], cluster[draws]
    logits = score_rows(hidden, shard.cluster_rows, opened.to(torch.int32).unsqueeze(1))[:, 0]
    ids = shard.cluster_token_ids[opened].long()
    # The tokens' own noise: unused so far, and the noise that a dense head's draw has.
    noisy = final_logits(logits, final) + gumbel(noise.rows(draws), ids)
    place = noisy.masked_fill(ids < 0, float("-inf")).argmax(1, keepdim=True)
    found = pack_keys(value[draws], ids.gather(1, place)[:, 0])
    return keys.index_copy(0, draws, torch.maximum(keys[draws], found))


def _draw_clusters(
    weighed: Weighed, group_ids: Tensor, row_of_draw: Tensor, noise: GumbelNoise
) -> tuple[Tensor, Tensor]:
    """`(value, cluster)`: the greatest noisy group mass float32 `[n]`, and a cluster drawn from it.

    cluster: int64 `[n]`, counted through this rank's groups. The value is -inf where no group has
    mass.
    """
    draws, (_, groups, clusters) = len(row_of_draw), weighed.log_mass.shape
    values, chosen = np.full(draws, -np.inf, np.float32), np.zeros(draws, np.int64)
    if groups:
        masses, group_masses = flat(weighed.log_mass), flat(weighed.group_log_mass)
        rows = row_of_draw.numpy()
        numbers = group_ids.to(torch.int32).numpy()
        seed, positions, sequences = _counters(noise)
        share(
            draws,
            lambda first, last: loops.best_groups(
                first, last, masses, group_masses, numbers, clusters, rows, seed, positions,
                sequences, values, chosen,
            ),
        )  # fmt: skip
    return torch.from_numpy(values), torch.from_numpy(chosen)


def draw_dense(
    hidden_states: Tensor,
    rows: Tensor,
    first_token_id: int,
    token_ids: Tensor | None,
    final: FinalLogits,
) -> Tensor:
    """See `sampling.draw_dense`."""
    assert final.noise is not None
    scores = dense_scores(hidden_states, rows, first_token_id)
    logits, ids = final_logits(scores.logits, final), scores.token_ids
    if token_ids is not None:
        ids = token_ids.unsqueeze(0)
    return draw_candidates(logits, ids, torch.arange(len(logits)), final.noise)


def dense_log_mass(
    hidden_states: Tensor,
    rows: Tensor,
    token_ids: Tensor | None,
    own_rows: Tensor,
    final: FinalLogits,
) -> Tensor:
    """See `sampling.dense_log_mass`."""
    logits = final_logits(dense_scores(hidden_states, rows, 0).logits, final)
    return own_and_all(logits, token_ids, own_rows)


def gumbel(noise: GumbelNoise, token_ids: Tensor, domain: Domain = Domain.TOKEN) -> Tensor:
    """See `logits.gumbel`."""
    seed, positions, sequences = _counters(noise)
    out = np.empty(token_ids.shape, np.float32)
    items = token_ids.to(torch.int32).contiguous().numpy()
    loops.noise_of(items, seed, positions, sequences, int(domain), out)
    return torch.from_numpy(out)


def _counters(noise: GumbelNoise) -> tuple[Any, Any, Any]:
    """The seed as a signed 64-bit number, positions and sequences as int64 arrays."""
    positions = noise.positions.to(torch.int64).contiguous().numpy()
    sequences = np.zeros_like(positions)
    if noise.sequences is not None:
        sequences = noise.sequences.to(torch.int64).contiguous().numpy()
    return np.int64(((noise.seed + _HALF) % (2 * _HALF)) - _HALF), positions, sequences
