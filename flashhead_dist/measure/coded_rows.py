"""FlashHead with its candidate rows in int8, to be timed: what it gives, reads and holds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from flashhead_dist.heads.flashhead import FlashHead
from flashhead_kernels.cpu_row_codes import coded_candidates
from flashhead_kernels.keys import unpack_keys
from flashhead_kernels.row_codes import KEPT, RowCodes, code_rows


@dataclass(frozen=True)
class CodedRows:
    """A head at tp_size 1 on a CPU, its rows by their codes (`flashhead_kernels.row_codes`)."""

    head: FlashHead
    codes: RowCodes

    def step(self, hidden_states: Tensor) -> Tensor:
        """Greedy token ids int64 `[B]` of `hidden_states [B, D]`, on one thread."""
        shard, head = self.head.shard, self.head
        keys = coded_candidates(
            hidden_states, self.codes, shard.rows, shard.token_ids, shard.centroids, shard.spread,
            head.alpha, -(-head.num_probes // head.num_groups), shard.pinned_rows,
            shard.pinned_token_ids,
        )  # fmt: skip
        return unpack_keys(keys)[1][:, 0]

    @property
    def read_bytes_per_row(self) -> int:
        """As the head's, with the codes of probed rows, and KEPT rows a group themselves."""
        shard = self.head.shard
        clusters = shard.rows.shape[0] * shard.rows.shape[1]
        saved = (shard.rows.nbytes - self.codes.data.nbytes) // clusters
        kept = KEPT * len(shard.rows) * shard.rows.shape[-1] * shard.rows.element_size()
        return self.head.read_bytes_per_row - self.head.num_local_probes * saved + kept

    def account(self, states: Tensor) -> dict[str, Any]:
        """Bytes of a step and of memory, and the share of `states` with the head's own token."""
        same = self.step(states) == self.head(states).token_ids[:, 0]
        return {
            "read_bytes": self.read_bytes_per_row,
            "flashhead_read_bytes": self.head.read_bytes_per_row,
            "more_memory_bytes": self.codes.data.nbytes,
            "same_token_share": float(same.double().mean()),
        }


def with_coded_rows(head: FlashHead) -> CodedRows:
    """Round the rows of `head`.

    Raises:
        ValueError: a hidden size that is no multiple of 32.
    """
    return CodedRows(head, code_rows(head.shard.rows))
