"""What is the same for every setting: the weights, a tree of clusters, and states in three parts.

V vocabulary, D hidden size, N states of all parts together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from flashhead_dist.states import HiddenStates
from flashhead_dist.states.hold_out import Parts
from flashhead_dist.tune.points import Shape

TOP = 10
"""Best tokens of the dense head that are known of each state."""


@dataclass(frozen=True)
class Part:
    """States `rows` of the scene, with the source of each."""

    rows: slice
    source_ids: Tensor
    sources: tuple[str, ...]

    def shares(self, found: Tensor) -> Shares:
        """Shares of `found` bool `[N]`, of the whole scene, that lie in this part."""
        mine = found[self.rows].double().cpu()
        totals = torch.bincount(self.source_ids, minlength=len(self.sources))
        hits = torch.bincount(self.source_ids, weights=mine, minlength=len(self.sources))
        shares = torch.where(totals > 0, hits / totals.clamp(min=1), torch.inf)
        worst = int(shares.argmin())
        return Shares(
            float(mine.mean()),
            len(mine),
            float(shares[worst]),
            self.sources[worst],
            int(totals[worst]),
        )


@dataclass(frozen=True)
class Shares:
    """Of states whose dense argmax is a candidate: over all, and in the worst source."""

    overall: float
    num_states: int
    worst: float
    worst_source: str
    num_worst_states: int


@dataclass(frozen=True)
class Scene:
    """What settings are simulated on.

    weights `[V, D]`; slots int64 `[C, S]` of clusters in tree order, -1 for pads; vectors `[V, d]`,
    rows in the metric that clusters form in; moment float64 `[D, D]` of the calibration states, or
    None; states `[N, D]`; top_tokens int64 `[N, t]`, the dense head's best tokens, best first.
    """

    weights: Tensor
    slots: Tensor
    vectors: Tensor
    moment: Tensor | None
    num_groups: int
    states: Tensor
    top_tokens: Tensor
    calibration: Part
    selection: Part
    held_out: Part | None

    @property
    def shape(self) -> Shape:
        return Shape(self.weights.shape[0], self.weights.shape[1], self.num_groups)


def join(parts: Parts) -> tuple[Tensor, tuple[Part, Part, Part | None]]:
    """States `[N, D]` of all parts, one after another, and where each part lies."""
    present = [parts.calibration, parts.selection]
    if parts.held_out is not None:
        present.append(parts.held_out)
    places = _places(present)
    states = torch.cat([part.states for part in present])
    return states, (places[0], places[1], places[2] if len(places) > 2 else None)


def _places(present: Sequence[HiddenStates]) -> list[Part]:
    places, start = [], 0
    for part in present:
        rows = slice(start, start + len(part))
        places.append(Part(rows, part.source_ids, part.sources))
        start += len(part)
    return places
