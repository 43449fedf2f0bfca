"""From hidden states to rows of logits, for the kinds of rows that a batch of requests needs.

`start` measures the crossover and compiles the kernels before vLLM's first step.

Letters: `B` rows, `V` vocabulary, `D` hidden size, `R` rows of this rank's table.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from flashhead_dist.bench.control import Control
from flashhead_dist.bench.crossover import find_crossover_of, settle_crossover
from flashhead_dist.heads.base import Want
from flashhead_dist.heads.flashhead import FlashHeadAuto
from flashhead_dist.integrations.vllm.needs import Rest, RowNeed
from flashhead_dist.integrations.vllm.options import MEASURE, NEVER
from flashhead_dist.integrations.vllm.rows import VocabularyMap, know, make_rows
from flashhead_dist.parallel import TensorParallel
from flashhead_kernels.noise import to_device
from flashhead_profiles.ranges import HEAD, annotate

logger = logging.getLogger("vllm.flashhead")

_BEST = 4
"""Best tokens to find: logits that are equal once rounded go to the smallest id, as in vLLM."""
_LARGEST = 256
"""Rows of the largest batch that is timed."""
_KINDS = (
    RowNeed(Rest.NOTHING, best_only=True),
    RowNeed(Rest.NOTHING),
    RowNeed(Rest.EVEN),
    RowNeed(Rest.CLUSTERS),
)


@dataclass(frozen=True)
class Finish:
    """From `hidden . row` to final logits: vLLM's own steps, in its head's dtype."""

    dtype: torch.dtype
    softcap: float | None = None
    scale: float = 1.0

    def __call__(self, logits: Tensor) -> Tensor:
        """Final logits in the head's dtype, of logits in any."""
        logits = logits.to(self.dtype)
        if self.softcap is not None:
            logits = torch.tanh(logits / self.softcap) * self.softcap
        return logits if self.scale == 1.0 else logits * self.scale


