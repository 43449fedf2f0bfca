"""The collectives as torch.distributed calls them: two for exchanges, and what timing needs."""

from __future__ import annotations

from typing import Protocol

import torch.distributed as dist
from torch import Tensor


class CollectiveCalls(Protocol):
    """Who carries out a collective: torch, or a library that logs what it sends."""

    def all_reduce(
        self, tensor: Tensor, reduction: dist.ReduceOp.RedOpType, group: dist.ProcessGroup | None
    ) -> None:
        """Reduce `tensor` over the group, in place."""

    def all_gather(self, gathered: Tensor, tensor: Tensor, group: dist.ProcessGroup | None) -> None:
        """Fill flat `gathered` with the ranks' flat `tensor`s, in rank order."""


class TorchCalls:
    """torch.distributed itself."""

    def all_reduce(
        self, tensor: Tensor, reduction: dist.ReduceOp.RedOpType, group: dist.ProcessGroup | None
    ) -> None:
        dist.all_reduce(tensor, op=reduction, group=group)

    def all_gather(self, gathered: Tensor, tensor: Tensor, group: dist.ProcessGroup | None) -> None:
        # torch 2.13 renamed all_gather_into_tensor and deprecates the old name.
        call = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
        call(gathered, tensor, group=group)


def meet_on_stream(token: Tensor, group: dist.ProcessGroup | None) -> None:
    """Queue an all-reduce of `token` on a GPU: no rank's stream passes it before all have come.

    With NCCL the host does not wait.
    """
    dist.all_reduce(token, group=group)


def round_trip(tensor: Tensor, peer: int, group: dist.ProcessGroup, *, begins: bool) -> None:
    """Send `tensor` to a rank of the group and take it back; the one that `begins` sends first.

    peer: the other's rank within `group`. The other one calls it with `begins` false.
    """
    if begins:
        dist.send(tensor, group=group, group_dst=peer)
    dist.recv(tensor, group=group, group_src=peer)
    if not begins:
        dist.send(tensor, group=group, group_dst=peer)
