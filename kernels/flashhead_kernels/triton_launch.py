"""Launches the FlashHead kernels on a rank's groups."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property, partial

import torch
import triton
from torch import Tensor

from flashhead_kernels import launch_choice
from flashhead_kernels.launch_choice import LaunchCase
from flashhead_kernels.quantize import QuantizedCentroids
from flashhead_kernels.shard import Candidates, IndexShard, Query
from flashhead_kernels.triton_head import (
    candidates_kernel,
    dots_kernel,
    one_launch_kernel,
    prepare_kernel,
)
from flashhead_kernels.triton_shapes import (
    CANDIDATES_REGISTERS,
    CANDIDATES_WARPS,
    ONE_LAUNCH_REGISTERS,
    ONE_LAUNCH_WARPS,
    ROWS_A_WARP,
    CentroidShape,
    HeadPlan,
    HeadShape,
    counters,
    is_interpreted,
    num_processors,
    on_device,
    part_block,
    plan_head,
    power_of_two,
)

_GROUPS_A_PROGRAM = 8
_PREPARE_WARPS = 4
_CLUSTERS_A_WARP = 32


class CentroidStep:
    """Centroids `[N, M]` of a rank and hidden states `[B, D]`, 1 to MAX_ROWS, in int8.

    A launch of its own quantises them where the plan says so; otherwise the programs that score
    them write them into the same memory.
    """

    def __init__(
        self, hidden_states: Tensor, centroids: QuantizedCentroids, head: HeadShape
    ) -> None:
        self.hidden, self.centroids, self.head = hidden_states, centroids, head
        self.batch, self.groups = len(hidden_states), len(centroids.values)
        self.shape = None if centroids.bits == 16 else CentroidShape.of(centroids)
        self.plan: HeadPlan = plan_head(
            head, self.shape, self.groups, self.batch, num_processors(hidden_states.device),
            projected=centroids.projection is not None,
        )  # fmt: skip
        values, scales = centroids.values, centroids.scales
        # Words of four bytes, where rows are made of them.
        whole = self.shape is not None and self.shape.width == 4
        self.values = values.view(torch.int32) if whole else values
        # A pointer has to be given even where nothing is read from it.
        self.scales = values if scales is None else scales

    @cached_property
    def words(self) -> tuple[Tensor, Tensor, Tensor]:
        """Words, scales and the part of `h . mean` of each row, see `prepare_kernel`."""
        device, shape, projection = self.hidden.device, self.shape, self.centroids.projection
        if shape is None:
            return self.hidden, self.hidden, self.hidden
        rows = power_of_two(self.batch)
        words = torch.empty((rows, 2, shape.groups, shape.words), dtype=torch.int32, device=device)
        scales = torch.empty((rows, 2, shape.groups), dtype=torch.float32, device=device)
        if not self.plan.prepares:
            return words, scales, scales
        means = torch.empty(self.batch, dtype=torch.float32, device=device)
        coordinates = scales
        if projection is not None:
            columns = len(projection.to_state)
            coordinates = torch.empty((self.batch, columns), dtype=torch.float32, device=device)
        groups = 1 if projection is not None else min(_GROUPS_A_PROGRAM, power_of_two(shape.groups))
        prepare_kernel[(self.batch, triton.cdiv(shape.groups, groups))](
            self.hidden, *((scales, scales) if projection is None else
                           (projection.to_state, projection.mean)),
            coordinates, means, words, scales,
            CENTROIDS=shape, GROUPS=groups, D=self.hidden.shape[1],
            BLOCK_D=self.head.block_columns, PROJECTED=projection is not None,
            num_warps=_PREPARE_WARPS,
        )  # fmt: skip
        return words, scales, means

    @property
    def projected(self) -> bool:
        return self.centroids.projection is not None

    @property
    def group_strides(self) -> tuple[int, int]:
        """Elements of values and scales a group."""
        return self.values.stride(0), self.scales.stride(0)

    @property
    def groups_pad(self) -> int:
        return 1 if self.shape is None else power_of_two(self.shape.groups)

    def dots(self) -> Tensor:
        """`h . centroid` by segments, float32 `[segments, B, N, M]`, without `h . mean`."""
        plan, clusters = self.plan, self.head.clusters
        words, scales, _ = self.words
        size = (plan.segments, self.batch, self.groups, clusters)
        dots = torch.empty(size, dtype=torch.float32, device=self.hidden.device)
        grid = (
            self.groups * plan.segments,
            triton.cdiv(clusters, plan.block_clusters),
            triton.cdiv(self.batch, plan.dots_rows),
        )
        dots_kernel[grid](
            self.hidden, self.values, self.scales, words, scales, dots, self.batch,
            *self.group_strides,
            HEAD=self.head, CENTROIDS=self.shape, SEGMENTS=plan.segments,
            BLOCK_M=plan.block_clusters, BATCH=plan.dots_rows, GROUPS_PAD=self.groups_pad,
            PREPARED=plan.prepares, COMPILED=not is_interpreted(),
            num_warps=plan.block_clusters // _CLUSTERS_A_WARP,
        )  # fmt: skip
        return dots


def launch_dots(hidden_states: Tensor, centroids: QuantizedCentroids) -> Tensor:
    """`reference.centroid_dots` of 1 to MAX_ROWS rows: float32 `[B, N, M]`."""
    head = HeadShape.of_centroids(centroids.num_clusters, hidden_states.shape[1])
    with on_device(hidden_states):
        step = CentroidStep(hidden_states, centroids, head)
        dots = step.dots()
        summed = dots[0] if len(dots) == 1 else dots.sum(0)
        return summed + step.words[2][:, None, None] if step.projected else summed


def launch_head(
    hidden_states: Tensor,
    shard: IndexShard,
    query: Query,
    launches: int | None,
    between: Callable[[], object] | None = None,
) -> Candidates:
    """The k (at most MAX_BEST) best keys of 1 to MAX_ROWS rows over at least one group.

    launches: 1, 2, or None for what `launch_choice` has measured to be faster; 2 also where hidden
        states need a launch before them.
    between: called between two launches, which it asks for where `launches` is None.

    Raises:
        ValueError: one launch for a shape that it cannot serve.
    """
    head = HeadShape.of(shard, query)
    with on_device(hidden_states):
        step = CentroidStep(hidden_states, shard.centroids, head)
        plan = step.plan
        one = partial(_one_launch, step, shard, query)
        two = partial(_two_launches, step, shard, query)
        if launches == 1 and not plan.fits_one_launch:
            raise ValueError(f"one launch cannot serve groups of {head.clusters} clusters: use two")
        if launches is None and between is not None:
            launches = 2
        elif launches is None and plan.fits_one_launch and plan.may_take_two:
            case = LaunchCase(
                device=launch_choice.device_name(hidden_states.device),
                groups=step.groups,
                batch=power_of_two(step.batch),
                rows=str(shard.rows.dtype),
                hidden=str(hidden_states.dtype),
                logsumexp=query.need_logsumexp,
                head=head,
                centroids=step.shape,
            )
            launches = launch_choice.table.choose(case, one, two, hidden_states.device)
        elif launches is None:
            launches = 1 if plan.fits_one_launch else 2
        return one() if launches == 1 else two(between)


def _one_launch(step: CentroidStep, shard: IndexShard, query: Query) -> Candidates:
    plan, head = step.plan, step.head
    words, scales, means = step.words
    parts, found = _results(step, query, step.groups)
    one_launch_kernel[(step.groups, triton.cdiv(step.batch, plan.rows_a_program))](
        step.hidden, shard.rows, shard.token_ids, step.values, step.scales, shard.spread,
        shard.pinned_rows, shard.pinned_token_ids, words, scales, means, *parts, query.alpha,
        step.batch, *step.group_strides,
        HEAD=head, CENTROIDS=step.shape, BATCH=plan.rows_a_program,
        ROWS=ROWS_A_WARP * ONE_LAUNCH_WARPS, GROUPS_PAD=step.groups_pad,
        PREPARED=plan.prepares, PROJECTED=step.projected, LOGSUMEXP=query.need_logsumexp,
        UNPROBED=query.need_unprobed, PART_BLOCK=part_block(head.best),
        COMPILED=not is_interpreted(), num_warps=ONE_LAUNCH_WARPS, maxnreg=ONE_LAUNCH_REGISTERS,
    )  # fmt: skip
    return found


def _two_launches(
    step: CentroidStep,
    shard: IndexShard,
    query: Query,
    between: Callable[[], object] | None = None,
) -> Candidates:
    plan, head = step.plan, step.head
    dots = step.dots()
    if between is not None:
        between()
    probes = triton.cdiv(head.probes, plan.splits)
    splits = triton.cdiv(head.probes, probes)
    parts, found = _results(step, query, step.groups * splits)
    candidates_kernel[(step.groups, splits, step.batch)](
        step.hidden, shard.rows, shard.token_ids, dots, step.words[2], shard.spread,
        shard.pinned_rows, shard.pinned_token_ids, *parts, query.alpha, probes,
        HEAD=head, SEGMENTS=plan.segments, ROWS=ROWS_A_WARP * CANDIDATES_WARPS,
        PROJECTED=step.projected, LOGSUMEXP=query.need_logsumexp, UNPROBED=query.need_unprobed,
        PART_BLOCK=part_block(head.best), num_warps=CANDIDATES_WARPS,
        maxnreg=CANDIDATES_REGISTERS,
    )  # fmt: skip
    return found


def _results(
    step: CentroidStep, query: Query, num_parts: int
) -> tuple[tuple[Tensor, ...], Candidates]:
    """Memory for parts and results as the kernels take it, and what it will hold."""
    batch, best, device = step.batch, step.head.best, step.hidden.device
    parts = batch * num_parts
    num_keys = parts * best + parts * query.need_unprobed
    part_keys = torch.empty(num_keys, dtype=torch.int64, device=device)
    out = torch.empty(batch * (best + query.need_unprobed), dtype=torch.int64, device=device)
    ids = torch.empty((batch, best), dtype=torch.int64, device=device)
    logits = torch.empty((batch, best), dtype=torch.float32, device=device)
    # A pointer has to be given even where nothing is written.
    part_sums, logsumexp = part_keys, logits
    if query.need_logsumexp:
        part_sums = torch.empty(2 * parts, dtype=torch.float32, device=device)
        logsumexp = torch.empty(batch, dtype=torch.float32, device=device)
    found = Candidates(
        out[: batch * best].view(batch, best)[:, : query.k],
        logsumexp if query.need_logsumexp else None,
        out[batch * best :] if query.need_unprobed else None,
        ids[:, : query.k],
        logits[:, : query.k],
    )
    return (part_keys, part_sums, counters(device), out, ids, logits, logsumexp), found
