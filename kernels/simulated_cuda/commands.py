"""What happens on simulated devices, and where it was asked for."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor

_SKIPPED_FRAMES = (
    *(str(Path(file).parent) for file in (__file__, torch.__file__, triton.__file__)),
    contextlib.__file__,
)


@dataclass(frozen=True)
class HostWait:
    """The host waited for a device. place: `file:line`, the nearest caller outside torch."""

    name: str
    place: str


@dataclass(frozen=True)
class Operation:
    """A torch operation that launches at least one kernel, e.g. `aten.add.Tensor`."""

    name: str
    device: torch.device
    place: str


@dataclass(frozen=True)
class Launch:
    """A Triton launch. device: of its tensors; current_device: index of the current one."""

    kernel: str
    grid: tuple[int, ...]
    current_device: int
    device: torch.device | None
    place: str


@dataclass(frozen=True)
class EventRecord:
    """An event was recorded on a stream. number: of the event, in order of creation."""

    number: int
    place: str


@dataclass(frozen=True)
class Replay:
    """A graph of `nodes` operations and launches was replayed: one launch by the host."""

    nodes: int
    place: str


Command = HostWait | Operation | Launch | EventRecord | Replay


def tensors_in(tree: Any) -> list[Tensor]:
    """The tensors in nested lists, tuples and dictionaries."""
    if isinstance(tree, Tensor):
        return [tree]
    if isinstance(tree, dict):
        tree = tree.values()
    elif not isinstance(tree, list | tuple):
        return []
    return [found for each in tree for found in tensors_in(each)]


def map_tensors(tree: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """`tree` with `function` of its tensors in their place."""
    if isinstance(tree, Tensor):
        return function(tree)
    if isinstance(tree, dict):
        return {key: map_tensors(value, function) for key, value in tree.items()}
    if isinstance(tree, list | tuple) and not hasattr(tree, "_fields"):
        return type(tree)(map_tensors(each, function) for each in tree)
    return tree


def place() -> str:
    """`file:line` of the nearest caller outside torch, Triton and this file."""
    frame = sys._getframe(1)
    file = frame.f_code.co_filename
    while frame.f_back is not None and file.startswith(_SKIPPED_FRAMES):
        frame = frame.f_back
        file = frame.f_code.co_filename
    return f"{'/'.join(file.rsplit('/', 2)[-2:])}:{frame.f_lineno}"
