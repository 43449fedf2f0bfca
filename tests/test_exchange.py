"""The ranks agree on an exchange, whatever fails, and the heads' keys go through it.

Ranks are gloo processes without CUDA: what torch's symmetric memory would map is a file here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from flashhead_dist import exchange as exchange_choice
from flashhead_dist.errors import UserError
from flashhead_dist.exchange import (
    ExchangeFailedError,
    ExchangeUnavailableError,
    choose_exchange,
)
from flashhead_dist.parallel import (
    Exchange,
    Operation,
    TensorParallel,
    split_tensor_parallel,
)
from flashhead_dist.symmetric import (
    SHARED_DEVICE_VARIABLE,
    MappedWords,
    Place,
    SymmetricExchange,
    group_obstacle,
    local_obstacle,
)
from flashhead_kernels.keys import EMPTY_KEY, merged_keys, num_words

WORLD_SIZE = 3
CAPACITY = 8
Run = Callable[..., list[Any]]
no_cuda = pytest.mark.skipif(torch.cuda.is_available(), reason="a rank without CUDA is played")


class _Files:
    """Words in files that every rank maps, each behind an offset of its own."""

    def __init__(self, folder: Path, rank: int) -> None:
        self.folder, self.rank = folder, rank

    def allocate(self, tp_size: int, device: torch.device, capacity: int) -> Tensor:
        offset = 16 * self.rank
        size = offset + num_words(tp_size, capacity)
        return self._open(self.rank, size)[offset:]

    def map(self, group: dist.ProcessGroup, words: Tensor) -> MappedWords:
        size = words.numel() + 16 * (WORLD_SIZE - 1)
        files = [self._open(rank, size) for rank in range(WORLD_SIZE)]
        # The rank's own words are seen where they were allocated, as in torch.
        offset = 8 * 16 * self.rank
        bases = [file.data_ptr() for file in files]
        bases[self.rank] = words.data_ptr() - offset
        return MappedWords(words, bases, offset, files)

    def _open(self, rank: int, size: int) -> Tensor:
        path = str(self.folder / f"words_{rank}")
        return torch.from_file(path, shared=True, size=size, dtype=torch.int64)


@contextmanager
def _as_if_cuda(**replaced: Any) -> Iterator[None]:
    """Ranks that see no obstacle; `replaced` functions of `exchange_choice` on top."""
    rank = dist.get_rank()
    functions = {
        "local_obstacle": lambda device: None,
        "local_place": lambda device: Place("host", f"gpu {rank}", False),
        "link_obstacle": lambda device, uuids: None,
    } | replaced
    with ExitStack() as stack:
        for name, function in functions.items():
            stack.enter_context(mock.patch.object(exchange_choice, name, function))
        yield


def _outcome(requested: str = "auto", device: str = "cuda") -> tuple[str, str]:
    """Method and reason, or the error's class and text."""
    assert dist.group.WORLD is not None
    try:
        choice = choose_exchange(dist.group.WORLD, device, requested, capacity=CAPACITY)
    except (ExchangeUnavailableError, ExchangeFailedError) as error:
        return type(error).__name__, str(error)
    return choice.method.value, choice.reason


def _failing(on_rank: int, error: Exception, otherwise: Any = None) -> Callable[..., Any]:
    def function(*arguments: Any) -> Any:
        if dist.get_rank() == on_rank:
            raise error
        return otherwise(*arguments) if callable(otherwise) else otherwise

    return function


