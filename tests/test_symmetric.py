"""What is asked of torch's symmetric memory, played by a module that keeps words on the CPU."""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
import torch.distributed as dist

from flashhead_dist import symmetric
from flashhead_dist.symmetric import (
    SHARED_DEVICE_VARIABLE,
    MappedWords,
    SymmetricExchange,
    local_place,
    map_words,
)
from flashhead_kernels.keys import num_words

GROUP = cast(dist.ProcessGroup, SimpleNamespace(group_name="7"))
RANK, TP_SIZE, CAPACITY = 1, 2, 4


@pytest.fixture(autouse=True)
def _played(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device", lambda _: nullcontext())
    monkeypatch.setattr(dist, "get_rank", lambda _: RANK)
    monkeypatch.setattr(symmetric, "_mappings", symmetric._Mappings())
    monkeypatch.setenv(SHARED_DEVICE_VARIABLE, "1")


def _map(monkeypatch: pytest.MonkeyPatch, handle: Any) -> MappedWords:
    import torch.distributed._symmetric_memory as symm_mem

    def rendezvous(words: torch.Tensor, group_name: str) -> Any:
        assert group_name == "7"
        return handle(words)

    monkeypatch.setattr(symm_mem, "rendezvous", rendezvous)
    return map_words(GROUP, torch.zeros(num_words(TP_SIZE, CAPACITY), dtype=torch.int64))


def test_addresses_are_each_ranks_allocation_and_its_own_offset(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    peer = 1 << 40
    mapped = _map(
        monkeypatch, lambda words: SimpleNamespace(buffer_ptrs=[peer, words.data_ptr() - 512])
    )
    assert mapped.offset == 512
    exchange = mapped.exchange(RANK, [64, 512], CAPACITY)
    assert exchange._addresses.tolist() == [peer + 64, mapped.words.data_ptr()]
    assert exchange.accepts(torch.zeros(CAPACITY, dtype=torch.int64))
    for refused in (torch.zeros(5, dtype=torch.int64), torch.zeros(2), torch.zeros(0).long()):
        assert not exchange.accepts(refused)


def test_mappings_are_counted_and_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    def handle(words: torch.Tensor) -> Any:
        return SimpleNamespace(buffer_ptrs=[8, words.data_ptr()])

    for count in (1, 2):
        mapped = _map(monkeypatch, handle)
        assert local_place(torch.device("cpu")).num_mappings == count
    assert symmetric._mappings.kept[-1][0] is mapped.words


@pytest.mark.parametrize("handle", [lambda _: None, lambda _: SimpleNamespace(buffer_ptrs=[0, 8])])
def test_a_failed_mapping_bars_the_process_from_more(
    monkeypatch: pytest.MonkeyPatch, handle: Any
) -> None:
    with pytest.raises(RuntimeError, match="mapped no address"):
        _map(monkeypatch, handle)
    place = local_place(torch.device("cpu"))
    assert "earlier mapping failed" in str(symmetric.group_obstacle([place, place]))


class _Driver:
    """Devices 0 and 1 have native atomics between them, 2 has none with either."""

    def cuDeviceGet(self, handle: Any, ordinal: int) -> int:  # noqa: N802
        handle._obj.value = 100 + ordinal
        return 0

    def cuDeviceGetP2PAttribute(self, value: Any, attribute: int, a: Any, b: Any) -> int:  # noqa: N802
        assert attribute == 3
        value._obj.value = int({a.value, b.value} == {100, 101})
        return 0


def test_peers_need_native_atomics_and_to_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(symmetric.ctypes, "CDLL", lambda _: _Driver())
    monkeypatch.setattr(symmetric, "visible_ordinals", lambda: {"a": 0, "b": 1, "c": 2})
    device = torch.device("cuda", 0)
    assert symmetric.link_obstacle(device, ["a", "b", "a"]) is None
    assert "GPU 0 and GPU 2 have no native atomics" in str(
        symmetric.link_obstacle(device, ["a", "b", "c"])
    )
    assert "hidden" in str(symmetric.link_obstacle(device, ["a", "d"]))


def test_ranks_on_one_gpu_need_no_driver_to_ask(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(_: str) -> None:
        raise OSError

    monkeypatch.setattr(symmetric.ctypes, "CDLL", missing)
    monkeypatch.setattr(symmetric, "visible_ordinals", lambda: {"a": 0, "b": 1})
    assert symmetric.link_obstacle(torch.device("cuda", 0), ["a", "a"]) is None
    assert symmetric.link_obstacle(torch.device("cuda", 0), ["a", "b"]) is not None


def test_a_wrong_first_round_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    words = torch.zeros(num_words(TP_SIZE, CAPACITY), dtype=torch.int64)
    exchange = SymmetricExchange(words, torch.zeros(TP_SIZE, dtype=torch.int64), RANK, CAPACITY)
    # Its own keys are not the greatest in every lane.
    monkeypatch.setattr(SymmetricExchange, "all_reduce_max", lambda _, keys: keys)
    assert exchange.trial_problem() == "a first round of keys came out wrong"
