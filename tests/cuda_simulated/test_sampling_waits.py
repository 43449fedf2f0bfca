"""What sampling and rows of logits launch on a simulated GPU, and where the host waits."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest
import torch

from flashhead_dist.heads.flashhead import FlashHead, FlashHeadAuto
from flashhead_dist.heads.sampling import SamplingParameters, choose_tokens, token_log_probs
from flashhead_dist.index.shard import read_token_ids
from flashhead_dist.integrations.transformers_rows import LogitRows
from flashhead_dist.integrations.vllm.head import Finish, RowsHead
from flashhead_dist.integrations.vllm.needs import Rest, RowNeed
from flashhead_dist.integrations.vllm.rows import VocabularyMap
from flashhead_dist.models import OutputContract

pytest.importorskip("simulated_cuda")

if TYPE_CHECKING:
    from simulated_cuda import SimulatedCuda
    from tests.cuda_simulated.conftest import Small

NUMBERS = torch.arange(2)
LAUNCHES = {
    "flashhead": ["dots_kernel", "scores_kernel", "log_sum_kernel", "log_mass_kernel",
                  "log_sum_kernel", "draw_groups_kernel"],
    "dense_local_max": ["dense_kernel"],
}  # fmt: skip


def second(cuda: SimulatedCuda, step: Callable[[], Any]) -> tuple[list[str], list[str]]:
    """Kernels of the second of two steps, and its waits; the first may read or time something."""
    step()
    launches, waits = len(cuda.launches), len(cuda.host_waits)
    step()
    return (
        [launch.kernel for launch in cuda.launches[launches:]],
        [f"{wait.name} {wait.place}" for wait in cuda.host_waits[waits:]],
    )


@pytest.mark.parametrize("positions_on", ["cpu", "cuda"])
@pytest.mark.parametrize("name", LAUNCHES)
def test_a_draw_waits_for_nothing_but_the_check_of_its_states(
    cuda: SimulatedCuda, small: Small, name: str, positions_on: str
) -> None:
    head, states = small.head(name), small.states[:2].cuda()
    numbers, parameters = NUMBERS.to(positions_on), SamplingParameters(temperature=8.0, seed=7)

    def draw() -> None:
        choose_tokens(
            head, states, numbers, numbers, parameters, contract=OutputContract(softcap=30.0)
        )

    launches, waits = second(cuda, draw)
    assert launches == LAUNCHES[name]
    assert len(waits) == 1, waits
    head.check_inputs = False
    assert second(cuda, draw)[1] == []


@pytest.mark.parametrize(("way", "most"), [({"top_k": 5, "top_p": 0.9}, 0), ({"top_p": 0.9}, 1)])
@pytest.mark.parametrize("name", LAUNCHES)
def test_cuts_wait_once_at_most(
    cuda: SimulatedCuda, small: Small, name: str, way: dict[str, Any], most: int
) -> None:
    """A nucleus has to know whether the tokens gathered are enough."""
    head, states = small.head(name), small.states[:2].cuda()
    head.check_inputs = False
    parameters = SamplingParameters(temperature=8.0, seed=7, **way)
    _, waits = second(cuda, lambda: choose_tokens(head, states, NUMBERS, NUMBERS, parameters))
    assert len(waits) <= most, waits


@pytest.mark.parametrize("name", LAUNCHES)
def test_log_probs_wait_for_nothing_but_the_check_of_their_states(
    cuda: SimulatedCuda, small: Small, name: str
) -> None:
    head, states = small.head(name), small.states[:2].cuda()
    _, waits = second(cuda, lambda: token_log_probs(head, states, NUMBERS, temperature=4.0))
    assert len(waits) == 1, waits


def test_rows_of_logits_wait_for_nothing(cuda: SimulatedCuda, small: Small) -> None:
    states = small.states[:2].cuda()
    plain, auto = small.head("flashhead"), small.head("flashhead_auto")
    assert isinstance(plain, FlashHead)
    assert isinstance(auto, FlashHeadAuto)
    rows = LogitRows(plain)

    def for_transformers() -> None:
        found = rows.retrieve(states, 2.0)
        rows.estimated(found, below_best=True)
        rows.closed_form(found)

    launches, waits = second(cuda, for_transformers)
    assert waits == []
    assert launches.count("logits_kernel") == 1
    token_ids, _ = read_token_ids(small.index_dir, auto.index.manifest)
    where = VocabularyMap.of(token_ids.cuda(), auto.vocab_size)
    served = RowsHead(auto, Finish(torch.float32, softcap=30.0), where)
    best, drawn = RowNeed(Rest.NOTHING, best_only=True), RowNeed(Rest.CLUSTERS, temperature=0.5)
    for needs in ([best] * 2, [drawn] * 2, [best, drawn]):
        assert second(cuda, lambda needs=needs: served.rows(states, needs))[1] == []


def test_a_head_on_another_device_than_the_current_one_draws(
    cuda: SimulatedCuda, small: Small
) -> None:
    """A kernel launched on the current device would be given another one's memory."""
    head, states = small.head("flashhead", "cuda:1"), small.states[:2].to("cuda:1")
    parameters = SamplingParameters(temperature=8.0, seed=7)
    found = choose_tokens(head, states, NUMBERS, NUMBERS, parameters)
    token_log_probs(head, states, NUMBERS)
    assert {launch.current_device for launch in cuda.launches} == {1}
    same = choose_tokens(small.head("flashhead"), states.cpu().cuda(), NUMBERS, NUMBERS, parameters)
    assert torch.equal(found.cpu(), same.cpu())
