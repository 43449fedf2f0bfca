"""The interface of every head, the shape that its cost depends on, and its one exchange.

A head is one class in a file of its own: it states its name, what it loads and what a step costs,
and `heads.registry` makes it known to every command, table and plot. See `heads.dense` for the
shortest.

Letters: `B` rows in the batch, `D` hidden size, `V` vocabulary, `P` tp_size, `k` tokens wanted.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from flashhead_dist.errors import UserError
from flashhead_dist.index import IndexManifest, IndexOptions
from flashhead_dist.index.calibrate import USUAL_SHARE
from flashhead_dist.models import ModelSource
from flashhead_dist.parallel import Exchange, Operation, Steps, TensorParallel
from flashhead_kernels.dispatch import ops_for
from flashhead_kernels.shard import Candidates, check_finite
from flashhead_profiles.ranges import CHECK, HEAD, RESULT, annotate
from flashhead_topology.cost import HeadWork, Sent
from flashhead_topology.links import payload_bytes
from flashhead_topology.machine import DeviceType

if TYPE_CHECKING:
    from flashhead_dist.heads.registry import HeadBuilder

KEY_BYTES = 8
HIDDEN_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class HeadOutput:
    """What a head says of a batch: the same on every rank.

    token_ids: int64 `[B, k]`, best first, ties by smaller id; -1 where fewer than k were scored.
    logits: float32 `[B, k]`, before any final soft-capping (monotone, so it changes no id).
    logsumexp: float32 `[B]`, over the vocabulary, where it was asked for; a retrieval head
        estimates the part that it did not score.
    candidate_logsumexp: float32 `[B]`, over the tokens scored exactly; for evaluation.
    """

    token_ids: Tensor
    logits: Tensor
    logsumexp: Tensor | None = None
    candidate_logsumexp: Tensor | None = None


@dataclass(frozen=True)
class Want:
    """What a caller asks of a head. `candidate_mass` takes a slow path, for evaluation."""

    k: int = 1
    logsumexp: bool = False
    candidate_mass: bool = False


@dataclass(frozen=True)
class VocabShard:
    """The token ids `start..stop` (half-open) of one rank; `width` is the longest of all ranks'."""

    start: int
    stop: int
    width: int

    @classmethod
    def of(cls, size: int, tp: TensorParallel, what: str = "vocabulary") -> VocabShard:
        """Split `size` evenly: the first `size % P` ranks hold one more.

        Raises:
            UserError: more ranks than things to split.
        """
        if size < tp.tp_size:
            raise UserError(
                f"a {what} of {size} cannot be split over tp_size {tp.tp_size}: "
                f"use {size} ranks or fewer"
            )
        share, extra = divmod(size, tp.tp_size)
        start = tp.tp_rank * share + min(tp.tp_rank, extra)
        return cls(start, start + share + (tp.tp_rank < extra), share + (extra > 0))


