"""The dense heads: two as public systems run them, the strongest that we know, and one over an
index's rows.

Equality across tp_size: `dense_local_max` scores each row in float32 in an order that does not
depend on how many rows a rank holds, so its ids and logits are equal bit for bit at every tp_size
(CPU kernels). The other two use torch's GEMM in the model's dtype, whose blocking depends on the
shard's shape, and `dense_allreduce` adds P partial sums that were rounded to that dtype: their
logits agree only within that dtype's rounding, and an id differs where the best two lie as close.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from flashhead_dist.errors import UserError
from flashhead_dist.heads.base import (
    Head,
    HeadOutput,
    HeadShape,
    HeadStyle,
    VocabShard,
    Want,
    keys_sent,
    launches,
    merge_candidates,
    share_of,
)
from flashhead_dist.index import LoadedShard
from flashhead_dist.parallel import Exchange, Operation, Steps, TensorParallel
from flashhead_kernels.dispatch import ops_for
from flashhead_kernels.keys import pack_keys, unpack_keys
from flashhead_kernels.shard import Candidates
from flashhead_profiles.ranges import CANDIDATES, RESULT, annotate
from flashhead_topology.cost import HeadWork, Part, Sent

if TYPE_CHECKING:
    from flashhead_dist.heads.registry import HeadBuilder

_ID_BYTES = 4


class _DenseHead(Head):
    """A head whose rank holds `weight`, some rows or columns of the output embedding."""

    scores_everything: ClassVar[bool] = True

    def __init__(self, tp: TensorParallel, weight: Tensor, vocab_size: int, hidden_size: int):
        size = weight.element_size()
        super().__init__(
            tp,
            HeadShape(
                vocab_size=vocab_size,
                hidden_size=hidden_size,
                row_bits=8 * size,
                logit_bytes=size,
            ),
        )
        self.weight = weight

    @property
    def weight_bytes(self) -> int:
        return self.weight.nbytes


class _RowHead(_DenseHead):
    """A dense head whose rank holds the rows of consecutive tokens."""

    holds_rows: ClassVar[bool] = True

    def __init__(self, tp: TensorParallel, rows: Tensor, vocab_size: int) -> None:
        """rows: `[V_local, D]`, the tokens of `VocabShard.of(vocab_size, tp)`."""
        super().__init__(tp, rows, vocab_size, rows.shape[1])
        self.shard = VocabShard.of(vocab_size, tp)

    @classmethod
    def load(cls, builder: HeadBuilder, num_probes: int | None, alpha: float | None) -> Head:
        return cls(builder.tp, builder.rows, builder.model.vocab_size)

    def embedding_steps(self, token_ids: Tensor) -> Steps[Tensor]:
        outside = (token_ids < 0) | (token_ids >= self.vocab_size)
        if bool(outside.any()):
            raise IndexError(f"token ids must lie between 0 and {self.vocab_size - 1}")
        owned = (token_ids >= self.shard.start) & (token_ids < self.shard.stop)
        rows = self.weight[torch.where(owned, token_ids - self.shard.start, 0)]
        return (yield Exchange(Operation.SUM, rows.masked_fill(~owned.unsqueeze(-1), 0)))


class DenseGather(_RowHead):
    """Rows sharded by token; every rank gathers all logits in the model's dtype, then reduces.

    What Megatron does with `parallel_output=False`, and vLLM by default. Shards are padded with
    -inf to the longest.
    """

    name: ClassVar[str] = "dense_gather"
    style: ClassVar[HeadStyle] = HeadStyle("#E69F00", "s")
    rounds_logits: ClassVar[bool] = True

    def __init__(self, tp: TensorParallel, rows: Tensor, vocab_size: int) -> None:
        """See `_RowHead`."""
        super().__init__(tp, rows, vocab_size)
        self._token_ids = _gathered_token_ids(vocab_size, tp).to(rows.device)

    @classmethod
    def work(cls, shape: HeadShape, tp_size: int, batch: int = 1, tp_rank: int = 0) -> HeadWork:
        rows = share_of(shape.vocab_size, tp_size, tp_rank)
        logits = share_of(shape.vocab_size, tp_size) * batch * shape.logit_bytes
        part = replace(_scored(shape, rows, batch), scratch_bytes=float(logits))
        # argmax reads all logits, after a copy into order where there are several rows.
        passes = 1 if batch == 1 else 3
        result = Part(0.0, 0.0, scratch_bytes=float(passes * logits * tp_size))
        number = 5 + (batch > 1 and tp_size > 1)
        return HeadWork(
            {"head/candidates": part, "head/result": result},
            (Sent("all_gather", logits, shape.logit_bytes),),
            launches(number, number),
            rows * shape.row_bytes,
        )

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
    style: ClassVar[HeadStyle] = HeadStyle("#D55E00", "D")
    rounds_logits: ClassVar[bool] = True

    def __init__(self, tp: TensorParallel, columns: Tensor, hidden_size: int) -> None:
        """columns: `[V, D_local]`, the columns of `VocabShard.of(hidden_size, tp)`."""
        super().__init__(tp, columns, columns.shape[0], hidden_size)
        self.columns = VocabShard.of(hidden_size, tp, "hidden size")
        self._token_ids = torch.arange(self.vocab_size, device=columns.device)

    @classmethod
    def load(cls, builder: HeadBuilder, num_probes: int | None, alpha: float | None) -> Head:
        return cls(builder.tp, builder.columns, builder.model.hidden_size)

    @classmethod
    def split_limit(cls, shape: HeadShape) -> tuple[int, str]:
        return shape.hidden_size, "columns"

    @classmethod
    def work(cls, shape: HeadShape, tp_size: int, batch: int = 1, tp_rank: int = 0) -> HeadWork:
        columns = share_of(shape.hidden_size, tp_size, tp_rank)
        weights = shape.vocab_size * columns * shape.row_bits // 8
        logits = shape.vocab_size * batch * shape.logit_bytes
        operations = 2.0 * batch * shape.vocab_size * columns
        part = Part(weights, operations, scratch_bytes=float(logits))
        return HeadWork(
            {"head/candidates": part, "head/result": Part(0.0, 0.0, scratch_bytes=float(logits))},
            (Sent("all_reduce", logits, shape.logit_bytes),),
            launches(5, 5),
            weights,
        )

    def steps(self, hidden_states: Tensor, want: Want) -> Steps[HeadOutput]:
        with annotate(CANDIDATES):
            local = hidden_states[:, self.columns.start : self.columns.stop].to(self.weight.dtype)
            partial = functional.linear(local, self.weight)
        logits = yield Exchange(Operation.SUM, partial)
        with annotate(RESULT):
            return _reduce(logits, self._token_ids, want)


class DenseLocalMax(_RowHead):
    """Rows sharded by token; each rank reduces its own logits and exchanges packed keys."""

    name: ClassVar[str] = "dense_local_max"
    style: ClassVar[HeadStyle] = HeadStyle("#000000", "o")
    samples: ClassVar[bool] = True

    @classmethod
    def work(cls, shape: HeadShape, tp_size: int, batch: int = 1, tp_rank: int = 0) -> HeadWork:
        rows = share_of(shape.vocab_size, tp_size, tp_rank)
        part = _scored(shape, rows, batch)
        sent = (keys_sent(batch),)
        held = rows * shape.row_bytes
        return HeadWork({"head/candidates": part}, sent, launches(1, 1, unpacks=True), held)

    def steps(self, hidden_states: Tensor, want: Want) -> Steps[HeadOutput]:
        with annotate(CANDIDATES):
            found = ops_for(hidden_states.device).dense_candidates(
                hidden_states, self.weight, self.shard.start, k=want.k,
                need_logsumexp=want.logsumexp,
            )  # fmt: skip
        return (yield from merge_candidates(found))


class IndexScan(Head):
    """Every token scored over an index's rows, so that a rank holds no second copy of them.

    For confirming what a retrieval head over the same index chose. Ids and logits are those of
    `dense_local_max`, bit for bit on a CPU: a row is scored in an order that depends on the hidden
    size alone, and of equal logits the smaller id wins wherever it lies.
    """

    name: ClassVar[str] = "index_scan"
    samples: ClassVar[bool] = True
    scores_everything: ClassVar[bool] = True

    def __init__(self, tp: TensorParallel, index: LoadedShard) -> None:
        """index: must hold its rows in one piece, as `load_shard` leaves them.

        Raises:
            UserError: it does not.
        """
        size = index.shard.rows.element_size()
        super().__init__(tp, HeadShape.of_index(index.manifest, row_bytes=size))
        if index.shard.table is None:
            raise UserError(f"the rows of {index.path} do not lie in one piece: load them anew")
        self.index = index
        self.rows, self.token_ids = index.shard.table

    @classmethod
    def load(cls, builder: HeadBuilder, num_probes: int | None, alpha: float | None) -> Head:
        return cls(builder.tp, builder.index_shard)

    @classmethod
    def work(cls, shape: HeadShape, tp_size: int, batch: int = 1, tp_rank: int = 0) -> HeadWork:
        groups = share_of(shape.num_groups, tp_size, tp_rank)
        slots = shape.num_clusters // shape.num_groups * shape.cluster_size + shape.pinned_per_group
        part = _scored(shape, groups * slots, batch)
        held = groups * slots * (shape.row_bytes + _ID_BYTES)
        part = replace(part, read_bytes=held)
        sent = (keys_sent(batch),)
        return HeadWork({"head/candidates": part}, sent, launches(1, 1, unpacks=True), held)

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


def _scored(shape: HeadShape, rows: int, batch: int) -> Part:
    """Reading and scoring `rows` of the embedding."""
    return Part(rows * shape.row_bytes, 2.0 * batch * rows * shape.hidden_size)


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
