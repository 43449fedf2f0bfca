"""Build an index: read the weights, cluster, lay out, calibrate, test, store."""

from __future__ import annotations

import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor

from flashhead_dist.hidden_states import HiddenStates
from flashhead_dist.index.calibrate import (
    Found,
    choose_alpha,
    dense_argmax,
    found_within,
    probe_ranks,
)
from flashhead_dist.index.cluster import Report, cluster_tokens
from flashhead_dist.index.layout import IndexTensors, cohesion, lay_out
from flashhead_dist.index.manifest import IndexManifest
from flashhead_dist.index.metric import hidden_metric
from flashhead_dist.index.options import ALPHAS, HeadIndexError, IndexOptions
from flashhead_dist.index.store import check_target, save_index
from flashhead_dist.model_source import ModelSource

_READ_ROWS = 1 << 14
_VERSIONED = ("flashhead-dist", "torch", "numpy", "safetensors")


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
) -> Path:
    """Build the index of `model` and store it in the folder `out`, which is returned.

    calibration: shapes the metric and chooses alpha; without it clusters are Euclidean and alpha is
        0 unless the options say otherwise.
    test: its fidelity goes into the manifest.
    device: a GPU where there is one, if None.

    Raises:
        HeadIndexError: options that do not fit the model, weights that are not finite, or an `out`
            that exists or cannot be written.
    """
    options.check(model.vocab_size, model.hidden_size)
    check_target(out, replace=replace_existing)
    started = time.monotonic()
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    with _progress(progress) as report:
        weights = _read_weights(model, report).to(device)
        transform = None
        if calibration is not None and options.metric_exponent > 0:
            transform = hidden_metric(calibration.states.to(device), options.metric_exponent)
        slots, rounds = cluster_tokens(weights, options, transform=transform, report=report)
        tensors = lay_out(weights, slots, options)
        evidence, chosen = _calibrate(weights, tensors, options, calibration, report)
        fidelity = _test(weights, tensors, options, chosen, test, report)
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
                num_pinned=tensors.pinned_token_ids.shape[1],
                centroid_kind=options.centroid_kind,
                alpha=chosen,
                num_probes=options.probes(model.vocab_size),
                method=options.method,
                metric_exponent=0.0 if transform is None else options.metric_exponent,
                seed=options.seed,
                rounds=rounds,
                cohesion=mean_cosine,
                build_seconds=build_seconds,
                versions=_versions(),
                calibration=evidence,
                fidelity=fidelity,
                **stored,
            )

        return save_index(out, tensors, describe, replace=replace_existing)


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


def _probes_per_group(options: IndexOptions, weights: Tensor) -> int:
    return -(-options.probes(len(weights)) // options.num_groups)


def _calibrate(
    weights: Tensor,
    tensors: IndexTensors,
    options: IndexOptions,
    calibration: HiddenStates | None,
    report: Report,
) -> tuple[dict[str, Any], float]:
    """Evidence for the manifest, and alpha."""
    if calibration is None or not len(calibration):
        return {}, options.alpha or 0.0
    alphas = ALPHAS if options.alpha is None else (options.alpha,)
    found = _found(weights, tensors, options, calibration, alphas, report, "Calibrating")
    evidence = {
        "num_states": len(calibration),
        "origin": calibration.origin,
        "top1_agreement_by_alpha": [
            {
                "alpha": alpha,
                "top1_agreement": result.overall,
                "top1_agreement_worst_source": result.worst,
                "worst_source": result.worst_source,
            }
            for alpha, result in found.items()
        ],
    }
    return evidence, choose_alpha(found)


def _test(
    weights: Tensor,
    tensors: IndexTensors,
    options: IndexOptions,
    alpha: float,
    test: HiddenStates | None,
    report: Report,
) -> dict[str, Any]:
    """Fidelity on the test states, for the manifest."""
    if test is None or not len(test):
        return {}
    found = _found(weights, tensors, options, test, (alpha,), report, "Testing")[alpha]
    return {
        "num_states": len(test),
        "origin": test.origin,
        "top1_agreement": found.overall,
        "top1_agreement_worst_source": found.worst,
        "worst_source": found.worst_source,
        "top1_agreement_by_source": found.by_source,
    }


def _found(
    weights: Tensor,
    tensors: IndexTensors,
    options: IndexOptions,
    states: HiddenStates,
    alphas: tuple[float, ...],
    report: Report,
    stage: str,
) -> dict[float, Found]:
    count = _Counter(report, f"{stage}: dense head")
    tokens = dense_argmax(weights, states.states, count)
    count = _Counter(report, f"{stage}: index")
    ranks = probe_ranks(tensors, states.states, tokens, alphas, count)
    probes = _probes_per_group(options, weights)
    return {
        alpha: found_within(row, probes, states) for alpha, row in zip(alphas, ranks, strict=True)
    }


class _Counter:
    """Adds up the shares of a stage."""

    def __init__(self, report: Report, stage: str) -> None:
        self._report, self._stage, self._done = report, stage, 0.0

    def __call__(self, share: float) -> None:
        self._done += share
        self._report(self._stage, min(1.0, self._done))


@contextmanager
def _progress(show: bool) -> Iterator[Report]:
    """A bar per stage on stderr."""
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), disable=not show) as bars:
        tasks: dict[str, Any] = {}

        def report(stage: str, done: float) -> None:
            if stage not in tasks:
                tasks[stage] = bars.add_task(stage, total=1.0)
            bars.update(tasks[stage], completed=done)

        yield report


def _versions() -> dict[str, str]:
    return {"python": platform.python_version(), **{name: version(name) for name in _VERSIONED}}
