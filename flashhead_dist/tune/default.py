"""Making a chosen point the default of an index, with the evidence for it in its manifest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from flashhead_dist.index import build_index, load_manifest
from flashhead_dist.index.manifest import IndexManifest, change_manifest
from flashhead_dist.index.options import HeadIndexError, IndexOptions
from flashhead_dist.models import ModelSource
from flashhead_dist.tune.front import Record, Target
from flashhead_dist.tune.nested import resize
from flashhead_dist.tune.points import index_options
from flashhead_dist.tune.prepare import Prepared
from flashhead_dist.tune.timing import point_of

NOTE = "tuning"
_MANIFEST_FIELDS = {
    "cluster_size": "cluster_size",
    "centroid_bits": "bits",
    "group_size": "group_size",
    "centroid_columns": "centroid_columns",
    "row_bits": "row_bits",
}


def evidence(
    chosen: Record,
    target: Target,
    held_out: Sequence[str],
    choose_by: Sequence[str],
    num_points: int,
) -> dict[str, Any]:
    """What the manifest keeps, under NOTE: the target, the point, and what it was found to do."""
    return {
        NOTE: {
            "target": str(target),
            "chosen": chosen,
            "num_points": num_points,
            "held_out": list(held_out),
            "choose_by": list(choose_by),
            "date_utc": datetime.now(UTC).strftime("%Y-%m-%d"),
        }
    }


def build_default(
    chosen: Record,
    notes: dict[str, Any],
    prepared: Prepared,
    model: ModelSource,
    frequent: Sequence[int],
    out: Path,
    *,
    replace_existing: bool = False,
    device: str | None = None,
) -> Path:
    """Build the index of `chosen` in `out`, of the clusters that were simulated.

    Its calibration states are those of the run, and its fidelity is that on the held-out states
    where there are any, else on the selection states.

    Raises:
        HeadIndexError: a point that no head runs, or an `out` that cannot be written.
    """
    point, scene, parts = point_of(chosen), prepared.scene, prepared.parts
    options = index_options(point, scene.shape.hidden_size, scene.num_groups)
    if options is None:
        raise HeadIndexError(
            f"the point {chosen['family']} is simulated alone: choose among those that the head "
            "runs, without --simulated"
        )
    pinned = tuple(sorted(frequent[: point.frequent_pins]))
    choices = {field.name: getattr(options, field.name) for field in fields(IndexOptions)} | {
        "num_probes": point.probes_per_group * scene.num_groups,
        "learned_pins_per_group": -(-point.learned_pins // scene.num_groups),
        "pinned_token_ids": pinned,
    }
    slots = resize(scene.slots, scene.vectors, point.cluster_size)
    taken = torch.isin(slots, torch.tensor(pinned, dtype=slots.dtype))
    return build_index(
        model,
        IndexOptions(**choices),
        calibration=parts.calibration,
        test=parts.held_out or parts.selection,
        out=out,
        device=device,
        replace_existing=replace_existing,
        clusters=(slots.masked_fill(taken, -1), prepared.rounds),
        notes=notes,
    )


def fits(record: Record, manifest: IndexManifest) -> bool:
    """Whether the index of `manifest` becomes `record` by other probes and another alpha alone."""
    usual = {"centroid_columns": manifest.hidden_size, "row_bits": 16}
    stored = {
        name: getattr(manifest, there, None) or usual.get(name)
        for name, there in _MANIFEST_FIELDS.items()
    }
    same = all(record[name] == value for name, value in stored.items())
    learned = len(manifest.calibration.get("learned_pinned_token_ids", []))
    as_pinned = not record["frequent_pins"] and bool(record["learned_pins"]) == bool(learned)
    simple = not record["coarse_size"] and record["second_order"] == "spread"
    return same and as_pinned and simple


def fitting(records: Sequence[Record], path: Path) -> list[Record]:
    """The records that the index `path` becomes by other probes and another alpha alone.

    Raises:
        HeadIndexError: there is none, or no index.
    """
    manifest = load_manifest(path)
    found = [record for record in records if fits(record, manifest)]
    if not found:
        raise HeadIndexError(
            f"{path} has clusters, centroids or pinned tokens that none of the {len(records)} "
            "settings has: build an index of the choice with --build"
        )
    return found


def apply_default(path: Path, chosen: Record, notes: dict[str, Any]) -> IndexManifest:
    """Write probes, alpha and the evidence into the manifest of the index `path`.

    Raises:
        HeadIndexError: an index that the point does not fit, or that cannot be written.
    """
    manifest = load_manifest(path)
    # Margins are of the probes and the alpha that they were calibrated with.
    kept = {name: item for name, item in manifest.calibration.items() if name != "escalation"}
    return change_manifest(
        path,
        num_probes=chosen["probes_per_group"] * manifest.num_groups,
        alpha=chosen["alpha"],
        calibration={**kept, **notes},
        # Measured with other probes, on other states.
        fidelity={},
    )
