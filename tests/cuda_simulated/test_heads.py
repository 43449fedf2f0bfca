"""Heads on a simulated GPU give what they give on the CPU, and a greedy step does not wait."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

from flashhead_dist.errors import UserError
from flashhead_dist.exchange import ExchangeChoice, ExchangeMethod
from flashhead_dist.heads.base import Head, HeadOutput, Want
from flashhead_dist.heads.flashhead import FlashHeadAuto
from flashhead_dist.heads.registry import HEADS, HeadBuilder, emulate_head
from flashhead_dist.parallel import TensorParallel
from flashhead_dist.symmetric import SymmetricExchange
from flashhead_kernels import launch_choice
from flashhead_kernels.keys import SIGNAL_STRIDE, num_words, pack_keys
from tests.cuda_simulated.conftest import Small

if TYPE_CHECKING:
    from simulated_cuda import SimulatedCuda

WANTS = {
    "greedy": Want(),
    "k": Want(k=5),
    "log-sum-exp": Want(logsumexp=True),
    "mass": Want(logsumexp=True, candidate_mass=True),
}
ON_GPU = [name for name in HEADS if name != "faiss_ivf"]
BATCH = 2


def assert_same(found: HeadOutput, expected: HeadOutput) -> None:
    """On a GPU, and with the values that the CPU gives but for the order of sums."""
    assert found.token_ids.is_cuda
    assert torch.equal(found.token_ids.cpu(), expected.token_ids)
    for name in ("logits", "logsumexp", "candidate_logsumexp"):
        ours, theirs = getattr(found, name), getattr(expected, name)
        assert (ours is None) == (theirs is None)
        if ours is not None:
            assert ours.is_cuda
            assert ours.dtype == torch.float32
            torch.testing.assert_close(ours.cpu(), theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("what", WANTS)
@pytest.mark.parametrize("name", ON_GPU)
def test_a_head_gives_the_cpus_answer(
    cuda: SimulatedCuda, small: Small, name: str, what: str
) -> None:
    expected = small.head(name, "cpu").serve(small.states[:BATCH], WANTS[what])
    found = small.head(name).serve(small.states[:BATCH].cuda(), WANTS[what])
    assert_same(found, expected)


def test_flashhead_auto_scans_large_batches(cuda: SimulatedCuda, small: Small) -> None:
    want = Want(k=2, logsumexp=True)
    heads = [small.head("flashhead_auto", device) for device in ("cuda", "cpu")]
    for head in heads:
        assert isinstance(head, FlashHeadAuto)
        head.changes_at = (1,)
    assert_same(
        heads[0].serve(small.states[:BATCH].cuda(), want),
        heads[1].serve(small.states[:BATCH], want),
    )


@pytest.mark.parametrize("name", [name for name in ON_GPU if name != "dense_allreduce"])
def test_a_head_looks_tokens_up(cuda: SimulatedCuda, small: Small, name: str) -> None:
    head, ids = small.head(name), torch.tensor([[0, 110], [61, 5]])
    assert head.holds_rows
    found = head.tp.run(head.embedding_steps(ids.cuda()))
    rows = small.model.read_rows(0, small.model.vocab_size)
    assert found.is_cuda
    assert torch.equal(found.cpu(), rows[ids])


@pytest.mark.parametrize("name", ON_GPU)
def test_emulated_ranks_give_the_cpus_answer(cuda: SimulatedCuda, small: Small, name: str) -> None:
    ours, theirs = (
        emulate_head(name, tp_size=2, model=small.model, index_dir=small.index_dir, device=device)
        for device in ("cuda", "cpu")
    )
    assert_same(ours.forward(small.states[:1].cuda()), theirs.forward(small.states[:1]))


def test_faiss_says_that_it_has_no_gpu(cuda: SimulatedCuda, small: Small) -> None:
    with pytest.raises(UserError, match="faiss"):
        small.head("faiss_ivf")


def test_nan_is_refused_and_its_row_named(cuda: SimulatedCuda, small: Small) -> None:
    states = small.states[:2].cuda()
    states[1, 3] = torch.nan
    with pytest.raises(UserError, match="1 holds NaN"):
        small.head("flashhead")(states)


def captured(head: Head, states: torch.Tensor) -> tuple[torch.cuda.CUDAGraph, HeadOutput]:
    """A graph of one greedy step, warmed up on its stream."""
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    with torch.cuda.stream(stream):
        head(states)
    with torch.cuda.graph(graph, stream=stream):
        output = head(states)
    return graph, output


@pytest.mark.parametrize("name", ["flashhead", "flashhead_auto", "dense_local_max"])
def test_a_greedy_step_waits_once_at_most_and_never_in_a_graph(
    cuda: SimulatedCuda, small: Small, name: str
) -> None:
    head, static = small.head(name), small.states[:1].cuda()
    expected = small.head(name, "cpu")(small.states[5:6])
    head(static)
    cuda.reset()
    head(static)
    assert len(cuda.host_waits) <= 1
    # Raises where the step waits: see test_simulation.
    graph, output = captured(head, static)
    static.copy_(small.states[5:6])
    cuda.reset()
    graph.replay()
    assert not cuda.host_waits
    assert_same(output, expected)
    head.check_inputs = False
    cuda.reset()
    head(static)
    assert not cuda.host_waits


@pytest.mark.parametrize("launches", [1, 2])
@pytest.mark.parametrize("name", ["flashhead", "flashhead_auto", "dense_local_max"])
@pytest.mark.parametrize("batch", [1, 4, 9])
def test_a_greedy_step_is_two_launches_at_most(
    cuda: SimulatedCuda,
    small: Small,
    name: str,
    launches: int,
    batch: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """But for the check of its states, which is no part of a captured step."""
    monkeypatch.setattr(launch_choice.table, "choose", lambda *_: launches)
    head, states = small.head(name), small.states[:batch].cuda()
    head.check_inputs = False
    head(states)
    cuda.reset()
    head(states)
    assert len(cuda.launches) >= 1
    assert len(cuda.launches) + len(cuda.operations) <= 2


class PeerThatSent(SymmetricExchange):
    """Rank 0 of two, whose peer has sent `key` for every row of every round."""

    def __init__(self, key: torch.Tensor, rows: int) -> None:
        words = torch.zeros(num_words(2, rows), dtype=torch.int64, device="cuda")
        words[:] = key
        words[SIGNAL_STRIDE] = 1000
        addresses = torch.tensor([words.data_ptr()] * 2, dtype=torch.int64, device="cuda")
        super().__init__(words, addresses, 0, rows)


@pytest.mark.parametrize("launches", [1, 2])
@pytest.mark.parametrize("name", ["flashhead", "dense_local_max"])
def test_a_greedy_step_of_several_ranks_is_three_launches_at_most(
    cuda: SimulatedCuda,
    small: Small,
    name: str,
    launches: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The exchange unpacks the keys: the peer's, which is the greatest."""
    monkeypatch.setattr(launch_choice.table, "choose", lambda *_: launches)
    key = pack_keys(torch.tensor([1e6]), torch.tensor([9]))
    choice = ExchangeChoice(ExchangeMethod.SYMMETRIC, "", PeerThatSent(key.cuda(), 2))
    tp = TensorParallel(tp_size=2, group=object(), device="cuda", choice=choice)
    head = HeadBuilder(tp=tp, model=small.model, index_dir=small.index_dir, device="cuda").build(
        name
    )
    head.check_inputs = False
    states = small.states[:2].cuda()
    head(states)
    cuda.reset()
    output = head(states)
    assert len(cuda.launches) + len(cuda.operations) <= 3
    assert output.token_ids.tolist() == [[9], [9]]
    assert output.logits.tolist() == [[1e6], [1e6]]


@pytest.mark.parametrize("name", ON_GPU)
def test_a_head_says_rightly_whether_it_can_be_captured(
    cuda: SimulatedCuda, small: Small, name: str
) -> None:
    head, states = small.head(name), small.states[:1].cuda()
    if head.capturable:
        captured(head, states)
        return
    with pytest.raises(RuntimeError, match="capturing"):
        captured(head, states)


@pytest.mark.parametrize("launches", [1, 2])
@pytest.mark.parametrize("name", ["flashhead", "dense_local_max"])
def test_a_head_works_on_another_device_than_the_current_one(
    cuda: SimulatedCuda,
    small: Small,
    name: str,
    launches: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(launch_choice.table, "choose", lambda *_: launches)
    expected = small.head(name, "cpu")(small.states[:1])
    for number in (1, 0):
        found = small.head(name, f"cuda:{number}")(small.states[:1].to(number))
        assert found.token_ids.device == torch.device("cuda", number)
        assert_same(found, expected)
        assert torch.cuda.current_device() == 0
    assert {launch.current_device for launch in cuda.launches} == {0, 1}
