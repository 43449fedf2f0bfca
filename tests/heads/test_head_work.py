"""The cost model's bytes and launches against those of the heads themselves.

Mutated to see each fail: spread left out of the centroids' bytes, ids left out of the rows',
`num_probes` not rounded up to whole probes a group, the last rank taken for the first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from math import inf
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from flashhead_dist.heads import base, flashhead
from flashhead_dist.heads import dense as dense_heads
from flashhead_dist.heads.base import Head, HeadShape, Want
from flashhead_dist.heads.flashhead import FlashHeadAuto, FlashHeadGlobal, IndexHead
from flashhead_dist.heads.flashhead_escalate import Escalation, FlashHeadEscalate
from flashhead_dist.heads.registry import HEADS, HeadBuilder
from flashhead_dist.index import IndexOptions, build_index, load_manifest
from flashhead_dist.models import open_model
from flashhead_dist.parallel import Operation, TensorParallel
from flashhead_kernels import cpu, reference
from flashhead_topology.links import payload_bytes, ring_sent_bytes

BATCHES = (1, 4, 9, 1000)
SIZES = (1, 2, 3, 5, 8)
SCORE_ROWS = reference.score_rows


@pytest.fixture(scope="module", params=[(4, 16), (8, 13), (16, 32)], ids=["int4", "int8", "16-bit"])
def index(
    request: pytest.FixtureRequest, tied_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Indexes of `tied_model` with other centroids and probes, one not a multiple of the groups."""
    bits, num_probes = request.param
    options = IndexOptions(
        num_groups=8,
        num_probes=num_probes,
        alpha=0.02,
        centroid_bits=bits,
        group_size=32,
        pinned_token_ids=(1005, 900, 612),
    )
    out = tmp_path_factory.mktemp("index") / str(bits)
    model = open_model(str(tied_model))
    return build_index(
        model, options, calibration=None, test=None, out=out, device="cpu", progress=False
    )


def built(tied_model: Path, index: Path, tp_size: int, name: str, tp_rank: int = 0) -> Head:
    place = TensorParallel(tp_rank=tp_rank, tp_size=tp_size)
    return HeadBuilder(tp=place, model=open_model(str(tied_model)), index_dir=index).build(name)


def held_bytes(head: Head) -> int:
    """Bytes of the weights and tables that the head holds."""
    if isinstance(head, IndexHead):
        shard = head.shard
        tensors = (shard.rows, shard.token_ids, shard.pinned_rows, shard.pinned_token_ids)
        return sum(t.nbytes for t in tensors) + shard.centroids.nbytes + shard.spread.nbytes
    return int(cast(Any, head).weight.nbytes)


