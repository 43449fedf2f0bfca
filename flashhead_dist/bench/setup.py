"""How a run uses the machine: devices, backend, threads, heads, and which `tp_size` fits.

The same on every rank of a host, from what the rank sees; nothing is opened here.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec

import torch

from flashhead_dist.errors import UserError
from flashhead_dist.heads.faiss_ivf import FaissIvf
from flashhead_dist.heads.registry import HEAD_NAMES
from flashhead_topology.machine import (
    Machine,
    Oversubscription,
    Placement,
    choose_placement,
    oversubscription,
)


@dataclass(frozen=True, kw_only=True)
class Setup:
    """What `decide_setup` decided; `notes` are sentences that a person must read."""

    machine: Machine
    placement: Placement
    device: torch.device
    heads: tuple[str, ...]
    threads_per_rank: int
    local_world_size: int
    notes: tuple[str, ...] = ()

    def fit(self, tp_size: int) -> Oversubscription:
        """Whether a group of `tp_size` ranks, of which this host has what fits, runs at speed."""
        return oversubscription(
            min(tp_size, self.local_world_size),
            self.machine.num_cores,
            len(self.machine.gpus) if self.device.type == "cuda" else 0,
            threads_per_rank=self.threads_per_rank,
        )

    def group_sizes(self, tp_sizes: Iterable[int], world_size: int) -> list[int]:
        """Groups that a sweep of `tp_sizes` needs, ascending.

        Where one is oversubscribed, the largest group that is not joins them: it times the
        exchanges that projections are made of.
        """
        sizes = set(tp_sizes)
        if any(self.fit(size).oversubscribed for size in sizes):
            fitting = [s for s in range(2, world_size + 1) if not self.fit(s).oversubscribed]
            sizes.update(fitting[-1:])
        return sorted(sizes)

    @property
    def device_name(self) -> str:
        """Name of what computes."""
        if self.device.type == "cuda":
            return self.machine.gpus[self.device.index or 0].name
        return self.machine.cpu_model


def decide_setup(
    machine: Machine,
    *,
    local_rank: int,
    local_world_size: int,
    threads_per_rank: int,
    device: str | None = None,
    heads: Sequence[str] | None = None,
) -> Setup:
    """Decide how this rank uses `machine`.

    Args:
        device: `cpu` or `cuda` where the user insists.
        heads: None for all that can run here.

    Raises:
        UserError: cuda is asked for and the ranks do not have a GPU each.
    """
    notes: list[str] = []
    num_gpus = 0 if device == "cpu" else len(machine.gpus)
    placement = choose_placement(local_world_size, num_gpus)
    if device == "cuda" and placement.device_type != "cuda":
        raise UserError(f"--device cuda is not possible: {placement.reason}")
    if num_gpus and placement.device_type == "cpu":
        notes.append(f"GPUs are NOT USED: {placement.reason}.")
    if heads is None:
        heads, skipped = _all_heads(placement.device_type)
        notes += skipped
    on_cuda = placement.device_type == "cuda"
    return Setup(
        machine=machine,
        placement=placement,
        device=torch.device("cuda", local_rank) if on_cuda else torch.device("cpu"),
        heads=tuple(heads),
        threads_per_rank=threads_per_rank,
        local_world_size=local_world_size,
        notes=tuple(notes),
    )


def _all_heads(device_type: str) -> tuple[list[str], list[str]]:
    """All heads, without faiss_ivf where no faiss serves the device, and a note if so."""
    if find_spec("faiss") is None:
        reason = "faiss is not installed; pip install 'flashhead-dist[faiss]' to measure it"
    elif device_type == "cuda" and not hasattr(import_module("faiss"), "StandardGpuResources"):
        reason = (
            "the installed faiss has no GPU support; "
            "install flashhead-dist[faiss-gpu] in place of faiss-cpu to measure it"
        )
    else:
        return list(HEAD_NAMES), []
    others = [name for name in HEAD_NAMES if name != FaissIvf.name]
    return others, [f"{FaissIvf.name} is SKIPPED: {reason}."]
