"""Launches the FlashHead kernels on a rank's groups."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from flashhead_kernels import launch_choice
from flashhead_kernels.candidates import Candidates
from flashhead_kernels.launch_choice import LaunchCase
from flashhead_kernels.logits import FinalLogits, OutputBias
from flashhead_kernels.quantize import QuantizedCentroids
from flashhead_kernels.triton_head import (
    candidates_kernel,
    dots_kernel,
    one_launch_kernel,
    project_kernel,
)
from flashhead_kernels.triton_shapes import (
    HEAD_WARPS,
    MAX_BATCH_IN_ONE_LAUNCH,
    CentroidShape,
    HeadShape,
    fits_one_launch,
    is_interpreted,
    part_block,
    power_of_two,
)
from flashhead_kernels.triton_workspace import Workspace, workspace

_CLUSTERS_A_BLOCK = 64
_DOTS_WARPS = 4
_COLUMNS_A_BLOCK = 16
_PROJECT_WARPS = 4


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
    bias: OutputBias | None
    final: FinalLogits


def launch_head(
    inputs: HeadInputs,
    k: int,
    need_logsumexp: bool,
    need_unprobed: bool,
    launches: int | None,
    between: Callable[[], object] | None = None,
) -> Candidates:
    """The k (at most MAX_BEST) best keys of at least one row over at least one group.

    launches: 1, 2, or None for what `launch_choice` has measured to be faster.
    between: called between two launches, which it asks for where `launches` is None.

    Raises:
        ValueError: one launch for a shape that it cannot serve.
    """
    groups, clusters, tokens, size = inputs.rows.shape
    batch = inputs.hidden_states.shape[0]
    head = HeadShape.of(
        clusters, tokens, size, inputs.num_probes_per_group, inputs.pinned_rows.shape[1], k
    )
    centroids = None if inputs.centroids.bits == 16 else CentroidShape.of(inputs.centroids)
    one = fits_one_launch(head, centroids, batch)
    if launches == 1 and not one:
        raise ValueError(
            f"one launch cannot serve a batch of {batch} and groups of {clusters} clusters: use two"
        )
    launch = _Launch(inputs, head, centroids, groups, batch, need_logsumexp, need_unprobed)
    if not one or (launches is None and between is not None):
        launches = 2
    elif launches is None:
        device = inputs.hidden_states.device
        launches = launch_choice.table.choose(launch.case(), launch.one, launch.two, device)
    keys, logsumexp = launch.one() if launches == 1 else launch.two(between)
    return Candidates(keys[:, :k], logsumexp, launch.unprobed if need_unprobed else None)


class _Launch:
    """One call's tensors in the order and number that the kernels take them in."""

    def __init__(
        self,
        inputs: HeadInputs,
        head: HeadShape,
        centroids: CentroidShape | None,
        groups: int,
        batch: int,
        need_logsumexp: bool,
        need_unprobed: bool,
    ) -> None:
        self.inputs, self.head, self.centroids = inputs, head, centroids
        self.groups, self.batch = groups, batch
        self.need_logsumexp, self.need_unprobed = need_logsumexp, need_unprobed
        hidden = inputs.hidden_states
        of_row = head.best + need_unprobed
        self.out = torch.empty(batch * of_row, dtype=torch.int64, device=hidden.device)
        self.keys = self.out[: batch * head.best].view(batch, head.best)
        self.unprobed = self.out[batch * head.best :]
        self.logsumexp = torch.empty(batch if need_logsumexp else 0, device=hidden.device)
        values, scales = inputs.centroids.values, inputs.centroids.scales
        # Words of four bytes, where rows are made of them.
        whole = centroids is not None and centroids.width == 4
        self.values = values.view(torch.int32) if whole else values
        # A pointer has to be given even where nothing is read from it.
        self.scales = values if scales is None else scales
        self.words_a_row = 2 * centroids.groups * centroids.words if centroids else 0
        self.scales_a_row = 2 * centroids.groups if centroids else 0

    def case(self) -> LaunchCase:
        """What decides between `one` and `two`."""
        inputs, final = self.inputs, self.inputs.final
        return LaunchCase(
            device=launch_choice.device_name(self.keys.device),
            groups=self.groups,
            batch=self.batch,
            rows=str(inputs.rows.dtype),
            hidden=str(inputs.hidden_states.dtype),
            bias=inputs.bias is not None,
            softcap=final.softcap > 0,
            sample=final.noise is not None,
            logsumexp=self.need_logsumexp,
            head=self.head,
            centroids=self.centroids,
        )

    def one(self) -> tuple[Tensor, Tensor | None]:
        rows_pad = power_of_two(self.batch)
        space = self._workspace(rows=rows_pad, dots=0)
        out = self._out(space, space.counters)
        one_launch_kernel[(self.groups,)](
            self.inputs.hidden_states, *self._probing(), *self._rows(), self.values, self.scales,
            *self._tables(), space.words, space.scales, *out, *self._scalars(),
            *self._group_strides(),
            HEAD=self.head, CENTROIDS=self.centroids, BATCH=self.batch, BATCH_PAD=rows_pad,
            **self._flags(), DP4A=not is_interpreted(), PROJECTED=self._projected,
            num_warps=HEAD_WARPS,
        )  # fmt: skip
        return self.keys, self.logsumexp if self.need_logsumexp else None

    def two(self, between: Callable[[], object] | None = None) -> tuple[Tensor, Tensor | None]:
        clusters = self.head.clusters
        rows = min(power_of_two(self.batch), MAX_BATCH_IN_ONE_LAUNCH)
        block = min(self.head.clusters_pad, _CLUSTERS_A_BLOCK)
        grid = (self.groups, triton.cdiv(clusters, block), triton.cdiv(self.batch, rows))
        space = self._workspace(rows=grid[2] * rows, dots=self.batch * self.groups * clusters)
        dots_kernel[grid](
            *self._probing(), self.values, self.scales, space.words, space.scales, space.dots,
            self.batch, *self._group_strides(),
            rows * self.words_a_row, rows * self.scales_a_row,
            HEAD=self.head, CENTROIDS=self.centroids, BLOCK_M=block, BATCH=rows,
            DP4A=not is_interpreted(), PROJECTED=self._projected, num_warps=_DOTS_WARPS,
        )  # fmt: skip
        if between is not None:
            between()
        candidates_kernel[(self.groups, self.batch)](
            self.inputs.hidden_states, *self._rows(), space.dots, *self._tables(),
            *self._out(space, space.counters), *self._scalars(),
            HEAD=self.head, **self._flags(), num_warps=HEAD_WARPS,
        )  # fmt: skip
        return self.keys, self.logsumexp if self.need_logsumexp else None

    @property
    def _projected(self) -> bool:
        return self.inputs.centroids.projection is not None

    def _probing(self) -> tuple[Tensor, Tensor]:
        """States in the columns of the centroids, and what is added to each row's scores."""
        hidden, projection = self.inputs.hidden_states, self.inputs.centroids.projection
        if projection is None:
            return hidden, self.inputs.spread
        columns, size = projection.to_state.shape
        probing = torch.empty((self.batch, columns), device=hidden.device)
        added = torch.empty(self.batch, device=hidden.device)
        project_kernel[(self.batch, triton.cdiv(columns, _COLUMNS_A_BLOCK))](
            hidden, projection.to_state, projection.mean, probing, added,
            D=size, BLOCK_D=self.head.block_columns, COLUMNS=columns, BLOCK=_COLUMNS_A_BLOCK,
            num_warps=_PROJECT_WARPS,
        )  # fmt: skip
        return probing, added

    def _workspace(self, *, rows: int, dots: int) -> Workspace:
        return workspace(
            self.keys.device,
            words=rows * self.words_a_row,
            scales=rows * self.scales_a_row,
            dots=dots,
            parts=self.batch * self.groups,
            best=self.head.best + self.need_unprobed,
            rows=self.batch,
        )

    def _rows(self) -> tuple[Tensor, Tensor]:
        return self.inputs.rows, self.inputs.token_ids

    def _tables(self) -> tuple[Tensor, ...]:
        inputs, bias = self.inputs, self.inputs.bias
        noise = inputs.final.noise
        none = inputs.spread
        return (
            inputs.spread,
            none if bias is None else bias.rows,
            none if bias is None else bias.clusters,
            inputs.pinned_rows,
            inputs.pinned_token_ids,
            none if bias is None else bias.pinned,
            inputs.token_ids if noise is None else noise.positions,
            inputs.token_ids if noise is None or noise.sequences is None else noise.sequences,
        )

    def _out(self, space: Workspace, counters: Tensor) -> tuple[Tensor, ...]:
        return space.keys, space.sums, counters, self.out, self.logsumexp

    def _scalars(self) -> tuple[float, float, float, int]:
        final = self.inputs.final
        seed = 0 if final.noise is None else final.noise.seed
        return self.inputs.alpha, 1 / final.temperature, final.softcap, seed

    def _group_strides(self) -> tuple[int, int]:
        """Elements of values and scales a group."""
        return self.values[0].numel(), self.scales[0].numel()

    def _flags(self) -> dict[str, Any]:
        final = self.inputs.final
        return {
            "BIAS": self.inputs.bias is not None,
            "SOFTCAP": final.softcap > 0,
            "SAMPLE": final.noise is not None,
            "SEQUENCES": final.noise is not None and final.noise.sequences is not None,
            "LOGSUMEXP": self.need_logsumexp,
            "UNPROBED": self.need_unprobed,
            "PART_BLOCK": part_block(self.groups, self.head.best),
        }
