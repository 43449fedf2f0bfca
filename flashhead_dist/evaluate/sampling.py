"""Draws of a head against the dense head's distribution, from real hidden states.

Every draw is from a state chosen by chance, and draws are pooled over states: they are a sample of
the mean of the states' distributions, and are held against the mean of their softmaxes. How near a
sample of that size comes by chance alone is shown by samples of the dense distribution itself,
drawn by torch's generator and not by our noise.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from torch import Tensor

from flashhead_dist.heads.base import Head
from flashhead_dist.heads.distribution import ClosedForm, closed_form
from flashhead_dist.heads.registry import EmulatedHead
from flashhead_dist.models.contract import PLAIN, OutputContract
from flashhead_kernels.keys import unpack_keys
from flashhead_kernels.noise import GumbelNoise

_TOP = 50
_PAIRED_DRAWS = 100
"""Draws of the dense head a state, with the same noise: each reads V numbers."""


@dataclass(frozen=True)
class SamplingEvaluation:
    """A head's draws at one temperature, pooled over `num_states` hidden states.

    total_variation: of the head's draws to the dense distribution; dense_total_variation: of as
    many dense draws to it; dense_pair_total_variation: of two such samples to each other.
    exact_total_variation: of the closed form to the dense distribution, mean over states, and
    pooled_exact_total_variation once pooled: what is left with no chance at all.
    chi_square, p_value: of the head's draws over the dense distribution's 50 best tokens and the
    rest together, 50 degrees of freedom; dense_p_value: of dense draws.
    same_as_dense: share of draws whose token is the dense head's own draw with the same noise.
    equal_tp_sizes: tp sizes whose every draw was that of the first.
    opened_share: share of draws that came from an unprobed cluster, by the closed form.
    """

    head: str
    temperature: float
    num_states: int
    num_draws: int
    total_variation: float
    dense_total_variation: float
    dense_pair_total_variation: float
    exact_total_variation: float
    pooled_exact_total_variation: float
    chi_square: float
    p_value: float
    dense_p_value: float
    same_as_dense: float
    opened_share: float
    equal_tp_sizes: list[int]

    def to_json(self) -> dict[str, Any]:
        """A JSON-ready dict of every field."""
        return asdict(self)


def evaluate_sampling(
    heads: Sequence[EmulatedHead],
    dense: Head,
    hidden_states: Tensor,
    *,
    temperature: float,
    num_draws: int,
    seed: int = 0,
    contract: OutputContract = PLAIN,
    progress: bool = True,
) -> SamplingEvaluation:
    """Draw `num_draws` tokens from `hidden_states [N, D]` with the first of `heads`.

    heads: the same head at several tp sizes, one of them 1 and first; dense: the dense head of the
    same model. Noise: sequence is the number of the state, position that of the draw.
    """
    size, states = dense.vocab_size, len(hidden_states)
    pooled, pooled_dense = torch.zeros(2, size, dtype=torch.float64)
    drawn, first_dense, second_dense = torch.zeros(3, size, dtype=torch.float64)
    exact, opened, same = 0.0, 0.0, 0.0
    unequal: set[int] = set()
    generator = torch.Generator().manual_seed(seed)
    # Draws of the head and of both dense samples from each state: int64 [3, N].
    shares = torch.stack(
        [
            torch.bincount(
                torch.randint(states, (num_draws,), generator=generator), minlength=states
            )
            for _ in range(3)
        ]
    )
    paired_draws = 0
    with Progress(console=Console(stderr=True), disable=not progress, transient=True) as bar:
        task = bar.add_task(f"drawing at T = {temperature}", total=len(hidden_states))
        for number in range(len(hidden_states)):
            state = hidden_states[number : number + 1]
            count = int(shares[0, number])
            noise = GumbelNoise(seed, torch.arange(count), torch.full((count,), number))
            forms = [
                closed_form(rank, state, temperature=temperature, contract=contract)
                for rank in heads[0].ranks
            ]
            tokens = _draw(forms, noise)
            for head in heads[1:]:
                others = [
                    closed_form(rank, state, temperature=temperature, contract=contract)
                    for rank in head.ranks
                ]
                if not torch.equal(_draw(others, noise), tokens):
                    unequal.add(head.tp_size)
            truth = closed_form(dense, state, temperature=temperature, contract=contract)
            few = slice(0, min(_PAIRED_DRAWS, count))
            paired = GumbelNoise(seed, noise.positions[few], torch.full_like(tokens[few], number))
            same += int((_draw([truth], paired) == tokens[few]).sum())
            paired_draws += len(tokens[few])
            own = forms[0].unnormalized()[0].double().softmax(0)
            softmax = truth.unnormalized()[0].double().softmax(0)
            exact += _total_variation(own, softmax)
            opened += 1 - float(
                (forms[0].logits[0].double().logsumexp(0) - forms[0].log_normalizer()[0]).exp()
            )
            pooled += own
            pooled_dense += softmax
            drawn += torch.bincount(tokens, minlength=size)
            for sample, share in zip((first_dense, second_dense), shares[1:, number], strict=True):
                if int(share):
                    chosen = torch.multinomial(softmax, int(share), True, generator=generator)
                    sample += torch.bincount(chosen, minlength=size)
            bar.advance(task)
    expected = pooled_dense / states
    chi_square, p_value = top_chi_square(drawn, expected)
    return SamplingEvaluation(
        head=heads[0].name,
        temperature=temperature,
        num_states=states,
        num_draws=num_draws,
        total_variation=_total_variation(drawn / num_draws, expected),
        dense_total_variation=_total_variation(first_dense / num_draws, expected),
        dense_pair_total_variation=_total_variation(
            first_dense / num_draws, second_dense / num_draws
        ),
        exact_total_variation=exact / states,
        pooled_exact_total_variation=_total_variation(pooled / states, expected),
        chi_square=chi_square,
        p_value=p_value,
        dense_p_value=top_chi_square(first_dense, expected)[1],
        same_as_dense=same / max(1, paired_draws),
        opened_share=opened / states,
        equal_tp_sizes=[head.tp_size for head in heads if head.tp_size not in unequal],
    )


def top_chi_square(counts: Tensor, expected: Tensor, top: int = _TOP) -> tuple[float, float]:
    """Pearson's chi-square of `counts [V]` against probabilities `expected [V]`, and its p-value.

    Over the `top` most probable tokens, and all others as one.
    """
    best = expected.topk(min(top, len(expected) - 1)).indices
    observed = torch.cat([counts[best], (counts.sum() - counts[best].sum()).unsqueeze(0)])
    wanted = torch.cat([expected[best], (1 - expected[best].sum()).clamp(min=1e-12).unsqueeze(0)])
    wanted = wanted * counts.sum()
    statistic = ((observed - wanted).square() / wanted).sum().double()
    freedom = torch.tensor(len(best) / 2, dtype=torch.float64)
    return float(statistic), float(torch.special.gammaincc(freedom, statistic / 2))


def _draw(forms: Sequence[ClosedForm], noise: GumbelNoise) -> Tensor:
    """What the ranks' one maximum gives: token ids int64 of the draws, all from row 0."""
    rows = torch.zeros_like(noise.positions)
    keys = torch.stack([form.draw(noise, rows) for form in forms]).amax(0)
    return unpack_keys(keys)[1]


def _total_variation(left: Tensor, right: Tensor) -> float:
    return float((left - right).abs().sum() / 2)
