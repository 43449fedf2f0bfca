"""Heads by name: what a command line names, built on one rank or emulated on all of them.

A new head is a file of its own and its class in the call of `register` below.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flashhead_dist.errors import UserError
from flashhead_dist.heads.base import (
    Head,
    HeadOutput,
    HeadShape,
    VocabShard,
    Want,
    empty_output,
)
from flashhead_dist.heads.dense import DenseAllReduce, DenseGather, DenseLocalMax, IndexScan
from flashhead_dist.heads.faiss_ivf import FaissIvf
from flashhead_dist.heads.flashhead import (
    FlashHead,
    FlashHeadAuto,
    FlashHeadGlobal,
    FlashHeadReplicated,
)
from flashhead_dist.heads.flashhead_escalate import Escalation, FlashHeadEscalate
from flashhead_dist.index import IndexManifest, LoadedShard, load_manifest, load_shard
from flashhead_dist.index.shard import with_row_dtype
from flashhead_dist.measured_choices import keep_launches
from flashhead_dist.models import ModelSource
from flashhead_dist.parallel import TensorParallel, run_in_lock_step
from flashhead_kernels.cpu_threads import empty_on_large_pages
from flashhead_kernels.dispatch import ops_for
from flashhead_topology.cost import StepCost, step_cost
from flashhead_topology.systems import System

_READ_ROWS = 1 << 14

HEADS: dict[str, type[Head]] = {}
"""Every head by name, in the order of tables and measurements."""

BASELINE = DenseLocalMax.name
"""What other heads are compared with: the strongest dense head."""
DEFAULT_HEAD = FlashHead.name


def register(*heads: type[Head]) -> None:
    """Make heads known to commands, reports, plots and the cost model.

    Raises:
        ValueError: a name that is taken.
    """
    for head in heads:
        if HEADS.setdefault(head.name, head) is not head:
            raise ValueError(f"there is a head named {head.name!r} already: choose another name")


register(
    DenseGather,
    DenseAllReduce,
    DenseLocalMax,
    FlashHeadReplicated,
    FlashHeadGlobal,
    FlashHead,
    FlashHeadAuto,
    FlashHeadEscalate,
    FaissIvf,
)


def head_type(name: str) -> type[Head]:
    """The class of the head `name`; raises UserError for an unknown name."""
    if name not in HEADS:
        raise UserError(f"there is no head named {name!r}: choose from {', '.join(HEADS)}")
    return HEADS[name]


def check_head_names(names: Iterable[str]) -> None:
    """Raise UserError for a name that is not in HEADS."""
    for name in names:
        head_type(name)


def needs_index(*names: str) -> bool:
    """Whether one of the heads cannot be built without an index folder."""
    return any(head_type(name).needs_index for name in names)


def sampling_heads() -> list[str]:
    """Names of the heads that tokens can be drawn from."""
    return [name for name, head in HEADS.items() if head.samples]


def head_cost(
    name: str,
    shape: HeadShape,
    system: System,
    *,
    tp_size: int,
    pp_size: int = 1,
    batch_size: int = 1,
) -> StepCost:
    """`step_cost` of a head, which takes the cheaper of its ways if it has two.

    Raises:
        ValueError: an unknown head, a size below 1, more ranks than the head can be split over or
            the system joins, a retrieval head and no index.
    """
    if name not in HEADS:
        raise ValueError(f"there is no head named {name!r}: choose one of {', '.join(HEADS)}")
    head = HEADS[name]
    for what, size in (("tp_size", tp_size), ("batch_size", batch_size)):
        if size < 1:
            raise ValueError(f"{what} is {size}: it must be at least 1")
    if head.needs_index and not shape.num_clusters:
        raise ValueError(f"{name} needs an index: give num_clusters and num_probes")
    limit, parts = head.split_limit(shape)
    if head.sharded and tp_size > limit:
        raise ValueError(
            f"{name} splits {limit} {parts} and cannot use {tp_size} ranks: choose fewer"
        )
    work = head.work(shape, tp_size, batch_size)
    return step_cost(work, system, tp_size=tp_size, pp_size=pp_size, batch_size=batch_size)


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
        return head_type(name).load(self, num_probes, alpha)

    def build_confirming(self) -> Head:
        """A dense head that takes no further memory where an index is loaded already.

        Its ids and logits are those of the baseline.
        """
        if "index_shard" in vars(self) and "rows" not in vars(self):
            return IndexScan.load(self, None, None)
        return self.build(BASELINE)

    def probing(self, num_probes: int | None, alpha: float | None) -> dict[str, Any]:
        """The arguments of a retrieval head, the index's own where None."""
        return {
            "num_probes": self.manifest.num_probes if num_probes is None else num_probes,
            "alpha": self.manifest.alpha if alpha is None else alpha,
        }

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
    def index_shard(self) -> LoadedShard:
        """This rank's part of the index."""
        return self._load(self.tp.tp_rank, self.tp.tp_size)

    @cached_property
    def unsharded_index(self) -> LoadedShard:
        """All of the index."""
        return self.index_shard if self.tp.tp_size == 1 else self._load(0, 1)

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
    def rows(self) -> Tensor:
        """This rank's rows of the output embedding `[V_local, D]`."""
        shard = VocabShard.of(self.model.vocab_size, self.tp)
        shape = (shard.stop - shard.start, self.model.hidden_size)
        rows = empty_on_large_pages(shape, self.dtype)
        for start in range(shard.start, shard.stop, _READ_ROWS):
            stop = min(start + _READ_ROWS, shard.stop)
            rows[start - shard.start : stop - shard.start] = self.model.read_rows(start, stop)
        return rows.to(self.device)

    @cached_property
    def columns(self) -> Tensor:
        """This rank's columns of the output embedding `[V, D_local]`."""
        shard = VocabShard.of(self.model.hidden_size, self.tp, "hidden size")
        columns = self.model.read_columns(shard.start, shard.stop)
        return columns.to(device=self.device, dtype=self.dtype).contiguous()


