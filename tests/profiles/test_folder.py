"""A folder of reports: told apart by rank and capture, whichever tool wrote them."""

from __future__ import annotations

from pathlib import Path

import pytest

from flashhead_profiles.readers import _capture_of, read_profile
from flashhead_profiles.traces import TraceError
from tests.profiles.test_nsys import write


@pytest.mark.parametrize(
    ("name", "rank", "capture"),
    [
        ("tp2_1_rank0.json", 0, "tp2_1"),
        ("tp2_1_rank10.json.gz", 10, "tp2_1"),
        ("rank0.2.sqlite", 0, "2"),
        ("rank_3.sqlite", 3, ""),
    ],
)
def test_captures_are_named_by_what_is_not_the_rank(name: str, rank: int, capture: str) -> None:
    assert _capture_of(Path(name), rank) == capture


def test_captures_of_one_rank_are_kept_apart(tmp_path: Path) -> None:
    """As nsys names them with --capture-range-end=repeat."""
    for number in (1, 2):
        write(tmp_path / f"rank0.{number}.sqlite")
    timeline = read_profile(tmp_path).timeline
    assert timeline is not None
    assert timeline.groupby("capture").size().to_dict() == {"1": 3, "2": 3}
    assert read_profile(tmp_path).counters is None


def test_a_folder_without_reports_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match="holds no report"):
        read_profile(tmp_path)
    with pytest.raises(TraceError, match="there is no folder"):
        read_profile(tmp_path / "none")
