"""From the ranks of a family to its points: what each finds, in every part of the states."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from flashhead_dist.index.calibrate import missed_tokens
from flashhead_dist.tune.front import HALF, undominated
from flashhead_dist.tune.points import Family, Point
from flashhead_dist.tune.row_rounding import survives
from flashhead_dist.tune.scene import Part, Scene
from flashhead_dist.tune.simulate import Simulator

CANDIDATES = (
    *(1024, 1536, 2048, 3072, 4096, 5120, 6144, 7168, 8192, 9216, 10240, 11264, 12288),
    *(14336, 16384, 20480, 24576, 32768),
)
"""Candidate rows, R, that are tried for one of 2^18 tokens; others in proportion."""
_VOCABULARY = 1 << 18
_KEPT_BY = ("top1_worst", "top1", HALF)


@dataclass(frozen=True)
class Choices:
    """Values of what a family's points differ in."""

    alphas: tuple[float, ...]
    candidates: tuple[int, ...]
    pins: tuple[tuple[int, int], ...]
    """(learned, frequent)."""
    row_bits: tuple[int, ...]
    most_bytes_share: float

    def probes(self, family: Family, scene: Scene) -> list[int]:
        """Probes a group, ascending, that give about the candidates, and fewer than all."""
        shape = scene.shape
        unit = shape.num_groups * family.cluster_size
        scale = shape.vocab_size / _VOCABULARY
        clusters = shape.num_clusters(family.cluster_size) // shape.num_groups
        wanted = {max(1, round(rows * scale / unit)) for rows in self.candidates}
        return sorted(p for p in wanted if p < clusters)


def measure_family(
    simulator: Simulator,
    scene: Scene,
    family: Family,
    choices: Choices,
    frequent: Sequence[int],
    int8_logits: Tensor,
    ranks: Tensor,
) -> list[dict[str, Any]]:
    """Records of the family's points that no other with the same alpha and row bits beats.

    Not across alphas: they are what a choice weighs against a few states (`front.choose`).

    ranks: from `Simulator.ranks`, `[alphas, N]`. frequent: token ids, most frequent first.
    int8_logits: `[N, t]` of `scene.top_tokens`.
    """
    groups = simulator.home_groups(family, scene.top_tokens)
    rounding = {16: torch.ones(len(groups), dtype=torch.bool), 8: survives(int8_logits, groups)}
    records: dict[tuple[int, float], list[dict[str, Any]]] = defaultdict(list)
    for point, found, by_half in _found(scene, family, choices, frequent, ranks):
        for bits in choices.row_bits:
            with_bits = replace(point, row_bits=bits)
            share = scene.shape.bytes_share(with_bits)
            if share <= choices.most_bytes_share:
                kept = rounding[bits]
                records[bits, point.alpha].append(
                    record_of(with_bits, share, found & kept, by_half & kept, scene)
                )
    return [
        record for alike in records.values() for record in undominated(alike, agreements=_KEPT_BY)
    ]


def record_of(
    point: Point, bytes_share: float, found: Tensor, by_half: Tensor, scene: Scene
) -> dict[str, Any]:
    """One flat record: the point's choices, its bytes, and what it finds in each part.

    found, by_half: bool `[N]`, states whose dense argmax is a candidate with all of the probes and
    with half of them.
    """
    record: dict[str, Any] = {
        "family": point.key,
        **asdict(point),
        "candidates": point.probes_per_group * scene.num_groups * point.cluster_size,
        "bytes_share": bytes_share,
        HALF: scene.selection.shares(by_half).overall,
    }
    parts: list[tuple[str, Part | None]] = [
        ("", scene.selection),
        ("held_out_", scene.held_out),
    ]
    for prefix, part in parts:
        if part is not None:
            shares = part.shares(found)
            record |= {
                f"{prefix}top1": shares.overall,
                f"{prefix}top1_worst": shares.worst,
                f"{prefix}worst_source": shares.worst_source,
                f"{prefix}worst_states": shares.num_worst_states,
                f"{prefix}states": shares.num_states,
            }
    return record


def _found(
    scene: Scene, family: Family, choices: Choices, frequent: Sequence[int], ranks: Tensor
) -> Iterator[tuple[Point, Tensor, Tensor]]:
    """Points with 16-bit rows, and the states `[N]` that all and half of their probes find."""
    tokens = scene.top_tokens[:, 0]
    calibrating = scene.calibration.rows
    vocab_size = len(scene.weights)
    of_frequent = {
        count: _among(tokens, frequent[:count], vocab_size)
        for count in {count for _, count in choices.pins}
    }
    for probes in choices.probes(family, scene):
        for place, alpha in enumerate(choices.alphas):
            probed, by_half = ranks[place] < probes, 2 * ranks[place] < probes
            of_calibration = ranks[place][calibrating], tokens[calibrating]
            of_learned = {
                count: _among(tokens, missed_tokens(*of_calibration, probes, count), vocab_size)
                for count in {learned for learned, _ in choices.pins}
            }
            for learned, count in choices.pins:
                pinned = of_learned[learned] | of_frequent[count]
                point = Point.of(
                    family,
                    alpha=alpha,
                    probes_per_group=probes,
                    learned_pins=learned,
                    frequent_pins=min(count, len(frequent)),
                )
                yield point, probed | pinned, by_half | pinned


def _among(tokens: Tensor, chosen: Sequence[int], vocab_size: int) -> Tensor:
    """Which of `tokens [N]` are among `chosen`: bool `[N]`."""
    table = torch.zeros(vocab_size, dtype=torch.bool)
    table[torch.tensor(chosen, dtype=torch.int64)] = True
    return table[tokens]