def build_head(
    name: str, *, num_probes: int | None = None, alpha: float | None = None, **weights: Any
) -> Head:
    """One head of one rank. weights: the arguments of `HeadBuilder`; see there and its `build`."""
    return HeadBuilder(**weights).build(name, num_probes=num_probes, alpha=alpha)


def emulate_head(
    name: str, *, tp_size: int, device: torch.device | str = "cpu", **arguments: Any
) -> EmulatedHead:
    """All ranks of a head in this process: see `EmulatedHead`, and `build_head` for the rest."""
    if tp_size < 1:
        raise UserError(f"tp_size must be at least 1, got {tp_size}")
    # Replicas do not differ, so one represents all.
    ranks = range(tp_size if head_type(name).sharded else 1)
    places = [TensorParallel(tp_rank=rank, tp_size=tp_size, device=device) for rank in ranks]
    heads = [build_head(name, tp=place, device=device, **arguments) for place in places]
    return EmulatedHead(heads, tp_size=tp_size)


class EmulatedHead:
    """The `tp_size` ranks of one head, which share a process; `forward` is that of `Head`.

    Byte counts are sums over the ranks (weights, reads), or of one rank (payload).
    """

    def __init__(self, ranks: Sequence[Head], *, tp_size: int | None = None) -> None:
        """ranks: rank 0 first. Of a replicated head, one rank represents all `tp_size`."""
        self.ranks = list(ranks)
        self.tp_size = tp_size or len(self.ranks)
        first = self.ranks[0]
        self.name = first.name
        self.vocab_size = first.vocab_size
        self.hidden_size = first.hidden_size
        self.has_logsumexp = first.has_logsumexp
        self.scores_everything = first.scores_everything
        self.payload_bytes_per_row = first.payload_bytes_per_row

    @property
    def read_bytes_per_row(self) -> int:
        """Sum over all `tp_size` ranks."""
        read = sum(rank.read_bytes_per_row for rank in self.ranks)
        return read * self.tp_size // len(self.ranks)

    @property
    def weight_bytes_per_rank(self) -> int:
        """Weights of the rank that holds most."""
        return max(rank.weight_bytes for rank in self.ranks)

    def forward(
        self, hidden_states: Tensor, *, k: int = 1, need_logsumexp: bool = False
    ) -> HeadOutput:
        """See `Head.forward`."""
        return self.serve(hidden_states, Want(k=k, logsumexp=need_logsumexp))

    def serve(self, hidden_states: Tensor, want: Want) -> HeadOutput:
        """See `Head.serve`.

        Raises:
            RuntimeError: the ranks disagree on a token, which would be a defect of the head.
        """
        first = self.ranks[0]
        first.check(hidden_states, want)
        if hidden_states.shape[0] == 0:
            return empty_output(want, hidden_states.device)
        outputs = run_in_lock_step([rank.steps(hidden_states, want) for rank in self.ranks])
        for rank, output in enumerate(outputs):
            if not torch.equal(output.token_ids, outputs[0].token_ids):
                raise RuntimeError(f"head {self.name}: rank {rank} and rank 0 chose other tokens")
        return outputs[0]


@dataclass(frozen=True)
class NamedHead:
    """A head, its number of probes and its index folder; None for what was not named."""

    name: str
    num_probes: int | None = None
    index: Path | None = None

    @property
    def label(self) -> str:
        """As it was named."""
        probes = "" if self.num_probes is None else f":{self.num_probes}"
        return f"{self.name}{probes}" + ("" if self.index is None else f"@{self.index}")


def named_head(text: str) -> NamedHead:
    """What NAME[:PROBES][@DIR] names.

    Raises:
        UserError: an unknown name, probes that are no number of 1 or more, a folder without an
            index.
    """
    named, _, folder = text.partition("@")
    name, _, probes = named.partition(":")
    check_head_names([name])
    if probes and not (probes.isdecimal() and int(probes)):
        raise UserError(f"{probes!r} in {text} is no number of probes: give NAME:PROBES@DIR")
    if folder:
        load_manifest(Path(folder))
    return NamedHead(name, int(probes) if probes else None, Path(folder) if folder else None)
