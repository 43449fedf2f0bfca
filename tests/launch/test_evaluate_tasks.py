"""launch/evaluate.py tasks: records and figures, going on after an end, and what it refuses."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from flashhead_dist.decode.engine import Engine
from flashhead_dist.evaluate.tasks.questions import MtBench
from flashhead_dist.index import load_manifest
from flashhead_dist.models import open_model
from tests.launch.ground import LAUNCH, build_small
from tests.launch.scripts import load_script
from tests.launch.small_llama import save_small_llama

DENSE, RETRIEVED, CHECKED = "dense_local_max", "flashhead", "flashhead --lossless 5"
QUESTIONS = ["abab?!", "What is it?", "Say something, and then some more of it.", "1 and 1?"]
SMALL = ("--tasks", "mt_bench", "--max-new-tokens", "24", "--batch-size", "3")


@pytest.fixture(scope="module")
def evaluate() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(LAUNCH))
        yield load_script("evaluate")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[str]]:
    """Options that name a small model, an index of few probes, and data sets of a few items."""
    scratch = tmp_path_factory.mktemp("tasks")
    save_small_llama(scratch / "model", context=4096)
    data = scratch / "data"
    write_lines(data / "mt_bench", [{"turns": [q, f"{q} Again."]} for q in QUESTIONS])
    sums = [{"question": f"What is {i} + 1?", "answer": f"#### {i + 1}"} for i in range(3)]
    write_lines(data / "gsm8k", sums)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FLASHHEAD_CACHE", str(scratch / "cache"))
        model = open_model(str(scratch / "model"))
        index = build_small(model, scratch / "index", 4, num_probes=8)
        yield ["--model", str(scratch / "model"), "--index", str(index), "--data", str(data)]


def write_lines(folder: Path, lines: list[dict[str, Any]]) -> None:
    folder.mkdir(parents=True)
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "test.jsonl").write_text(text)


@pytest.fixture
def run(
    evaluate: ModuleType, files: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> Callable[..., dict[str, Any]]:
    """The command with --json to its end; the document, and the records under "records"."""

    def command(*arguments: str, out: str = "out") -> dict[str, Any]:
        capsys.readouterr()
        options = [*files, "--out", str(tmp_path / out), "--json", *arguments]
        assert evaluate.main(["tasks", *options]) == 0
        document: dict[str, Any] = json.loads(capsys.readouterr().out)
        lines = (tmp_path / out / "records.jsonl").read_text().splitlines()
        return document | {"records": [json.loads(line) for line in lines]}

    return command


def texts_of(found: dict[str, Any], label: str) -> dict[str, list[str]]:
    return {one["item"]: one["answers"][label]["texts"] for one in found["records"]}


def test_answers_of_all_heads_are_kept_and_compared(run: Callable[..., dict[str, Any]]) -> None:
    found = run(*SMALL, "--lossless", "5")
    dense, retrieved, checked = (texts_of(found, name) for name in (DENSE, RETRIEVED, CHECKED))
    assert len(found["records"]) == len(dense) == len(QUESTIONS)
    assert checked == dense
    # Few probes of random rows: or the line above would show nothing.
    assert retrieved != dense
    for record in found["records"]:
        own = record["answers"][RETRIEVED]
        same = own["texts"] == record["answers"][DENSE]["texts"]
        assert (own["first_difference"] is None) == same
        first, second = record["prompts"][RETRIEVED]
        assert first in second
        # Each head goes on from its own first answer.
        assert f"Assistant: {own['texts'][0].strip()}\nUser: " in second
    rows = {row["head"]: row for row in found["rows"]}
    assert list(rows) == [RETRIEVED, CHECKED]
    assert rows[CHECKED]["identical_texts"] == 1
    assert rows[RETRIEVED]["identical_texts"] < 1
    assert rows[RETRIEVED]["tokens_per_s"] > 0
    # No judge: a score would be made up.
    assert rows[RETRIEVED]["score"] is None


def test_heads_with_probes_and_an_index_of_their_own(
    run: Callable[..., dict[str, Any]], files: list[str], tmp_path: Path
) -> None:
    """Fails where all heads are built of one index, or one head stands for two of its name."""
    model = open_model(files[1])
    every = load_manifest(Path(files[3])).num_clusters
    index = build_small(model, tmp_path / "every", 4, num_probes=every)
    whole, many = f"flashhead_global@{index}", f"flashhead:{every}"
    found = run(*SMALL, "--head", f"flashhead,flashhead_escalate,{many},{whole}")
    labels = [DENSE, RETRIEVED, "flashhead_escalate", many, whole]
    assert list(found["records"][0]["answers"]) == labels
    dense = texts_of(found, DENSE)
    assert texts_of(found, many) == texts_of(found, whole) == dense
    assert texts_of(found, RETRIEVED) != dense
    assert found["settings"]["named_index_hashes"] == {str(index): load_manifest(index).index_hash}


def test_a_batch_answers_each_item_as_alone(run: Callable[..., dict[str, Any]]) -> None:
    together = run(*SMALL, out="together")
    alone = run(*SMALL, "--batch-size", "1", out="alone")
    for label in (DENSE, RETRIEVED):
        assert texts_of(together, label) == texts_of(alone, label)


def test_a_stop_string_ends_an_answer_and_its_decoding(
    run: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fails where texts are cut but decoded on, and where unchecked tokens end a text."""
    whole = run(*SMALL, "--lossless", "5", out="whole")
    stop = whole["records"][0]["answers"][DENSE]["texts"][0][4:6]
    monkeypatch.setattr(MtBench, "stops", (stop,))
    found = run(*SMALL, "--lossless", "5", out="cut")
    assert texts_of(found, CHECKED) == texts_of(found, DENSE)
    ended = 0
    for label in (DENSE, RETRIEVED, CHECKED):
        for before, after in zip(whole["records"], found["records"], strict=True):
            old, new = before["answers"][label], after["answers"][label]
            assert new["texts"][0] == old["texts"][0].partition(stop)[0]
            if new["texts"][0] != old["texts"][0]:
                assert new["num_tokens"] < old["num_tokens"]
                assert new["finish_reasons"][0] == "stop"
                ended += 1
    assert ended >= 2


