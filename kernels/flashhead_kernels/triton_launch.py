"""Launches the FlashHead kernels on a rank's groups."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
import triton
from torch import Tensor

from flashhead_kernels import launch_choice
from flashhead_kernels.candidates import Candidates
from flashhead_kernels.launch_choice import LaunchCase
from flashhead_kernels.quantize import QuantizedCentroids
from flashhead_kernels.triton_device import counters, num_processors, on_device
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
    is_interpreted,
    part_block,
    plan_head,
    power_of_two,
)

_GROUPS_A_PROGRAM = 8
_PREPARE_WARPS = 4
_CLUSTERS_A_WARP = 32


@dataclass(frozen=True)
class HeadInputs:
    """The arguments of `reference.flashhead_candidates`, those that are data."""

    hidden_states: Tensor
    rows: Tensor
    token_ids: Tensor
    centroids: QuantizedCentroids
    spread: Tensor
    pinned_rows: Tensor
    pinned_token_ids: Tensor
    alpha: float
    num_probes_per_group: int


class CentroidLaunch:
    """Centroids `[N, M]` of a rank and hidden states `[B, D]`, 1 to MAX_ROWS, in int8.

    A launch of its own quantises them where the plan says so; otherwise the programs that score
    them write them into the same memory.
    """

    def __init__(
        self, hidden_states: Tensor, centroids: QuantizedCentroids, head: HeadShape, groups: int
    ) -> None:
        self.hidden, self.centroids, self.head, self.groups = hidden_states, centroids, head, groups
        self.batch = hidden_states.shape[0]
        self.shape = None if centroids.bits == 16 else CentroidShape.of(centroids)
        self.plan: HeadPlan = plan_head(
            head, self.shape, groups, self.batch, num_processors(hidden_states.device),
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
    groups, clusters = centroids.values.shape[0], centroids.num_clusters
    head = HeadShape.of(clusters, 1, hidden_states.shape[1], 1, 0, 1)
    with on_device(hidden_states):
        launch = CentroidLaunch(hidden_states, centroids, head, groups)
        dots = launch.dots()
        summed = dots[0] if len(dots) == 1 else dots.sum(0)
        return summed + launch.words[2][:, None, None] if launch.projected else summed


def launch_head(
    inputs: HeadInputs,
    k: int,
    need_logsumexp: bool,
    need_unprobed: bool,
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
    with on_device(inputs.hidden_states):
        launch = _Launch(inputs, k, need_logsumexp, need_unprobed)
        plan = launch.centroids.plan
        if launches == 1 and not plan.fits_one_launch:
            raise ValueError(
                f"one launch cannot serve groups of {launch.head.clusters} clusters: use two"
            )
        if launches is None and between is not None:
            launches = 2
        elif launches is None and plan.fits_one_launch and plan.may_take_two:
            device = inputs.hidden_states.device
            launches = launch_choice.table.choose(launch.case(), launch.one, launch.two, device)
        elif launches is None:
            launches = 1 if plan.fits_one_launch else 2
        return launch.one() if launches == 1 else launch.two(between)


class _Launch:
    """One call's tensors."""

    def __init__(
        self, inputs: HeadInputs, k: int, need_logsumexp: bool, need_unprobed: bool
    ) -> None:
        groups, clusters, tokens, size = inputs.rows.shape
        self.inputs, self.k, self.groups = inputs, k, groups
        self.need_logsumexp, self.need_unprobed = need_logsumexp, need_unprobed
        self.head = HeadShape.of(
            clusters, tokens, size, inputs.num_probes_per_group, inputs.pinned_rows.shape[1], k
        )
        self.batch = inputs.hidden_states.shape[0]
        self.centroids = CentroidLaunch(inputs.hidden_states, inputs.centroids, self.head, groups)

    def case(self) -> LaunchCase:
        """What decides between `one` and `two`."""
        return LaunchCase(
            device=launch_choice.device_name(self.inputs.rows.device),
            groups=self.groups,
            batch=power_of_two(self.batch),
            rows=str(self.inputs.rows.dtype),
            hidden=str(self.inputs.hidden_states.dtype),
            logsumexp=self.need_logsumexp,
            head=self.head,
            centroids=self.centroids.shape,
        )

    def one(self) -> Candidates:
        centroids, plan = self.centroids, self.centroids.plan
        words, scales, means = centroids.words
        parts, found = self._results(self.groups)
        one_launch_kernel[(self.groups, triton.cdiv(self.batch, plan.rows_a_program))](
            self.inputs.hidden_states, self.inputs.rows, self.inputs.token_ids, centroids.values,
            centroids.scales, *self._tables(), words, scales, means, *parts, self.inputs.alpha,
            self.batch, *centroids.group_strides,
            HEAD=self.head, CENTROIDS=centroids.shape, BATCH=plan.rows_a_program,
            ROWS=ROWS_A_WARP * ONE_LAUNCH_WARPS, GROUPS_PAD=centroids.groups_pad,
            PREPARED=plan.prepares, PROJECTED=centroids.projected, LOGSUMEXP=self.need_logsumexp,
            UNPROBED=self.need_unprobed, PART_BLOCK=part_block(self.head.best),
            COMPILED=not is_interpreted(), num_warps=ONE_LAUNCH_WARPS,
            maxnreg=ONE_LAUNCH_REGISTERS,
        )  # fmt: skip
        return found

    def two(self, between: Callable[[], object] | None = None) -> Candidates:
        centroids, plan = self.centroids, self.centroids.plan
        dots = centroids.dots()
        if between is not None:
            between()
        probes = triton.cdiv(self.head.probes, plan.splits)
        splits = triton.cdiv(self.head.probes, probes)
        parts, found = self._results(self.groups * splits)
        candidates_kernel[(self.groups, splits, self.batch)](
            self.inputs.hidden_states, self.inputs.rows, self.inputs.token_ids, dots,
            centroids.words[2], *self._tables(), *parts, self.inputs.alpha, probes,
            HEAD=self.head, SEGMENTS=plan.segments, ROWS=ROWS_A_WARP * CANDIDATES_WARPS,
            PROJECTED=centroids.projected, LOGSUMEXP=self.need_logsumexp,
            UNPROBED=self.need_unprobed, PART_BLOCK=part_block(self.head.best),
            num_warps=CANDIDATES_WARPS, maxnreg=CANDIDATES_REGISTERS,
        )  # fmt: skip
        return found

    def _tables(self) -> tuple[Tensor, Tensor, Tensor]:
        inputs = self.inputs
        return inputs.spread, inputs.pinned_rows, inputs.pinned_token_ids

    def _results(self, num_parts: int) -> tuple[tuple[Tensor, ...], Candidates]:
        """Memory for parts and results as the kernels take it, and what it will hold."""
        batch, best = self.batch, self.head.best
        device = self.inputs.hidden_states.device
        parts = batch * num_parts
        num_keys = parts * best + parts * self.need_unprobed
        part_keys = torch.empty(num_keys, dtype=torch.int64, device=device)
        out = torch.empty(batch * (best + self.need_unprobed), dtype=torch.int64, device=device)
        ids = torch.empty((batch, best), dtype=torch.int64, device=device)
        logits = torch.empty((batch, best), dtype=torch.float32, device=device)
        # A pointer has to be given even where nothing is written.
        part_sums, logsumexp = part_keys, logits
        if self.need_logsumexp:
            part_sums = torch.empty(2 * parts, dtype=torch.float32, device=device)
            logsumexp = torch.empty(batch, dtype=torch.float32, device=device)
        found = Candidates(
            out[: batch * best].view(batch, best)[:, : self.k],
            logsumexp if self.need_logsumexp else None,
            out[batch * best :] if self.need_unprobed else None,
            ids[:, : self.k],
            logits[:, : self.k],
        )
        return (part_keys, part_sums, counters(device), out, ids, logits, logsumexp), found
