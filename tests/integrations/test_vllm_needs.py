"""What a request needs of its row, and what the plugin refuses; vLLM itself is not needed here."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from flashhead_dist.errors import UserError
from flashhead_dist.integrations.vllm import options
from flashhead_dist.integrations.vllm.needs import REASONS, RequestNeed, Rest, request_need
from flashhead_dist.integrations.vllm.options import (
    FlashHeadOptions,
    options_of,
    refuse,
    unsupported_version,
)

USUAL: dict[str, Any] = {
    "temperature": 0.0,
    "logprobs": None,
    "prompt_logprobs": None,
    "logprob_token_ids": None,
    "allowed_token_ids": None,
    "structured_outputs": None,
    "logit_bias": None,
    "bad_words": None,
    "min_tokens": 0,
    "top_k": 0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "repetition_penalty": 1.0,
    "thinking_token_budget": None,
}


def need(output: list[int] | None = None, **changed: Any) -> RequestNeed:
    parameters = SimpleNamespace(**{**USUAL, **changed})
    return request_need(parameters, [] if output is None else output, 1000)


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"allowed_token_ids": [1]}, "allowed_token_ids"),
        ({"structured_outputs": object()}, "structured_outputs"),
        ({"logit_bias": {5: -3.0, 6: 0.5}}, "logit_bias"),
        ({"logprobs": -1}, "logprobs"),
        ({"logprobs": 1001}, "logprobs"),
        ({"logprob_token_ids": [4]}, "logprobs"),
        ({"top_k": 1001, "temperature": 1.0}, "top_k"),
        ({"presence_penalty": -0.1}, "raised_penalties"),
        ({"frequency_penalty": -0.1}, "raised_penalties"),
        ({"repetition_penalty": 0.9}, "raised_penalties"),
        ({"thinking_token_budget": 3}, "thinking_budget"),
        ({"prompt_logprobs": 0}, "prompt_logprobs"),
    ],
)
def test_what_may_raise_an_unscored_token_needs_every_logit(
    changed: dict[str, Any], reason: str
) -> None:
    assert need(**changed).dense == reason
    assert reason in REASONS


@pytest.mark.parametrize(
    "changed",
    [
        {"logit_bias": {5: -3.0}},
        {"logprobs": 1000},
        {"logprobs": 0},
        {"top_k": 1000, "temperature": 1.0},
        {"top_k": 5000},
        {"presence_penalty": 2.0, "frequency_penalty": 2.0, "repetition_penalty": 1.5},
    ],
)
def test_what_only_lowers_logits_is_served(changed: dict[str, Any]) -> None:
    assert need(**changed).dense is None


def test_prompt_logprobs_need_every_logit_until_the_first_output() -> None:
    """Fails where the whole request stays dense: vLLM lets the list grow in place."""
    output: list[int] = []
    asked = need(output, prompt_logprobs=1)
    assert asked.dense == "prompt_logprobs"
    output.append(7)
    assert asked.dense is None


@pytest.mark.parametrize(
    "changed",
    [
        {"logit_bias": {5: -3.0}},
        {"bad_words": ["x"]},
        {"min_tokens": 2},
        {"presence_penalty": 1.0},
        {"frequency_penalty": 1.0},
        {"repetition_penalty": 1.1},
    ],
)
def test_greedy_rows_that_are_lowered_hold_all_candidates(changed: dict[str, Any]) -> None:
    """Fails where the best token alone is given, and stays the best once it is lowered."""
    assert need().row.best_only
    row = need(**changed).row
    assert not row.best_only
    assert row.rest is Rest.NOTHING


def test_rows_of_which_probabilities_are_asked_hold_all_mass() -> None:
    assert need(logprobs=1).row.rest is Rest.EVEN
    drawn = need(temperature=0.7, logprobs=1).row
    assert (drawn.rest, drawn.temperature) == (Rest.CLUSTERS, 0.7)


def config(tmp_path: Path, **changed: Any) -> Any:
    model = SimpleNamespace(
        model=str(tmp_path),
        runner_type="generate",
        logits_processors=None,
        get_vocab_size=lambda: 100,
        get_hidden_size=lambda: 8,
    )
    usual = {
        "additional_config": {},
        "model_config": model,
        "use_v2_model_runner": False,
        "speculative_config": None,
        "lora_config": None,
        "parallel_config": SimpleNamespace(pipeline_parallel_size=1),
        "load_config": SimpleNamespace(load_format="auto"),
    }
    return SimpleNamespace(**{**usual, **changed})


MANIFEST: Any = SimpleNamespace(vocab_size=100, hidden_size=8, model_name="another")


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"use_v2_model_runner": True}, "VLLM_USE_V2_MODEL_RUNNER=0"),
        ({"speculative_config": SimpleNamespace(method="eagle")}, "speculative decoding"),
        ({"lora_config": object()}, "LoRA"),
        ({"parallel_config": SimpleNamespace(pipeline_parallel_size=2)}, "pipeline"),
        ({"load_config": SimpleNamespace(load_format="dummy")}, "dummy"),
    ],
)
def test_what_is_not_served_is_refused_with_a_reason(
    tmp_path: Path, changed: dict[str, Any], words: str
) -> None:
    refuse(config(tmp_path), MANIFEST, "0.32.0")
    with pytest.raises(UserError, match=words):
        refuse(config(tmp_path, **changed), MANIFEST, "0.32.0")


def test_other_logits_processors_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = config(tmp_path)
    asked.model_config.logits_processors = ["some.module:Processor"]
    with pytest.raises(UserError, match=r"some\.module:Processor"):
        refuse(asked, MANIFEST, "0.32.0")
    installed = SimpleNamespace(name="theirs")
    monkeypatch.setattr(options, "entry_points", lambda group: [installed])
    with pytest.raises(UserError, match="theirs"):
        refuse(config(tmp_path), MANIFEST, "0.32.0")


def test_an_index_of_another_shape_is_refused(tmp_path: Path) -> None:
    asked = config(tmp_path)
    asked.model_config.get_vocab_size = lambda: 101
    with pytest.raises(UserError, match="101 of 8"):
        refuse(asked, MANIFEST, "0.32.0")


@pytest.mark.parametrize("version", ["0.32.0", "0.32.7", "0.32.1rc1+cpu"])
def test_the_versions_that_are_supported(version: str) -> None:
    assert unsupported_version(version) is None


@pytest.mark.parametrize("version", ["0.31.9", "0.33.0", "1.32.0", "dev"])
def test_other_versions_are_named(version: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=version):
        refuse(config(tmp_path), MANIFEST, version)


def test_off_unless_asked_for(tmp_path: Path) -> None:
    assert options_of(config(tmp_path)) is None
    assert options_of(config(tmp_path, additional_config={"other": 1})) is None
    (tmp_path / "flashhead").mkdir()
    found = options_of(config(tmp_path))
    assert found == FlashHeadOptions(index=tmp_path / "flashhead")
    assert options_of(config(tmp_path, additional_config={"flashhead": False})) is None
    asked = config(tmp_path, additional_config={"flashhead": {"index": "x", "num_probes": 5}})
    assert options_of(asked) == FlashHeadOptions(index=Path("x"), num_probes=5)


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        (True, "not understood"),
        ({}, "no index folder"),
        ({"index": "x", "probes": 3}, "'probes'"),
        ({"index": "x", "num_probes": "many"}, "'many'"),
        ({"index": "x", "alpha": "much"}, "'much'"),
        ({"index": "x", "crossover": 0}, "crossover"),
        ({"index": "x", "crossover": "often"}, "'often'"),
    ],
)
def test_options_that_make_no_sense_are_refused(asked: Any, words: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=words):
        options_of(config(tmp_path, additional_config={"flashhead": asked}))
