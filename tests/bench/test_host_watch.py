"""A rank on another host that dies, stands still or cannot be reached ends the run with its name.

Ranks here are processes that are told that they are on different hosts; tests/topology/shaped has
hosts of their own.
"""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from flashhead_dist.bench.host_watch import LOST_AFTER_VARIABLE, Marks, Place, lost_after_s
from flashhead_dist.errors import UserError

# Without torch, whose import takes seconds; the store is a folder, and is lost with it.
RANK = """
import sys, time
from pathlib import Path
from flashhead_dist.errors import UserError
from flashhead_dist.bench import host_watch
from flashhead_dist.bench.host_watch import HostWatch, Place

host_watch._BEAT_S, host_watch._LINGER_S, host_watch._SUSPECT_AFTER_S = 0.2, 1.0, 1.0

class FolderStore:
    def __init__(self, folder):
        self.folder = folder
    def _path(self, key):
        if not self.folder.is_dir():
            raise RuntimeError("the store is lost")
        return self.folder / key.replace("/", "_")
    def set(self, key, value):
        part = self._path(key).with_suffix(f".{rank}.part")
        part.write_text(value)
        part.rename(self._path(key))
    def check(self, keys):
        while (self.folder / "stuck").exists():
            time.sleep(1)
        return all(self._path(key).exists() for key in keys)
    def get(self, key):
        return self._path(key).read_bytes()
    def multi_get(self, keys):
        return [self.get(key) for key in keys]

folder, rank, how = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
places = [Place("a", "north"), Place("b", "south"), Place("b", "south")]
watch = HostWatch(FolderStore(folder), rank, places, store_place="north (10.0.0.1)",
                  parting_words=lambda: " Look in runs/x.", silence=lambda: None, lost_after_s=2)
with watch:
    if how == "done" and rank == 2:
        pass
    elif how == "done":
        time.sleep(4)
    elif how == "mistake":
        time.sleep(0.5)
        raise UserError("not there")
    elif how == "broken link" and rank != 1:
        time.sleep(1)
        raise RuntimeError("connection closed by peer")
    elif how == "told" and rank == 2:
        watch.announce("rank 7 on south ended.")
        time.sleep(60)
    else:
        time.sleep(60)
"""

Start = Callable[[str], list[subprocess.Popen[str]]]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Start three ranks, two of them on the second host, and return once all of them watch."""
    running: list[subprocess.Popen[str]] = []
    (tmp_path / "store").mkdir()

    def launch(how: str) -> list[subprocess.Popen[str]]:
        for rank in range(3):
            command = [sys.executable, "-c", RANK, str(tmp_path / "store"), str(rank), how]
            running.append(subprocess.Popen(command, stderr=subprocess.PIPE, text=True))
        deadline = time.monotonic() + 60
        while not all((tmp_path / "store" / f"mark_{rank}").exists() for rank in range(3)):
            assert time.monotonic() < deadline, "the ranks do not start"
            time.sleep(0.02)
        time.sleep(0.5)  # by then every rank has seen the others' marks
        return running

    yield launch
    for process in running:
        process.kill()
        process.communicate()


def ends(processes: list[subprocess.Popen[str]]) -> list[tuple[int, list[str]]]:
    """Exit code and the errors said, of each."""
    found = []
    for process in processes:
        _, stderr = process.communicate(timeout=40)
        said = [line for line in stderr.splitlines() if line.startswith("error: ")]
        found.append((process.returncode, said))
    return found


@pytest.mark.parametrize("blow", [signal.SIGSTOP, signal.SIGKILL])
def test_a_silent_rank_is_named_once_on_each_host(start: Start, blow: signal.Signals) -> None:
    """Rank 2 of the second host: the first host's only rank finds out, and tells that host too."""
    ranks = start("stuck")
    ranks[2].send_signal(blow)
    (code, said), (other_code, other_said) = ends(ranks[:2])
    assert (code, other_code) == (1, 1)
    for sentences in (said, other_said):
        (sentence,) = sentences
        assert sentence.startswith("error: rank 2 on south gave no sign for ")
        assert sentence.endswith("so the run stops. Look in runs/x.")


