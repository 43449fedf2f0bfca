"""A faiss inverted-file index over each rank's rows: what a retrieval library gives off the shelf.

Inner product, lists by faiss's own spherical k-means, rows stored in the model's precision (bf16
rows as faiss's QT_bf16 on CPU; faiss has no bf16 lists on a GPU, where they are fp16). Every rank
searches its own shard, so the candidates, and with them the ids, depend on tp_size. Ties between
equal logits on one rank go as faiss finds them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from flashhead_dist.errors import UserError
from flashhead_dist.heads.base import Head, HeadOutput, VocabShard, Want
from flashhead_dist.heads.faiss_lists import CHUNK_ROWS, TrainedLists, import_faiss
from flashhead_dist.heads.merge import merge_candidates
from flashhead_dist.parallel import Steps, TensorParallel
from flashhead_kernels.keys import pack_keys
from flashhead_kernels.shard import Candidates
from flashhead_profiles.ranges import CANDIDATES, CENTROIDS, in_parts


class FaissIvf(Head):
    """`num_probes` of the local shard's lists are searched for the k best, then merged by key."""

    name: ClassVar[str] = "faiss_ivf"
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
        super().__init__(tp, vocab_size, rows.shape[1])
        faiss = import_faiss()
        if tp.device.type == "cuda" and not hasattr(faiss, "StandardGpuResources"):
            raise UserError(
                "the installed faiss has no GPU support: install flashhead-dist[faiss-gpu] in "
                "place of faiss-cpu, leave faiss_ivf out of --heads, or use --device cpu"
            )
        self.shard = VocabShard.of(vocab_size, tp)
        lists = TrainedLists.of(rows, cache)
        self.num_lists = lists.centroids.shape[0]
        self._centroid_bytes = lists.centroids.nbytes
        self._row_bytes = rows.shape[1] * rows.element_size() + 8
        self._list_sizes = np.bincount(lists.assignments.numpy(), minlength=self.num_lists)
        self.num_probes = self._choose_probes(num_probes, read_bytes)
        self._index: Any = _build(faiss, rows, lists, tp.device)
        self._index.nprobe = self.num_probes
        self._faiss = faiss

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
