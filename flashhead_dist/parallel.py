"""Tensor-parallel exchanges: the only caller of torch.distributed for the heads.

A head does not call a collective, it *yields* an `Exchange` and is sent the result:

    merged = yield Exchange(Operation.MAX, keys)

`TensorParallel.run` answers with a real collective; `run_in_lock_step` answers for all ranks of one
process without one. Both therefore run the same head code.
"""

from __future__ import annotations

import time
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from enum import StrEnum
from math import ceil
from typing import Any, Protocol, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from flashhead_dist.errors import UserError
from flashhead_dist.exchange import (
    AUTO,
    ExchangeChoice,
    ExchangeFailedError,
    ExchangeMethod,
    ExchangeUnavailableError,
    choose_exchange,
)
from flashhead_kernels.dispatch import ops_for
from flashhead_profiles.ranges import EXCHANGE, annotate
from flashhead_topology.links import payload_bytes, ring_sent_bytes

T = TypeVar("T")
GLOO_SEGMENT_BYTES = 2**20
"""Longest segment that gloo's ring all-reduce sends at a time."""
_NO_CHOICE = "nothing is sent: one rank, or emulated ranks"


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


class Operation(StrEnum):
    """What an exchange does with the tensors of the ranks."""

    MAX = "all_reduce_max"
    SUM = "all_reduce_sum"
    GATHER = "all_gather"


@dataclass(frozen=True)
class Exchange:
    """One collective that a head asks for; every rank gives a tensor of the same shape and dtype.

    The answer is a tensor of that shape (MAX, SUM; it may overwrite the one given) or
    `[P, *shape]` in rank order (GATHER).

    unpacked: token ids and logits of the packed keys `tensor`; of MAX, those of the answer are
        written there.
    """

    operation: Operation
    tensor: Tensor
    unpacked: tuple[Tensor, Tensor] | None = None


Steps = Generator[Exchange, Tensor, T]
"""A rank's part of a head: yields exchanges, is sent their answers, returns its result."""


class TensorParallel:
    """One rank's place in a tensor-parallel group, and the account of its exchanges.

    payload_bytes: sum of `payload_bytes` over the exchanges since `reset`.
    sent_bytes: sum of `ring_sent_bytes`.
    num_collectives: exchanges since `reset`.
    exchange_method, exchange_reason: what carries the maximum of packed keys ("symmetric", "nccl",
        "gloo" or "none"), and why, in one sentence; the same on every rank.

    Without a group and with `tp_size` > 1 it names a rank for emulation, and refuses to run.

    >>> import flashhead_dist as fh
    >>> tp = fh.TensorParallel.single()
    >>> (tp.tp_rank, tp.tp_size, tp.exchange_method)
    (0, 1, 'none')
    """

    def __init__(
        self,
        *,
        tp_rank: int = 0,
        tp_size: int = 1,
        group: dist.ProcessGroup | None = None,
        device: torch.device | str = "cpu",
        choice: ExchangeChoice | None = None,
        calls: CollectiveCalls | None = None,
    ) -> None:
        if not 0 <= tp_rank < tp_size:
            raise ValueError(f"tp_rank {tp_rank} does not lie in 0..{tp_size - 1}")
        self.tp_rank = tp_rank
        self.tp_size = tp_size
        self.group = group
        self.device = torch.device(device)
        choice = choice or ExchangeChoice(ExchangeMethod.NONE, _NO_CHOICE)
        self.exchange_method = choice.method.value
        self.exchange_reason = choice.reason
        self._symmetric = choice.symmetric
        self._calls = calls or TorchCalls()
        self.reset()

    @classmethod
    def single(cls, device: torch.device | str = "cpu") -> TensorParallel:
        """The only rank of a group of one: it never communicates."""
        return cls(device=device)

    @classmethod
    def from_group(
        cls,
        group: dist.ProcessGroup,
        device: torch.device | str = "cpu",
        exchange: str = AUTO,
        calls: CollectiveCalls | None = None,
    ) -> TensorParallel:
        """This process's place in an open process group; every rank of it calls this.

        exchange: how packed keys are exchanged, one of `flashhead_dist.exchange.METHODS`.
        calls: what carries out the collectives; torch.distributed where None.

        Raises:
            UserError: the ranks cannot have that exchange, or its kernel fails on this device.
        """
        try:
            choice = choose_exchange(group, device, exchange)
        except (ExchangeUnavailableError, ExchangeFailedError) as error:
            raise UserError(str(error)) from error
        return cls(
            tp_rank=dist.get_rank(group),
            tp_size=dist.get_world_size(group),
            group=group,
            device=device,
            choice=choice,
            calls=calls,
        )

    def reset(self) -> None:
        """Forget what was counted and timed."""
        self.payload_bytes = 0
        self.sent_bytes = 0.0
        self.num_collectives = 0
        self._seconds = 0.0
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    @property
    def communication_s(self) -> float:
        """Seconds inside exchanges since `reset`, waiting for slower ranks included.

        On CUDA the time between events around each collective, which this property waits for;
        collectives captured in a graph are not timed.
        """
        for start, stop in self._events:
            stop.synchronize()
            self._seconds += start.elapsed_time(stop) / 1e3
        self._events = []
        return self._seconds

    def run(self, steps: Steps[T]) -> T:
        """Drive one head to its result, answering each exchange with a collective."""
        try:
            exchange = next(steps)
            while True:
                exchange = steps.send(self.perform(exchange))
        except StopIteration as stop:
            result: T = stop.value
            return result

    def all_reduce_max(self, tensor: Tensor) -> Tensor:
        """Elementwise maximum over the ranks, in place; int64 for packed keys."""
        return self.perform(Exchange(Operation.MAX, tensor))

    def all_reduce_sum(self, tensor: Tensor) -> Tensor:
        """Elementwise sum over the ranks, in place, in its dtype and in the backend's order."""
        return self.perform(Exchange(Operation.SUM, tensor))

    def all_gather(self, tensor: Tensor) -> Tensor:
        """The ranks' tensors as `[P, *shape]`, in rank order."""
        return self.perform(Exchange(Operation.GATHER, tensor))

    def perform(self, exchange: Exchange) -> Tensor:
        """Answer one exchange. An empty tensor is exchanged without a call, as is any at size 1."""
        tensor, operation = exchange.tensor, exchange.operation
        if self.tp_size == 1 or tensor.numel() == 0:
            if operation is not Operation.GATHER:
                return tensor
            return tensor.unsqueeze(0).expand(self.tp_size, *tensor.shape)
        if self.group is None:
            raise RuntimeError(f"rank {self.tp_rank} of {self.tp_size} has no process group")
        self.payload_bytes += payload_bytes(operation, tensor.nbytes, self.tp_size)
        self.sent_bytes += ring_sent_bytes(operation, tensor.nbytes, self.tp_size)
        self.num_collectives += 1
        if tensor.device.type != "cuda":
            start_s = time.perf_counter()
            result = self._call(exchange)
            self._seconds += time.perf_counter() - start_s
            return result
        if torch.cuda.is_current_stream_capturing():
            return self._call(exchange)
        start, stop = _timing_event(), _timing_event()
        start.record()
        result = self._call(exchange)
        stop.record()
        self._events.append((start, stop))
        return result

    def _call(self, exchange: Exchange) -> Tensor:
        operation, tensor = exchange.operation, exchange.tensor
        with annotate(EXCHANGE, tensor.nbytes):
            if operation is Operation.GATHER:
                gathered = tensor.new_empty((self.tp_size, *tensor.shape))
                self._calls.all_gather(gathered.view(-1), tensor.contiguous().view(-1), self.group)
                return gathered
            result = tensor.contiguous()
            symmetric = self._symmetric if operation is Operation.MAX else None
            if symmetric is not None and symmetric.accepts(result):
                return symmetric.all_reduce_max(result, exchange.unpacked)
            reduction = dist.ReduceOp.MAX if operation is Operation.MAX else dist.ReduceOp.SUM
            self._calls.all_reduce(result, reduction, self.group)
            if exchange.unpacked is not None:
                ops_for(result.device).unpack_keys_into(result, *exchange.unpacked)
            return result

    def barrier(self) -> None:
        """Wait for every rank of the group; neither counted nor timed."""
        if self.tp_size > 1:
            dist.barrier(group=self.group)

    def gather_objects(self, item: T) -> list[T]:
        """Every rank's picklable `item` in rank order, the same list on every rank; not counted."""
        if self.tp_size == 1:
            return [item]
        items: list[Any] = [None] * self.tp_size
        dist.all_gather_object(items, item, group=self.group)
        return items