def test_numbers_are_judged(run: Callable[..., dict[str, Any]]) -> None:
    found = run("--tasks", "gsm8k", "--max-new-tokens", "8")
    (row,) = found["rows"]
    assert (row["items"], row["scored"]) == (3, 3)
    for record in found["records"]:
        for answer in record["answers"].values():
            assert answer["correct"] == (answer["final"] == record["truth"])
        assert record["prompts"][DENSE][0].count("\nA:") == 9


def test_more_items_keep_what_is_finished(
    run: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    few = run(*SMALL, "--limit", "2")
    more = run(*SMALL, "--limit", "4")
    assert more["records"][:2] == few["records"]
    assert len(more["records"]) == 4

    def refuse(*_: Any) -> None:
        raise AssertionError("nothing is left to decode")

    monkeypatch.setattr(Engine, "load", refuse)
    again = run(*SMALL, "--limit", "4")
    assert again["rows"] == more["rows"]
    assert run(*SMALL, "--limit", "2")["rows"][0]["items"] == 2


def test_ctrl_c_keeps_finished_items_and_the_same_command_goes_on(
    run: Callable[..., dict[str, Any]],
    evaluate: ModuleType,
    files: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    whole = run(*SMALL, out="whole")
    decode, calls = Engine.decode, []

    def interrupt(self: Engine, *arguments: Any) -> Any:
        calls.append(arguments)
        # Two heads of two turns make the first batch; then the second one's first head is done.
        if len(calls) == 6:
            raise KeyboardInterrupt
        return decode(self, *arguments)

    monkeypatch.setattr(Engine, "decode", interrupt)
    options = [*files, *SMALL, "--out", str(tmp_path / "cut")]
    assert evaluate.main(["tasks", *options]) == 130
    said = capsys.readouterr().err
    assert "3 items are saved" in said
    assert "Traceback" not in said
    monkeypatch.setattr(Engine, "decode", decode)
    resumed = run(*SMALL, out="cut")
    assert len(resumed["records"]) == len(QUESTIONS)
    for label in (DENSE, RETRIEVED):
        assert texts_of(resumed, label) == texts_of(whole, label)


def test_a_folder_made_otherwise_is_not_added_to(
    run: Callable[..., dict[str, Any]],
    evaluate: ModuleType,
    files: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    options = [*files, *SMALL, "--out", str(tmp_path / "out"), "--num-probes", "4"]
    # A mistake in the first command leaves a folder, but nothing that could be mixed.
    assert evaluate.main(["tasks", *options, "--chat"]) == 2
    run(*SMALL, "--limit", "1")
    assert evaluate.main(["tasks", *options]) == 2
    assert "made with num_probes None, not 4: name another folder" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tasks", "gsm9k"], "there is no task named 'gsm9k': choose from gsm8k, "),
        (["--tasks", "mmlu_pro"], "mmlu_pro holds 0 .jsonl files: give --data a folder with one"),
        (["--head", "none"], "there is no head named 'none'"),
        (["--head", ","], "--head names none: choose from "),
        (["--head", "flashhead:few"], "'few' in flashhead:few is no number of probes"),
        (["--head", "flashhead@nowhere"], "nowhere"),
        (["--limit", "0"], "--limit is 0: give 1 or more"),
        (["--lossless", "-1"], "--lossless is -1: give 0 or more"),
        ([*SMALL, "--chat"], "has no chat template in its tokenizer: leave out --chat"),
        ([*SMALL, "--max-new-tokens", "5000"], "more than the model's context of 4096"),
        ([*SMALL, "--index", "nowhere"], "nowhere"),
    ],
)
def test_a_mistake_is_one_sentence(
    evaluate: ModuleType,
    files: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    assert evaluate.main(["tasks", *files, "--out", str(tmp_path / "out"), *arguments]) == 2
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(said) == 1
    assert message in said[0]
