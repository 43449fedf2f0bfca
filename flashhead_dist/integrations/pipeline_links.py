"""What goes from stage to stage: hidden states forward, chosen tokens from the last stage to all.

Letters: B sequences of a micro-batch, L tokens fed to each, D hidden size.

Sends do not wait. `deepspeed.runtime.pipe.p2p.send` does, and over gloo a send ends only once the
receiver asks for it: with two micro-batches in flight the first stage would wait for the second to
take hidden states while the second waits for the first to take tokens. So hidden states are taken
with DeepSpeed's `p2p.recv` from the stage before, and sent, like tokens, with `deepspeed.comm`.

The two directions have process groups of their own, because NCCL serves the messages between two
ranks of one group in the order in which they were posted on both sides.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from flashhead_profiles.ranges import RECEIVE, SEND, annotate

HIDDEN_LOG_NAME = "pipeline_hidden_states"
TOKENS_LOG_NAME = "pipeline_tokens"
"""Names of the sends in DeepSpeed's communication log."""


class Links:
    """One rank's links to the ranks of its pipeline: same tensor-parallel rank, other stages.

    grid: DeepSpeed's PipelineParallelGrid.
    """

    def __init__(self, grid: Any, device: torch.device) -> None:
        from deepspeed import comm
        from deepspeed.runtime.pipe import p2p

        self._comm, self._p2p = comm, p2p
        self._device = device
        self._stage: int = grid.get_stage_id()
        self._ranks: list[int] = list(grid.pp_group)
        self._tokens_group = grid.get_pipe_parallel_group()
        self._grid = grid

    def open(self) -> None:
        """Make DeepSpeed's p2p module, which knows one pipeline at a time, speak of this one."""
        self._p2p.init_process_groups(self._grid)

    def send_hidden(self, hidden: Tensor) -> Any:
        """Start sending `[B, L, D]` to the next stage; the handle to wait for, which keeps it."""
        hidden = hidden.contiguous()
        rank = self._ranks[self._stage + 1]
        with annotate(SEND, hidden.nbytes):
            return _Sent(hidden, self._comm.isend(hidden, rank, log_name=HIDDEN_LOG_NAME))

    def receive_hidden(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Wait for `shape` = `[B, L, D]` from the stage before."""
        hidden = torch.empty(tuple(shape), dtype=dtype, device=self._device)
        with annotate(RECEIVE, hidden.nbytes):
            self._p2p.recv(hidden, self._stage - 1)
        return hidden

    def announce(self, token_ids: Tensor) -> list[Any]:
        """Start sending int64 ids of any shape from the last stage to all others."""
        ids = token_ids.to(self._device, torch.int64).contiguous()
        with annotate(SEND, ids.nbytes):
            return [
                _Sent(
                    ids,
                    self._comm.isend(ids, rank, group=self._tokens_group, log_name=TOKENS_LOG_NAME),
                )
                for rank in self._ranks[:-1]
            ]

    def learn(self, *shape: int) -> Tensor:
        """Wait for int64 ids of that shape from the last stage; on the CPU."""
        ids = torch.empty(shape, dtype=torch.int64, device=self._device)
        with annotate(RECEIVE, ids.nbytes):
            self._comm.recv(ids, self._ranks[-1], group=self._tokens_group)
        return ids.cpu()


class _Sent:
    """A send under way, and the tensor that it reads."""

    def __init__(self, tensor: Tensor, work: Any) -> None:
        self._tensor = tensor
        self._work = work

    def wait(self) -> None:
        self._work.wait()
