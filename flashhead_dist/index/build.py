"""Build an index (read the weights, cluster, lay out, calibrate, test, store), or find it.

`ensure_index` is what commands call: the index of a model at its default path in the cache, built
first where it is missing.
"""

from __future__ import annotations

import platform
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flashhead_dist import __version__
from flashhead_dist.index.calibrate import Evaluator, calibrate_escalation, calibrate_shrinkage
from flashhead_dist.index.cluster import cluster_tokens, second_moment
from flashhead_dist.index.layout import cohesion, keep_spread, lay_out
from flashhead_dist.index.options import HeadIndexError, IndexOptions
from flashhead_dist.index.store import IndexManifest, check_target, save_index
from flashhead_dist.models import ModelSource, cache_root
from flashhead_dist.models.cache import locked
from flashhead_dist.states import HiddenStates, collect_hidden_states, synthetic_hidden_states
from flashhead_kernels.cpu_threads import compute_threads
from flashhead_kernels.shard import Query

_LAYOUT_VERSION = 1
"""Part of the default path: raise it where the builder makes another index of the same options."""
_READ_ROWS = 1 << 14
_VERSIONED = ("torch", "numpy", "safetensors")

States = tuple[HiddenStates | None, HiddenStates | None]


@dataclass(frozen=True)
class BuildInputs:
    """What an index is made from beside the weights.

    calibration: shapes the metric and the rounding of centroids, and chooses alpha and pinned
        tokens. Without it clusters are Euclidean, alpha is 0 unless the options say otherwise, and
        no token is pinned but those of the options and the tokenizer's special ones.
    test: its fidelity goes into the manifest.
    clusters: the result of `cluster_tokens` for these options, where it is known.
    notes: JSON-ready, stored in the manifest beside the evidence for alpha.
    """

    calibration: HiddenStates | None
    test: HiddenStates | None = None
    clusters: tuple[Tensor, int] | None = None
    notes: Mapping[str, Any] = field(default_factory=dict)


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
    """Build the index of `model` in the folder `out` from calibration and test states.

    See `BuildInputs` for the states and `build_from` for the rest.
    """
    return build_from(
        model,
        options,
        BuildInputs(calibration, test),
        out,
        device=device,
        replace_existing=replace_existing,
        progress=progress,
    )


def build_from(
    model: ModelSource,
    options: IndexOptions,
    inputs: BuildInputs,
    out: Path,
    *,
    device: torch.device | str | None = None,
    replace_existing: bool = False,
    progress: bool = True,
) -> Path:
    """Build the index of `model` and store it in the folder `out`, which is returned.

    device: a GPU where there is one, if None. progress: show it on stderr.

    Raises:
        HeadIndexError: options that do not fit the model, a device that does not exist, weights
            that are not finite, or an `out` that exists or cannot be written.
    """
    options.check(model.vocab_size, model.hidden_size)
    check_target(out, replace=replace_existing)
    started = time.monotonic()
    device = _device(device)
    calibration = inputs.calibration if inputs.calibration else None
    threads = torch.get_num_threads()
    # Sums over several threads are added in another order, and a tree depends on the last bit. Only
    # the dense head, whose answers are exact, uses more: clusters are then the same on any machine
    # with this kind of processor.
    with compute_threads(1):
        weights = read_weights(model).to(device)
        moment = None
        if calibration is not None:
            moment = second_moment(calibration.states.to(device))
        slots, rounds = inputs.clusters or cluster_tokens(
            weights, options, moment=moment, visible=progress
        )
        slots = slots.to(device)
        shard = lay_out(weights, slots, options.pinned_token_ids, options, moment)
        special = model.special_token_ids() if options.pin_special_tokens else ()
        evaluator = Evaluator(weights, options, threads, progress)
        choice = evaluator.choose(shard, calibration, special)
        if choice.pinned_token_ids != options.pinned_token_ids:
            slots, before = _without(slots, choice.pinned_token_ids), shard.spread
            shard = lay_out(weights, slots, choice.pinned_token_ids, options, moment)
            shard = replace(shard, spread=keep_spread(shard, before))
        evidence = choice.evidence
        if calibration is not None:
            query = Query(evaluator.probes_per_group, choice.alpha)
            shrinkage = calibrate_shrinkage(shard, calibration, query, visible=progress)
            escalation = calibrate_escalation(shard, calibration, query, visible=progress)
            evidence = evidence | shrinkage | {"escalation": escalation}
        fidelity = evaluator.fidelity(shard, choice.alpha, inputs.test)
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
                group_size=shard.centroids.group_size,
                tile=shard.centroids.tile,
                centroid_columns=options.centroid_columns,
                num_pinned=shard.pinned_token_ids.shape[1],
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
                calibration={**evidence, **inputs.notes},
                fidelity=fidelity,
                **stored,
            )

        return save_index(out, shard, describe, replace=replace_existing)


def _device(named: torch.device | str | None) -> torch.device:
    if named is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(named)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise HeadIndexError("this torch sees no CUDA device; use --device cpu.")
    return device


def read_weights(model: ModelSource) -> Tensor:
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
    return weights


def _without(slots: Tensor, token_ids: Sequence[int]) -> Tensor:
    """`slots` with `token_ids` turned into pads."""
    taken = torch.tensor(list(token_ids), device=slots.device, dtype=slots.dtype)
    return slots.masked_fill(torch.isin(slots, taken), -1)


def _versions() -> dict[str, str]:
    own = {"python": platform.python_version(), "flashhead-dist": __version__}
    return own | {name: version(name) for name in _VERSIONED}


def default_index_path(
    model: ModelSource, options: IndexOptions | None = None, cache_dir: Path | None = None
) -> Path:
    """Folder for the index of `model` with `options` under the cache; it may not exist yet."""
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", model.name).strip("-.") or "model"
    key = (options or IndexOptions()).fingerprint()
    folder = f"{name}-{model.weight_hash[:12]}-v{_LAYOUT_VERSION}-{key}"
    return cache_root(cache_dir) / "index" / folder


def ensure_index(
    model: ModelSource,
    options: IndexOptions | None = None,
    *,
    cache_dir: Path | None = None,
    device: torch.device | str | None = None,
    states: Callable[[], States] | None = None,
    replace_existing: bool = False,
    progress: bool = True,
) -> Path:
    """The index of `model` at its default path, built first where it is missing or to be replaced.

    states: gives the calibration and test states; by default those of the shipped corpus (or
        synthetic ones, for a synthetic model). Concurrent callers build it once.

    Raises UserError where it cannot be built.
    """
    options = options or IndexOptions()
    out = default_index_path(model, options, cache_dir)
    if out.exists() and not replace_existing:
        return out
    with locked(out):
        if replace_existing or not out.exists():
            calibration, test = states() if states else default_states(model, cache_dir, progress)
            build_index(
                model,
                options,
                calibration=calibration,
                test=test,
                out=out,
                device=device,
                replace_existing=replace_existing,
                progress=progress,
            )
    return out


def default_states(model: ModelSource, cache_dir: Path | None, progress: bool) -> States:
    """Calibration and test states over the shipped corpus; synthetic ones of a synthetic model."""
    if model.synthetic:
        return synthetic_hidden_states(model)
    return collect_hidden_states(model, cache_dir=cache_dir, progress=progress)