def _rank_choices(rank: int, _: int, folder: Path) -> dict[str, tuple[str, str]]:
    files = _Files(folder, rank)
    result = {
        "cpu": _outcome(device="cpu"),
        "cpu gloo": _outcome("gloo", device="cpu"),
        "cpu symmetric": _outcome("symmetric", device="cpu"),
        "cpu nccl": _outcome("nccl", device="cpu"),
        "unknown": _outcome("fast"),
        "no device": _outcome(),
        "no device, asked": _outcome("symmetric"),
        "gloo, asked": _outcome("gloo"),
        "different": _outcome("symmetric" if rank == 1 else "auto"),
    }
    with _as_if_cuda(local_obstacle=lambda device: "it is old" if rank == 2 else None):
        result["one obstacle"] = _outcome()
    with _as_if_cuda(local_place=lambda device: Place("host", "gpu 0", rank == 0)):
        result["shared"] = _outcome()
    with _as_if_cuda(link_obstacle=lambda device, uuids: f"no link to {uuids[rank]}"):
        result["link"] = _outcome()
    # Nobody may wait in a rendezvous for the rank that could not allocate.
    allocate = _failing(1, RuntimeError("out of memory.\nat line 3"), files.allocate)
    with _as_if_cuda(allocate_words=allocate, map_words=_failing(rank, AssertionError())):
        result["allocation"] = _outcome()
    files_ok = {"allocate_words": files.allocate, "map_words": files.map}
    with _as_if_cuda(**files_ok | {"map_words": _failing(0, RuntimeError("no peer"), files.map)}):
        result["mapping"] = _outcome()
    for name, function in {
        "compile": _failing(2, ValueError("ptxas refuses"), None),
        "trial_problem": lambda *_: "it is wrong" if rank == 0 else None,
    }.items():
        with _as_if_cuda(**files_ok), mock.patch.object(SymmetricExchange, name, function):
            result[name] = _outcome()
    endless = _failing(rank, TimeoutError("it has not ended"))
    with (
        _as_if_cuda(**files_ok),
        mock.patch.object(SymmetricExchange, "trial_problem", endless),
        mock.patch.object(SymmetricExchange, "compile", return_value=None),
    ):
        result["endless"] = _outcome()
    return result


@pytest.fixture(scope="module")
def choices(run_ranks: Run, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[str, str]]:
    ranks = run_ranks(_rank_choices, WORLD_SIZE, tmp_path_factory.mktemp("choices"))
    assert all(rank == ranks[0] for rank in ranks), "ranks differ in method or reason"
    result: dict[str, tuple[str, str]] = ranks[0]
    return result


@no_cuda
@pytest.mark.parametrize(
    ("case", "method", "words"),
    [
        ("cpu", "gloo", "tensors are on the CPU"),
        ("cpu gloo", "gloo", "tensors are on the CPU"),
        ("no device", "gloo", "on rank 0 it has no CUDA device"),
        ("gloo, asked", "gloo", "it was asked for"),
        ("one obstacle", "gloo", "on rank 2 it is old"),
        ("shared", "gloo", "3 ranks share 1 device"),
        ("link", "gloo", "on rank 0 no link to gpu 0"),
        ("allocation", "gloo", "on rank 1 out of memory"),
        ("mapping", "gloo", "on rank 0 no peer"),
        ("cpu symmetric", "ExchangeUnavailableError", "tensors are on the CPU"),
        ("cpu nccl", "ExchangeUnavailableError", "uses gloo on cpu"),
        ("unknown", "ExchangeUnavailableError", "auto, symmetric, nccl, gloo"),
        ("no device, asked", "ExchangeUnavailableError", "on rank 0 it has no CUDA device"),
        ("different", "ExchangeUnavailableError", "auto, symmetric, auto"),
        ("compile", "ExchangeFailedError", "on rank 2 the exchange kernel does not compile"),
        ("trial_problem", "ExchangeFailedError", "on rank 0 it is wrong"),
        ("endless", "ExchangeFailedError", "it has not ended"),
    ],
)
def test_every_rank_chooses_the_same_and_says_why(
    choices: dict[str, tuple[str, str]], case: str, method: str, words: str
) -> None:
    assert choices[case][0] == method
    assert words in choices[case][1]
    assert "\n" not in choices[case][1]


def _rank_symmetric(rank: int, _: int, folder: Path) -> dict[str, Any]:
    files = _Files(folder, rank)
    assert dist.group.WORLD is not None
    original = choose_exchange

    def small(*arguments: Any) -> Any:
        return original(*arguments, capacity=CAPACITY)

    with (
        _as_if_cuda(allocate_words=files.allocate, map_words=files.map),
        mock.patch("flashhead_dist.parallel.choose_exchange", small),
    ):
        tp = TensorParallel.from_group(dist.group.WORLD, "cuda", "symmetric")
    result: dict[str, Any] = {"choice": (tp.exchange_method, tp.exchange_reason), "wrong": 0}
    draw = torch.Generator().manual_seed(5)
    with mock.patch.object(dist, "all_reduce", side_effect=AssertionError("it is not symmetric")):
        for round_ in range(20):
            shape = (WORLD_SIZE, 1 + round_ % CAPACITY, 1)
            rank_keys = torch.randint(-(2**63), 2**63 - 1, shape, generator=draw)
            rank_keys[round_ % WORLD_SIZE, 0] = EMPTY_KEY
            given = rank_keys[rank].clone()
            answer = tp.all_reduce_max(given)
            result["wrong"] += int(not torch.equal(answer, merged_keys(rank_keys)))
        result["account"] = (tp.payload_bytes, tp.num_collectives)
        # A transposed view is not contiguous; its answer has its shape.
        view = torch.arange(6).reshape(2, 3).T + 10 * rank
        result["view"] = tp.all_reduce_max(view)
    # What the kernel does not take goes through the group's library.
    result["many"] = tp.all_reduce_max(torch.full((CAPACITY + 1,), rank))
    result["floats"] = tp.all_reduce_max(torch.tensor([0.5 * rank]))
    result["sum"] = tp.perform(Exchange(Operation.SUM, torch.tensor([rank])))
    return result


