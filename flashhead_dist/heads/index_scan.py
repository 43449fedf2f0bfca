"""The dense head over an index's rows: every token scored, no second copy of the embedding.

For confirming what a retrieval head over the same index chose. Ids and logits are those of
`dense_local_max`, bit for bit on a CPU: a row is scored in an order that depends on the hidden size
alone, and of equal logits the smaller id wins wherever it lies.
"""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from flashhead_dist.errors import UserError
from flashhead_dist.heads.base import Head, HeadOutput, Want
from flashhead_dist.heads.merge import merge_candidates
from flashhead_dist.index import LoadedShard
from flashhead_dist.parallel import Steps, TensorParallel
from flashhead_kernels.dispatch import ops_for
from flashhead_kernels.shard import Candidates
from flashhead_profiles.ranges import CANDIDATES, annotate


class IndexScan(Head):
    """Scans the rows of this rank's groups; one exchange of packed candidates."""

    name: ClassVar[str] = "index_scan"
    scores_everything: ClassVar[bool] = True

    def __init__(self, tp: TensorParallel, index: LoadedShard) -> None:
        """index: must hold its rows in one piece, as `load_shard` leaves them.

        Raises:
            UserError: it does not.
        """
        super().__init__(tp, index.manifest.vocab_size, index.manifest.hidden_size)
        if index.shard.table is None:
            raise UserError(f"the rows of {index.path} do not lie in one piece: load them anew")
        self.index = index
        self.rows, self.token_ids = index.shard.table

    def steps(self, hidden_states: Tensor, want: Want) -> Steps[HeadOutput]:
        found = self.candidates(hidden_states, want)
        return (yield from merge_candidates(found))

    def candidates(self, hidden_states: Tensor, want: Want) -> Candidates:
        """This rank's best of `hidden_states [B, D]` among every token that it holds."""
        with annotate(CANDIDATES):
            found: Candidates = ops_for(hidden_states.device).dense_candidates(
                hidden_states,
                self.rows,
                0,
                k=want.k,
                need_logsumexp=want.logsumexp,
                token_ids=self.token_ids,
            )
        return found

    @property
    def weight_bytes(self) -> int:
        return self.rows.nbytes + self.token_ids.nbytes

    def read_bytes_per_step(self, batch_size: int) -> int:
        return self.weight_bytes if batch_size else 0
