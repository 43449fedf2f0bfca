"""Lists of an inverted file, trained by faiss once and kept."""

from __future__ import annotations

import importlib
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flashhead_dist.errors import UserError
from flashhead_dist.models.cache import cached_tensors

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
        return cls(**cached_tensors(cache, lambda: vars(_train(rows))))


def _train(rows: Tensor) -> TrainedLists:
    """faiss's spherical k-means on a sample, then every row to its best list by inner product."""
    faiss = import_faiss()
    faiss.omp_set_num_threads(torch.get_num_threads())
    centroids = _centroids(faiss, rows)
    quantizer = faiss.IndexFlatIP(rows.shape[1])
    quantizer.add(centroids)
    assignments = np.empty(len(rows), np.int32)
    for first in range(0, len(rows), CHUNK_ROWS):
        part = rows[first : first + CHUNK_ROWS].float().numpy()
        assignments[first : first + CHUNK_ROWS] = quantizer.search(part, 1)[1][:, 0]
    return TrainedLists(torch.from_numpy(centroids), torch.from_numpy(assignments))


def _centroids(faiss: Any, rows: Tensor) -> np.ndarray[Any, Any]:
    """Unit-norm float32 `[lists, D]`.

    The sample goes to float32 by parts: a whole copy would be twice the rank's share.
    """
    kmeans = faiss.Kmeans(
        rows.shape[1],
        default_num_lists(rows.shape[0]),
        niter=_ITERATIONS,
        spherical=True,
        max_points_per_centroid=_POINTS_PER_LIST,
        min_points_per_centroid=1,
        seed=_SEED,
    )
    num_points = min(len(rows), _POINTS_PER_LIST * kmeans.k)
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(_SEED))
    chosen = order[:num_points].sort().values
    sample = np.empty((num_points, rows.shape[1]), np.float32)
    for first in range(0, num_points, CHUNK_ROWS):
        sample[first : first + CHUNK_ROWS] = rows[chosen[first : first + CHUNK_ROWS]].float()
    kmeans.train(sample)
    centroids: np.ndarray[Any, Any] = kmeans.centroids
    return centroids
