"""The interface of every head.

Letters: `B` rows in the batch, `D` hidden size, `V` vocabulary, `P` tp_size, `k` tokens wanted.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from flashhead_dist.errors import UserError
from flashhead_dist.parallel import Operation, Steps, TensorParallel, payload_bytes
from flashhead_kernels.dispatch import ops_for
from flashhead_kernels.shard import check_finite
from flashhead_profiles.ranges import CHECK, HEAD, annotate

KEY_BYTES = 8
HIDDEN_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class HeadOutput:
    """What a head says of a batch: the same on every rank.

    token_ids: int64 `[B, k]`, best first, ties by smaller id; -1 where fewer than k were scored.
    logits: float32 `[B, k]`, before any final soft-capping (monotone, so it changes no id).
    logsumexp: float32 `[B]`, over the vocabulary, where it was asked for; a retrieval head
        estimates the part that it did not score.
    candidate_logsumexp: float32 `[B]`, over the tokens scored exactly; for evaluation.
    """

    token_ids: Tensor
    logits: Tensor
    logsumexp: Tensor | None = None
    candidate_logsumexp: Tensor | None = None


@dataclass(frozen=True)
class Want:
    """What a caller asks of a head. `candidate_mass` takes a slow path, for evaluation."""

    k: int = 1
    logsumexp: bool = False
    candidate_mass: bool = False


@dataclass(frozen=True)
class VocabShard:
    """The token ids `start..stop` (half-open) of one rank; `width` is the longest of all ranks'."""

    start: int
    stop: int
    width: int

    @classmethod
    def of(cls, size: int, tp: TensorParallel, what: str = "vocabulary") -> VocabShard:
        """Split `size` evenly: the first `size % P` ranks hold one more.

        Raises:
            UserError: more ranks than things to split.
        """
        if size < tp.tp_size:
            raise UserError(
                f"a {what} of {size} cannot be split over tp_size {tp.tp_size}: "
                f"use {size} ranks or fewer"
            )
        share, extra = divmod(size, tp.tp_size)
        start = tp.tp_rank * share + min(tp.tp_rank, extra)
        return cls(start, start + share + (tp.tp_rank < extra), share + (extra > 0))


class Head(ABC):
    """A vocabulary-parallel output head on one rank.

    A subclass implements `steps`; nothing in it calls a collective.
    """

    name: ClassVar[str]
    has_logsumexp: ClassVar[bool] = True
    scores_everything: ClassVar[bool] = False
    """Every token is a candidate, so there is no candidate mass to ask for."""
    capturable: ClassVar[bool] = True
    """A greedy step on CUDA never waits for the host, so a CUDA graph can hold it."""
    holds_rows: ClassVar[bool] = False
    """Between them the ranks hold every row, so they can serve as a tied input embedding."""

    def __init__(self, tp: TensorParallel, vocab_size: int, hidden_size: int) -> None:
        self.tp = tp
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.check_inputs = True
        """Refuse NaN and inf in `forward`; costs one synchronization on CUDA."""

    def forward(
        self, hidden_states: Tensor, *, k: int = 1, need_logsumexp: bool = False
    ) -> HeadOutput:
        """The k best tokens of `hidden_states [B, D]`; an empty batch gives an empty result.

        Raises:
            UserError: a shape or dtype that does not fit, k outside 1..V, NaN or inf.
        """
        return self.serve(hidden_states, Want(k=k, logsumexp=need_logsumexp))

    __call__ = forward

    def serve(self, hidden_states: Tensor, want: Want) -> HeadOutput:
        """`forward`, with what is wanted spelled out."""
        with annotate(HEAD, hidden_states.shape[0], self.name):
            with annotate(CHECK):
                self.check(hidden_states, want)
            if hidden_states.shape[0] == 0:
                return empty_output(want, hidden_states.device)
            return self.tp.run(self.steps(hidden_states, want))

    @abstractmethod
    def steps(self, hidden_states: Tensor, want: Want) -> Steps[HeadOutput]:
        """This rank's part, for arguments that `check` has passed and at least one row."""

    def embedding_steps(self, token_ids: Tensor) -> Steps[Tensor]:
        """Rows `[..., D]` of `token_ids` int64 `[...]`, the same on every rank: a tied embedding.

        Raises:
            UserError: a head that does not hold rows (`holds_rows`).
            IndexError: an id outside the vocabulary.
        """
        raise UserError(f"head {self.name} holds no rows to look tokens up in")

    @property
    @abstractmethod
    def weight_bytes(self) -> int:
        """Bytes of weights and their tables that this rank holds for the head."""

    @abstractmethod
    def read_bytes_per_step(self, batch_size: int) -> int:
        """Bytes of weights that this rank reads for a batch, each distinct byte once.

        Rows of a batch are taken to probe different clusters, up to all of them: an upper bound.
        """

    @property
    def read_bytes_per_row(self) -> int:
        """`read_bytes_per_step(1)`."""
        return self.read_bytes_per_step(1)

    @property
    def payload_bytes_per_row(self) -> int:
        """Payload of one row's greedy step, as `collectives.payload_bytes` defines it.

        The reduced buffer or the whole gathered one, as nccl-tests' `size`; 0 at tp_size 1.
        """
        return payload_bytes(Operation.MAX, KEY_BYTES, self.tp.tp_size)

    def check(self, hidden_states: Tensor, want: Want) -> None:
        """Refuse what no head can serve; see `forward`."""
        if hidden_states.ndim != 2 or hidden_states.shape[1] != self.hidden_size:
            raise UserError(
                f"hidden states of shape {tuple(hidden_states.shape)} do not fit head {self.name}: "
                f"give [B, {self.hidden_size}]"
            )
        if hidden_states.dtype not in HIDDEN_DTYPES:
            raise UserError(
                f"hidden states of {hidden_states.dtype} are not served: "
                f"give float32, bfloat16 or float16"
            )
        if not 1 <= want.k <= self.vocab_size:
            raise UserError(f"k must lie between 1 and {self.vocab_size}, got {want.k}")
        if want.logsumexp and not self.has_logsumexp:
            raise UserError(
                f"head {self.name} gives no log-sum-exp: choose flashhead or a dense head for it"
            )
        if self.check_inputs and not _capturing(hidden_states):
            refuse_non_finite(hidden_states)


def empty_output(want: Want, device: torch.device) -> HeadOutput:
    """The result of an empty batch, for which no rank exchanges anything."""
    floats = torch.empty(0, dtype=torch.float32, device=device)
    return HeadOutput(
        torch.empty((0, want.k), dtype=torch.int64, device=device),
        torch.empty((0, want.k), dtype=torch.float32, device=device),
        floats if want.logsumexp else None,
        floats if want.candidate_mass else None,
    )


def refuse_non_finite(hidden_states: Tensor) -> None:
    """Raise UserError naming the first row of `hidden_states [B, D]` with NaN or inf."""
    if ops_for(hidden_states.device).all_finite(hidden_states):
        return
    try:
        check_finite(hidden_states)
    except ValueError as error:
        raise UserError(
            f"{error}: check the model that made it, since no token is the best of such a row"
        ) from error


def _capturing(hidden_states: Tensor) -> bool:
    return hidden_states.is_cuda and torch.cuda.is_current_stream_capturing()
