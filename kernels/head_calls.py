"""Calls of the head's operations on one rank's shard: what is compiled ahead, and checked on a GPU.

A call names what is asked for; `run` asks `flashhead_kernels.cuda` or `.reference` for it alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

from bench_shapes import Shard
from bench_ways import Checked, FinalLogit, WrongResultError, same_tokens
from flashhead_kernels import reference
from flashhead_kernels.noise import PLAIN, FinalLogits, GumbelNoise, gumbel
from flashhead_kernels.shard import Candidates
from flashhead_kernels.triton_shapes import CentroidShape, HeadShape, num_processors, plan_head

_TEMPERATURE = 0.7
_SEED = 5
_LOG_TOLERANCE = 1e-4
"""Of a log-sum-exp, a cluster's score and Gumbel noise, relative and absolute: a few hundred
roundings of float32."""


@dataclass(frozen=True)
class Call:
    """dense: `dense_candidates`, else `candidates` in so many `launches`.

    sampled: with temperature and noise. wide: float32 hidden states, over bfloat16 rows.
    """

    batch: int
    dense: bool = False
    launches: int | None = None
    k: int = 1
    logsumexp: bool = False
    unprobed: bool = False
    sampled: bool = False
    wide: bool = False

    @property
    def name(self) -> str:
        """In words."""
        parts = [
            "dense" if self.dense else "flashhead",
            f"batch {self.batch}",
            {1: "one launch", 2: "two launches"}.get(self.launches or 0, ""),
            f"{self.k} best" if self.k > 1 else "",
            "log-sum-exp" if self.logsumexp else "",
            "unprobed" if self.unprobed else "",
            "sampled" if self.sampled else "",
            "float32 states" if self.wide else "",
        ]
        return ", ".join(part for part in parts if part)

    def states(self, shard: Shard, *, seed: int | None = None) -> Tensor:
        """Hidden states `[B, D]` where the shard is: random, or without values where no seed."""
        device = shard.storage.device
        dtype = torch.float32 if self.wide else torch.bfloat16
        size = (self.batch, shard.hidden_size)
        if seed is None:
            return torch.empty(size, dtype=dtype, device=device)
        generator = torch.Generator(device).manual_seed(seed)
        return torch.randn(size, generator=generator, dtype=dtype, device=device)

    def serves(self, shard: Shard) -> bool:
        """Whether the shard has a shape for so many launches."""
        if self.dense or self.launches != 1:
            return True
        return plan_head(
            HeadShape.of(shard.index, shard.query(k=self.k)), CentroidShape.of(shard.centroids),
            len(shard.spread), self.batch,
            num_processors(shard.storage.device),
        ).fits_one_launch  # fmt: skip

    def run(self, ops: ModuleType, shard: Shard, states: Tensor) -> Candidates:
        """Ask `ops` for it."""
        found: Candidates
        if self.dense:
            found = ops.dense_candidates(
                states, shard.dense_rows, 0, k=self.k, need_logsumexp=self.logsumexp,
                final=self._final(states.device),
            )  # fmt: skip
            return found
        own = {} if ops is reference else {"launches": self.launches}
        query = shard.query(k=self.k, need_logsumexp=self.logsumexp, need_unprobed=self.unprobed)
        found = ops.candidates(states, shard.index, query, **own)
        return found

    def check(self, shard: Shard, states: Tensor, found: Candidates) -> Checked:
        """Compare with the reference, by the logits of tokens where those differ.

        Raises:
            WrongResultError: something else than rounding differs.
        """
        expected = self.run(reference, shard, states)
        checked = Checked(0, 0)
        for place in range(self.k):
            one = same_tokens(
                self.name,
                found.keys[:, place],
                expected.keys[:, place],
                states,
                shard.dense_row_of if self.dense else shard.row_of,
                self._final_logit(states.device),
            )
            checked = Checked(checked.tokens + one.tokens, checked.ties + one.ties)
        ids = reference.unpack_keys(found.keys)[1].tolist()
        if any(len(set(row)) < self.k for row in ids):
            raise WrongResultError(f"{self.name} gave a token twice: {ids}")
        if self.logsumexp:
            self._close("log-sum-exp", found.logsumexp, expected.logsumexp)
        if self.unprobed:
            assert found.unprobed is not None
            assert expected.unprobed is not None
            scores = (reference.unpack_keys(one)[0] for one in (found.unprobed, expected.unprobed))
            self._close("score of an unprobed cluster", *scores)
        return checked

    def _final(self, device: torch.device) -> FinalLogits:
        if not self.sampled:
            return PLAIN
        positions = torch.arange(self.batch, dtype=torch.int64, device=device)
        return FinalLogits(0.0, _TEMPERATURE, GumbelNoise(_SEED, positions))

    def _final_logit(self, device: torch.device) -> FinalLogit | None:
        """Of a logit and its rounding the final logit's, with the noise of its row and token."""
        noise = self._final(device).noise
        if noise is None:
            return None

        def final(row: int, token: int, logit: float, rounding: float) -> tuple[float, float]:
            ids = torch.full((self.batch, 1), token, device=device)
            drawn = float(gumbel(noise, ids)[row])
            slack = _LOG_TOLERANCE * (1 + abs(drawn))
            return logit / _TEMPERATURE + drawn, rounding / _TEMPERATURE + slack

        return final

    def _close(self, what: str, found: Tensor | None, expected: Tensor | None) -> None:
        assert found is not None
        assert expected is not None
        if not torch.allclose(found, expected, rtol=_LOG_TOLERANCE, atol=_LOG_TOLERANCE):
            worst = float((found - expected).abs().max())
            raise WrongResultError(f"{self.name}: {what} is off by {worst:.2e}")


def table_calls() -> list[Call]:
    """What decoding launches, for `resources.py`."""
    calls = []
    for batch in (1, 8, 64):
        calls += [Call(batch, launches=launches) for launches in (1, 2)]
        calls += [Call(batch, dense=True), Call(batch, dense=True, wide=True)]
    for launches in (1, 2):
        calls.append(Call(1, launches=launches, unprobed=True))
        calls.append(Call(1, launches=launches, k=4, logsumexp=True, unprobed=True))
    return [*calls, Call(1, dense=True, sampled=True)]


def checked_calls(batches: Sequence[int]) -> list[Call]:
    """What `check_gpu.py` compares with the reference: every kernel, at each batch."""
    calls = []
    for batch in batches:
        calls += [Call(batch, launches=launches) for launches in (1, 2)]
        for launches in (1, 2):
            every = Call(batch, launches=launches, k=4, logsumexp=True, unprobed=True)
            calls.append(every)
        calls += [
            Call(batch, dense=True),
            Call(batch, dense=True, k=4, logsumexp=True),
            Call(batch, dense=True, sampled=True),
        ]
    return [*calls, Call(batches[-1], dense=True, wide=True)]
