"""FlashHead with a second round for rows whose best token it may have missed.

The exchange of a greedy step carries a second key beside the best candidate: the greatest probing
score of a cluster that nobody probed. Both are maxima over fixed groups, so after it every rank
knows every row's margin,

    margin = logit of the best candidate - greatest probing score of an unprobed cluster,

and every rank, at every tp_size, takes the same decision about a row: one more round for those
whose margin lies below a threshold, nothing more for the others. A row is judged by its own margin
alone, so its answer does not depend on its batch.

The second round scores every token of the shard, or probes more clusters. What it finds replaces
the first round's answer, whose candidates are among its own.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from math import isnan
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from flashhead_dist.errors import UserError
from flashhead_dist.heads.base import (
    Head,
    HeadOutput,
    HeadShape,
    HeadStyle,
    Want,
    keys_sent,
    merge_candidates,
    merge_judged,
    merge_scanned,
    share_of,
)
from flashhead_dist.heads.dense import IndexScan
from flashhead_dist.heads.flashhead import FlashHead
from flashhead_dist.index import IndexManifest, LoadedShard
from flashhead_dist.index.calibrate import USUAL_SHARE
from flashhead_dist.parallel import Steps, TensorParallel
from flashhead_kernels.shard import Candidates
from flashhead_topology.cost import HeadWork, Part

if TYPE_CHECKING:
    from flashhead_dist.heads.registry import HeadBuilder

_GREEDY = Want()
_ID_BYTES = 4


@dataclass(frozen=True, kw_only=True)
class Escalation:
    """Which rows take a second round, and what it does.

    Raises:
        UserError: a margin that is NaN, fewer than one probe, a share outside 0..1.
    """

    margin: float = 0.0
    """Rows whose margin lies below it, in logits. 0: an unprobed cluster's score is above the best
    candidate's logit; -inf: no row; inf: every row that leaves a cluster unprobed."""
    num_probes: int | None = None
    """Clusters that the second round probes in all; None: it scores every token."""
    expected_share: float = USUAL_SHARE
    """Share of rows that are expected to escalate, for the account of bytes before any was seen."""

    def __post_init__(self) -> None:
        if isnan(self.margin):
            raise UserError("the margin of escalation is not a number: give one in logits, as 0")
        if self.num_probes is not None and self.num_probes < 1:
            raise UserError(
                f"escalation to {self.num_probes} probes looks at nothing: give more than the "
                f"head's own number, or none to score every token"
            )
        if not 0 <= self.expected_share <= 1:
            raise UserError(
                f"the expected share of escalated rows is {self.expected_share}: it must lie "
                f"between 0 and 1"
            )


def usual_escalation(manifest: IndexManifest) -> Escalation:
    """What was chosen for the index (`index.calibrate.write_escalation`), else the margin that
    USUAL_SHARE of its calibration states lie below, else 0.
    """
    chosen = manifest.calibration.get("escalation", {}).get("chosen")
    if chosen is not None:
        return Escalation(
            margin=chosen["margin"],
            num_probes=chosen["second_probes"],
            expected_share=chosen["share"],
        )
    return Escalation(margin=manifest.margin_by_share.get(USUAL_SHARE, 0.0))


