"""Bytes a token that each variant's collectives carry, from DeepSpeed's communication log."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from flashhead_dist.decode.engine import Engine, Variant
from flashhead_dist.decode.sequences import DecodeState
from flashhead_dist.integrations.deepspeed import (
    HEAD_PREFIX,
    LoggedCollective,
    communication_log,
)

_STEPS = 4


@dataclass(frozen=True)
class Traffic:
    """Message bytes of this rank's collectives for a token of one sequence, prompt left out."""

    head_bytes_per_token: float
    body_bytes_per_token: float
    collectives: tuple[LoggedCollective, ...]

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def count_traffic(
    engine: Engine, variants: Sequence[Variant], prompt: list[int]
) -> dict[str, Traffic]:
    """Traffic by label: the log of a few more tokens less the log of the first one.

    A run of its own, unmeasured: the log's timers would be part of every step.
    """
    found = {}
    for variant in variants:
        if variant.check_every:
            continue
        logs = [_log(engine, variant, prompt, steps) for steps in (1, 1 + _STEPS)]
        sums = [_sums(log) for log in logs]
        head, body = ((more - less) / _STEPS for less, more in zip(*sums, strict=True))
        found[variant.label] = Traffic(head, body, tuple(logs[1]))
    return found


def _log(engine: Engine, variant: Variant, prompt: list[int], steps: int) -> list[LoggedCollective]:
    with communication_log() as log:
        engine.decode(variant, [DecodeState([prompt], max_new_tokens=steps)])
    return log


def _sums(log: Sequence[LoggedCollective]) -> tuple[int, int]:
    head = sum(item.total_bytes for item in log if item.name.startswith(HEAD_PREFIX))
    return head, sum(item.total_bytes for item in log) - head
