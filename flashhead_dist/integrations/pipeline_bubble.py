"""Idle time of pipeline stages (the bubble): by formula, and by replaying measured compute.

Letters: p stages, m micro-batches, n steps (tokens) of each.

Two schedules. *Flushed*: a step of all micro-batches is finished before the next begins, as in
training and in DeepSpeed's `eval_batch`; the bubble is the (p - 1) / (m + p - 1) of GPipe
(https://arxiv.org/abs/1811.06965, section 2.3), at every step. *Continuous*: a micro-batch's next
step begins as soon as its token is known, so that the pipeline fills and drains once a run.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field


def flushed_bubble(pp_size: int, num_micro_batches: int) -> float:
    """Idle share of p equal stages that are flushed after every step: (p - 1) / (m + p - 1)."""
    return (pp_size - 1) / (num_micro_batches + pp_size - 1)


def continuous_bubble(pp_size: int, num_micro_batches: int, num_steps: int) -> float:
    """Idle share of p equal stages over n steps of m micro-batches, filling and draining included.

    A token comes back after p slots, or after m where there are more micro-batches than stages, so
    the run takes `max(m, p) (n - 1) + m + p - 1` slots and each stage works in `m n` of them. For
    large n that is 0 where m >= p, else 1 - m / p.
    """
    slots = max(num_micro_batches, pp_size) * (num_steps - 1) + num_micro_batches + pp_size - 1
    return 1 - num_micro_batches * num_steps / slots


@dataclass
class StageTimes:
    """Seconds of one stage over one run, by its own clock.

    compute_s: of each micro-batch step in order, head and checks included; micro_batches: whose
    step it was. wait_s: for hidden states and tokens of other stages, their transfer included.
    total_s: from a common start until the last token was known.
    """

    compute_s: list[float] = field(default_factory=list)
    micro_batches: list[int] = field(default_factory=list)
    wait_s: float = 0.0
    total_s: float = 0.0

    @property
    def busy_s(self) -> float:
        """Sum of `compute_s`."""
        return sum(self.compute_s)

    @property
    def idle_share(self) -> float:
        """1 - busy / total: waiting, and the little spent on bookkeeping and sends."""
        return 1 - self.busy_s / self.total_s


def measured_bubble(stages: Sequence[StageTimes]) -> float:
    """Mean idle share of the stages."""
    return sum(stage.idle_share for stage in stages) / len(stages)


def ideal_bubble(stages: Sequence[StageTimes], *, flushed: bool) -> float:
    """Mean idle share of the measured compute if messages took no time.

    The reference for a measured bubble where the stages are unequal.
    """
    total_s = replay([stage.compute_s for stage in stages], stages[0].micro_batches, flushed)
    return 1 - sum(stage.busy_s for stage in stages) / (len(stages) * total_s)


def replay(
    compute_s: Sequence[Sequence[float]], micro_batches: Sequence[int], flushed: bool
) -> float:
    """End time of the last stage, if stage s takes `compute_s[s][i]` for the i-th micro-batch step.

    micro_batches: whose step the i-th is; ascending within a round over all that still run. A step
    starts when its stage is free, the stage before has done it, and, at the first stage, that
    micro-batch's step before has ended; flushed: all steps of earlier rounds have.
    """
    free_s = [0.0] * len(compute_s)
    known_s: dict[int, float] = {}
    round_start_s = 0.0
    for i, micro_batch in enumerate(micro_batches):
        if i and micro_batch <= micro_batches[i - 1]:
            round_start_s = free_s[-1]
        ready_s = round_start_s if flushed else known_s.get(micro_batch, 0.0)
        for stage, times in enumerate(compute_s):
            ready_s = max(ready_s, free_s[stage]) + times[i]
            free_s[stage] = ready_s
        known_s[micro_batch] = ready_s
    return free_s[-1]
