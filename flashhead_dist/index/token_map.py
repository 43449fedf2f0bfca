"""Where each token's row lies when clusters are dealt over groups and groups over ranks."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class TokenMap:
    """`(rank, row)` of every token, packed as `row * tp_size + rank` in int32 `[V]`."""

    packed: Tensor
    tp_size: int

    @classmethod
    def of(
        cls, token_ids: Tensor, pinned_token_ids: Tensor, vocab_size: int, tp_size: int
    ) -> TokenMap:
        """Map of clusters `token_ids [G, M, S]` and `pinned_token_ids [G, n]` (-1: pad).

        A rank's rows are those of its groups' clusters, in order, then their pinned slots.
        """
        groups = len(token_ids)
        clustered, pinned = token_ids.flatten(1), pinned_token_ids
        group = torch.arange(groups)
        rank, place = group % tp_size, group // tp_size
        num_owned = torch.bincount(rank, minlength=tp_size)[rank]
        first = place * clustered.shape[1]
        first_pinned = num_owned * clustered.shape[1] + place * pinned.shape[1]
        packed = torch.full((vocab_size,), -1, dtype=torch.int32)
        for ids, start in ((clustered, first), (pinned, first_pinned)):
            rows = start.unsqueeze(1) + torch.arange(ids.shape[1])
            codes = (rows * tp_size + rank.unsqueeze(1)).to(torch.int32)
            real = ids >= 0
            packed[ids[real].long()] = codes[real]
        return cls(packed, tp_size)

    def to(self, device: torch.device) -> TokenMap:
        return TokenMap(self.packed.to(device), self.tp_size)

    def locate(self, token_ids: Tensor) -> tuple[Tensor, Tensor]:
        """`(rank, row)`, int64, of `token_ids`; IndexError for an id outside the vocabulary."""
        if bool(((token_ids < 0) | (token_ids >= len(self.packed))).any()):
            raise IndexError(f"token ids must lie between 0 and {len(self.packed) - 1}")
        return self.places(token_ids)

    def places(self, token_ids: Tensor) -> tuple[Tensor, Tensor]:
        """`locate`, of ids known to lie in the vocabulary; on CUDA the host does not wait."""
        codes = self.packed[token_ids.long()].long()
        return codes % self.tp_size, codes // self.tp_size
