"""The ways to a greedy token that `bench.py` times, each over copies of one rank's weights."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

from bench_shapes import Shard
from flashhead_kernels import reference

FLASHHEAD = "flashhead"
TWO_LAUNCHES = "flashhead_two_launches"
DENSE_FUSED = "dense_fused"
DENSE_TORCH = "dense_torch"
PUBLISHED_EAGER = "published_eager"
PUBLISHED_GRAPH = "published_graph"

_PUBLISHED_CLUSTER_SIZE = 16
_PUBLISHED_SHARE = 16
_BFLOAT16_TIE = 2.0**-7
"""Two logits nearer than this share of the greatest may change places when rounded to bfloat16."""
_FLOAT32_ROUNDING = 2.0**-24
_DEVIATIONS = 6
_STATES_CHECKED = 4


class WrongResultError(Exception):
    """A way gave another token than its definition: its time means nothing."""


@dataclass(frozen=True)
class Published:
    """FlashHead as published (arXiv 2603.14591), in torch's operations, over a dense head's rows.

    C = V/16 clusters of 16 tokens, here neighbouring rows; p = C/16 probes; unit-norm centroids in
    the rows' dtype. clusters `[C, 16, D]`; centroids `[C, D]`.
    """

    clusters: Tensor
    centroids: Tensor
    num_probes: int

    @classmethod
    def over(cls, shard: Shard) -> Published:
        rows = shard.dense_rows
        num_clusters = len(rows) // _PUBLISHED_CLUSTER_SIZE
        clusters = rows[: num_clusters * _PUBLISHED_CLUSTER_SIZE].view(
            num_clusters, _PUBLISHED_CLUSTER_SIZE, -1
        )
        means = clusters.mean(1, dtype=torch.float32)
        centroids = torch.nn.functional.normalize(means, dim=1).to(rows.dtype)
        return cls(clusters, centroids, -(-num_clusters // _PUBLISHED_SHARE))

    def probes(self, states: Tensor) -> Tensor:
        """Clusters int64 `[B, p]` that `states [B, D]` probe, in no order."""
        scores = torch.nn.functional.linear(states, self.centroids)
        return scores.topk(self.num_probes, dim=1, sorted=False).indices

    def __call__(self, states: Tensor) -> Tensor:
        """Token ids `[B]`."""
        batch, size = states.shape
        probes = self.probes(states)
        flat = self.clusters.view(len(self.clusters), -1)
        chosen = flat.index_select(0, probes.flatten()).view(batch, -1, size)
        logits = torch.bmm(chosen, states.unsqueeze(2)).squeeze(2)
        best = logits.argmax(1)
        cluster = probes.gather(1, (best // _PUBLISHED_CLUSTER_SIZE).unsqueeze(1)).squeeze(1)
        return cluster * _PUBLISHED_CLUSTER_SIZE + best % _PUBLISHED_CLUSTER_SIZE

    def read_bytes(self, states: Tensor) -> float:
        """Bytes that a step must read, each once; the mean over batches `states [K, B, D]`."""
        distinct = sum(len(torch.unique(self.probes(batch))) for batch in states) / len(states)
        per_cluster = self.clusters[0].nbytes
        return self.centroids.nbytes + states[0].nbytes + distinct * per_cluster


@dataclass(frozen=True)
class Copy:
    """One of several copies of the weights."""

    shard: Shard
    published: Published


@dataclass(frozen=True)
class Checked:
    """Tokens compared with the definition's, and those of them that tie with another token.

    A tie is a token whose float64 logit is below that of the definition's token by no more than the
    rounding of both sums: either is right.
    """

    tokens: int
    ties: int


FinalLogit = Callable[[int, int, float, float], tuple[float, float]]
"""`(row, token, logit, rounding)` to the final logit and its rounding."""


@dataclass(frozen=True)
class Way:
    """step: `(copy, states [B, D])` to what `check` reads: keys `[B, 1]` or token ids `[B]`.

    graph: its steps are captured in a CUDA graph; else launches are part of its time.
    check: takes the copy, the states and what the step gave; raises WrongResultError.
    required: a failure to capture it is an error.
    """

    name: str
    step: Callable[[Copy, Tensor], Tensor]
    check: Callable[[Copy, Tensor, Tensor], Checked]
    graph: bool = True
    required: bool = True


def make_ways(ops: ModuleType, *, graphs: bool) -> list[Way]:
    """All ways that a device allows; `graphs`: it has CUDA graphs."""

    def fused(copy: Copy, states: Tensor, **options: int) -> Tensor:
        shard = copy.shard
        found: Tensor = ops.candidates(states, shard.index, shard.query(), **options).keys
        return found

    def dense_fused(copy: Copy, states: Tensor) -> Tensor:
        found: Tensor = ops.dense_candidates(states, copy.shard.dense_rows, 0).keys
        return found

    ways = [
        Way(FLASHHEAD, fused, _check_flashhead),
        Way(DENSE_FUSED, dense_fused, _check_dense_fused),
        Way(DENSE_TORCH, _dense_torch, _check_dense_torch),
        Way(PUBLISHED_EAGER, _published, _check_published, graph=False),
    ]
    if graphs:
        ways.append(Way(PUBLISHED_GRAPH, _published, _check_published, required=False))
    if "launches" in inspect.signature(ops.candidates).parameters:
        two = Way(TWO_LAUNCHES, lambda copy, s: fused(copy, s, launches=2), _check_flashhead)
        ways.insert(1, two)
    return ways


def read_bytes(name: str, copy: Copy, states: Tensor) -> float:
    """Bytes that one step of the way must read, the mean over batches `states [K, B, D]`."""
    batch_size = states.shape[1]
    if name in (FLASHHEAD, TWO_LAUNCHES):
        clusters = copy.shard.count_clusters_read(states)
        return copy.shard.flashhead_bytes(clusters, batch_size)
    if name in (PUBLISHED_EAGER, PUBLISHED_GRAPH):
        return copy.published.read_bytes(states)
    return copy.shard.dense_bytes(batch_size)


def _dense_torch(copy: Copy, states: Tensor) -> Tensor:
    return torch.nn.functional.linear(states, copy.shard.dense_rows).max(1).indices


def _published(copy: Copy, states: Tensor) -> Tensor:
    return copy.published(states)


def _check_flashhead(copy: Copy, states: Tensor, keys: Tensor) -> Checked:
    shard = copy.shard
    expected = reference.candidates(states, shard.index, shard.query())
    return same_tokens(FLASHHEAD, keys, expected.keys, states, shard.row_of)


def _check_dense_fused(copy: Copy, states: Tensor, keys: Tensor) -> Checked:
    some = states[:_STATES_CHECKED]
    expected = reference.dense_candidates(some, copy.shard.dense_rows, 0)
    keys = keys[: len(some)]
    return same_tokens(DENSE_FUSED, keys, expected.keys, some, copy.shard.dense_row_of)


def same_tokens(
    name: str,
    keys: Tensor,
    expected: Tensor,
    states: Tensor,
    row_of: Callable[[int], Tensor | None],
    final: FinalLogit | None = None,
) -> Checked:
    """Compare keys, one of each of B rows, with those expected, by the logits of their tokens.

    row_of: the row `[D]` of a token, None where there is none. final: what becomes of a logit
    before tokens are compared; None for nothing. Logits are scored in float64. The
    rounding of a float32 sum of D products is taken as `6 sqrt(D) 2^-24 sum |h_d row_d|`: a bound
    that random rounding errors exceed with probability 3e-8, in whatever order they are added
    (Higham and Mary, "A new approach to probabilistic rounding error analysis", 2019).

    Raises:
        WrongResultError: another token that is no tie, a token that no row stands for, or a logit
            that is not its token's.
    """
    logits, ids = (one.flatten() for one in reference.unpack_keys(keys))
    best_ids = reference.unpack_keys(expected)[1].flatten()

    def score(row: int, token: int) -> tuple[float, float]:
        found = row_of(token)
        if found is None:
            raise WrongResultError(f"{name} gave token {token} for row {row}, which is no token")
        logit, rounding = _exact_logit(states[row], found)
        return final(row, token, logit, rounding) if final else (logit, rounding)

    ties = 0
    for row, (token, best) in enumerate(zip(ids.tolist(), best_ids.tolist(), strict=True)):
        truth, rounding = score(row, token)
        given = float(logits[row])
        if not abs(given - truth) <= rounding:
            raise WrongResultError(
                f"{name} gave logit {given:.6f} for token {token} of row {row}: it is {truth:.6f}, "
                f"give or take {rounding:.1e}"
            )
        if token != best:
            greatest, other = score(row, best)
            if abs(greatest - truth) > rounding + other:
                raise WrongResultError(
                    f"{name} gave token {token} of logit {truth:.6f} for row {row}, its reference "
                    f"{best} of {greatest:.6f}: no tie, which ends at {rounding + other:.1e}"
                )
            ties += 1
    return Checked(len(ids), ties)


def _exact_logit(state: Tensor, row: Tensor) -> tuple[float, float]:
    """`h . row` in float64, and the rounding that a float32 sum of it may have."""
    products = state.double() * row.double()
    rounding = _DEVIATIONS * len(products) ** 0.5 * _FLOAT32_ROUNDING
    return float(products.sum()), rounding * float(products.abs().sum())


def _check_dense_torch(copy: Copy, states: Tensor, ids: Tensor) -> Checked:
    some = states[:_STATES_CHECKED].float()
    some_ids = ids[: len(some)]
    logits = some @ copy.shard.dense_rows.float().T
    found = logits.gather(1, some_ids[:, None])[:, 0]
    return _near_best(DENSE_TORCH, logits.amax(1), found, some_ids)


def _check_published(copy: Copy, states: Tensor, ids: Tensor) -> Checked:
    """The token is the best, within bfloat16's rounding, of those in the clusters probed."""
    published = copy.published
    all_rows = published.clusters.flatten(0, 1)
    probes = published.probes(states)  # of all states: another batch may round other scores
    count = min(len(states), _STATES_CHECKED)
    best, found = [], []
    for row in range(count):
        state = states[row].float()
        best.append((published.clusters[probes[row]].float() @ state).amax())
        found.append(all_rows[ids[row]].float() @ state)
    return _near_best("published", torch.stack(best), torch.stack(found), ids[:count])


def _near_best(name: str, best: Tensor, found: Tensor, ids: Tensor) -> Checked:
    """Refuse `ids [B]` whose logits `found [B]` are below `best [B]` by more than rounding."""
    if bool((best - found > _BFLOAT16_TIE * best.abs()).any()):
        row = int((best - found).argmax())
        raise WrongResultError(
            f"{name} gave token {int(ids[row])}, whose logit {float(found[row]):.4f} is below the "
            f"greatest, {float(best[row]):.4f}"
        )
    return Checked(len(ids), int((found < best).sum()))
