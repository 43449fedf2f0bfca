"""Where `flashhead_auto` changes over, remembered from run to run.

It is found again for the same index, probes, rows, ranks, device and threads, with the same kernels
and torch. The first rank's device stands for all; it alone reads the cache, so that all ranks of a
group change over at the same batch size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import torch
from torch import Tensor

from flashhead_dist.bench.control import Control
from flashhead_dist.bench.crossover import Crossover, measure_crossover
from flashhead_dist.heads.flashhead_auto import FlashHeadAuto
from flashhead_dist.models import cache_root
from flashhead_dist.models.kept import KeptMeasurements
from flashhead_kernels.source_hash import kernels_hash
from flashhead_topology.probe import probe_machine

_SCHEMA_VERSION = 2
"""Of a kept `Crossover`; another's is not found."""


def find_crossover_of(head: FlashHeadAuto, control: Control, *, largest: int) -> Crossover | None:
    """What another run measured, where it holds for batches of up to `largest` rows, else None.

    Every rank of the group calls it, and all get the same; nothing is set.

    Raises:
        UserError: on every rank, where the cache is damaged.
    """
    found: dict[str, Any] | None = None
    with control.phase():
        if control.is_first:
            found = _kept().find(_case(head))
    known = control.broadcast(found)
    if known is None:
        return None
    crossover = Crossover.from_json(known)
    return crossover if crossover.largest >= largest else None


def settle_crossover(
    head: FlashHeadAuto,
    batches: Callable[[int], Sequence[Tensor]],
    control: Control,
    *,
    largest: int,
    in_turn: bool,
    remeasure: bool = False,
) -> Crossover:
    """Tell `head` where to change over: what was kept, or what is measured now and kept.

    See `measure_crossover`; remeasure: whatever was kept.
    """
    crossover = None if remeasure else find_crossover_of(head, control, largest=largest)
    if crossover is None:
        crossover = measure_crossover(head, batches, control, largest=largest, in_turn=in_turn)
        not_kept: str | None = None
        if control.is_first:
            now = datetime.now(UTC).isoformat(timespec="seconds")
            not_kept = _kept().keep(
                _case(head), replace(crossover, origin=f"kept from {now}").as_json()
            )
        crossover = replace(crossover, not_kept=control.broadcast(not_kept))
    head.changes_at = crossover.changes_at
    return crossover


def _kept() -> KeptMeasurements:
    return KeptMeasurements(cache_root() / "measurements" / "crossovers.json")


def _case(head: FlashHeadAuto) -> dict[str, Any]:
    """All that a crossover depends on, as JSON values."""
    device: dict[str, Any]
    if head.tp.device.type == "cuda":
        device = {"device": torch.cuda.get_device_name(head.tp.device)}
    else:
        machine, threads = probe_machine(), torch.get_num_threads()
        cores = {"num_cores": machine.num_cores, "threads_per_rank": threads}
        device = {"device": machine.cpu_model, **cores}
    return {
        "schema_version": _SCHEMA_VERSION,
        "vocab_size": head.vocab_size,
        "hidden_size": head.hidden_size,
        "tp_size": head.tp.tp_size,
        "rows": str(head.shard.rows.dtype),
        "index_hash": head.shard.manifest.index_hash,
        "num_probes": head.num_probes,
        "kernels": kernels_hash(),
        "torch": torch.__version__,
        **device,
    }