@no_cuda
def test_keys_of_a_head_go_through_the_kernel_and_are_counted_as_before(
    run_ranks: Run, tmp_path: Path
) -> None:
    pytest.importorskip("triton")
    for result in run_ranks(_rank_symmetric, WORLD_SIZE, tmp_path):
        method, reason = result["choice"]
        assert method == "symmetric"
        assert "more than 8 keys at once go through gloo" in reason
        assert result["wrong"] == 0
        keys = sum(1 + round_ % CAPACITY for round_ in range(20))
        assert result["account"] == (8 * keys, 20)
        assert torch.equal(result["view"], torch.arange(6).reshape(2, 3).T + 20)
        assert result["many"].tolist() == [WORLD_SIZE - 1] * (CAPACITY + 1)
        assert result["floats"].tolist() == [1.0]
        assert result["sum"].tolist() == [3]


def _rank_user_error(_: int, __: int) -> str:
    assert dist.group.WORLD is not None
    assert TensorParallel.from_group(dist.group.WORLD).exchange_method == "gloo"
    with pytest.raises(UserError) as caught:
        TensorParallel.from_group(dist.group.WORLD, "cpu", "nccl")
    return str(caught.value)


def test_a_request_that_cannot_be_met_is_the_users_to_mend(run_ranks: Run) -> None:
    assert all("exchange 'nccl' is unavailable" in text for text in run_ranks(_rank_user_error, 2))


def test_one_rank_and_emulated_ranks_send_nothing() -> None:
    for place in (TensorParallel.single(), TensorParallel(tp_rank=0, tp_size=2)):
        assert place.exchange_method == "none"
        assert "nothing is sent" in place.exchange_reason


def test_ranks_share_memory_on_one_machine_and_a_device_only_where_allowed() -> None:
    def places(*triples: tuple[str, str, bool]) -> list[Place]:
        return [Place(*triple) for triple in triples]

    assert group_obstacle(places(("a", "0", False), ("a", "1", False))) is None
    assert group_obstacle(places(("a", "0", True), ("a", "0", True))) is None
    assert "2 machines" in str(group_obstacle(places(("a", "0", True), ("b", "0", True))))
    shared = group_obstacle(places(("a", "0", True), ("a", "0", False)))
    assert SHARED_DEVICE_VARIABLE in str(shared)


def test_ranks_whose_mappings_differ_would_hang_in_torch_and_are_kept_from_it() -> None:
    def obstacle(*counts: int) -> str:
        return str(group_obstacle([Place("a", str(r), False, n) for r, n in enumerate(counts)]))

    assert obstacle(1, 1) == "None"
    assert "open larger ones first" in obstacle(1, 1, 0)
    assert "an earlier mapping failed" in obstacle(-1, 1)


def _rank_order(rank: int, _: int) -> tuple[list[int], list[int]]:
    opened: list[int] = []

    def record(group: dist.ProcessGroup, *_: Any) -> None:
        opened.append(dist.get_world_size(group))

    with mock.patch.object(TensorParallel, "from_group", record):
        places = split_tensor_parallel([2, 1, 3])
    return opened, list(places)


def test_larger_groups_are_opened_first_and_told_in_the_order_asked(run_ranks: Run) -> None:
    opened = [([3, 2], [2, 1, 3])] * 2 + [([3], [2, 1, 3])]
    assert run_ranks(_rank_order, WORLD_SIZE) == opened


def test_a_cpu_is_an_obstacle_and_words_must_fit() -> None:
    assert "not on CUDA" in str(local_obstacle(torch.device("cpu")))
    with pytest.raises(ValueError, match="do not fit"):
        SymmetricExchange(torch.zeros(5, dtype=torch.int64), torch.zeros(2), 0, 4)
