"""What a sweep measures, and on what."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from flashhead_dist.bench.cell import Effort
from flashhead_dist.heads.flashhead_escalate import Escalation
from flashhead_dist.models import ModelSource
from flashhead_topology.machine import Oversubscription


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What to measure; the same on every rank."""

    heads: Sequence[str]
    tp_sizes: Sequence[int]
    batch_sizes: Sequence[int]
    dtype: torch.dtype
    num_probes: int | None = None
    alpha: float | None = None
    escalation: Escalation | None = None
    """Of flashhead_escalate; the index's own where None."""
    effort: Effort = field(default_factory=Effort)
    num_cores: int
    """Cores of this host, for loading: heads are built with all of them and timed with their own
    threads."""
    fit: Callable[[int], Oversubscription]
    """Whether a `tp_size` fits the machine."""
    remeasure: bool = False
    """Measure anew what another run kept: where flashhead_auto changes over."""

    @property
    def num_stages(self) -> int:
        """How often `Progress.stage` is called."""
        return len(self.tp_sizes) * (2 + len(self.batch_sizes))


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """What to measure on; the same on every rank.

    states `[N, D]`, dense_ids `[N]` (the dense head's best token, or None to leave agreement out),
    source_ids `[N]` into `sources`.
    """

    model: ModelSource
    index_dir: Path | None
    states: Tensor
    source_ids: Tensor
    sources: Sequence[str]
    dense_ids: Tensor | None
