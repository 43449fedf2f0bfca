"""Heads by name."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from flashhead_dist.errors import UserError
from flashhead_dist.heads.base import Head, VocabShard
from flashhead_dist.heads.dense import DenseAllReduce, DenseGather, DenseLocalMax
from flashhead_dist.heads.emulated import EmulatedHead
from flashhead_dist.heads.faiss_ivf import FaissIvf
from flashhead_dist.heads.flashhead import FlashHead, FlashHeadReplicated, IndexHead
from flashhead_dist.heads.flashhead_auto import FlashHeadAuto
from flashhead_dist.heads.flashhead_escalate import (
    Escalation,
    FlashHeadEscalate,
    usual_escalation,
)
from flashhead_dist.heads.flashhead_global import FlashHeadGlobal
from flashhead_dist.heads.index_scan import IndexScan
from flashhead_dist.index import IndexManifest, LoadedShard, load_manifest, load_shard
from flashhead_dist.index.row_block import with_row_dtype
from flashhead_dist.measured_choices import keep_launches
from flashhead_dist.models import ModelSource, cache_root
from flashhead_dist.parallel import TensorParallel
from flashhead_kernels.cpu_memory import empty_on_large_pages
from flashhead_kernels.dispatch import ops_for

_INDEX_HEADS: dict[str, type[IndexHead]] = {
    head.name: head
    for head in (
        FlashHead,
        FlashHeadAuto,
        FlashHeadEscalate,
        FlashHeadGlobal,
        FlashHeadReplicated,
    )
}
HEAD_NAMES = (
    DenseGather.name,
    DenseAllReduce.name,
    DenseLocalMax.name,
    FlashHeadReplicated.name,
    FlashHeadGlobal.name,
    FlashHead.name,
    FlashHeadAuto.name,
    FlashHeadEscalate.name,
    FaissIvf.name,
)
_READ_ROWS = 1 << 14
_DEFAULT_SHARE = 0.15
"""Share of the dense head's bytes that faiss_ivf may read where there is no index to match."""


def check_head_names(names: Iterable[str]) -> None:
    """Raise UserError for a name that is not one of HEAD_NAMES."""
    for name in names:
        if name not in HEAD_NAMES:
            raise UserError(f"there is no head named {name!r}: choose from {', '.join(HEAD_NAMES)}")


def needs_index(name: str) -> bool:
    """Whether the head cannot be built without an index folder."""
    return name in _INDEX_HEADS


