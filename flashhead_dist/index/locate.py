"""Where the index of a model is kept, and building it when it is missing."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import torch

from flashhead_dist.index.build import build_index
from flashhead_dist.index.options import IndexOptions
from flashhead_dist.models import ModelSource, cache_root
from flashhead_dist.models.cache import locked
from flashhead_dist.states import (
    HiddenStates,
    collect_hidden_states,
    synthetic_hidden_states,
)

_LAYOUT_VERSION = 1
"""Part of the default path: raise it where the builder makes another index of the same options."""

States = tuple[HiddenStates | None, HiddenStates | None]


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

    states: gives the calibration and test states; by default those of the shipped corpus (or made
        up, for a synthetic model). Concurrent callers build it once.

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
    """Calibration and test states of `model` over the shipped corpus, or made up and so named."""
    if model.synthetic:
        return synthetic_hidden_states(model)
    return collect_hidden_states(model, cache_dir=cache_dir, progress=progress)
