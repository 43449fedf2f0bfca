"""A faiss inverted-file index over each rank's rows: what a retrieval library gives off the shelf.

Inner product, lists by faiss's own spherical k-means, rows stored in the model's precision (bf16
rows as faiss's QT_bf16 on CPU; faiss has no bf16 lists on a GPU, where they are fp16). Every rank
searches its own shard, so the candidates, and with them the ids, depend on tp_size. Ties between
equal logits on one rank go as faiss finds them.
"""

from __future__ import annotations

import importlib
import math
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from flashhead_dist.errors import UserError
from flashhead_dist.heads.base import (
    Head,
    HeadOutput,
    HeadShape,
    HeadStyle,
    VocabShard,
    Want,
    keys_sent,
    launches,
    merge_candidates,
    share_of,
)
from flashhead_dist.models import cache_root
from flashhead_dist.models.cache import cached_tensors
from flashhead_dist.parallel import Steps, TensorParallel
from flashhead_kernels.keys import pack_keys
from flashhead_kernels.shard import Candidates
from flashhead_profiles.ranges import CANDIDATES, CENTROIDS, in_parts
from flashhead_topology.cost import HeadWork, Part

if TYPE_CHECKING:
    from flashhead_dist.heads.registry import HeadBuilder

_ID_BYTES = 8
_DEFAULT_SHARE = 0.15
"""Share of the dense head's bytes that are read where there is no index to match."""
_ITERATIONS = 10
_POINTS_PER_LIST = 64
_SEED = 1234
CHUNK_ROWS = 8192
"""Rows that are held in float32 at a time."""


