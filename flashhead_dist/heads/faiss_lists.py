"""Lists of an inverted file, trained by faiss once and kept."""

from __future__ import annotations

import importlib
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from flashhead_dist.errors import UserError
from flashhead_dist.model_source.cache import make_once

_ITERATIONS = 10
_POINTS_PER_LIST = 64
_SEED = 1234
CHUNK_ROWS = 8192
"""Rows that are held in float32 at a time."""


def import_faiss() -> Any:
    """The faiss module.

    Raises:
        UserError: it is not installed.
    """
    try:
        return importlib.import_module("faiss")
    except ImportError as error:
        raise UserError(
            'head faiss_ivf needs faiss: pip install "flashhead-dist[faiss]", '
            "or leave faiss_ivf out of --heads"
        ) from error


def default_num_lists(num_rows: int) -> int:
    """The power of two at or below `4 sqrt(rows)`, faiss's guideline below a million rows."""
    return int(2 ** math.floor(math.log2(4 * math.sqrt(num_rows)))) if num_rows > 64 else 1


@dataclass(frozen=True)
class TrainedLists:
    """centroids: float32 `[lists, D]`, unit norm; assignments: int32 `[V_local]`."""

    centroids: Tensor
    assignments: Tensor

    @classmethod
    def of(cls, rows: Tensor, cache: Path | None = None) -> TrainedLists:
        """The lists of `rows [V_local, D]`, from `cache` where it exists, else trained into it."""
        if cache is None:
            return _train(rows)
        make_once(cache, lambda path: _save(_train(rows), path))
        stored = load_file(cache)
        return cls(stored["centroids"], stored["assignments"])


def _save(lists: TrainedLists, path: Path) -> None:
    save_file({"centroids": lists.centroids, "assignments": lists.assignments}, path)


def _train(rows: Tensor) -> TrainedLists:
    """faiss's spherical k-means on a sample, then every row to its best list by inner product."""
    faiss = import_faiss()
    faiss.omp_set_num_threads(torch.get_num_threads())
    kmeans = faiss.Kmeans(
        rows.shape[1],
        default_num_lists(rows.shape[0]),
        niter=_ITERATIONS,
        spherical=True,
        max_points_per_centroid=_POINTS_PER_LIST,
        min_points_per_centroid=1,
        seed=_SEED,
    )
    # A float32 copy of all rows would be twice the rank's share.
    num_points = min(len(rows), _POINTS_PER_LIST * kmeans.k)
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(_SEED))
    kmeans.train(rows[order[:num_points].sort().values].float().numpy())
    assignments = [
        torch.from_numpy(kmeans.index.search(part.float().numpy(), 1)[1][:, 0])
        for part in torch.split(rows, CHUNK_ROWS)
    ]
    return TrainedLists(torch.from_numpy(kmeans.centroids), torch.cat(assignments).to(torch.int32))
