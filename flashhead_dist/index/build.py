"""Build an index: read the weights, cluster, lay out, calibrate, test, store."""

from __future__ import annotations

import platform
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flashhead_dist import __version__
from flashhead_dist.index.choose import choose, measure_fidelity
from flashhead_dist.index.cluster import cluster_tokens
from flashhead_dist.index.escalation import calibrate_escalation
from flashhead_dist.index.layout import cohesion, keep_spread, lay_out
from flashhead_dist.index.manifest import IndexManifest
from flashhead_dist.index.metric import second_moment
from flashhead_dist.index.options import HeadIndexError, IndexOptions
from flashhead_dist.index.progress import Counter, Report, progress_bars
from flashhead_dist.index.shrinkage import calibrate_shrinkage
from flashhead_dist.index.store import check_target, save_index
from flashhead_dist.models import ModelSource
from flashhead_dist.states import HiddenStates
from flashhead_kernels.cpu_threads import compute_threads

_READ_ROWS = 1 << 14
_VERSIONED = ("torch", "numpy", "safetensors")


def build_index(
    model: ModelSource,
    options: IndexOptions,
    *,
    calibration: HiddenStates | None,
    test: HiddenStates | None,
    out: Path,
    device: torch.device | str | None = None,
    replace_existing: bool = False,
    progress: bool = True,
    clusters: tuple[Tensor, int] | None = None,
    notes: Mapping[str, Any] | None = None,
) -> Path:
    """Build the index of `model` and store it in the folder `out`, which is returned.

    calibration: shapes the metric and the rounding of centroids, and chooses alpha and pinned
        tokens. Without it clusters are Euclidean, alpha is 0 unless the options say otherwise, and
        no token is pinned but those of the options and the tokenizer's special ones.
    test: its fidelity goes into the manifest.
    device: a GPU where there is one, if None.
    clusters: what `cluster_tokens` gives for these options, where it is at hand.
    notes: JSON-ready, kept in the manifest beside the evidence for alpha.

    Raises:
        HeadIndexError: options that do not fit the model, a device that is not there, weights that
            are not finite, or an `out` that exists or cannot be written.
    """
    options.check(model.vocab_size, model.hidden_size)
    check_target(out, replace=replace_existing)
    started = time.monotonic()
    device = _device(device)
    threads = torch.get_num_threads()
    # Sums over several threads are added in another order, and a tree turns on the last bit. Only
    # the dense head, whose answers are exact, uses more: clusters are then the same on any machine
    # with this kind of processor.
    with progress_bars(progress) as report, compute_threads(1):
        weights = _read_weights(model, report).to(device)
        moment = None
        if calibration is not None and len(calibration):
            moment = second_moment(calibration.states.to(device))
        if clusters is None:
            clusters = cluster_tokens(weights, options, moment=moment, report=report)
        slots, rounds = clusters[0].to(device), clusters[1]
        tensors = lay_out(weights, slots, options.pinned_token_ids, options, moment)
        special = model.special_token_ids() if options.pin_special_tokens else ()
        choice = choose(weights, tensors, options, calibration, special, threads, report)
        if choice.pinned_token_ids != options.pinned_token_ids:
            slots, before = _without(slots, choice.pinned_token_ids), tensors.spread
            tensors = lay_out(weights, slots, choice.pinned_token_ids, options, moment)
            tensors = replace(tensors, spread=keep_spread(tensors, before))
        evidence = choice.evidence
        if calibration is not None and len(calibration):
            probes = -(-options.probes(model.vocab_size) // options.num_groups)
            advance = Counter(report, "Calibrating: unprobed clusters")
            evidence = evidence | calibrate_shrinkage(
                tensors, calibration, choice.alpha, probes, advance
            )
            advance = Counter(report, "Calibrating: margins")
            evidence["escalation"] = calibrate_escalation(
                tensors, calibration, choice.alpha, probes, advance
            )
        fidelity = measure_fidelity(weights, tensors, options, choice.alpha, test, threads, report)
        mean_cosine = cohesion(weights, slots)
        build_seconds = round(time.monotonic() - started, 1)

        def describe(stored: dict[str, Any]) -> IndexManifest:
            return IndexManifest(
                model_name=model.name,
                weight_hash=model.weight_hash,
                synthetic=model.synthetic,
                dtype=str(model.dtype).removeprefix("torch."),
                vocab_size=model.vocab_size,
                hidden_size=model.hidden_size,
                num_clusters=len(slots),
                cluster_size=options.cluster_size,
                num_groups=options.num_groups,
                bits=options.centroid_bits,
                group_size=tensors.centroids.group_size,
                tile=tensors.centroids.tile,
                centroid_columns=options.centroid_columns,
                num_pinned=tensors.pinned_token_ids.shape[1],
                centroid_kind=options.centroid_kind,
                alpha=choice.alpha,
                num_probes=options.probes(model.vocab_size),
                method=options.method,
                metric_exponent=0.0 if moment is None else options.metric_exponent,
                seed=options.seed,
                rounds=rounds,
                cohesion=mean_cosine,
                build_seconds=build_seconds,
                versions=_versions(),
                calibration={**evidence, **(notes or {})},
                fidelity=fidelity,
                **stored,
            )

        return save_index(out, tensors, describe, replace=replace_existing)


def _device(named: torch.device | str | None) -> torch.device:
    if named is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(named)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise HeadIndexError("this torch sees no CUDA device; use --device cpu.")
    return device


def _read_weights(model: ModelSource, report: Report) -> Tensor:
    """The output embedding `[V, D]` in the model's dtype; HeadIndexError where it is not finite."""
    weights = torch.empty(model.vocab_size, model.hidden_size, dtype=model.dtype)
    for start in range(0, model.vocab_size, _READ_ROWS):
        stop = min(start + _READ_ROWS, model.vocab_size)
        weights[start:stop] = model.read_rows(start, stop)
        finite = torch.isfinite(weights[start:stop]).all(1)
        if not bool(finite.all()):
            token = start + int((~finite).nonzero()[0, 0])
            raise HeadIndexError(
                f"the output embedding of {model.name} is NaN or infinite at token {token}; "
                "use weights that are finite."
            )
        report("Reading the output embedding", stop / model.vocab_size)
    return weights


def _without(slots: Tensor, token_ids: Sequence[int]) -> Tensor:
    """`slots` with `token_ids` turned into pads."""
    taken = torch.tensor(list(token_ids), device=slots.device, dtype=slots.dtype)
    return slots.masked_fill(torch.isin(slots, taken), -1)


def _versions() -> dict[str, str]:
    own = {"python": platform.python_version(), "flashhead-dist": __version__}
    return own | {name: version(name) for name in _VERSIONED}
