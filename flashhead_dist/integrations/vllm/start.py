"""What a head does once, before vLLM's first step: find its crossover and compile its kernels."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from flashhead_dist.bench.control import Control
from flashhead_dist.bench.crossover import find_crossover_of, settle_crossover
from flashhead_dist.integrations.vllm.head import RowsHead
from flashhead_dist.integrations.vllm.needs import Rest, RowNeed
from flashhead_dist.integrations.vllm.options import MEASURE, NEVER, FlashHeadOptions
from flashhead_dist.parallel import TensorParallel

logger = logging.getLogger("vllm.flashhead")

_LARGEST = 256
"""Rows of the largest batch that is timed."""
_KINDS = (
    RowNeed(Rest.NOTHING, best_only=True),
    RowNeed(Rest.NOTHING),
    RowNeed(Rest.EVEN),
    RowNeed(Rest.CLUSTERS),
)


class GroupControl(Control):
    """Agreement of ranks through their process group, where there is no store to speak through."""

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
    head: RowsHead, options: FlashHeadOptions, control: Control, *, largest: int, dtype: torch.dtype
) -> None:
    """Settle where `head` changes over, for batches of up to `largest` rows, and run it once.

    dtype: of the hidden states. Every rank calls it.
    """
    _settle(head, options, control, min(largest, _LARGEST), dtype)
    states = _states(head, 2, dtype)
    for kind in _KINDS:
        head.rows(states, [kind] * 2)


def _settle(
    head: RowsHead, options: FlashHeadOptions, control: Control, largest: int, dtype: torch.dtype
) -> None:
    auto, asked = head.head, options.crossover
    if asked == NEVER:
        return
    if asked != MEASURE:
        auto.changes_at = (int(asked),)
        return
    if find_crossover_of(auto, control, largest=largest) is None and control.is_first:
        logger.info("timing the head and a dense scan for batches of up to %d rows", largest)
    found = settle_crossover(
        auto, lambda size: _batches(head, size, dtype), control, largest=largest, in_turn=False
    )
    if control.is_first:
        changes = ", ".join(map(str, found.changes_at)) or f"none up to {largest}"
        logger.info("rows at which retrieval and dense scan change over: %s", changes)


def _batches(head: RowsHead, size: int, dtype: torch.dtype) -> Sequence[Tensor]:
    return [_states(head, size, dtype, seed) for seed in range(4)]


def _states(head: RowsHead, size: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Made-up hidden states `[size, D]`, the same on every rank: rows that probe unlike clusters,
    the dearest case for retrieval.
    """
    draw = torch.Generator("cpu").manual_seed(seed)
    # vLLM has its own default device and dtype while it loads a model.
    shape = (size, head.head.hidden_size)
    states = torch.randn(shape, generator=draw, device="cpu", dtype=torch.float32)
    return states.to(head.head.shard.rows.device, dtype)