def test_both_ranks_of_a_host_are_named_together(start: Start) -> None:
    ranks = start("stuck")
    for rank in ranks[1:]:
        rank.send_signal(signal.SIGSTOP)
    ((code, (sentence,)),) = ends(ranks[:1])
    assert code == 1
    assert sentence.startswith("error: ranks 1, 2 on south gave no sign")


@pytest.mark.parametrize(
    ("how", "sentence"), [("lost", "broke off"), ("stuck", "gave no sign for ")]
)
def test_a_lost_store_is_found_by_every_host(
    start: Start, tmp_path: Path, how: str, sentence: str
) -> None:
    """Its host may be gone, or may stand still with whoever asks it."""
    ranks = start("stuck")
    if how == "lost":
        (tmp_path / "store").rename(tmp_path / "gone")
    else:
        (tmp_path / "store" / "stuck").touch()
    (_, first), (_, second), (code, third) = ends(ranks)
    for said in (first, second):
        assert said[0].startswith(f"error: the run's store on north (10.0.0.1) {sentence}")
        assert len(said) == 1
    # The second rank of a host ends as silently as the first one speaks.
    assert (code, third) == (1, [])


def test_what_one_host_tells_is_what_all_say(start: Start) -> None:
    """A host on which a process died knows more than the others can."""
    ranks = start("told")
    for code, said in ends(ranks[:2]):
        assert code == 1
        assert said == ["error: rank 7 on south ended. Look in runs/x."]


def test_a_broken_connection_waits_for_the_name_of_who_broke_it(start: Start) -> None:
    """gloo's own error would end the rank first, with a traceback that names nobody."""
    ranks = start("broken link")
    ranks[1].send_signal(signal.SIGKILL)
    (code, said), _ = ends([ranks[0], ranks[2]])
    assert code == 1
    assert said[0].startswith("error: rank 1 on south gave no sign")


def test_who_is_done_is_not_missed(start: Start) -> None:
    ranks = start("done")
    assert ends(ranks) == [(0, []), (0, []), (0, [])]


def test_a_mistake_of_the_user_passes_through_at_once(start: Start) -> None:
    ranks = start("mistake")
    # Python's own end for what nobody caught: launch catches it above.
    assert ends(ranks) == [(1, [])] * 3


def test_silence_counts_from_the_last_change() -> None:
    marks = Marks([Place("a", "north"), Place("b", "south"), Place("c", "west")])
    marks.update({1: "1", 2: "1"}, 0.0)
    marks.update({1: "2", 2: "1"}, 5.0)
    assert marks.silent(3.0, 4.0) == {}
    assert marks.silent(6.0, 4.0) == {2: 6.0}
    # Who fell silent at most a beat and a half later is named too.
    assert marks.silent(8.0, 4.0) == {1: 3.0, 2: 8.0}
    assert marks.silent(7.4, 4.0) == {2: 7.4}
    assert marks.describe({1: 5.0, 2: 10.0}).startswith("rank 1 on south and rank 2 on west gave")
    # A time in which the observer stood still itself is nobody's silence.
    marks.forgive(7.0)
    assert marks.silent(10.0, 4.0) == {}
    marks.update({2: "done"}, 11.0)
    assert 2 not in marks.silent(100.0, 4.0)


@pytest.mark.parametrize("text", ["soon", "2.9", "nan", "inf", ""])
def test_a_patience_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(UserError, match=f"{LOST_AFTER_VARIABLE} is '{text}': give seconds"):
        lost_after_s({LOST_AFTER_VARIABLE: text})
    assert lost_after_s({}) == 60
    assert lost_after_s({LOST_AFTER_VARIABLE: "3"}) == 3
