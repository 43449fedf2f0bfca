"""How the ranks of a group exchange their keys: chosen once, together, with the reason."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from flashhead_dist.symmetric import (
    Place,
    SymmetricExchange,
    allocate_words,
    group_obstacle,
    link_obstacle,
    local_obstacle,
    local_place,
    map_words,
)
from flashhead_kernels.keys import DEFAULT_CAPACITY

T = TypeVar("T")

AUTO = "auto"


class ExchangeMethod(StrEnum):
    """What carries the maximum over the ranks' keys."""

    SYMMETRIC = "symmetric"
    """One Triton kernel through torch symmetric memory."""
    NCCL = "nccl"
    """`all_reduce(MAX)` of int64 through NCCL."""
    GLOO = "gloo"
    """`all_reduce(MAX)` of int64 through gloo."""
    NONE = "none"
    """One rank, or emulated ranks: nothing is sent."""


METHODS = (AUTO, ExchangeMethod.SYMMETRIC, ExchangeMethod.NCCL, ExchangeMethod.GLOO)
"""What may be requested."""


class ExchangeUnavailableError(ValueError):
    """The requested exchange cannot serve this group; the text is one sentence for the user."""


class ExchangeFailedError(RuntimeError):
    """Symmetric memory is there and the kernel does not work; the text is one sentence.

    Nothing else is tried: a slower exchange in its place would hide the fault.
    """


@dataclass(frozen=True)
class ExchangeChoice:
    """The same method on every rank of a group.

    reason: one sentence, for reports; the same on every rank.
    symmetric: this rank's end, where the method is SYMMETRIC.
    """

    method: ExchangeMethod
    reason: str
    symmetric: SymmetricExchange | None = None


def choose_exchange(
    group: dist.ProcessGroup,
    device: torch.device | str,
    requested: str = AUTO,
    *,
    capacity: int = DEFAULT_CAPACITY,
) -> ExchangeChoice:
    """Choose for a group; every rank of it calls this with the same arguments.

    requested: one of METHODS. "auto" is symmetric memory where every rank can use it, otherwise the
    library that the group was opened with for this device.
    capacity: keys at once, a power of two, up to which symmetric memory serves.

    On CUDA the ranks talk to agree; on a CPU nothing is sent.

    Raises:
        ExchangeUnavailableError: the requested method is unknown, or unavailable on some rank, or
            the ranks asked for different ones. Every rank raises.
        ExchangeFailedError: the exchange kernel does not compile or a first round comes out wrong.
            Every rank raises.
    """
    device = torch.device(device)
    if dist.get_world_size(group) == 1:
        return ExchangeChoice(ExchangeMethod.NONE, "one rank: nothing is sent")
    asked = [requested] if device.type != "cuda" else _everyones(group, requested)
    if len(set(asked)) > 1:
        raise ExchangeUnavailableError(
            f"the ranks ask for different exchanges ({', '.join(asked)}): give each the same"
        )
    if requested not in METHODS:
        raise ExchangeUnavailableError(
            f"exchange {requested!r} is none of {', '.join(METHODS)}: choose one of them"
        )
    library = _library(group, device)
    if device.type != "cuda":
        because = f"the tensors are on the {device.type.upper()}"
        return _with_library(library, requested, because, device)
    if requested not in (AUTO, ExchangeMethod.SYMMETRIC):
        return _with_library(library, requested, "it was asked for", device)
    opened = _open(group, device, capacity)
    if isinstance(opened, str):
        because = f"symmetric memory cannot serve this group: {opened}"
        return _with_library(library, requested, because, device)
    _prove(group, opened)
    return ExchangeChoice(
        ExchangeMethod.SYMMETRIC,
        f"torch symmetric memory, as {len(asked)} ranks of one machine can write each other's "
        f"memory; more than {capacity} keys at once go through {library}",
        opened,
    )


def _library(group: dist.ProcessGroup, device: torch.device) -> str:
    """Name of the library behind the group's collectives on such a device."""
    backends: dict[str, str] = {}
    for part in dist.get_backend_config(group).split(","):
        kind, _, name = part.partition(":")
        backends[kind] = name
    return backends.get(device.type, "no library")


def _with_library(
    library: str, requested: str, because: str, device: torch.device
) -> ExchangeChoice:
    if requested == ExchangeMethod.SYMMETRIC:
        raise ExchangeUnavailableError(
            f"exchange {requested!r} is unavailable, as {because}: choose {AUTO!r} or {library!r}"
        )
    if requested not in (AUTO, library):
        raise ExchangeUnavailableError(
            f"exchange {requested!r} is unavailable, as this group uses {library} on "
            f"{device.type}: choose {AUTO!r} or open the group with {requested}"
        )
    if library not in (ExchangeMethod.NCCL, ExchangeMethod.GLOO):
        raise ExchangeUnavailableError(
            f"this group uses {library} on {device.type}: open it with nccl or gloo"
        )
    return ExchangeChoice(ExchangeMethod(library), f"{library} all_reduce, as {because}")


def _open(group: dist.ProcessGroup, device: torch.device, capacity: int) -> SymmetricExchange | str:
    """This rank's end of a symmetric exchange, or why the group cannot have one."""
    # Who cannot take a step says so before the others wait for it in the next.
    rank, tp_size = dist.get_rank(group), dist.get_world_size(group)
    problem = _first_problem(group, local_obstacle(device))
    if problem is not None:
        return problem
    places: list[Place] = _everyones(group, local_place(device))
    problem = group_obstacle(places)
    if problem is not None:
        return problem
    problem = _first_problem(group, link_obstacle(device, [place.device_uuid for place in places]))
    if problem is not None:
        return problem
    words, problem = _try(lambda: allocate_words(tp_size, device, capacity))
    problem = _first_problem(group, problem)
    if problem is not None or words is None:
        return problem or ""
    mapped, problem = _try(lambda: map_words(group, words))
    problem = _first_problem(group, problem)
    if problem is not None or mapped is None:
        return problem or ""
    return mapped.exchange(rank, _everyones(group, mapped.offset), capacity)


def _prove(group: dist.ProcessGroup, exchange: SymmetricExchange) -> None:
    """Compile on every rank, and only then launch."""
    problem = None
    try:
        exchange.compile()
    # Triton raises errors of many kinds, ptxas's among them.
    except Exception as error:
        problem = f"the exchange kernel does not compile ({_sentence(error)})"
    problem = _first_problem(group, problem)
    if problem is None:
        try:
            problem = exchange.trial_problem()
        except TimeoutError as error:
            # The stream waits still, and so would what is sent to agree.
            raise _failed(str(error)) from error
        problem = _first_problem(group, problem)
    if problem is not None:
        raise _failed(problem)


def _failed(problem: str) -> ExchangeFailedError:
    return ExchangeFailedError(
        f"symmetric memory is there but {problem}: report it, or choose another exchange"
    )


def _try(step: Callable[[], T]) -> tuple[T | None, str | None]:
    """What the step returns, or the first line of torch's error."""
    try:
        return step(), None
    except RuntimeError as error:
        return None, _sentence(error)


def _everyones(group: dist.ProcessGroup, item: Any) -> list[Any]:
    items: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(items, item, group=group)
    return items


def _first_problem(group: dist.ProcessGroup, problem: str | None) -> str | None:
    """The lowest rank's problem, on every rank; None where none has one."""
    for rank, text in enumerate(_everyones(group, problem)):
        if text is not None:
            return f"on rank {rank} {text}"
    return None


def _sentence(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__
