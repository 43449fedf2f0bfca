"""FlashHead for small batches, a scan of the whole shard for large ones.

Rows of a batch probe different clusters, so what retrieval reads grows with the batch while a scan
reads the shard once. From some batch size on the scan is faster; where depends on shapes and device
and is measured (`measure.crossover`). It may change back: both ways take other kernels for larger
batches. The scan runs over the index's own rows, so the rank holds no
second copy, and gives the dense head's tokens.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from functools import cached_property
from typing import ClassVar

from torch import Tensor

from flashhead_dist.heads.base import HeadOutput, Want
from flashhead_dist.heads.flashhead import FlashHead
from flashhead_dist.heads.index_scan import IndexScan
from flashhead_dist.heads.merge import merge_scanned
from flashhead_dist.parallel import Steps
from flashhead_kernels.shard import Candidates


def scans_at(changes_at: Sequence[int], batch_size: int) -> bool:
    """Whether a head with these `changes_at` scans a batch of this size."""
    return bisect_right(changes_at, batch_size) % 2 == 1


class FlashHeadAuto(FlashHead):
    """Retrieves, from `changes_at[0]` rows on scans, from `changes_at[1]` on retrieves, and so on.

    Every rank must hold the same `changes_at`, ascending. Both ways take the same one exchange.
    """

    name: ClassVar[str] = "flashhead_auto"
    changes_at: tuple[int, ...] = ()

    def scans(self, batch_size: int) -> bool:
        """Whether a batch of this size is scanned."""
        return scans_at(self.changes_at, batch_size)

    def steps(self, hidden_states: Tensor, want: Want) -> Steps[HeadOutput]:
        if not self.scans(hidden_states.shape[0]):
            return (yield from super().steps(hidden_states, want))
        mass = Want(want.k, want.logsumexp or want.candidate_mass)
        found = self.scan(hidden_states, mass)
        return (yield from merge_scanned(found, want))

    def retrieve(self, hidden_states: Tensor, want: Want) -> Candidates:
        """This rank's candidates of `hidden_states [B, D]`, by retrieval."""
        return self._find(hidden_states, want)[0]

    def scan(self, hidden_states: Tensor, want: Want) -> Candidates:
        """This rank's candidates of `hidden_states [B, D]`, by scoring every token it holds."""
        return self._scan.candidates(hidden_states, want)

    def read_bytes_per_step(self, batch_size: int) -> int:
        if not self.scans(batch_size):
            return super().read_bytes_per_step(batch_size)
        return self._scan.read_bytes_per_step(batch_size)

    @cached_property
    def _scan(self) -> IndexScan:
        return IndexScan(self.tp, self.index)