class RowsHead:
    """Serves rows over one rank's part of an index; all ranks of the group make the same calls."""

    def __init__(self, head: FlashHeadAuto, finish: Finish, where: VocabularyMap) -> None:
        """head: with contiguous rows; where: the tokens of all ranks."""
        head.check_inputs = False
        self.head = head
        self.finish = finish
        self.where = where
        self.vocab_size = head.vocab_size
        table = head.shard.table
        assert table is not None
        self._table = table[0]

    def num_scored(self, needs: Sequence[RowNeed]) -> int:
        """Tokens that this rank scores exactly for `rows` of these needs, pads included."""
        if self.head.scans(len(needs)):
            return len(needs) * len(self._table)
        return sum(self._num_candidates(need) for need in needs)

    def _num_candidates(self, need: RowNeed) -> int:
        head, manifest = self.head, self.head.index.manifest
        probes = head.num_probes if need.rest is Rest.NOTHING else head.sampling_probes
        per_group = -(-probes // head.num_groups) * manifest.cluster_size + manifest.num_pinned
        return len(head.shard.group_ids) * per_group

    def serves(self, needs: Sequence[RowNeed]) -> bool:
        """Whether `rows` is faster than `dense`: past the crossover only if the head's scan can
        serve these needs.
        """
        return not self.head.scans(len(needs)) or all(need.best_only for need in needs)

    def rows(self, hidden_states: Tensor, needs: Sequence[RowNeed]) -> Tensor:
        """Rows float32 `[B, V]` of `hidden_states [B, D]`, one need for each."""
        kinds = sorted(set(needs), key=needs.index)
        if len(kinds) == 1:
            return self._of_kind(hidden_states, kinds[0])
        out = hidden_states.new_empty((len(needs), self.vocab_size), dtype=torch.float32)
        for kind in kinds:
            places = [i for i, need in enumerate(needs) if need == kind]
            chosen = to_device(torch.tensor(places), hidden_states.device)
            out[chosen] = self._of_kind(hidden_states[chosen], kind)
        return out

    def dense(self, hidden_states: Tensor) -> Tensor:
        """Every logit `[B, V]`, in the head's dtype."""
        with annotate(HEAD, len(hidden_states), "dense"):
            dtype = self.finish.dtype
            logits = torch.nn.functional.linear(hidden_states.to(dtype), self._table.to(dtype))
            tp = self.head.tp
            if tp.tp_size > 1:
                width = self._position.width
                logits = torch.nn.functional.pad(logits, (0, width - logits.shape[1]))
                logits = tp.all_gather(logits).transpose(0, 1).flatten(1)
            return self.finish(logits.index_select(1, self._position.of_token))

    def _of_kind(self, hidden_states: Tensor, need: RowNeed) -> Tensor:
        if need.best_only:
            return self._best(hidden_states)
        with annotate(HEAD, len(hidden_states), self.head.name):
            steps = know(
                self.head,
                hidden_states,
                need.temperature,
                softcap=self.finish.softcap or 0.0,
                scale=self.finish.scale,
                draws=need.rest is not Rest.NOTHING,
            )
            known = self.head.tp.run(steps)
            return make_rows(known, self.finish(known.logits), self.where, need.rest)

    def _best(self, hidden_states: Tensor) -> Tensor:
        k = min(_BEST, self.vocab_size)
        found = self.head.serve(hidden_states, Want(k=k))
        rows = hidden_states.new_full(
            (len(hidden_states), self.vocab_size), -torch.inf, dtype=torch.float32
        )
        logits = self.finish(found.logits).float()
        # Fewer than k were scored: repeat the first. None was, for states with NaN: leave -inf.
        missing = found.token_ids < 0
        first = found.token_ids[:, :1].clamp(min=0)
        ids = torch.where(missing, first, found.token_ids)
        return rows.scatter_(1, ids, torch.where(missing, logits[:, :1], logits))

    @cached_property
    def _position(self) -> _Positions:
        index, manifest = self.head.index, self.head.index.manifest
        packed = index.token_map.packed.long()
        rank, row = packed % index.tp_size, packed // index.tp_size
        per_group = manifest.clusters_per_group * manifest.cluster_size + manifest.num_pinned
        width = -(-manifest.num_groups // index.tp_size) * per_group
        return _Positions(rank * width + row, width)


@dataclass(frozen=True)
class _Positions:
    """The position of each token's logit when the ranks' logits, padded to `width`, are joined."""

    of_token: Tensor
    width: int


class GroupControl(Control):
    """Agreement of ranks through their process group instead of a store."""

    def __init__(self, tp: TensorParallel) -> None:
        """tp: on a group of the CPU."""
        self.rank = tp.tp_rank
        self.ranks = tuple(range(tp.tp_size))
        self._tp = tp

    def gather(self, value: Any) -> list[Any]:
        """Every rank's picklable value, in order."""
        return self._tp.gather_objects(value)

    def broadcast(self, value: Any) -> Any:
        """The first rank's value."""
        return self.gather(value)[0]

    def barrier(self) -> None:
        """Wait for every rank."""
        self.gather(None)


def start(
    head: RowsHead, crossover: int | str, control: Control, *, largest: int, dtype: torch.dtype
) -> None:
    """Set the crossover of `head` for batches of up to `largest` rows, and run it once.

    crossover: see `FlashHeadOptions`. dtype: of the hidden states. Every rank calls it.
    """
    auto, largest = head.head, min(largest, _LARGEST)
    if crossover == MEASURE:
        if find_crossover_of(auto, control, largest=largest) is None and control.is_first:
            logger.info("timing the head and a dense scan for batches of up to %d rows", largest)
        found = settle_crossover(
            auto,
            lambda size: [_states(head, size, dtype, seed) for seed in range(4)],
            control,
            largest=largest,
            in_turn=False,
        )
        if control.is_first:
            changes = ", ".join(map(str, found.changes_at)) or f"none up to {largest}"
            logger.info("rows at which retrieval and dense scan change over: %s", changes)
    elif crossover != NEVER:
        auto.changes_at = (int(crossover),)
    states = _states(head, 2, dtype)
    for kind in _KINDS:
        head.rows(states, [kind] * 2)


def _states(head: RowsHead, size: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Synthetic hidden states `[size, D]`, the same on every rank. Their rows probe different
    clusters, the most expensive case for retrieval.
    """
    draw = torch.Generator("cpu").manual_seed(seed)
    # vLLM has its own default device and dtype while it loads a model.
    shape = (size, head.head.hidden_size)
    states = torch.randn(shape, generator=draw, device="cpu", dtype=torch.float32)
    return states.to(head.head.shard.rows.device, dtype)
