"""Sampling in Triton, interpreted, against its definition in torch and a float64 truth.

On a machine with CUDA the same tests run on the card.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from flashhead_kernels import sampling
from flashhead_kernels.dispatch import sampling_ops_for
from flashhead_kernels.keys import EMPTY_KEY, unpack_keys
from flashhead_kernels.noise import Domain, FinalLogits, GumbelNoise
from flashhead_kernels.noise import gumbel as gumbel_of_torch
from flashhead_kernels.sampling import LocalScores, Weighed
from flashhead_kernels.shard import IndexShard, Query
from tests.kernels.shards import ALPHA, make_shard, random_states, select_groups
from tests.kernels.test_triton_head import DEVICE, SHAPES, on_device, tied_shard

pytest.importorskip("triton")
cuda_sampling: Any = sampling_ops_for("cuda")
FINALS = (FinalLogits(), FinalLogits(softcap=5.0, temperature=1.7))
SEEDS = (1, 16, 2**40 + 5, 2**64 - 3)


def close(found: torch.Tensor, wanted: torch.Tensor) -> None:
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-4)


def flat_states(batch: int, size: int) -> torch.Tensor:
    """Hidden states whose logits are so alike that unprobed clusters win now and then."""
    return (2 / size**0.5 * random_states(batch, size)).to(DEVICE)


def noise_of(draws: int, seed: int = 2**64 - 3) -> GumbelNoise:
    places = torch.arange(draws, device=DEVICE)
    return GumbelNoise(seed, places * 2**20, places + 2**31)


def scores_of(ops: Any, shard: IndexShard, states: torch.Tensor, probes: int) -> LocalScores:
    found: LocalScores = ops.local_scores(states, shard, Query(probes, ALPHA))
    return found


def weigh(
    ops: Any, shard: IndexShard, states: torch.Tensor, scores: LocalScores, final: FinalLogits
) -> Weighed:
    logits = ops.final_logits(scores.logits, final).masked_fill(scores.token_ids < 0, -torch.inf)
    mass = ops.cluster_log_mass(
        states, shard, scores.means,
        ops.group_log_mass(logits.unflatten(1, (len(shard.rows), -1))), 0.5, final,
    )  # fmt: skip
    return Weighed(logits, scores.token_ids, mass, ops.group_log_mass(mass))


def draws_of(
    ops: Any,
    shard: IndexShard,
    states: torch.Tensor,
    weighed: Weighed,
    final: FinalLogits,
    row_of_draw: torch.Tensor,
) -> torch.Tensor:
    found: torch.Tensor = ops.draw_groups(states, shard, weighed, row_of_draw, final)
    return found


@pytest.mark.parametrize(
    ("shape", "batch", "probes"),
    [
        *((shape, 1, (shape[1] + 1) // 2) for shape in SHAPES),
        (SHAPES[3], 9, 2),  # so many rows that none is shared out over programs
        (SHAPES[1], 1, 9),  # all clusters
    ],
)
def test_scores_are_those_of_the_reference(shape: tuple[Any, ...], batch: int, probes: int) -> None:
    shard = on_device(make_shard(*shape))
    states = random_states(batch, shape[3]).to(DEVICE)
    found, wanted = (scores_of(ops, shard, states, probes) for ops in (cuda_sampling, sampling))
    assert torch.equal(found.token_ids, wanted.token_ids)
    close(found.logits, wanted.logits)
    close(found.means, wanted.means)


def test_ties_and_pads_in_scores() -> None:
    shard = on_device(tied_shard())
    states = torch.ones(1, 64, device=DEVICE)
    found, wanted = (scores_of(ops, shard, states, 5) for ops in (cuda_sampling, sampling))
    assert torch.equal(found.token_ids, wanted.token_ids)
    assert found.token_ids[0, :20].tolist() == list(range(129, 109, -1))
    assert found.means[0].isneginf().sum(1).tolist() == [5, 5]
    pads = replace(shard, token_ids=torch.full_like(shard.token_ids, -1))
    nothing = scores_of(cuda_sampling, pads, states, 5).logits.view(2, -1)
    assert nothing[:, :-1].isneginf().all()
    assert nothing[:, -1].tolist() == [64, 64]


@pytest.mark.parametrize("final", FINALS)
@pytest.mark.parametrize("shape", [SHAPES[1], SHAPES[4], SHAPES[7], SHAPES[6]])
def test_masses_and_draws_are_those_of_the_reference(
    shape: tuple[Any, ...], final: FinalLogits
) -> None:
    shard = on_device(make_shard(*shape))
    batch, draws = 3, 8
    states = flat_states(batch, shape[3])
    scores = scores_of(sampling, shard, states, 1)
    found, wanted = (weigh(ops, shard, states, scores, final) for ops in (cuda_sampling, sampling))
    close(found.log_mass, wanted.log_mass)
    close(found.group_log_mass, wanted.group_log_mass)
    rows = torch.arange(draws, device=DEVICE) % batch
    drawing = replace(final, noise=noise_of(draws))
    keys, expected = (
        draws_of(ops, shard, states, wanted, drawing, rows) for ops in (cuda_sampling, sampling)
    )
    close(unpack_keys(keys)[0], unpack_keys(expected)[0])
    assert torch.equal(unpack_keys(keys)[1], unpack_keys(expected)[1])
    candidates, best = (
        ops.draw_candidates(wanted.logits, wanted.token_ids, rows, drawing.noise)
        for ops in (cuda_sampling, sampling)
    )
    assert torch.equal(unpack_keys(candidates)[1], unpack_keys(best)[1])
    of_candidates = int((keys == candidates).sum())
    assert shape != SHAPES[1] or 0 < of_candidates < draws, "both kinds of winners are compared"


def test_masses_of_extreme_states() -> None:
    shard = on_device(make_shard(*SHAPES[7]))
    states = (random_states(2, SHAPES[7][3]).float() * 1e15).to(DEVICE)
    scores = scores_of(sampling, shard, states, 3)
    for final in (FinalLogits(), FinalLogits(softcap=30.0)):
        found, wanted = (
            weigh(ops, shard, states, scores, final) for ops in (cuda_sampling, sampling)
        )
        assert not found.log_mass.isnan().any()
        close(found.log_mass, wanted.log_mass)
        close(found.group_log_mass, wanted.group_log_mass)


def test_draws_are_the_same_bits_however_groups_are_split() -> None:
    shard = on_device(make_shard(*SHAPES[8]))
    states = flat_states(2, shard.rows.shape[-1])
    final = FinalLogits(noise=noise_of(4))
    every = torch.arange(len(shard.rows), device=DEVICE)
    rows = torch.arange(4, device=DEVICE) % 2

    def drawn(groups: list[int]) -> torch.Tensor:
        part = select_groups(shard, groups)
        weighed = weigh(
            cuda_sampling, part, states, scores_of(cuda_sampling, part, states, 2), final
        )
        return draws_of(cuda_sampling, part, states, weighed, final, rows)

    whole = drawn(every.tolist())
    for size in (2, 3):
        parts = [drawn(every[rank::size].tolist()) for rank in range(size)]
        assert torch.equal(torch.stack(parts).amax(0), whole)


def test_a_draw_does_not_depend_on_the_draws_beside_it() -> None:
    shard = on_device(make_shard(*SHAPES[1]))
    states = flat_states(3, 96)
    final = FinalLogits(noise=noise_of(3))
    rows = torch.arange(3, device=DEVICE)
    scores = scores_of(cuda_sampling, shard, states, 2)
    weighed = weigh(cuda_sampling, shard, states, scores, final)
    together = draws_of(cuda_sampling, shard, states, weighed, final, rows)
    assert final.noise is not None
    assert final.noise.sequences is not None
    last = GumbelNoise(
        final.noise.seed, final.noise.positions[2:].clone(), final.noise.sequences[2:].clone()
    )
    alone = scores_of(cuda_sampling, shard, states[2:].clone(), 2)
    weighed = weigh(cuda_sampling, shard, states[2:].clone(), alone, final)
    found = draws_of(
        cuda_sampling, shard, states[2:].clone(), weighed, FinalLogits(noise=last), rows[:1]
    )
    assert torch.equal(found, together[2:])


@pytest.mark.parametrize("seed", SEEDS)
def test_noise_of_every_domain(seed: int) -> None:
    ids = torch.arange(1500, device=DEVICE).expand(2, -1)
    for domain in Domain:
        noise = noise_of(2, seed)
        close(cuda_sampling.gumbel(noise, ids, domain), gumbel_of_torch(noise, ids, domain))
    alone = GumbelNoise(seed, torch.tensor([7], device=DEVICE))
    close(cuda_sampling.gumbel(alone, ids[:1]), gumbel_of_torch(alone, ids[:1]))


def test_great_noise_is_exact() -> None:
    """From a uniform of 24 bits near 1, noise above 12 is off by a hundredth."""
    noise = noise_of(1, (3 << 35) + 1)
    ids = torch.arange(1 << 20, device=DEVICE).unsqueeze(0)
    expected = gumbel_of_torch(noise, ids)
    assert expected.max() > 12
    torch.testing.assert_close(cuda_sampling.gumbel(noise, ids), expected, rtol=1e-6, atol=2e-6)


def test_nothing_to_draw_gives_empty_keys() -> None:
    shard = on_device(make_shard(*SHAPES[0]))
    pads = replace(shard, token_ids=torch.full_like(shard.token_ids, -1))
    states = random_states(1, 64).to(DEVICE)
    final = FinalLogits(noise=noise_of(1))
    scores = scores_of(cuda_sampling, pads, states, 2)
    weighed = weigh(cuda_sampling, pads, states, scores, final)
    row = torch.zeros(1, dtype=torch.int64, device=DEVICE)
    assert draws_of(cuda_sampling, pads, states, weighed, final, row).tolist() == [EMPTY_KEY]


@pytest.mark.parametrize("table", [False, True])
def test_the_dense_head_draws_and_weighs_in_its_kernel(table: bool) -> None:
    generator = torch.Generator().manual_seed(5)
    rows = torch.randn(150, 48, generator=generator).to(torch.bfloat16).to(DEVICE)
    states = random_states(6, 48).to(DEVICE)
    ids = None
    if table:
        ids = torch.randperm(150, generator=generator).int().to(DEVICE)
        ids[[3, 70]] = -1
    own = torch.tensor([0, 149, -1, 4, 80, -1], device=DEVICE)
    for final in FINALS:
        drawing = replace(final, noise=noise_of(6))
        keys, wanted = (
            ops.draw_dense(states, rows, 0 if table else 9, ids, drawing)
            for ops in (cuda_sampling, sampling)
        )
        assert torch.equal(unpack_keys(keys)[1], unpack_keys(wanted)[1])
        parts, expected = (
            ops.dense_log_mass(states, rows, ids, own, final) for ops in (cuda_sampling, sampling)
        )
        torch.testing.assert_close(parts, expected, rtol=1e-5, atol=1e-4)
        assert parts[:, 0].isneginf().tolist() == [False, False, True, False, False, True]


def test_dense_draws_come_as_often_as_the_softmax_says() -> None:
    rows = torch.tensor([[1.0], [2.0], [0.0], [-1.0]]).to(DEVICE)
    states = torch.full((400, 1), 0.7, device=DEVICE)
    places = torch.arange(400, device=DEVICE)
    final = FinalLogits(temperature=0.8, noise=GumbelNoise(11, places, places % 3))
    keys = cuda_sampling.draw_dense(states, rows, 0, None, final)
    counts = torch.bincount(unpack_keys(keys)[1].cpu(), minlength=4)
    expected = 400 * torch.softmax(0.7 * rows[:, 0].cpu() / 0.8, 0)
    assert ((counts - expected).square() / expected).sum() < 16.3, "chi-squared, 3 degrees, 0.1 %"


def test_draws_of_clusters_come_as_often_as_their_masses_say() -> None:
    """Which group, which of its clusters, which token there: the definition that kernels equal."""
    shard = on_device(make_shard(2, 3, 2, 8, 16, 8, 0, torch.float32))
    states = 0.2 * random_states(1, 8).float().to(DEVICE)
    final = FinalLogits()
    weighed = weigh(sampling, shard, states, scores_of(sampling, shard, states, 1), final)
    count = 4000
    rows = torch.zeros(count, dtype=torch.int64, device=DEVICE)
    noise = GumbelNoise(5, torch.arange(count, device=DEVICE))
    keys = draws_of(sampling, shard, states, weighed, replace(final, noise=noise), rows)
    tokens = unpack_keys(keys)[1].cpu()
    masses = torch.full((12,), float("-inf"), dtype=torch.float64)
    real = weighed.token_ids[0].cpu() >= 0
    masses[weighed.token_ids[0].cpu()[real].long()] = weighed.logits[0].cpu()[real].double()
    logits = (shard.rows[..., :].double() @ states[0].double()).cpu()
    ids = shard.token_ids.cpu()
    within = logits.masked_fill(ids < 0, float("-inf")).log_softmax(2)
    shut = weighed.log_mass[0].cpu() > float("-inf")
    share = weighed.log_mass[0].cpu().double()[..., None] + within
    opened = shut[..., None] & (ids >= 0)
    masses[ids[opened].long()] = share[opened]
    expected = count * masses.softmax(0)
    seen = torch.bincount(tokens, minlength=12)
    assert int(seen[expected == 0].sum()) == 0
    kept = expected > 0
    misfit = ((seen - expected).square() / expected)[kept].sum()
    assert misfit < 31.3, "chi-squared, 11 degrees, 0.1 %"


def test_an_empty_batch() -> None:
    shard = on_device(make_shard(*SHAPES[0]))
    none = random_states(0, 64).to(DEVICE)
    scores = scores_of(cuda_sampling, shard, none, 2)
    assert scores.logits.shape == (0, 24)
    weighed = weigh(cuda_sampling, shard, none, scores, FinalLogits())
    final = FinalLogits(noise=noise_of(0))
    rows = torch.zeros(0, dtype=torch.int64, device=DEVICE)
    assert draws_of(cuda_sampling, shard, none, weighed, final, rows).shape == (0,)