class HeadBuilder:
    """Builds heads of one rank, which share the weights that they have in common."""

    def __init__(
        self,
        *,
        tp: TensorParallel,
        model: ModelSource,
        index_dir: Path | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str = "cpu",
        escalation: Escalation | None = None,
    ) -> None:
        """dtype: of the rows and columns; the model's where None.

        escalation: of flashhead_escalate; what the index was calibrated to where None.

        Raises:
            UserError: Triton is missing where the device needs it.
        """
        try:
            ops_for(device)
        except ImportError as error:
            raise UserError(str(error)) from error
        self.tp = tp
        self.model = model
        self.index_dir = index_dir
        self.dtype = dtype or model.dtype
        self.device = torch.device(device)
        self.escalation = escalation
        if self.device.type == "cuda":
            keep_launches()

    def build(
        self, name: str, *, num_probes: int | None = None, alpha: float | None = None
    ) -> Head:
        """The head `name`; num_probes and alpha are the index's own where None.

        For faiss_ivf num_probes counts lists on this rank; where None it reads as many bytes as
        the index's default (15 % of the dense head's without an index).

        Raises:
            UserError: an unknown name, no index where one is needed, more ranks than vocabulary,
                columns or probing groups, num_probes out of range, faiss missing.
        """
        check_head_names([name])
        if name in _INDEX_HEADS:
            return self._build_index_head(name, num_probes, alpha)
        vocab_size, hidden_size = self.model.vocab_size, self.model.hidden_size
        if name == DenseAllReduce.name:
            return DenseAllReduce(self.tp, self._columns, hidden_size)
        if name == DenseGather.name:
            return DenseGather(self.tp, self._rows, vocab_size)
        if name == DenseLocalMax.name:
            return DenseLocalMax(self.tp, self._rows, vocab_size)
        return FaissIvf(
            self.tp,
            self._rows.cpu(),
            vocab_size,
            num_probes=num_probes,
            read_bytes=self._faiss_read_bytes(),
            cache=self._faiss_cache(),
        )

    def build_confirming(self) -> Head:
        """A dense head that takes no further memory where an index is held already.

        Its ids and logits are those of dense_local_max.
        """
        if "_index_shard" in vars(self) and "_rows" not in vars(self):
            return IndexScan(self.tp, self._index_shard)
        return self.build(DenseLocalMax.name)

    def _build_index_head(self, name: str, num_probes: int | None, alpha: float | None) -> Head:
        manifest = self.manifest
        shard = self._whole_index if name == FlashHeadReplicated.name else self._index_shard
        probes = manifest.num_probes if num_probes is None else num_probes
        weight = manifest.alpha if alpha is None else alpha
        if name == FlashHeadEscalate.name:
            escalation = self.escalation or usual_escalation(manifest)
            return FlashHeadEscalate(
                self.tp, shard, num_probes=probes, alpha=weight, escalation=escalation
            )
        return _INDEX_HEADS[name](self.tp, shard, num_probes=probes, alpha=weight)

    @cached_property
    def manifest(self) -> IndexManifest:
        """The index's manifest; raises UserError where no index was given."""
        return load_manifest(self._index_folder())

    def _index_folder(self) -> Path:
        if self.index_dir is None:
            raise UserError(
                "a flashhead head needs an index: build one with launch/build_index.py and give "
                "its folder with --index"
            )
        return self.index_dir

    @cached_property
    def _index_shard(self) -> LoadedShard:
        return self._load(self.tp.tp_rank, self.tp.tp_size)

    @cached_property
    def _whole_index(self) -> LoadedShard:
        return self._index_shard if self.tp.tp_size == 1 else self._load(0, 1)

    def _load(self, tp_rank: int, tp_size: int) -> LoadedShard:
        shard = load_shard(
            self._index_folder(),
            tp_rank=tp_rank,
            tp_size=tp_size,
            device=self.device,
            model=self.model,
        )
        return with_row_dtype(shard, self.dtype)

    @cached_property
    def _rows(self) -> Tensor:
        """This rank's rows `[V_local, D]`."""
        shard = VocabShard.of(self.model.vocab_size, self.tp)
        shape = (shard.stop - shard.start, self.model.hidden_size)
        rows = empty_on_large_pages(shape, self.dtype)
        for start in range(shard.start, shard.stop, _READ_ROWS):
            stop = min(start + _READ_ROWS, shard.stop)
            rows[start - shard.start : stop - shard.start] = self.model.read_rows(start, stop)
        return rows.to(self.device)

    @cached_property
    def _columns(self) -> Tensor:
        """This rank's columns `[V, D_local]`."""
        shard = VocabShard.of(self.model.hidden_size, self.tp, "hidden size")
        return self._placed(self.model.read_columns(shard.start, shard.stop))

    def _placed(self, weight: Tensor) -> Tensor:
        return weight.to(device=self.device, dtype=self.dtype).contiguous()

    def _faiss_read_bytes(self) -> int:
        row_bytes = self.model.hidden_size * self.dtype.itemsize
        if self.index_dir is None:
            return round(_DEFAULT_SHARE * self.model.vocab_size * row_bytes / self.tp.tp_size)
        rows = self.manifest.num_probes * self.manifest.cluster_size * row_bytes
        return (self.manifest.centroid_bytes + rows) // self.tp.tp_size

    def _faiss_cache(self) -> Path:
        shard = VocabShard.of(self.model.vocab_size, self.tp)
        name = f"{self.model.weight_hash[:16]}_{shard.start}_{shard.stop}_v2.safetensors"
        return cache_root() / "faiss" / name


def build_head(
    name: str,
    *,
    tp: TensorParallel,
    model: ModelSource,
    index_dir: Path | None = None,
    dtype: torch.dtype | None = None,
    num_probes: int | None = None,
    alpha: float | None = None,
    device: torch.device | str = "cpu",
    escalation: Escalation | None = None,
) -> Head:
    """One head of one rank; see `HeadBuilder` and its `build`."""
    builder = HeadBuilder(
        tp=tp,
        model=model,
        index_dir=index_dir,
        dtype=dtype,
        device=device,
        escalation=escalation,
    )
    return builder.build(name, num_probes=num_probes, alpha=alpha)


def emulate_head(
    name: str,
    *,
    tp_size: int,
    model: ModelSource,
    index_dir: Path | None = None,
    dtype: torch.dtype | None = None,
    num_probes: int | None = None,
    alpha: float | None = None,
    device: torch.device | str = "cpu",
    escalation: Escalation | None = None,
) -> EmulatedHead:
    """All ranks of a head in this process; see `EmulatedHead` and `HeadBuilder`."""
    if tp_size < 1:
        raise UserError(f"tp_size must be at least 1, got {tp_size}")
    # Replicas differ in nothing, so one stands for all.
    places = 1 if name == FlashHeadReplicated.name else tp_size
    ranks = [
        build_head(
            name,
            tp=TensorParallel(tp_rank=rank, tp_size=tp_size, device=device),
            model=model,
            index_dir=index_dir,
            dtype=dtype,
            num_probes=num_probes,
            alpha=alpha,
            device=device,
            escalation=escalation,
        )
        for rank in range(places)
    ]
    return EmulatedHead(ranks, tp_size=tp_size)
