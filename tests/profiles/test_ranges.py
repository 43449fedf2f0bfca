"""Ranges: who hears of them, in what order, and that nobody pays where nobody listens."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from flashhead_profiles import ranges
from flashhead_profiles.ranges import NAMES, annotate, in_parts, listening, recording, split_message

BENCH = Path(__file__).parents[2] / "profiles" / "bench_ranges.py"


class Heard:
    """A listener that writes down what it is told."""

    def __init__(self) -> None:
        self.told: list[tuple[str, int | None] | str] = []

    def begin(self, message: str, payload: int | None) -> None:
        self.told.append((message, payload))

    def end(self) -> None:
        self.told.append("end")


def test_a_listener_hears_names_labels_and_payloads_in_order() -> None:
    heard = Heard()
    with listening(heard), annotate(ranges.STEP, 3), annotate(ranges.HEAD, 4, "flashhead"):
        pass
    with annotate(ranges.STEP):
        pass
    assert heard.told == [("step", 3), ("head:flashhead", 4), "end", "end"]


def test_parts_follow_each_other_and_the_last_one_stays() -> None:
    heard = Heard()
    with listening(heard), in_parts(ranges.CENTROIDS, ranges.CANDIDATES) as next_part:
        assert next_part is not None
        next_part()
        next_part()
    assert heard.told == [("head/centroids", None), "end", ("head/candidates", None), "end"]


def test_nobody_listens_and_every_range_is_the_same_object() -> None:
    """The likely mistake is a new object each time; parts must say that nobody asks for them."""
    assert annotate(ranges.STEP, 1) is annotate(ranges.HEAD, 2, "flashhead")
    with in_parts(ranges.CENTROIDS, ranges.CANDIDATES) as next_part:
        assert next_part is None


def test_an_exception_passes_a_range_that_nobody_hears_of() -> None:
    """A true value from __exit__ would swallow it."""
    with pytest.raises(ZeroDivisionError), annotate(ranges.STEP):
        raise ZeroDivisionError


def test_an_exception_ends_a_range_that_is_heard_of() -> None:
    heard = Heard()
    with pytest.raises(ZeroDivisionError), listening(heard), annotate(ranges.STEP):
        raise ZeroDivisionError
    assert heard.told == [("step", None), "end"]


def test_who_begins_to_listen_inside_a_range_is_not_told_of_its_end() -> None:
    heard = Heard()
    with annotate(ranges.STEP), listening(Heard()):
        outer = annotate(ranges.BODY)
        with outer:
            inner = listening(heard)
            inner.__enter__()
    inner.__exit__(None, None, None)
    assert heard.told == []


def test_another_name_is_refused_where_someone_listens() -> None:
    with listening(Heard()), pytest.raises(KeyError):
        annotate("head/centroid")


def test_messages_are_read_back() -> None:
    assert split_message("head:dense_local_max") == ("head", "dense_local_max")
    assert [split_message(name) for name in NAMES] == [(name, None) for name in NAMES]
    with pytest.raises(ValueError, match="aten::mm"):
        split_message("aten::mm")


def test_torch_profiler_sees_the_ranges_as_annotations() -> None:
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        with annotate(ranges.STEP, 1), annotate(ranges.HEAD, 1, "flashhead"):
            torch.ones(3).sum()
        with in_parts(ranges.CENTROIDS, ranges.CANDIDATES) as next_part:
            assert next_part is not None
            next_part()
    seen = {event.name: event for event in profiled.events() if split_or_none(event.name)}
    assert set(seen) == {"step", "head:flashhead", "head/centroids", "head/candidates"}
    assert all(event.is_user_annotation for event in seen.values())
    inner, outer = seen["head:flashhead"].time_range, seen["step"].time_range
    assert outer.start <= inner.start <= inner.end <= outer.end


def split_or_none(message: str) -> bool:
    try:
        return bool(split_message(message))
    except ValueError:
        return False


def test_a_recorder_measures_ranges_inside_ranges() -> None:
    with recording() as recorder:
        with annotate(ranges.STEP, 7), in_parts(ranges.CENTROIDS, ranges.CANDIDATES) as next_part:
            assert next_part is not None
            next_part()
        spans = recorder.take()
        assert recorder.take() == []
    assert [(s.name, s.payload, s.depth) for s in spans] == [
        ("step", 7, 0),
        ("head/centroids", None, 1),
        ("head/candidates", None, 1),
    ]
    step, *parts = spans
    assert step.start_us == 0
    assert sum(part.duration_us for part in parts) <= step.duration_us
    assert parts[0].start_us + parts[0].duration_us <= parts[1].start_us


def test_an_open_range_is_not_taken() -> None:
    with recording() as recorder, annotate(ranges.STEP), pytest.raises(RuntimeError, match="step"):
        recorder.take()


def test_the_benchmark_says_what_a_step_costs() -> None:
    """How much it is depends on the machine; `make bench-ranges` says it on a quiet one."""
    done = subprocess.run([sys.executable, BENCH, "--quick"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "nobody listens" in done.stdout
    assert " us" in done.stdout
