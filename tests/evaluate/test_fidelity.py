"""The dense truth, a head's fidelity to it by source, and the command that prints it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from flashhead_dist.errors import UserError
from flashhead_dist.evaluate.fidelity import evaluate_fidelity
from flashhead_dist.evaluate.truth import DenseTruth, dense_truth
from flashhead_dist.heads.base import HeadOutput, Want
from flashhead_dist.heads.dense import DenseLocalMax
from flashhead_dist.heads.registry import HEADS
from flashhead_dist.models import ModelSource, open_model
from flashhead_dist.parallel import Steps, TensorParallel
from flashhead_dist.states import HiddenStates, save_hidden_states
from tests.launch.scripts import load_script

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def model(tied_model: Path) -> ModelSource:
    return open_model(str(tied_model))


@pytest.fixture(scope="module")
def hidden(model: ModelSource) -> HiddenStates:
    draw = torch.Generator().manual_seed(9)
    states = torch.cat(
        [
            model.read_rows(0, 30).float() / 4,
            0.4 * torch.randn(50, 64, generator=draw),
        ]
    ).to(torch.bfloat16)
    sources = (torch.arange(80) >= 30).long() * 2
    return HiddenStates(states, sources, ("easy", "unused", "hard"), "made for a test")


@pytest.fixture(scope="module")
def launch() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "launch"))
        yield load_script("evaluate")


def test_truth_is_brute_force_with_ties_to_the_smaller_id(
    model: ModelSource, hidden: HiddenStates
) -> None:
    truth = dense_truth(model, hidden.states, progress=False)
    logits = hidden.states.double() @ model.read_rows(0, 1013).double().T
    assert torch.allclose(truth.logsumexp.double(), logits.logsumexp(1), rtol=1e-6)
    # Equal rows have equal logits: a stable sort of the exact products gives the smaller id first.
    expected = logits.sort(dim=1, descending=True, stable=True)
    assert torch.equal(truth.token_ids, expected.indices[:, :10])
    assert torch.allclose(truth.logits.double(), expected.values[:, :10], rtol=1e-5)
    assert bool((truth.logits[:, 0] == truth.logits[:, 1]).any())


def test_truth_spans_chunks_of_the_vocabulary_and_of_the_states(
    model: ModelSource, hidden: HiddenStates, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    whole = dense_truth(model, hidden.states, progress=False)
    monkeypatch.setattr("flashhead_dist.evaluate.truth._ROWS", 100)
    monkeypatch.setattr("flashhead_dist.evaluate.truth._STATES", 32)
    pieces = dense_truth(model, hidden.states, cache_dir=tmp_path, progress=False)
    assert torch.equal(pieces.token_ids, whole.token_ids)
    assert torch.equal(pieces.logits, whole.logits)
    assert torch.allclose(pieces.logsumexp, whole.logsumexp, rtol=1e-6)


def test_truth_is_kept_by_weights_and_states(
    model: ModelSource,
    hidden: HiddenStates,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    first = dense_truth(model, hidden.states, cache_dir=tmp_path, progress=False)

    def fail(*_: Any) -> DenseTruth:
        raise AssertionError("computed again")

    monkeypatch.setattr("flashhead_dist.evaluate.truth._compute", fail)
    again = dense_truth(model, hidden.states, cache_dir=tmp_path, progress=False)
    assert torch.equal(again.logits, first.logits)
    with pytest.raises(AssertionError, match="computed again"):
        dense_truth(model, hidden.states[1:], cache_dir=tmp_path, progress=False)
    (kept,) = tmp_path.glob("truth/*.safetensors")
    kept.write_bytes(kept.read_bytes()[:-1])
    with pytest.raises(UserError, match=f"{kept} is damaged .* delete it"):
        dense_truth(model, hidden.states, cache_dir=tmp_path, progress=False)


class _Rigged(DenseLocalMax):
    """Gives the truth, but misses the first token of states in `wrong`."""

    def __init__(self, truth: DenseTruth, wrong: set[int]) -> None:
        super().__init__(TensorParallel.single(), torch.zeros(1013, 64, dtype=torch.bfloat16), 1013)
        self.truth, self.wrong, self.served = truth, wrong, 0

    def read_bytes_per_step(self, batch_size: int) -> int:
        return 1013 * 64 // 2

    def steps(self, hidden_states: torch.Tensor, want: Want) -> Steps[HeadOutput]:
        yield from ()
        part = slice(self.served, self.served + len(hidden_states))
        ids = self.truth.token_ids[part].clone()
        for row in range(len(ids)):
            if self.served + row in self.wrong:
                ids[row] = torch.cat([ids[row, 1:], torch.tensor([-1])])
        self.served += len(hidden_states)
        logsumexp = self.truth.logsumexp[part]
        return HeadOutput(ids, self.truth.logits[part], logsumexp + 0.25, logsumexp + 0.5**0.5 - 1)


def test_fidelity_counts_by_source_and_names_the_worst(
    model: ModelSource, hidden: HiddenStates
) -> None:
    truth = dense_truth(model, hidden.states, progress=False)
    # One of 30 easy states, five of 50 hard ones; 80 states span two batches.
    found = evaluate_fidelity(
        _Rigged(truth, {3, 30, 40, 50, 60, 79}), hidden, truth, progress=False
    )
    assert found.top1_agreement == pytest.approx(74 / 80)
    assert found.top1_agreement_by_source == {
        "easy": pytest.approx(29 / 30),
        "hard": pytest.approx(45 / 50),
    }
    assert found.num_states_by_source == {"easy": 30, "hard": 50}
    assert (found.worst_source, found.top1_agreement_worst_source) == ("hard", pytest.approx(0.9))
    assert found.top10_containment == pytest.approx(1 - 6 / 800)
    assert found.logz_error == pytest.approx(0.25, abs=1e-5)
    assert found.logz_error_p99 == pytest.approx(0.25, abs=1e-5)
    assert found.candidate_mass == pytest.approx(2.718281828 ** (0.5**0.5 - 1), rel=1e-5)
    assert found.bytes_share == pytest.approx(0.25, rel=1e-3)
    assert (found.num_states, found.tp_size, found.emulated) == (80, 1, False)


def test_states_that_are_not_finite_are_named_by_row_and_source(
    model: ModelSource, hidden: HiddenStates
) -> None:
    truth = dense_truth(model, hidden.states, progress=False)
    states = hidden.states.clone()
    states[41, 7] = float("inf")
    bad = HiddenStates(states, hidden.source_ids, hidden.sources, "states.safetensors")
    with pytest.raises(UserError, match=r"states\.safetensors .* row 41, of source hard"):
        evaluate_fidelity(_Rigged(truth, set()), bad, truth, progress=False)


KEYS = {
    "top1_agreement", "top1_agreement_by_source", "worst_source", "top10_containment",
    "candidate_mass", "logz_error", "bytes_share", "emulated", "tp_size", "head", "index_hash",
}  # fmt: skip


@pytest.mark.parametrize("name", HEADS)
def test_the_command_gives_one_json_document_for_any_head(
    launch: ModuleType,
    tied_model: Path,
    tied_index: Path,
    hidden: HiddenStates,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    name: str,
) -> None:
    file = tmp_path / "states.safetensors"
    save_hidden_states(file, hidden)
    code = launch.main(
        [
            "fidelity", "--model", str(tied_model), "--index", str(tied_index),
            "--hidden-states", str(file), "--head", name, "--tp-size", "3", "--json",
        ]
    )  # fmt: skip
    document = json.loads(capsys.readouterr().out)
    assert code == 0
    assert set(document) >= KEYS
    assert (document["head"], document["tp_size"], document["emulated"]) == (name, 3, True)
    assert document["num_states"] == 80
    assert len(document["index_hash"]) == 64
    if name == "dense_local_max":
        assert document["top1_agreement"] == document["top10_containment"] == 1
        assert document["bytes_share"] == 1
    else:
        assert 0.3 < document["top1_agreement"] <= 1
    assert (document["candidate_mass"] == 1) == name.startswith("dense")
    assert (document["logz_error"] is None) == (name == "faiss_ivf")


def test_the_table_names_the_worst_source_first_and_says_emulated(
    launch: ModuleType,
    tied_model: Path,
    tied_index: Path,
    hidden: HiddenStates,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file = tmp_path / "states.safetensors"
    save_hidden_states(file, hidden)
    common = ["--model", str(tied_model), "--index", str(tied_index), "--hidden-states", str(file)]
    assert launch.main(["fidelity", *common, "--num-probes", "8"]) == 0
    printed = capsys.readouterr().out
    assert "emulated" in printed
    assert printed.index("hard") < printed.index("easy")


def test_mistakes_end_in_one_sentence_and_code_2(
    launch: ModuleType, tied_model: Path, tied_index: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    common = ["fidelity", "--model", str(tied_model), "--index", str(tied_index)]
    wrong = torch.zeros(3, 32)
    narrow = tied_model.parent / "narrow.safetensors"
    save_hidden_states(narrow, HiddenStates(wrong, torch.zeros(3).long(), ("all",), "narrow"))
    cases = {
        "nosuch": [*common, "--head", "nosuch"],
        "cuda:9": [*common, "--device", "cuda:9"],
        "absent.safetensors": [*common, "--hidden-states", "absent.safetensors"],
        "no_index": ["fidelity", "--index", "no_index"],
        "tp_size must be at least 1": [*common, "--tp-size", "0"],
        "8 probing groups": [*common, "--tp-size", "9"],
        "999": [*common, "--num-probes", "999"],
        "32": [*common, "--hidden-states", str(narrow)],
    }
    for value, arguments in cases.items():
        assert launch.main(arguments) == 2
        captured = capsys.readouterr()
        assert captured.out == ""
        assert captured.err.startswith("error: ")
        assert value in captured.err
        assert "Traceback" not in captured.err
        assert captured.err.count("\n") == 1
