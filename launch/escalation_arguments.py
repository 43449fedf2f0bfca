"""The threshold of flashhead_escalate on a command line: which rows look again, and at how much."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from math import isfinite
from typing import Any

from flashhead_dist.errors import UserError
from flashhead_dist.heads.flashhead_escalate import Escalation, FlashHeadEscalate


def add_escalation(group: Any) -> None:
    """Add --escalate-below and --escalate-to to a parser or a group of one."""
    group.add_argument(
        "--escalate-below",
        type=float,
        metavar="LOGITS",
        help=f"{FlashHeadEscalate.name} looks again at a row whose best candidate's logit leads "
        "the best unprobed cluster's score by less; 0 is cautious, 1e9 takes every row (default: "
        "the index's own)",
    )
    group.add_argument(
        "--escalate-to",
        type=int,
        metavar="P",
        help="clusters probed in that second look (default with --escalate-below: every token)",
    )


def escalation_of(arguments: argparse.Namespace, heads: Sequence[str] | None) -> Escalation | None:
    """What was asked for; None for the index's own. heads: those of the run, None for all.

    Raises:
        UserError: a threshold that is not finite or that no head has use for, fewer than one probe.
    """
    below, to = arguments.escalate_below, arguments.escalate_to
    if below is None and to is None:
        return None
    given = "--escalate-to" if below is None else "--escalate-below"
    if heads is not None and FlashHeadEscalate.name not in heads:
        raise UserError(
            f"{given} is for {FlashHeadEscalate.name}, which is not among {', '.join(heads)}: name "
            f"it as well, or leave the option out"
        )
    if below is None:
        raise UserError(f"--escalate-to {to} needs a threshold: give --escalate-below too")
    if not isfinite(below):
        raise UserError(f"--escalate-below is {below}: give a finite number of logits, as 0")
    if to is not None and to < 1:
        raise UserError(f"--escalate-to is {to}: give 1 or more")
    return Escalation(margin=below, num_probes=to)