@dataclass(frozen=True, kw_only=True)
class HeadShape:
    """An output embedding, and the index over it where a head has one.

    num_clusters: 0 for none. row_bits, logit_bytes: of the model's dtype, which the dense heads
    gather logits in. group_size: columns that share a scale of the centroids. pinned_per_group:
    slots for pinned tokens in each probing group. escalated_share: of rows that take a second
    round; escalated_probes: clusters that it probes in all, 0 for every token. centroid_columns:
    that a stored centroid keeps, 0 for all of the hidden size.
    """

    vocab_size: int
    hidden_size: int
    num_clusters: int = 0
    cluster_size: int = 4
    num_probes: int = 0
    centroid_bits: int = 4
    group_size: int = 64
    num_groups: int = 128
    pinned_per_group: int = 0
    row_bits: int = 16
    logit_bytes: int = 2
    escalated_share: float = 0.0
    escalated_probes: int = 0
    centroid_columns: int = 0

    def __post_init__(self) -> None:
        for name in ("vocab_size", "hidden_size", "cluster_size", "num_groups"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: it must be at least 1")
        if self.centroid_bits not in (4, 8, 16):
            raise ValueError(f"centroid_bits is {self.centroid_bits}: choose 4, 8 or 16")
        if self.num_clusters and not 1 <= self.num_probes <= self.num_clusters:
            raise ValueError(
                f"num_probes is {self.num_probes}: choose between 1 and the {self.num_clusters} "
                "clusters"
            )

    @classmethod
    def with_default_index(cls, vocab_size: int, hidden_size: int) -> HeadShape:
        """An embedding with the index that `launch/build_index.py` makes by default."""
        options = IndexOptions()
        return cls(
            vocab_size=vocab_size,
            hidden_size=hidden_size,
            num_clusters=options.num_clusters(vocab_size),
            cluster_size=options.cluster_size,
            num_probes=options.probes(vocab_size),
            centroid_bits=options.centroid_bits,
            group_size=options.group_size,
            num_groups=options.num_groups,
            pinned_per_group=options.learned_pins_per_group,
        )

    @classmethod
    def of_model(cls, model: ModelSource, dtype: torch.dtype | None = None) -> HeadShape:
        """Without an index. dtype: of the rows and columns; the model's where None."""
        size = (dtype or model.dtype).itemsize
        return cls(
            vocab_size=model.vocab_size,
            hidden_size=model.hidden_size,
            row_bits=8 * size,
            logit_bytes=size,
        )

    @classmethod
    def of_index(
        cls, index: IndexManifest, *, num_probes: int | None = None, row_bytes: int = 2
    ) -> HeadShape:
        """num_probes: the index's own where None. row_bytes: of one number of a row or logit."""
        return cls(
            vocab_size=index.vocab_size,
            hidden_size=index.hidden_size,
            num_clusters=index.num_clusters,
            cluster_size=index.cluster_size,
            num_probes=index.num_probes if num_probes is None else num_probes,
            centroid_bits=index.bits,
            group_size=index.group_size,
            num_groups=index.num_groups,
            pinned_per_group=index.num_pinned,
            row_bits=8 * row_bytes,
            logit_bytes=row_bytes,
            escalated_share=USUAL_SHARE,
            centroid_columns=index.centroid_columns or 0,
        )

    @property
    def row_bytes(self) -> int:
        """Bytes of one row of the embedding."""
        return self.hidden_size * self.row_bits // 8

    @property
    def centroid_bytes(self) -> int:
        """Bytes of one centroid with its scales."""
        columns = self.centroid_columns or self.hidden_size
        scales = 0 if self.centroid_bits == 16 else columns // self.group_size
        return columns * self.centroid_bits // 8 + 2 * scales

    @property
    def projection_bytes(self) -> int:
        """Bytes, on every rank, of what takes hidden states to the centroids' columns."""
        return 4 * (self.centroid_columns + 1) * self.hidden_size if self.centroid_columns else 0


def share_of(size: int, tp_size: int, tp_rank: int = 0) -> int:
    """Rows, columns or groups of one rank: the first `size % P` ranks hold one more."""
    return size // tp_size + (tp_rank < size % tp_size)


def keys_sent(rows: int, *, keys_per_row: int = 1, times: float = 1.0) -> Sent:
    """The exchange of packed keys: one maximum of 8 bytes for each key."""
    return Sent("all_reduce", keys_per_row * KEY_BYTES * rows, KEY_BYTES, keys=True, times=times)


def launches(cuda: int, cpu: int, *, unpacks: bool = False) -> dict[DeviceType, int]:
    """Kernels of a step by device. unpacks: of keys, which is plain torch on CUDA."""
    return {"cuda": cuda + 10 * unpacks, "cpu": cpu + unpacks}


@dataclass(frozen=True)
class HeadStyle:
    """How plots draw a head: a colour and marker of matplotlib's, and what it lies over.

    Colours are Okabe and Ito's palette, which colour-blind readers can distinguish.
    """

    color: str = "#777777"
    marker: str = "P"
    zorder: float = 2.0


class Head(ABC):
    """A vocabulary-parallel output head on one rank.

    A subclass implements `load`, `work`, `steps` and `weight_bytes`; nothing in it calls a
    collective. Class attributes tell the rest of the project what kind of head it is.
    """

    name: ClassVar[str]
    style: ClassVar[HeadStyle] = HeadStyle()
    needs_index: ClassVar[bool] = False
    samples: ClassVar[bool] = False
    """Its distribution has a closed form, from which tokens are drawn: see `heads.distribution`."""
    rounds_logits: ClassVar[bool] = False
    """It compares logits rounded to the model's dtype, where many tie."""
    sharded: ClassVar[bool] = True
    """A rank holds a part; otherwise every rank does all the work and exchanges nothing."""
    has_logsumexp: ClassVar[bool] = True
    scores_everything: ClassVar[bool] = False
    """Every token is a candidate, so there is no candidate mass to ask for."""
    capturable: ClassVar[bool] = True
    """A greedy step on CUDA never waits for the host, so a CUDA graph can hold it."""
    holds_rows: ClassVar[bool] = False
    """Between them the ranks hold every row, so they can serve as a tied input embedding."""

    def __init__(self, tp: TensorParallel, shape: HeadShape) -> None:
        self.tp = tp
        self.shape = shape
        self.vocab_size = shape.vocab_size
        self.hidden_size = shape.hidden_size
        self.check_inputs = True
        """Refuse NaN and inf in `forward`; costs one synchronization on CUDA."""

    @classmethod
    @abstractmethod
    def load(cls, builder: HeadBuilder, num_probes: int | None, alpha: float | None) -> Head:
        """This head on the builder's rank, with weights of its `rows`, `columns` or `index_shard`.

        num_probes and alpha: the index's own where None.
        """

    @classmethod
    @abstractmethod
    def work(cls, shape: HeadShape, tp_size: int, batch: int = 1, tp_rank: int = 0) -> HeadWork:
        """What a rank reads, computes and sends in a greedy step; rank 0 does most.

        Each distinct byte counts once. Rows of a batch are taken to probe different clusters, up to
        all of them: an upper bound.
        """

    @classmethod
    def split_limit(cls, shape: HeadShape) -> tuple[int, str]:
        """The most ranks that the head can be split over, and what it splits."""
        return shape.vocab_size, "tokens"

    @classmethod
    def unavailable(cls, device_type: str) -> str | None:
        """Why the head cannot run on this machine and what to install; None where it can."""
        return None

    def forward(
        self, hidden_states: Tensor, *, k: int = 1, need_logsumexp: bool = False
    ) -> HeadOutput:
        """The k best tokens of `hidden_states [B, D]`; an empty batch gives an empty result.

        Raises:
            UserError: a shape or dtype that does not fit, k outside 1..V, NaN or inf.
        """
        return self.serve(hidden_states, Want(k=k, logsumexp=need_logsumexp))

    __call__ = forward

    def serve(self, hidden_states: Tensor, want: Want) -> HeadOutput:
        """`forward`, with what is wanted spelled out."""
        with annotate(HEAD, hidden_states.shape[0], self.name):
            with annotate(CHECK):
                self.check(hidden_states, want)
            if hidden_states.shape[0] == 0:
                return empty_output(want, hidden_states.device)
            return self.tp.run(self.steps(hidden_states, want))

    @abstractmethod
    def steps(self, hidden_states: Tensor, want: Want) -> Steps[HeadOutput]:
        """This rank's part, for arguments that `check` has passed and at least one row."""

    def embedding_steps(self, token_ids: Tensor) -> Steps[Tensor]:
        """Rows `[..., D]` of `token_ids` int64 `[...]`, the same on every rank: a tied embedding.

        Raises:
            UserError: a head that does not hold rows (`holds_rows`).
            IndexError: an id outside the vocabulary.
        """
        raise UserError(f"head {self.name} holds no rows to look tokens up in")

    @property
    @abstractmethod
    def weight_bytes(self) -> int:
        """Bytes of weights and their tables that this rank holds for the head."""

    def read_bytes_per_step(self, batch_size: int) -> int:
        """Bytes of weights that this rank reads for a batch; see `work`."""
        if batch_size == 0:
            return 0
        work = self.work(self.shape, self.tp.tp_size, batch_size, self.tp.tp_rank)
        return round(work.read_bytes)

    @property
    def read_bytes_per_row(self) -> int:
        """`read_bytes_per_step(1)`."""
        return self.read_bytes_per_step(1)

    @property
    def payload_bytes_per_row(self) -> int:
        """Payload of the exchanges that every greedy step of one row makes, as nccl-tests' `size`.

        The reduced buffer or the whole gathered one; 0 at tp_size 1.
        """
        tp_size = self.tp.tp_size
        return sum(
            payload_bytes(sent.operation, sent.operand_bytes, tp_size)
            for sent in self.work(self.shape, tp_size).exchanges
            if sent.times == 1
        )

    def check(self, hidden_states: Tensor, want: Want) -> None:
        """Refuse what no head can serve; see `forward`."""
        if hidden_states.ndim != 2 or hidden_states.shape[1] != self.hidden_size:
            raise UserError(
                f"hidden states of shape {tuple(hidden_states.shape)} do not fit head {self.name}: "
                f"give [B, {self.hidden_size}]"
            )
        if hidden_states.dtype not in HIDDEN_DTYPES:
            raise UserError(
                f"hidden states of {hidden_states.dtype} are not served: "
                f"give float32, bfloat16 or float16"
            )
        if not 1 <= want.k <= self.vocab_size:
            raise UserError(f"k must lie between 1 and {self.vocab_size}, got {want.k}")
        if want.logsumexp and not self.has_logsumexp:
            raise UserError(
                f"head {self.name} gives no log-sum-exp: choose flashhead or a dense head for it"
            )
        if self.check_inputs and not _capturing(hidden_states):
            refuse_non_finite(hidden_states)


def empty_output(want: Want, device: torch.device) -> HeadOutput:
    """The result of an empty batch, for which no rank exchanges anything."""
    floats = torch.empty(0, dtype=torch.float32, device=device)
    return HeadOutput(
        torch.empty((0, want.k), dtype=torch.int64, device=device),
        torch.empty((0, want.k), dtype=torch.float32, device=device),
        floats if want.logsumexp else None,
        floats if want.candidate_mass else None,
    )


def refuse_non_finite(hidden_states: Tensor) -> None:
    """Raise UserError naming the first row of `hidden_states [B, D]` with NaN or inf."""
    if ops_for(hidden_states.device).all_finite(hidden_states):
        return
    try:
        check_finite(hidden_states)
    except ValueError as error:
        raise UserError(
            f"{error}: check the model that made it, since no token is the best of such a row"
        ) from error


def _capturing(hidden_states: Tensor) -> bool:
    return hidden_states.is_cuda and torch.cuda.is_current_stream_capturing()


def merge_candidates(
    found: Candidates, candidate_logsumexp: Tensor | None = None
) -> Steps[HeadOutput]:
    """Merge each rank's best keys `[B, k]` and partial log-sum-exps `[B]` in ONE exchange.

    Greedy decoding (k = 1, no log-sum-exp) reduces 8 bytes a row by MAX. Otherwise the ranks gather
    `8 k + 4` bytes a row (4 less or more for no or two log-sum-exps) and merge them locally.

    Ids and logits are those of the greatest keys, whoever holds them, so they do not depend on P.
    The log-sum-exp adds the ranks' float32 partials in float64: it depends on P by the rounding of
    those partials, a few units in the last place.
    """
    partials = [item for item in (found.logsumexp, candidate_logsumexp) if item is not None]
    k = found.keys.shape[1]
    if k == 1 and not partials:
        if found.token_ids is None or found.logits is None:
            keys = yield Exchange(Operation.MAX, found.keys)
            return local_output(Candidates(keys, None))
        yield Exchange(Operation.MAX, found.keys, (found.token_ids, found.logits))
        return HeadOutput(found.token_ids, found.logits)
    all_keys, sums = yield from _gather(found.keys, partials)
    merged = all_keys.topk(k, dim=1).values
    return _output(merged, sums, found.logsumexp is not None)


def merge_scanned(found: Candidates, want: Want) -> Steps[HeadOutput]:
    """`merge_candidates` where every token is one, so that one log-sum-exp serves for both."""
    mass = found.logsumexp if want.candidate_mass else None
    logsumexp = found.logsumexp if want.logsumexp else None
    return (yield from merge_candidates(replace(found, logsumexp=logsumexp), mass))


def merge_judged(
    keys: Tensor,
    unprobed: Tensor,
    logsumexp: Tensor | None = None,
    candidate_logsumexp: Tensor | None = None,
) -> Steps[tuple[HeadOutput, Tensor]]:
    """As `merge_candidates`, with the greatest of the ranks' `unprobed` keys int64 `[B]` as well.

    It travels in the same exchange, 8 bytes a row more. The second result is its score, float32
    `[B]`, the same on every rank and at every P: -inf where every cluster was probed.
    """
    partials = [item for item in (logsumexp, candidate_logsumexp) if item is not None]
    k = keys.shape[1]
    both = torch.cat([keys, unprobed.unsqueeze(1)], dim=1)
    if k == 1 and not partials:
        both = yield Exchange(Operation.MAX, both)
        # Unpacked together: on a GPU that is plain torch, at one price for one number or for two.
        output = local_output(Candidates(both, None))
        return HeadOutput(output.token_ids[:, :1], output.logits[:, :1]), output.logits[:, 1]
    gathered, sums = yield from _gather(both, partials)
    by_rank = gathered.view(len(keys), -1, k + 1)
    merged = by_rank[..., :k].flatten(1).topk(k, dim=1).values
    left, _ = ops_for(keys.device).unpack_keys(by_rank[..., k:].amax(1))
    return _output(merged, sums, logsumexp is not None), left[:, 0]


def _gather(keys: Tensor, partials: list[Tensor]) -> Steps[tuple[Tensor, list[Tensor]]]:
    """All ranks' `keys [B, n]` as `[B, P * n]`, and the sums `[B]` of their log-sum-exps."""
    n = keys.shape[1]
    words = [keys.contiguous().view(torch.int32)]
    words += [item.float().contiguous().view(torch.int32).unsqueeze(1) for item in partials]
    gathered = yield Exchange(Operation.GATHER, torch.cat(words, dim=1))
    # A copy: of one row on one rank any slice counts as contiguous, with an odd stride.
    halves = gathered[..., : 2 * n].clone(memory_format=torch.contiguous_format)
    all_keys = halves.view(torch.int64)  # [P, B, n]
    floats = gathered[..., 2 * n :].contiguous().view(torch.float32).double()  # [P, B, sums]
    sums = [floats[..., i].logsumexp(0).float() for i in range(len(partials))]
    return all_keys.transpose(0, 1).reshape(len(keys), -1), sums


def _output(keys: Tensor, sums: list[Tensor], has_logsumexp: bool) -> HeadOutput:
    """`sums`: log-sum-exp, then that over the candidates; either may be missing."""
    remaining = iter(sums)
    logsumexp = next(remaining) if has_logsumexp else None
    return local_output(Candidates(keys, logsumexp), next(remaining, None))


def local_output(found: Candidates, candidate_logsumexp: Tensor | None = None) -> HeadOutput:
    """The result of a rank that has seen all there is: descending keys `[B, k]`, unpacked."""
    logits, token_ids = found.logits, found.token_ids
    if logits is None or token_ids is None:
        with annotate(RESULT):
            logits, token_ids = ops_for(found.keys.device).unpack_keys(found.keys)
    return HeadOutput(token_ids, logits, found.logsumexp, candidate_logsumexp)
