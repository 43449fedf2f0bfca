"""What goes from stage to stage: hidden states forward, chosen tokens from the last stage to all.

Letters: B sequences of a micro-batch, L tokens fed to each, D hidden size.

Messages are posted in one order that all stages share (`pipeline_loop`), and waited for where their
content is needed; `deepspeed.runtime.pipe.p2p` cannot part the two.

The two directions have process groups of their own: over NCCL the messages of one communicator
queue behind each other, and hidden states would wait for tokens that the last stage has yet to
choose.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from flashhead_profiles.ranges import SEND, annotate

HIDDEN_LOG_NAME = "pipeline_hidden_states"
TOKENS_LOG_NAME = "pipeline_tokens"
"""Names of the sends in DeepSpeed's communication log."""


class Links:
    """One rank's links to the ranks of its pipeline: same tensor-parallel rank, other stages.

    grid: DeepSpeed's PipelineParallelGrid. stage: this rank's, of `pp_size`.
    """

    def __init__(self, grid: Any, device: torch.device) -> None:
        from deepspeed import comm

        self._comm = comm
        self._device = device
        self._ranks: list[int] = list(grid.pp_group)
        self._tokens_group = grid.get_pipe_parallel_group()
        self.stage: int = grid.get_stage_id()
        self.pp_size = len(self._ranks)

    def send_hidden(self, hidden: Tensor) -> Posted:
        """Post the send of `[B, L, D]` to the next stage."""
        hidden = hidden.contiguous()
        rank = self._ranks[self.stage + 1]
        with annotate(SEND, hidden.nbytes):
            return Posted(hidden, self._comm.isend(hidden, rank, log_name=HIDDEN_LOG_NAME))

    def expect_hidden(self, shape: Sequence[int], dtype: torch.dtype) -> Posted:
        """Post the receive of `shape` = `[B, L, D]` from the stage before."""
        hidden = torch.empty(tuple(shape), dtype=dtype, device=self._device)
        return Posted(hidden, self._comm.irecv(hidden, self._ranks[self.stage - 1]))

    def send_tokens(self, token_ids: Tensor) -> list[Posted]:
        """Post the sends of int64 ids of any shape from the last stage to all others, in order."""
        ids = token_ids.to(self._device, torch.int64).contiguous()
        group, log_name = self._tokens_group, TOKENS_LOG_NAME
        with annotate(SEND, ids.nbytes):
            return [
                Posted(ids, self._comm.isend(ids, rank, group=group, log_name=log_name))
                for rank in self._ranks[:-1]
            ]

    def expect_tokens(self, shape: Sequence[int]) -> Posted:
        """Post the receive of int64 ids of that shape from the last stage."""
        ids = torch.empty(tuple(shape), dtype=torch.int64, device=self._device)
        return Posted(ids, self._comm.irecv(ids, self._ranks[-1], group=self._tokens_group))


class Posted:
    """A send or receive under way, and the tensor that it reads or fills."""

    def __init__(self, tensor: Tensor, work: Any) -> None:
        self.tensor = tensor
        self._work = work

    def wait(self) -> None:
        """Wait until it has passed; on CUDA the current stream waits, not the host."""
        self._work.wait()