class FlashHeadEscalate(FlashHead):
    """Two keys a row in one exchange, and a second round for the rows that they cast doubt on.

    With k > 1 a row is judged by its best candidate too, so that the first of k tokens is the
    greedy one. A log-sum-exp is that of the round which gave the tokens.

    num_rows, num_escalated: rows served so far, and those of them that took a second round.
    """

    name: ClassVar[str] = "flashhead_escalate"
    style: ClassVar[HeadStyle] = HeadStyle("#5B2A86", "p")
    samples: ClassVar[bool] = False
    capturable: ClassVar[bool] = False
    """The host has to know which rows escalate."""

    def __init__(
        self,
        tp: TensorParallel,
        index: LoadedShard,
        *,
        num_probes: int,
        alpha: float,
        escalation: Escalation | None = None,
    ) -> None:
        """escalation: the default one where None.

        Raises:
            UserError: as `IndexHead`, or a second round that probes no more than the first, or
                more clusters than there are.
        """
        super().__init__(tp, index, num_probes=num_probes, alpha=alpha)
        self.escalation = escalation or Escalation()
        self.shape = replace(self.shape, escalated_probes=self.escalation.num_probes or 0)
        self.num_rows = 0
        self.num_escalated = 0
        second, clusters = self.escalation.num_probes, index.manifest.num_clusters
        if second is not None and not num_probes < second <= clusters:
            raise UserError(
                f"escalation to {second} probes must lie above the head's own {num_probes} and "
                f"not above the index's {clusters} clusters: choose a number between, or none to "
                f"score every token"
            )

    @property
    def escalated_share(self) -> float:
        """Share of rows that take a second round: of those served, or as expected before any."""
        if self.num_rows == 0:
            return self.escalation.expected_share
        return self.num_escalated / self.num_rows

    @classmethod
    def load(cls, builder: HeadBuilder, num_probes: int | None, alpha: float | None) -> Head:
        escalation = builder.escalation or usual_escalation(builder.manifest)
        probing = builder.probing(num_probes, alpha)
        return cls(builder.tp, builder.index_shard, **probing, escalation=escalation)

    @classmethod
    def work(cls, shape: HeadShape, tp_size: int, batch: int = 1, tp_rank: int = 0) -> HeadWork:
        """Two keys a row, and on average the second round of the rows that escalate.

        Launches are those of the first round; on CUDA the host waits to know which rows escalate,
        which is not modelled.
        """
        work = super().work(shape, tp_size, batch, tp_rank)
        share = shape.escalated_share
        any_row = 1 - (1 - share) ** batch
        centroids, candidates = work.parts["head/centroids"], work.parts["head/candidates"]
        if shape.escalated_probes:
            wider = replace(shape, num_probes=shape.escalated_probes)
            second = super().work(wider, tp_size, 1, tp_rank).parts
            centroids = _plus(centroids, second["head/centroids"], any_row)
            groups = share_of(shape.num_groups, tp_size, tp_rank)
            row = shape.row_bytes + _ID_BYTES
            pinned = groups * shape.pinned_per_group * row
            rows = second["head/candidates"]
            most = groups * (shape.num_clusters // shape.num_groups) * shape.cluster_size * row
            probed = min(share * batch * (rows.read_bytes - pinned), any_row * most)
            candidates = _plus(candidates, replace(rows, read_bytes=0.0), share * batch)
            read = candidates.read_bytes + any_row * pinned + probed
            candidates = replace(candidates, read_bytes=read)
        else:
            scan = IndexScan.work(shape, tp_size, 1, tp_rank).parts["head/candidates"]
            candidates = _plus(candidates, scan, any_row)
        exchanges = [keys_sent(batch, keys_per_row=2)]
        if share:
            escalated = max(1, round(share * batch / any_row))
            exchanges.append(keys_sent(escalated, times=any_row))
        return replace(
            work,
            parts={"head/centroids": centroids, "head/candidates": candidates},
            exchanges=tuple(exchanges),
            # One tensor of two keys, a margin, and which rows lie below.
            launches={device: number + 4 for device, number in work.launches.items()},
        )

    def read_bytes_per_step(self, batch_size: int) -> int:
        """Of the first round, and the mean over batches of what the second reads."""
        self.shape = replace(self.shape, escalated_share=self.escalated_share)
        return super().read_bytes_per_step(batch_size)

    def steps(self, hidden_states: Tensor, want: Want) -> Steps[HeadOutput]:
        found, mass = self.first_round(hidden_states, want)
        assert found.unprobed is not None
        output, unprobed = yield from merge_judged(
            found.keys, found.unprobed, found.logsumexp, mass
        )
        # Every cluster probed: unprobed is -inf and the margin inf, which lies below no threshold.
        margins = output.logits[:, 0] - unprobed
        rows = (margins < self.escalation.margin).nonzero()[:, 0]
        self.num_rows += len(margins)
        self.num_escalated += len(rows)
        if len(rows) == 0:
            return output
        second = yield from self._second_round(hidden_states[rows], want)
        return _replaced(output, rows, second)

    def first_round(
        self, hidden_states: Tensor, want: Want = _GREEDY
    ) -> tuple[Candidates, Tensor | None]:
        """This rank's candidates of `hidden_states [B, D]` with its best unprobed cluster, and the
        log-sum-exp `[B]` over them where the candidates' mass is wanted.
        """
        return self._find(hidden_states, want, need_unprobed=True)

    def _second_round(self, hidden_states: Tensor, want: Want) -> Steps[HeadOutput]:
        if self.escalation.num_probes is not None:
            found, mass = self._find(hidden_states, want, num_probes=self.escalation.num_probes)
            return (yield from merge_candidates(found, mass))
        every = replace(want, logsumexp=want.logsumexp or want.candidate_mass)
        scanned = self._scan.candidates(hidden_states, every)
        return (yield from merge_scanned(scanned, want))

    @cached_property
    def _scan(self) -> IndexScan:
        return IndexScan(self.tp, self.index)


def _replaced(output: HeadOutput, rows: Tensor, second: HeadOutput) -> HeadOutput:
    """`output` with `rows` int64 `[n]` taken from `second`."""

    def put(first: Tensor | None, other: Tensor | None) -> Tensor | None:
        return None if first is None or other is None else first.index_copy(0, rows, other)

    return HeadOutput(
        torch.index_copy(output.token_ids, 0, rows, second.token_ids),
        torch.index_copy(output.logits, 0, rows, second.logits),
        put(output.logsumexp, second.logsumexp),
        put(output.candidate_logsumexp, second.candidate_logsumexp),
    )


def _plus(part: Part, other: Part, times: float) -> Part:
    """`part`, and `times` that of `other`."""
    return replace(
        part,
        read_bytes=part.read_bytes + times * other.read_bytes,
        flops=part.flops + times * other.flops,
    )
