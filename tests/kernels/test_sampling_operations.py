"""The CPU's sampling operations against their definition in torch, and the noise by itself."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from flashhead_kernels import cpu, cpu_sampling, cpu_sampling_loops, sampling
from flashhead_kernels.keys import unpack_keys
from flashhead_kernels.noise import Domain, FinalLogits, GumbelNoise, gumbel
from flashhead_kernels.sampling import Weighed
from flashhead_kernels.shard import IndexShard, Query
from tests.kernels.shards import ALPHA, candidates, make_shard, random_states

FINALS = (FinalLogits(), FinalLogits(temperature=0.6), FinalLogits(softcap=20.0, temperature=1.5))
NOISE = GumbelNoise(2**64 - 3, torch.arange(5) * 2**20, torch.arange(5) + 2**31)


@pytest.fixture(
    scope="module",
    params=[(3, 32, 4, 64, 4, 32, 2), (2, 5, 3, 48, 16, 48, 0)],
)
def shard(request: pytest.FixtureRequest) -> IndexShard:
    return make_shard(*request.param, torch.bfloat16)


def scores_of(ops: Any, shard: IndexShard, states: torch.Tensor) -> sampling.LocalScores:
    found: sampling.LocalScores = ops.local_scores(states, shard, Query(2, ALPHA))
    return found


def close(found: torch.Tensor, wanted: torch.Tensor) -> None:
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("final", FINALS)
def test_twins_agree(shard: IndexShard, final: FinalLogits) -> None:
    # So flat that unprobed clusters win some of the draws.
    states = 0.2 * random_states(5, shard.rows.shape[-1])
    found, wanted = (scores_of(ops, shard, states) for ops in (cpu_sampling, sampling))
    assert torch.equal(found.token_ids, wanted.token_ids)
    close(found.logits, wanted.logits)
    close(found.means, wanted.means)
    rows = torch.arange(40) % 5
    noise = GumbelNoise(2**64 - 3, torch.arange(40) * 2**20, torch.arange(40) + 2**31)
    masses, draws, groups = [], [], []
    for ops in (cpu_sampling, sampling):
        logits = ops.final_logits(wanted.logits, final)
        known = ops.group_log_mass(logits.view(5, len(shard.rows), -1))
        mass = ops.cluster_log_mass(states, shard, wanted.means, known, 0.5, final)
        masses.append(mass)
        weighed = Weighed(logits, wanted.token_ids, mass, ops.group_log_mass(mass))
        draws.append(ops.draw_candidates(logits, wanted.token_ids, rows, noise))
        groups.append(ops.draw_groups(states, shard, weighed, rows, replace(final, noise=noise)))
    close(*masses)
    for pair in (draws, groups):
        values, tokens = zip(*(unpack_keys(keys) for keys in pair), strict=True)
        close(*values)
        assert torch.equal(*tokens)
    assert not torch.equal(*(unpack_keys(found[0])[1] for found in (draws, groups)))


@pytest.mark.parametrize("table", [False, True])
def test_twins_agree_on_the_dense_head(table: bool) -> None:
    rows, states = random_states(300, 64), random_states(5, 64)
    ids = (torch.arange(300).int() * 7 % 300).masked_fill(torch.arange(300) == 4, -1)
    own = torch.tensor([0, -1, 299, 17, 150])
    for final in FINALS:
        given = (states, rows, 0 if table else 1000, ids if table else None)
        keys = [
            ops.draw_dense(*given, replace(final, noise=NOISE)) for ops in (cpu_sampling, sampling)
        ]
        assert torch.equal(*(unpack_keys(found)[1] for found in keys))
        parts = [
            ops.dense_log_mass(states, rows, given[3], own, final)
            for ops in (cpu_sampling, sampling)
        ]
        torch.testing.assert_close(*parts, rtol=1e-5, atol=1e-4)


def test_candidates_are_those_of_the_head(shard: IndexShard) -> None:
    """Probed otherwise than the greedy head, lossless sampling would lose its shared noise."""
    states = random_states(5, shard.rows.shape[-1])
    scores = scores_of(cpu_sampling, shard, states)
    best = cpu.best_keys(scores.logits, scores.token_ids, 1)
    assert torch.equal(best, candidates(cpu, shard, states, 2).keys)


def test_a_row_does_not_depend_on_its_neighbours(shard: IndexShard) -> None:
    states = random_states(5, shard.rows.shape[-1])
    together, alone = (scores_of(cpu_sampling, shard, part) for part in (states, states[3:4]))
    assert torch.equal(together.logits[3], alone.logits[0])
    assert torch.equal(together.means[3], alone.means[0])


def test_dense_scores_are_the_dense_head_s() -> None:
    rows, states = random_states(300, 64), random_states(3, 64)
    scores = cpu_sampling.dense_scores(states, rows, 1000)
    keys = cpu.best_keys(scores.logits, scores.token_ids.expand(3, -1), 4)
    assert torch.equal(keys, cpu.dense_candidates(states, rows, 1000, k=4).keys)


def test_noise_is_its_twin_s() -> None:
    ids = torch.arange(2000).expand(5, -1)
    for domain in Domain:
        close(cpu_sampling.gumbel(NOISE, ids, domain), gumbel(NOISE, ids, domain))


def test_noise_is_finite_at_every_word() -> None:
    """A uniform made of 24 bits and a half rounded to 1, and its noise to infinity."""
    words = torch.tensor([0, 1, 255, 256, 2**31, 2**32 - 257, 2**32 - 256, 2**32 - 1])
    noise = torch.tensor([cpu_sampling_loops.from_word(word) for word in words.tolist()])
    assert bool(torch.isfinite(noise).all())
    assert noise.tolist() == sorted(noise.tolist())
    v = (2.0**32 - 0.5 - words.double()) / 2**32
    wanted = -torch.log(-torch.log1p(-v))
    # The least words, whose noise never wins, are rounded to one value.
    assert float((noise[4:] - wanted[4:]).abs().max()) < 1e-5
    assert float((noise[:4] - wanted[:4]).abs().max()) < 0.33


def test_noise_has_the_moments_of_gumbel() -> None:
    ids = torch.arange(200_000).unsqueeze(0)
    noise = cpu_sampling.gumbel(GumbelNoise(5, torch.tensor([9])), ids).double()
    assert abs(float(noise.mean()) - 0.5772) < 0.01
    assert abs(float(noise.var()) - 1.6449) < 0.03


@pytest.mark.parametrize("what", ["seed", "high seed", "position", "sequence", "domain"])
def test_other_counters_give_other_noise(what: str) -> None:
    ids = torch.arange(50_000).unsqueeze(0)
    base = GumbelNoise(7, torch.tensor([3]), torch.tensor([2]))
    other = {
        "seed": replace(base, seed=8),
        "high seed": replace(base, seed=7 + 2**40),
        "position": replace(base, positions=torch.tensor([4])),
        "sequence": replace(base, sequences=torch.tensor([3])),
        "domain": base,
    }[what]
    domain = Domain.GROUP if what == "domain" else Domain.TOKEN
    left = cpu_sampling.gumbel(base, ids)[0]
    right = cpu_sampling.gumbel(other, ids, domain)[0]
    correlation = torch.corrcoef(torch.stack([left, right]))[0, 1]
    assert abs(float(correlation)) < 0.02


@pytest.mark.parametrize("name", ["log", "exp"])
def test_our_own_functions_are_as_near_as_float32_goes(name: str) -> None:
    exponents = torch.linspace(-80, 0, 4001)
    inputs = exponents if name == "exp" else exponents.exp()
    found = torch.tensor([float(getattr(cpu_sampling_loops, name)(x)) for x in inputs.numpy()])
    wanted = getattr(torch, name)(inputs.double())
    assert float(((found - wanted) / wanted.abs().clamp(min=1e-30)).abs()[:-1].max()) < 3e-7
