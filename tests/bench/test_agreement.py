"""Agreement by source, and a choice of states that leaves no source out."""

from __future__ import annotations

import pytest
import torch

from flashhead_dist.bench.agreement import spread_over_sources, top1_agreement

SOURCES = ("English", "Yoruba", "code")


def test_agreement_overall_and_at_its_worst() -> None:
    dense = torch.arange(10)
    found = dense.clone()
    found[[7, 8]] = -1
    source_ids = torch.tensor([0] * 6 + [1] * 4)
    agreement = top1_agreement(found, dense, source_ids, SOURCES)
    assert agreement.overall == pytest.approx(0.8)
    assert (agreement.worst, agreement.worst_source) == (0.5, "Yoruba")
    assert (agreement.num_worst_states, agreement.num_states) == (4, 10)


def test_agreement_of_nothing_is_refused() -> None:
    nothing = torch.empty(0, dtype=torch.int64)
    with pytest.raises(ValueError, match="at least one"):
        top1_agreement(nothing, nothing, nothing, SOURCES)


def test_few_states_come_from_every_source() -> None:
    source_ids = torch.tensor([0] * 100 + [1] * 3 + [2] * 50)
    chosen = spread_over_sources(source_ids, 12)
    assert source_ids[chosen].bincount().tolist() == [5, 3, 4]
    assert chosen.tolist() == sorted(set(chosen.tolist()))


def test_all_states_are_taken_where_there_are_few() -> None:
    assert spread_over_sources(torch.tensor([1, 0, 1]), 10).tolist() == [0, 1, 2]