def read_bytes(head: Head, batch: int) -> int:
    """Bytes of the head's own tensors that a batch reads, where every probe is another cluster."""
    if not isinstance(head, IndexHead):
        return held_bytes(head)
    shard, groups = head.shard, len(head.shard.rows)
    clusters = groups * shard.rows.shape[1]
    probes = -(-head.num_probes // head.num_groups) * groups
    if isinstance(head, FlashHeadGlobal):
        probes = -(-head.num_probes * groups // head.num_groups)
    unprobed = clusters - min(batch * probes, clusters)
    return held_bytes(head) - unprobed * (shard.rows.nbytes + shard.token_ids.nbytes) // clusters


@pytest.mark.parametrize("tp_size", SIZES)
@pytest.mark.parametrize("name", [n for n in HEADS if n not in ("faiss_ivf", "flashhead_escalate")])
def test_bytes_are_those_of_the_tensors(
    tied_model: Path, index: Path, name: str, tp_size: int
) -> None:
    for rank in {0, tp_size - 1}:
        head = built(tied_model, index, tp_size, name, rank)
        for batch in BATCHES:
            assert head.read_bytes_per_step(batch) == read_bytes(head, batch), batch
        work = HEADS[name].work(head.shape, tp_size, 4, rank)
        assert work.weight_bytes == head.weight_bytes == held_bytes(head)


def test_a_sharded_head_and_a_shape_of_its_index_do_the_same_work(
    tied_model: Path, index: Path
) -> None:
    shape = HeadShape.of_index(load_manifest(index))
    for name in HEADS:
        if name == "faiss_ivf":
            continue
        head = built(tied_model, index, 3, name)
        for batch in BATCHES:
            read = HEADS[name].work(shape, 3, batch).read_bytes
            assert round(read) == head.read_bytes_per_step(batch), (name, batch)


def test_bytes_of_faiss_are_those_of_the_head(tied_model: Path, index: Path) -> None:
    pytest.importorskip("faiss")
    shape = HeadShape.of_index(load_manifest(index))
    for tp_size in (1, 3):
        head = built(tied_model, index, tp_size, "faiss_ivf")
        for batch in BATCHES:
            work = HEADS["faiss_ivf"].work(shape, tp_size, batch)
            assert work.read_bytes == head.read_bytes_per_step(batch)
            assert work.weight_bytes == head.weight_bytes


@pytest.mark.parametrize("tp_size", SIZES)
def test_a_scan_reads_all_rows_and_ids_and_no_centroids(
    tied_model: Path, index: Path, tp_size: int
) -> None:
    head: Any = built(tied_model, index, tp_size, "flashhead_auto")
    head.changes_at = (1,)
    shard = head.shard
    unread = shard.centroids.nbytes + shard.spread.nbytes
    assert head.read_bytes_per_step(7) == held_bytes(head) - unread
    scan = FlashHeadAuto.work(head.shape, tp_size, 7).scan
    assert scan is not None
    assert scan.read_bytes == head.read_bytes_per_step(7)


def test_what_a_step_really_exchanges_is_what_the_model_says(tied_model: Path, index: Path) -> None:
    for name in HEADS:
        if name == "faiss_ivf":
            continue
        head = built(tied_model, index, 3, name)
        if isinstance(head, FlashHeadEscalate):
            head.escalation = Escalation(margin=-inf)
        asked = [(e.operation, e.tensor.nbytes) for e in exchanges(head, 4)]
        modelled = [
            sent for sent in HEADS[name].work(head.shape, 3, 4).exchanges if sent.times == 1
        ]
        assert [operand for _, operand in asked] == [sent.operand_bytes for sent in modelled], name
        for (operation, operand), sent in zip(asked, modelled, strict=True):
            assert (operation is Operation.GATHER) == (sent.operation == "all_gather")
            assert ring_sent_bytes(operation, operand, 3) == ring_sent_bytes(
                sent.operation, operand, 3
            )
        payload = sum(payload_bytes(operation, operand, 3) for operation, operand in asked)
        assert payload == 4 * head.payload_bytes_per_row


@pytest.mark.parametrize(("device", "ops"), [("cuda", reference), ("cpu", cpu)])
@pytest.mark.parametrize("name", [n for n in HEADS if n not in ("faiss_ivf", "flashhead_auto")])
def test_launches_are_the_operators_of_the_head(
    tied_model: Path,
    tied_index: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    device: Any,
    ops: ModuleType,
) -> None:
    """Of CUDA's operations those that are kernels count as such, the rest is the reference's torch;
    views are not counted.
    """
    head = built(tied_model, tied_index, 2, name)
    head.check_inputs = False
    if isinstance(head, FlashHeadEscalate):
        head.escalation = Escalation(margin=-inf)
    shape = HeadShape.of_index(load_manifest(tied_index))
    for batch in (1, 4):
        counter = _Counter()
        if ops is reference:
            # Probed candidates are its kernel and torch.
            monkeypatch.setattr(reference, "score_rows", _as_launches(SCORE_ROWS, 1, counter))
        space = _counted(ops, counter)
        for module in (base, dense_heads, flashhead):
            monkeypatch.setattr(module, "ops_for", lambda _, space=space: space, raising=False)
        exchanges(head, batch, counter)
        expected = HEADS[name].work(shape, 2, batch).launches[device]
        assert abs(counter.count - expected) <= 0.02 * expected, (counter.count, expected)


def exchanges(head: Head, batch: int, counter: _Counter | None = None) -> list[Any]:
    """The exchanges of one greedy step, each answered with this rank's own operand."""
    states = torch.randn(batch, head.hidden_size).to(torch.bfloat16)
    counter = counter or _Counter()
    asked: list[Any] = []
    with counter:
        steps = head.steps(states, Want())
        try:
            exchange = next(steps)
            while True:
                asked.append(exchange)
                answer: Tensor = exchange.tensor
                if exchange.operation is Operation.GATHER:
                    with counter.aside():
                        answer = torch.stack([answer] * head.tp.tp_size)
                exchange = steps.send(answer)
        except StopIteration:
            return asked


class _Counter(TorchDispatchMode):
    """Counts operators that compute something."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0
        self._aside = 0

    def launched(self, number: int) -> None:
        """Count launches, unless they are aside."""
        self.count += 0 if self._aside else number

    @contextmanager
    def aside(self) -> Iterator[None]:
        """What happens inside is not counted."""
        self._aside += 1
        try:
            yield
        finally:
            self._aside -= 1

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        given = {storage(t) for t in tensors_in((args, kwargs))}
        made = tensors_in(result)
        allocates = func.overloadpacket.__name__ in ("empty", "new_empty")
        views = all(storage(t) in given for t in made) and not func._schema.is_mutable
        if made and not views and not allocates and not self._aside:
            self.count += 1
        return result


def tensors_in(tree: Any) -> list[Tensor]:
    leaves = torch.utils._pytree.tree_leaves(tree)
    return [leaf for leaf in leaves if isinstance(leaf, Tensor)]


def storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _counted(ops: ModuleType, counter: _Counter) -> SimpleNamespace:
    """The module's operations, those that are kernels counted as their launches."""
    kernels = {"candidates": 1, "dense_candidates": 1, "score_centroids": 2}
    if ops is cpu:
        ones = ("unpack_keys", "score_centroids", "select_probes", "probed_candidates")
        kernels |= dict.fromkeys(ones, 1)
    names = [name for name in dir(ops) if not name.startswith("_")]
    found = {name: getattr(ops, name) for name in names}
    for name, launches in kernels.items():
        found[name] = _as_launches(found[name], launches, counter)
    return SimpleNamespace(**found)


def _as_launches(
    operation: Callable[..., Any], launches: int, counter: _Counter
) -> Callable[..., Any]:
    """`operation`, counted as so many launches whatever it does."""

    def run(*args: Any, **kwargs: Any) -> Any:
        counter.launched(launches)
        with counter.aside():
            return operation(*args, **kwargs)

    return run
