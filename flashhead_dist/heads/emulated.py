"""All ranks of a head in one process, in lock step: the same code as on real ranks, no wire.

Each round runs every rank to its next exchange, one after another, and answers all of them. What
the answer is on real ranks is known exactly: a maximum and a gather have no order, and a sum is
added in the order of gloo's ring, which this module reproduces bit for bit. NCCL adds in orders of
its own, so against NCCL a SUM agrees within the rounding of its dtype only.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil
from typing import TypeVar

import torch
from torch import Tensor

from flashhead_dist.heads.base import Head, HeadOutput, Want, empty_output
from flashhead_dist.parallel import Exchange, Operation, Steps
from flashhead_kernels.dispatch import ops_for

T = TypeVar("T")

GLOO_SEGMENT_BYTES = 2**20
"""Longest piece that gloo's ring all-reduce sends at a time."""


class EmulatedHead:
    """The `tp_size` ranks of one head, which share a process; `forward` is that of `Head`.

    Byte counts are sums over the ranks (weights, reads), or of one rank (payload).
    """

    def __init__(self, ranks: Sequence[Head], *, tp_size: int | None = None) -> None:
        """ranks: rank 0 first. A replicated head may give one rank to stand for `tp_size`."""
        self.ranks = list(ranks)
        self.tp_size = tp_size or len(self.ranks)
        first = self.ranks[0]
        self.name = first.name
        self.vocab_size = first.vocab_size
        self.hidden_size = first.hidden_size
        self.has_logsumexp = first.has_logsumexp
        self.scores_everything = first.scores_everything
        self.payload_bytes_per_row = first.payload_bytes_per_row

    @property
    def read_bytes_per_row(self) -> int:
        """Sum over all `tp_size` ranks."""
        read = sum(rank.read_bytes_per_row for rank in self.ranks)
        return read * self.tp_size // len(self.ranks)

    @property
    def weight_bytes_per_rank(self) -> int:
        """Weights of the rank that holds most."""
        return max(rank.weight_bytes for rank in self.ranks)

    def forward(
        self, hidden_states: Tensor, *, k: int = 1, need_logsumexp: bool = False
    ) -> HeadOutput:
        """See `Head.forward`."""
        return self.serve(hidden_states, Want(k=k, logsumexp=need_logsumexp))

    def serve(self, hidden_states: Tensor, want: Want) -> HeadOutput:
        """See `Head.serve`.

        Raises:
            RuntimeError: the ranks disagree on a token, which would be a defect of the head.
        """
        first = self.ranks[0]
        first.check(hidden_states, want)
        if hidden_states.shape[0] == 0:
            return empty_output(want, hidden_states.device)
        outputs = run_in_lock_step([rank.steps(hidden_states, want) for rank in self.ranks])
        for rank, output in enumerate(outputs):
            if not torch.equal(output.token_ids, outputs[0].token_ids):
                raise RuntimeError(f"head {self.name}: rank {rank} and rank 0 chose other tokens")
        return outputs[0]


def run_in_lock_step(ranks: Sequence[Steps[T]]) -> list[T]:
    """Drive the ranks' steps to their results, answering each round of exchanges.

    Raises:
        RuntimeError: ranks ask for different exchanges, which would hang on real ranks.
    """
    results: list[T] = []
    answers: list[Tensor | None] = [None] * len(ranks)
    while True:
        exchanges: list[Exchange] = []
        for steps, answer in zip(ranks, answers, strict=True):
            try:
                exchanges.append(next(steps) if answer is None else steps.send(answer))
            except StopIteration as stop:
                results.append(stop.value)
        if len(results) == len(ranks):
            return results
        answers = list(_answer(exchanges, len(ranks)))


def _answer(exchanges: Sequence[Exchange], tp_size: int) -> list[Tensor]:
    kinds = {(e.operation, e.tensor.shape, e.tensor.dtype) for e in exchanges}
    if len(kinds) != 1 or len(exchanges) != tp_size:
        raise RuntimeError(f"ranks ask for different exchanges: {kinds}")
    parts = torch.stack([exchange.tensor for exchange in exchanges])
    operation = exchanges[0].operation
    if operation is Operation.GATHER:
        return [parts] * tp_size
    if operation is Operation.MAX:
        best = parts.amax(0)
        for exchange in exchanges:
            if exchange.unpacked is not None:
                ops_for(best.device).unpack_keys_into(best, *exchange.unpacked)
        return [best] * tp_size
    return [gloo_ring_sum(parts)] * tp_size


def gloo_ring_sum(parts: Tensor) -> Tensor:
    """Sum `parts [P, *shape]` over P as gloo's ring all-reduce does, rounding at each addition.

    The flat buffer is cut into P blocks of whole segments; block b starts at rank b - 1 and adds
    the ranks below it in descending, cyclic order.
    """
    tp_size = parts.shape[0]
    flat = parts.flatten(1)
    total, element = flat[0].nbytes, flat.element_size()
    segments_per_rank = max(2, ceil(ceil(total / GLOO_SEGMENT_BYTES) / tp_size))
    segment_elements = ceil(ceil(total / (segments_per_rank * tp_size)) / element)
    block = segments_per_rank * segment_elements
    summed = torch.empty_like(flat[0])
    for b in range(tp_size):
        piece = flat[:, b * block : (b + 1) * block]
        result = piece[b - 1].clone()
        for step in range(1, tp_size):
            result += piece[(b - 1 - step) % tp_size]
        summed[b * block : (b + 1) * block] = result
    return summed.view(parts.shape[1:])
