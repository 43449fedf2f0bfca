"""What `progress` writes to a log and to a terminal."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from flashhead_dist import progress as module
from flashhead_dist.progress import progress


class _Clock:
    now_s = 100.0

    def perf_counter(self) -> float:
        return self.now_s


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> _Clock:
    clock = _Clock()
    monkeypatch.setattr(module, "time", clock)
    return clock


def test_a_log_gets_a_line_soon_and_then_every_ten_seconds_with_the_time_left(
    clock: _Clock,
) -> None:
    log = io.StringIO()
    with progress("reading", total=40, unit="texts", console=Console(file=log)) as advance:
        for _ in range(40):
            clock.now_s += 4
            advance()
    lines = log.getvalue().splitlines()
    assert lines[0] == "reading: 1 of 40 texts, 4 s"
    assert lines[1] == "reading: 4 of 40 texts, 16 s, about 2 min left"
    assert len(lines) == 14


def test_every_stage_is_a_line_and_the_one_before_it_is_finished(clock: _Clock) -> None:
    log = io.StringIO()
    with progress("starting", total=4, console=Console(file=log)) as advance:
        advance.stage("load")
        clock.now_s += 10
        advance.stage("measure", weight=3)
        clock.now_s += 1
    assert log.getvalue().splitlines() == [
        "[0/4, 0 s] load",
        "[1/4, 10 s, about 30 s left] measure",
    ]


def test_a_terminal_gets_a_bar(clock: _Clock) -> None:
    terminal = io.StringIO()
    console = Console(file=terminal, force_terminal=True, width=100)
    with progress("reading", total=2, console=console) as advance:
        clock.now_s += 10
        advance()
    assert "about 10 s left" in terminal.getvalue()


def test_nothing_is_shown_where_it_is_not_visible(capsys: pytest.CaptureFixture[str]) -> None:
    with progress("reading", total=2, visible=False) as advance:
        advance()
        advance.stage("next")
    assert capsys.readouterr().err == ""
