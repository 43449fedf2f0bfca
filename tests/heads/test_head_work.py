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
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from flashhead_dist.bench.head_shape import head_shape_of
from flashhead_dist.heads import base, flashhead, flashhead_global, merge
from flashhead_dist.heads import dense as dense_heads
from flashhead_dist.heads.base import Head, Want
from flashhead_dist.heads.flashhead_escalate import Escalation, FlashHeadEscalate
from flashhead_dist.heads.registry import HEAD_NAMES, HeadBuilder
from flashhead_dist.index import IndexOptions, build_index, load_manifest
from flashhead_dist.models import open_model
from flashhead_dist.parallel import Operation, TensorParallel, payload_bytes, ring_sent_bytes
from flashhead_kernels import cpu, reference
from flashhead_topology import head_work as model_of_work
from flashhead_topology.head_shape import HeadShape
from flashhead_topology.head_work import head_work, scan_work

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


def built(tied_model: Path, index: Path, tp_size: int, name: str) -> Head:
    """Rank 0's head, which holds most."""
    place = TensorParallel(tp_rank=0, tp_size=tp_size)
    return HeadBuilder(tp=place, model=open_model(str(tied_model)), index_dir=index).build(name)


def test_the_model_knows_every_head() -> None:
    assert set(model_of_work.HEAD_NAMES) == set(HEAD_NAMES)


@pytest.mark.parametrize("vocab_size", [262_144, 128_256, 151_936, 1000])
def test_the_default_shape_is_that_of_the_default_options(vocab_size: int) -> None:
    shape, options = HeadShape.with_default_index(vocab_size, 640), IndexOptions()
    assert shape.num_clusters == options.num_clusters(vocab_size)
    assert shape.num_probes == options.probes(vocab_size)
    assert (shape.cluster_size, shape.num_groups) == (options.cluster_size, options.num_groups)
    assert (shape.centroid_bits, shape.group_size) == (options.centroid_bits, options.group_size)
    assert shape.pinned_per_group == options.learned_pins_per_group


@pytest.mark.parametrize("tp_size", SIZES)
@pytest.mark.parametrize("name", [n for n in HEAD_NAMES if n != "faiss_ivf"])
def test_bytes_are_those_of_the_head(
    tied_model: Path, index: Path, name: str, tp_size: int
) -> None:
    head = built(tied_model, index, tp_size, name)
    shape = head_shape_of(open_model(str(tied_model)), load_manifest(index))
    for batch in BATCHES:
        work = head_work(name, shape, tp_size, batch)
        assert round(work.read_bytes) == head.read_bytes_per_step(batch), batch
        assert work.weight_bytes == head.weight_bytes
        # Once a row, whatever a second round sends now and then.
        payload = sum(
            payload_bytes(_operation(sent.operation), sent.operand_bytes, tp_size)
            for sent in work.exchanges
            if sent.times == 1
        )
        assert payload == head.payload_bytes_per_row * batch


def test_bytes_of_faiss_are_those_of_the_head(tied_model: Path, index: Path) -> None:
    pytest.importorskip("faiss")
    shape = head_shape_of(open_model(str(tied_model)), load_manifest(index))
    for tp_size in (1, 3):
        head = built(tied_model, index, tp_size, "faiss_ivf")
        for batch in BATCHES:
            work = head_work("faiss_ivf", shape, tp_size, batch)
            assert work.read_bytes == head.read_bytes_per_step(batch)
            assert work.weight_bytes == head.weight_bytes


@pytest.mark.parametrize("tp_size", SIZES)
def test_bytes_of_a_scan_are_those_of_flashhead_auto(
    tied_model: Path, index: Path, tp_size: int
) -> None:
    head: Any = built(tied_model, index, tp_size, "flashhead_auto")
    head.changes_at = (1,)
    shape = head_shape_of(open_model(str(tied_model)), load_manifest(index))
    assert scan_work(shape, tp_size, 7).read_bytes == head.read_bytes_per_step(7)


def test_what_a_step_really_exchanges_is_what_the_model_says(tied_model: Path, index: Path) -> None:
    shape = head_shape_of(open_model(str(tied_model)), load_manifest(index))
    for name in HEAD_NAMES:
        if name == "faiss_ivf":
            continue
        head = built(tied_model, index, 3, name)
        if isinstance(head, FlashHeadEscalate):
            head.escalation = Escalation(margin=-inf)
        asked = [(e.operation, e.tensor.nbytes) for e in exchanges(head, 4)]
        modelled = [sent for sent in head_work(name, shape, 3, 4).exchanges if sent.times == 1]
        assert len(asked) == len(modelled)
        for (operation, operand), sent in zip(asked, modelled, strict=True):
            assert operand == sent.operand_bytes, name
            gathers = operation is Operation.GATHER
            assert gathers == (sent.operation == "all_gather")
            sent_bytes = ring_sent_bytes(operation, operand, 3)
            assert sent_bytes == ring_sent_bytes(_operation(sent.operation), operand, 3)


@pytest.mark.parametrize(("device", "ops"), [("cuda", reference), ("cpu", cpu)])
@pytest.mark.parametrize(
    "name", [n for n in HEAD_NAMES if n not in ("faiss_ivf", "flashhead_auto")]
)
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
    shape = head_shape_of(open_model(str(tied_model)), load_manifest(tied_index))
    for batch in (1, 4):
        counter = _Counter()
        if ops is reference:
            # Probed candidates are its kernel and torch.
            monkeypatch.setattr(reference, "score_rows", _as_launches(SCORE_ROWS, 1, counter))
        space = _counted(ops, counter)
        for module in (base, dense_heads, flashhead, flashhead_global, merge):
            monkeypatch.setattr(module, "ops_for", lambda _, space=space: space, raising=False)
        exchanges(head, batch, counter)
        expected = head_work(name, shape, 2, batch).launches[device]
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


def _operation(name: str) -> Operation:
    return Operation.GATHER if name == "all_gather" else Operation.MAX
