"""The dense heads: two as public systems run them, and the strongest that we know.

Equality across tp_size: `dense_local_max` scores each row in float32 in an order that does not
depend on how many rows a rank holds, so its ids and logits are equal bit for bit at every tp_size
(CPU kernels). The other two use torch's GEMM in the model's dtype, whose blocking depends on the
shard's shape, and `dense_allreduce` adds P partial sums that were rounded to that dtype: their
logits agree only within that dtype's rounding, and an id differs where the best two lie as close.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from flashhead_dist.heads.base import Head, HeadOutput, VocabShard, Want
from flashhead_dist.heads.merge import merge_candidates
from flashhead_dist.parallel import Exchange, Operation, Steps, TensorParallel, payload_bytes
from flashhead_kernels.dispatch import ops_for
from flashhead_kernels.keys import pack_keys, unpack_keys
from flashhead_profiles.ranges import CANDIDATES, RESULT, annotate


class _DenseHead(Head):
    """A head whose rank holds `weight`, some rows or columns of the output embedding."""

    scores_everything: ClassVar[bool] = True

    def __init__(self, tp: TensorParallel, weight: Tensor, vocab_size: int, hidden_size: int):
        super().__init__(tp, vocab_size, hidden_size)
        self.weight = weight

    @property
    def weight_bytes(self) -> int:
        return self.weight.nbytes

    def read_bytes_per_step(self, batch_size: int) -> int:
        return self.weight.nbytes if batch_size else 0


class _RowHead(_DenseHead):
    """A dense head whose rank holds the rows of consecutive tokens."""

    holds_rows: ClassVar[bool] = True

    def __init__(self, tp: TensorParallel, rows: Tensor, vocab_size: int) -> None:
        """rows: `[V_local, D]`, the tokens of `VocabShard.of(vocab_size, tp)`."""
        super().__init__(tp, rows, vocab_size, rows.shape[1])
        self.shard = VocabShard.of(vocab_size, tp)

    def embedding_steps(self, token_ids: Tensor) -> Steps[Tensor]:
        outside = (token_ids < 0) | (token_ids >= self.vocab_size)
        if bool(outside.any()):
            raise IndexError(f"token ids must lie between 0 and {self.vocab_size - 1}")
        owned = (token_ids >= self.shard.start) & (token_ids < self.shard.stop)
        rows = self.weight[torch.where(owned, token_ids - self.shard.start, 0)]
        return (yield Exchange(Operation.SUM, rows.masked_fill(~owned.unsqueeze(-1), 0)))


class DenseLocalMax(_RowHead):
    """Rows sharded by token; each rank reduces its own logits and exchanges packed keys."""

    name: ClassVar[str] = "dense_local_max"

    def steps(self, hidden_states: Tensor, want: Want) -> Steps[HeadOutput]:
        with annotate(CANDIDATES):
            found = ops_for(hidden_states.device).dense_candidates(
                hidden_states, self.weight, self.shard.start, k=want.k,
                need_logsumexp=want.logsumexp,
            )  # fmt: skip
        return (yield from merge_candidates(found))


class DenseGather(_RowHead):
    """Rows sharded by token; every rank gathers all logits in the model's dtype, then reduces.

    What Megatron does with `parallel_output=False`, and vLLM by default. Shards are padded with
    -inf to the longest.
    """

    name: ClassVar[str] = "dense_gather"

    def __init__(self, tp: TensorParallel, rows: Tensor, vocab_size: int) -> None:
        """See `_RowHead`."""
        super().__init__(tp, rows, vocab_size)
        self._token_ids = _gathered_token_ids(vocab_size, tp).to(rows.device)

    @property
    def payload_bytes_per_row(self) -> int:
        operand = self.shard.width * self.weight.element_size()
        return payload_bytes(Operation.GATHER, operand, self.tp.tp_size)

    def steps(self, hidden_states: Tensor, want: Want) -> Steps[HeadOutput]:
        with annotate(CANDIDATES):
            logits = functional.linear(hidden_states.to(self.weight.dtype), self.weight)
            padding = self.shard.width - logits.shape[1]
            if padding:
                logits = functional.pad(logits, (0, padding), value=float("-inf"))
        gathered = yield Exchange(Operation.GATHER, logits)  # [P, B, width]
        with annotate(RESULT):
            return _reduce(gathered.transpose(0, 1).flatten(1), self._token_ids, want)


class DenseAllReduce(_DenseHead):
    """Hidden columns sharded; the ranks' partial logits are summed by an all-reduce.

    What DeepSpeed's AutoTP makes of `lm_head` (`LmHeadLinearAllreduce`): a local GEMM in the
    model's dtype, whose rounded partial logits are all-reduced in that dtype.
    """

    name: ClassVar[str] = "dense_allreduce"

    def __init__(self, tp: TensorParallel, columns: Tensor, hidden_size: int) -> None:
        """columns: `[V, D_local]`, the columns of `VocabShard.of(hidden_size, tp)`."""
        super().__init__(tp, columns, columns.shape[0], hidden_size)
        self.columns = VocabShard.of(hidden_size, tp, "hidden size")
        self._token_ids = torch.arange(self.vocab_size, device=columns.device)

    @property
    def payload_bytes_per_row(self) -> int:
        operand = self.vocab_size * self.weight.element_size()
        return payload_bytes(Operation.MAX, operand, self.tp.tp_size)

    def steps(self, hidden_states: Tensor, want: Want) -> Steps[HeadOutput]:
        with annotate(CANDIDATES):
            local = hidden_states[:, self.columns.start : self.columns.stop].to(self.weight.dtype)
            partial = functional.linear(local, self.weight)
        logits = yield Exchange(Operation.SUM, partial)
        with annotate(RESULT):
            return _reduce(logits, self._token_ids, want)


def _gathered_token_ids(vocab_size: int, tp: TensorParallel) -> Tensor:
    """Token id int64 `[P * width]` of each gathered column, ascending, -1 for padding."""
    shards = [
        VocabShard.of(vocab_size, TensorParallel(tp_rank=rank, tp_size=tp.tp_size))
        for rank in range(tp.tp_size)
    ]
    ids = torch.full((tp.tp_size, shards[0].width), -1)
    for row, shard in zip(ids, shards, strict=True):
        row[: shard.stop - shard.start] = torch.arange(shard.start, shard.stop)
    return ids.flatten()


def _reduce(logits: Tensor, token_ids: Tensor, want: Want) -> HeadOutput:
    """The k best of full `logits [B, n]`, whose columns hold ascending `token_ids [n]`.

    Greedy uses `argmax`, whose ties go to the first column and so to the smallest id.
    """
    if want.k == 1:
        column = logits.argmax(-1, keepdim=True)
        best, ids = logits.gather(1, column).float(), token_ids[column]
    else:
        keys = pack_keys(logits, token_ids.expand(logits.shape))
        best, ids = unpack_keys(keys.topk(want.k, dim=1).values)
    return HeadOutput(ids, best, logits.float().logsumexp(-1) if want.logsumexp else None)