class FaissIvf(Head):
    """`num_probes` of the local shard's lists are searched for the k best, then merged by key."""

    name: ClassVar[str] = "faiss_ivf"
    style: ClassVar[HeadStyle] = HeadStyle("#CC79A7", "X")
    has_logsumexp: ClassVar[bool] = False
    capturable: ClassVar[bool] = False

    def __init__(
        self,
        tp: TensorParallel,
        rows: Tensor,
        vocab_size: int,
        *,
        num_probes: int | None = None,
        read_bytes: int | None = None,
        cache: Path | None = None,
    ) -> None:
        """rows: `[V_local, D]` of `VocabShard.of(vocab_size, tp)`, on the CPU.

        num_probes: lists searched on this rank; where None, as many as fit `read_bytes` a row on
        this rank (at least one), the coarse scan included.
        cache: file that keeps the trained lists.

        Raises:
            UserError: faiss is missing, or has no GPU support where the device is one; num_probes
                outside 1..lists.
        """
        shape = HeadShape(
            vocab_size=vocab_size, hidden_size=rows.shape[1], row_bits=8 * rows.element_size()
        )
        super().__init__(tp, shape)
        faiss = import_faiss()
        if tp.device.type == "cuda" and not hasattr(faiss, "StandardGpuResources"):
            raise UserError(
                "the installed faiss has no GPU support: pip install -e '.[faiss-gpu]' in "
                "place of faiss-cpu, leave faiss_ivf out of --heads, or use --device cpu"
            )
        self.shard = VocabShard.of(vocab_size, tp)
        lists = TrainedLists.of(rows, cache)
        self.num_lists = lists.centroids.shape[0]
        self._centroid_bytes = lists.centroids.nbytes
        self._row_bytes = rows.shape[1] * rows.element_size() + _ID_BYTES
        self._list_sizes = np.bincount(lists.assignments.numpy(), minlength=self.num_lists)
        self.num_probes = self._choose_probes(num_probes, read_bytes)
        self._index: Any = _build(faiss, rows, lists, tp.device)
        self._index.nprobe = self.num_probes
        self._faiss = faiss

    @classmethod
    def load(cls, builder: HeadBuilder, num_probes: int | None, alpha: float | None) -> Head:
        """num_probes: lists searched on this rank; None: as many bytes as the index's default, or
        15 % of the dense head's without an index.
        """
        model, tp = builder.model, builder.tp
        shape = HeadShape.of_model(model, builder.dtype)
        if builder.index_dir is not None:
            size = builder.dtype.itemsize
            shape = HeadShape.of_index(builder.manifest, row_bytes=size)
        shard = VocabShard.of(model.vocab_size, tp)
        name = f"{model.weight_hash[:16]}_{shard.start}_{shard.stop}_v2.safetensors"
        return cls(
            tp,
            builder.rows.cpu(),
            model.vocab_size,
            num_probes=num_probes,
            read_bytes=_read_budget(shape, tp.tp_size),
            cache=cache_root() / "faiss" / name,
        )

    @classmethod
    def unavailable(cls, device_type: str) -> str | None:
        if find_spec("faiss") is None:
            return "faiss is not installed; pip install -e '.[faiss]' to measure it"
        if device_type == "cuda" and not hasattr(import_faiss(), "StandardGpuResources"):
            return (
                "the installed faiss has no GPU support; "
                "pip install -e '.[faiss-gpu]' in place of faiss-cpu to measure it"
            )
        return None

    @classmethod
    def work(cls, shape: HeadShape, tp_size: int, batch: int = 1, tp_rank: int = 0) -> HeadWork:
        rows = share_of(shape.vocab_size, tp_size, tp_rank)
        lists, size = default_num_lists(rows), shape.hidden_size
        row = shape.row_bytes + _ID_BYTES
        centroids = lists * size * 4
        per_list = rows / lists * row
        budget = _read_budget(shape, tp_size) - centroids
        probes = max(1, min(lists, round(budget / per_list)))
        probed = round(min(batch * probes, lists) * per_list)
        parts = {
            "head/centroids": Part(centroids, 2.0 * batch * lists * size),
            "head/candidates": Part(
                probed, 2.0 * batch * probes * rows / lists * size, gathered=True
            ),
        }
        # What torch does around the search was counted; two kernels of faiss's own are a guess.
        held = centroids + rows * row
        return HeadWork(parts, (keys_sent(batch),), launches(26, 26, unpacks=True), held)

    def _choose_probes(self, num_probes: int | None, read_bytes: int | None) -> int:
        if num_probes is None:
            budget = (read_bytes or 0) - self._centroid_bytes
            per_list = float(self._list_sizes.mean()) * self._row_bytes
            return max(1, min(self.num_lists, round(budget / per_list)))
        if not 1 <= num_probes <= self.num_lists:
            raise UserError(
                f"num_probes {num_probes} must lie between 1 and the {self.num_lists} lists of "
                f"faiss_ivf on a rank: choose a number in that range"
            )
        return num_probes

    @property
    def weight_bytes(self) -> int:
        """Rows, their ids and the list centroids."""
        return self._centroid_bytes + int(self._list_sizes.sum()) * self._row_bytes

    def read_bytes_per_step(self, batch_size: int) -> int:
        """List centroids once, and a list of mean length, ids included, for every probe."""
        if batch_size == 0:
            return 0
        probed = min(batch_size * self.num_probes, self.num_lists)
        mean_bytes = float(self._list_sizes.mean()) * self._row_bytes
        return self._centroid_bytes + round(probed * mean_bytes)

    def steps(self, hidden_states: Tensor, want: Want) -> Steps[HeadOutput]:
        keys = pack_keys(*self._search(hidden_states, want.k))
        mass = self._candidate_logsumexp(hidden_states) if want.candidate_mass else None
        return (yield from merge_candidates(Candidates(keys, None), mass))

    def _candidate_logsumexp(self, hidden_states: Tensor) -> Tensor:
        """Log-sum-exp float32 `[B]` over every row of the searched lists."""
        if self.tp.device.type == "cuda":
            raise UserError(
                "faiss on a GPU does not list its candidates: evaluate faiss_ivf with --device cpu"
            )
        queries = hidden_states.float().contiguous().numpy()
        # A range search without a bound gives every candidate, and keeps no heap.
        limits, scores, _ = self._index.range_search(queries, -float(np.finfo(np.float32).max))
        rows = torch.from_numpy(scores).tensor_split(
            torch.from_numpy(limits[1:-1].astype(np.int64))
        )
        return torch.stack([row.logsumexp(0) for row in rows])

    def _search(self, hidden_states: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Logits float32 `[B, k]` (-inf where there is none) and token ids int64 (-1)."""
        self._faiss.omp_set_num_threads(torch.get_num_threads())
        queries = hidden_states.float().cpu().contiguous().numpy()
        with in_parts(CENTROIDS, CANDIDATES) as next_part:
            if next_part is None or self.tp.device.type == "cuda":
                scores, found = self._index.search(queries, k)
            else:
                distances, lists = self._index.quantizer.search(queries, self.num_probes)
                next_part()
                scores, found = self._index.search_preassigned(queries, k, lists, distances)
        logits, ids = torch.from_numpy(scores), torch.from_numpy(found)
        logits = logits.masked_fill(ids < 0, float("-inf")).to(hidden_states.device)
        ids = torch.where(ids < 0, -1, ids + self.shard.start).to(hidden_states.device)
        best, order = logits.sort(dim=1, descending=True, stable=True)
        return best, ids.gather(1, order)


def _build(faiss: Any, rows: Tensor, lists: TrainedLists, device: torch.device) -> Any:
    """A searchable faiss index of the trained lists."""
    num_lists, hidden_size = lists.centroids.shape
    quantizer = faiss.IndexFlatIP(hidden_size)
    quantizer.add(lists.centroids.numpy())
    metric = faiss.METRIC_INNER_PRODUCT
    if rows.dtype == torch.float32:
        index = faiss.IndexIVFFlat(quantizer, hidden_size, num_lists, metric)
    else:
        bf16 = rows.dtype == torch.bfloat16 and device.type == "cpu"
        stored = faiss.ScalarQuantizer.QT_bf16 if bf16 else faiss.ScalarQuantizer.QT_fp16
        index = faiss.IndexIVFScalarQuantizer(
            quantizer, hidden_size, num_lists, stored, metric, False
        )
    index.is_trained = True
    index.own_fields = True
    quantizer.this.disown()
    _fill(faiss, index, rows, lists.assignments.numpy())
    if device.type != "cuda":
        return index
    resources = faiss.StandardGpuResources()
    return faiss.index_cpu_to_gpu(resources, torch.cuda.current_device(), index)


def _fill(faiss: Any, index: Any, rows: Tensor, assignments: np.ndarray[Any, Any]) -> None:
    """Add every row to its list, each list in one piece.

    `index.add_core` grows its lists row by row, and their vectors double: at the default model it
    takes half as much again as the rows.
    """
    order = np.argsort(assignments, kind="stable").astype(np.int64)
    ends = np.bincount(assignments, minlength=index.nlist).cumsum()
    starts = ends - np.diff(ends, prepend=0)
    first = 0
    while first < index.nlist:
        last = max(first + 1, int(np.searchsorted(ends, starts[first] + CHUNK_ROWS, "right")))
        ids = order[starts[first] : ends[last - 1]]
        chunk = rows[torch.from_numpy(ids)].float().numpy()
        lists_of_rows = assignments[ids].astype(np.int64)
        codes = np.empty((len(ids), index.code_size), np.uint8)
        index.encode_vectors(
            len(ids), faiss.swig_ptr(chunk), faiss.swig_ptr(lists_of_rows), faiss.swig_ptr(codes)
        )
        for number in range(first, last):
            part = slice(starts[number] - starts[first], ends[number] - starts[first])
            index.invlists.add_entries(
                number,
                int(ends[number] - starts[number]),
                faiss.swig_ptr(ids[part]),
                faiss.swig_ptr(codes[part]),
            )
        first = last
    index.ntotal = len(order)


def _read_budget(shape: HeadShape, tp_size: int) -> int:
    """Bytes that a rank may read for a row: what the index's default probes read there."""
    if not shape.num_clusters:
        return round(_DEFAULT_SHARE * shape.vocab_size * shape.row_bytes / tp_size)
    centroids = shape.num_clusters * shape.centroid_bytes + shape.projection_bytes
    return (centroids + shape.num_probes * shape.cluster_size * shape.row_bytes) // tp_size


def import_faiss() -> Any:
    """The faiss module.

    Raises:
        UserError: it is not installed.
    """
    try:
        return importlib.import_module("faiss")
    except ImportError as error:
        raise UserError(
            'head faiss_ivf needs faiss: pip install -e ".[faiss]", '
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
