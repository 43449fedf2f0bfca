"""The short table, and what each further rank saves and adds."""

from __future__ import annotations

from typing import Any

import pandas as pd
import pytest

from flashhead_dist.report.overview import best_size, rank_steps, sentences, short_table
from flashhead_dist.report.runs import records_frame
from tests.report.run_folders import changed, golden


def with_steps(times: dict[int, tuple[float, float]]) -> pd.DataFrame:
    """flashhead's (compute, median) by tp_size at every batch size, spread by 1 %."""

    def change(record: Any) -> dict[str, Any]:
        compute, median = times[record.tp_size]
        ends = {"p10_us": median * 0.99, "p90_us": median * 1.01} if record.measured else {}
        found: dict[str, Any] = {"compute_us": compute, "median_us": median} | ends
        return found if record.head == "flashhead" else {}

    return records_frame(changed(change))


def test_the_short_table_has_a_row_a_head_and_a_column_a_tp_size() -> None:
    table = short_table(records_frame(golden()), 1)
    assert list(table) == ["head", "tp 1", "tp 2", "tp 8 (PROJECTED)"]
    assert table["head"].tolist() == ["dense_gather", "dense_local_max", "flashhead"]
    assert table.iloc[2].tolist() == ["flashhead", "4,000 (10.0×)", "2,150 (9.4×)", "1,550 (3.9×)"]


def test_an_unknown_latency_is_a_dash() -> None:
    unknown = changed(lambda r: {} if r.measured else {"median_us": None})
    table = short_table(records_frame(unknown), 1)
    assert set(table["tp 8 (PROJECTED)"]) == {"–"}


def test_what_is_saved_and_added_sums_to_the_steps() -> None:
    steps = rank_steps(with_steps({1: (1000, 1000), 2: (600, 700), 8: (200, 800)}), "flashhead", 1)
    assert steps.drop(columns=["before_us", "after_us"]).to_dict("list") == {
        "before": [1, 2],
        "after": [2, 8],
        "saved_us": [400, 400],
        "added_us": [100, 500],
        "projected": [False, True],
        "within_noise": [False, False],
    }


def test_steps_that_overlap_are_within_noise() -> None:
    frame = with_steps({1: (1000, 1000), 2: (600, 1001), 8: (0, 0)})
    assert rank_steps(frame, "flashhead", 1)["within_noise"].tolist() == [True, False]


@pytest.mark.parametrize(
    ("times", "best"),
    [
        ({1: (1000, 1000), 2: (600, 700), 8: (200, 800)}, 2),
        ({1: (1000, 1000), 2: (600, 700), 8: (200, 300)}, 8),
        ({1: (1000, 1000), 2: (600, 1000), 8: (200, 1300)}, 1),
        # Slower on two ranks, and less slow on eight: a search for the first fall fails.
        ({1: (1000, 1000), 2: (600, 1400), 8: (200, 1100)}, 1),
    ],
)
def test_the_best_size_has_the_shortest_step(
    times: dict[int, tuple[float, float]], best: int
) -> None:
    assert best_size(with_steps(times), "flashhead", 1) == best


def test_sentences_hold_the_figures_and_their_kind() -> None:
    frame = with_steps({1: (1000, 1000), 2: (600, 700), 8: (200, 800)})
    text = " ".join(sentences(frame, 1))
    assert "compute falls by 400 µs" in text
    assert "add 500 µs (PROJECTED)" in text
    assert "shortest at tp 2" in text
    assert "99.60 %" in text


def test_a_shortest_step_that_is_projected_says_so() -> None:
    text = " ".join(sentences(records_frame(golden()), 1))
    assert "shortest at tp 8 (PROJECTED)" in text


def test_sentences_of_a_head_that_was_not_measured_claim_nothing() -> None:
    frame = records_frame([r for r in golden() if r.head == "dense_gather"])
    assert sentences(frame, 1) == ["flashhead was not measured at batch 1."]
