"""launch/evaluate.py tasks on Gemma-3-270M: two problems after eight worked examples."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.launch.ground import LAUNCH

pytestmark = [pytest.mark.real, pytest.mark.slow, pytest.mark.timeout(900)]
DENSE, CHECKED = "dense_local_max", "flashhead --lossless 8"
PROBLEMS = [
    ("Nia has 4 pens and buys 3 boxes of 5 pens each. How many pens has she now?", 19),
    ("A train of 6 coaches carries 40 people in each. How many people does it carry?", 240),
]


def test_answers_are_sums_and_checked_texts_the_dense_heads(tmp_path: Path) -> None:
    folder = tmp_path / "data" / "gsm8k"
    folder.mkdir(parents=True)
    lines = [{"question": question, "answer": f"#### {number}"} for question, number in PROBLEMS]
    (folder / "test.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    command = [sys.executable, str(LAUNCH / "evaluate.py"), "tasks", "--tasks", "gsm8k"]
    options = ["--data", str(tmp_path / "data"), "--out", str(tmp_path / "out"), "--json"]
    more = ["--lossless", "8", "--max-new-tokens", "96"]
    done = subprocess.run([*command, *options, *more], capture_output=True, text=True, timeout=800)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["rows"][1]["identical_texts"] == 1
    records = [json.loads(line) for line in (tmp_path / "out/records.jsonl").open()]
    assert len(records) == 2
    for record in records:
        answer = record["answers"][DENSE]
        assert record["answers"][CHECKED]["texts"] == answer["texts"]
        # A base model that has seen eight examples follows their form, right or wrong.
        assert answer["final"] is not None
        assert answer["finish_reasons"] == ["stop"]
