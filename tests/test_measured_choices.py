"""Measurements kept in the cache: found by what they are of, added to by many, never in the way."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from flashhead_dist.errors import UserError
from flashhead_dist.measured_choices import (
    MeasuredChoices,
    describe_launches,
    keep_launches,
    measured_choices,
)
from flashhead_kernels import launch_choice

CASE = {"device": "a GPU", "shape": {"clusters": 512, "bits": None}, "batch": 1}


def test_an_entry_is_found_by_all_that_it_is_of(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "kept.json"
    kept = MeasuredChoices(path, "a")
    assert kept.find(CASE) is None
    assert kept.keep(CASE, {"us": 1.5}) is None
    assert kept.keep(CASE | {"batch": 2}, {"us": 2.5}) is None
    other = MeasuredChoices(path, "a")
    assert other.find(dict(CASE)) == {"us": 1.5}
    assert MeasuredChoices(path, "b").find(CASE) is None
    assert other.find(CASE | {"shape": {"clusters": 511, "bits": None}}) is None
    assert other.keep(CASE, {"us": 0.5}) is None
    assert (kept.find(CASE), kept.find(CASE | {"batch": 2})) == ({"us": 0.5}, {"us": 2.5})


def test_writers_at_once_lose_nothing(tmp_path: Path) -> None:
    """Without the lock one of two that read the same file overwrites the other's entry."""
    path = tmp_path / "kept.json"

    def write(number: int) -> str | None:
        return MeasuredChoices(path, "a").keep({"number": number}, {})

    with ThreadPoolExecutor(4) as writers:
        assert set(writers.map(write, range(40))) == {None}
    assert len(json.loads(path.read_text())["entries"]) == 40


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "kept.json"
    path.write_text('{"schema_version": 1, "entries": [{"kind": "a", "of": 3}]}')
    with pytest.raises(UserError, match=r"kept.json.*delete the file"):
        MeasuredChoices(path, "a").find(CASE)
    path.write_text('{"schema_version": 0, "entries": "as they were then"}')
    assert MeasuredChoices(path, "a").find(CASE) is None


def test_a_folder_that_cannot_be_written_is_a_reason_and_no_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    reason = MeasuredChoices(tmp_path / "file" / "kept.json", "a").keep(CASE, {})
    assert reason is not None
    assert "cannot be written" in reason


def test_launches_are_kept_in_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLASHHEAD_CACHE", str(tmp_path))
    monkeypatch.setattr(launch_choice, "table", launch_choice.LaunchTable())
    assert describe_launches() == {"choices": [], "not_kept": None}
    keep_launches()
    store = launch_choice.table.store
    assert isinstance(store, MeasuredChoices)
    store.keep(CASE, {"one_us": 1.0})
    assert (tmp_path / "measurements" / "choices.json").exists()
    assert measured_choices("launches").find(CASE) == {"one_us": 1.0}
    assert measured_choices("launches", remeasure=True).find(CASE) is None
    keep_launches(remeasure=True)
    assert launch_choice.table.store is store, "the first call decides"