def split_tensor_parallel(
    tp_sizes: Sequence[int],
    *,
    device: torch.device | str = "cpu",
    timeout: timedelta | None = None,
    exchange: str = AUTO,
) -> dict[int, TensorParallel | None]:
    """Places of this process in groups of the first 1, 2, ... ranks of the world.

    Every rank of the world calls it with the same `tp_sizes`. The value is None where this rank
    takes no part. Without an open process group the world is this process.
    `exchange`: see `TensorParallel.from_group`.

    Raises:
        UserError: a size outside 1..world size, or an exchange that is not to be had.
    """
    world_size = dist.get_world_size() if dist.is_initialized() else 1
    rank = dist.get_rank() if dist.is_initialized() else 0
    for tp_size in tp_sizes:
        if not 1 <= tp_size <= world_size:
            raise UserError(
                f"tp_size {tp_size} needs between 1 and {world_size} ranks, the number started: "
                f"start more with --nproc-per-node or choose a smaller one"
            )
    places: dict[int, TensorParallel | None] = dict.fromkeys(tp_sizes)
    # Symmetric memory of a smaller group would bar larger ones from theirs: see `group_obstacle`.
    for tp_size in sorted(places, reverse=True):
        if tp_size == 1:
            places[1] = TensorParallel.single(device) if rank == 0 else None
            continue
        group = dist.new_group(list(range(tp_size)), timeout=timeout)
        mine = rank < tp_size
        places[tp_size] = TensorParallel.from_group(group, device, exchange) if mine else None
    return places


def world_tensor_parallel(device: torch.device | str = "cpu") -> TensorParallel:
    """This process's place in the whole world; a group of one where none is open."""
    world = dist.group.WORLD
    if world is None or dist.get_world_size() == 1:
        return TensorParallel.single(device)
    return TensorParallel.from_group(world, device)


def _timing_event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]


def run_in_lock_step(ranks: Sequence[Steps[T]]) -> list[T]:
    """Drive the steps of all ranks of one process to their results, in lock step.

    Each round runs every rank to its next exchange, one after another, and answers all of them. The
    answers are those of real ranks: a maximum and a gather have no order, and a sum is added in the
    order of gloo's ring. NCCL adds in other orders, so against NCCL a SUM agrees within the
    rounding of its dtype only.

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
