"""The plugin in an engine: off it is not there, exact where all is scored, refused in time."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.vllm.servers import NEEDS_VLLM
from tests.vllm.tiny import ALL_CLUSTERS, answers, make

pytestmark = NEEDS_VLLM

PROMPTS = [[1, 5, 9, 200, 31], [1, 700, 701], [1, 44, 44, 44, 44, 44, 44]]
PLAIN: dict[str, Any] = {"prompts": PROMPTS, "temperature": 0.0}
DRAWN: dict[str, Any] = {"prompts": PROMPTS, "temperature": 1.0, "seed": 7}
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "greedy": (PLAIN, {}),
    "temperature": (DRAWN, {}),
    "seed": (DRAWN, {"seed": 8}),
    "hot": (DRAWN, {"temperature": 1.6}),
    "top_k": (DRAWN, {"top_k": 3}),
    "top_p": (DRAWN, {"top_p": 0.4}),
    "min_p": (DRAWN, {"min_p": 0.3}),
    "n": (DRAWN, {"n": 2}),
    "presence_penalty": (PLAIN, {"presence_penalty": 2.0}),
    "frequency_penalty": (PLAIN, {"frequency_penalty": 2.0}),
    "repetition_penalty": (PLAIN, {"repetition_penalty": 2.0}),
    "raised repetition": (PLAIN, {"repetition_penalty": 0.5}),
    "logit_bias": (PLAIN, {"logit_bias": {77: 50.0}}),
    "allowed_token_ids": (PLAIN, {"allowed_token_ids": [10, 11, 12]}),
    "logprobs": (PLAIN, {"logprobs": 3}),
    "drawn logprobs": (DRAWN, {"logprobs": 3}),
    "all logprobs": (PLAIN, {"logprobs": -1, "max_tokens": 2}),
    "prompt_logprobs": (PLAIN, {"prompt_logprobs": 2}),
}
MIXED = {
    "prompts": PROMPTS,
    "each": [
        {"temperature": 0.0},
        {"temperature": 0.7, "seed": 3, "top_p": 0.9},
        {"temperature": 0.0, "logprobs": 2, "frequency_penalty": 1.0, "max_tokens": 5},
    ],
}
REQUESTS = [{**base, **changed} for base, changed in CASES.values()] + [MIXED]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("tiny")
    make(folder / "model", folder / "index")
    return folder / "model", folder / "index"


@pytest.fixture(scope="module")
def dense(files: tuple[Path, Path]) -> dict[str, Any]:
    """The plugin is installed, and not switched on."""
    return answers(files[0], REQUESTS)


@pytest.fixture(scope="module")
def exact(files: tuple[Path, Path]) -> dict[str, Any]:
    """Every cluster is probed: every token is a candidate."""
    model, index = files
    flashhead = {"index": str(index), "num_probes": ALL_CLUSTERS, "crossover": "never"}
    return answers(model, REQUESTS, flashhead)


def test_off_is_vllm_itself(files: tuple[Path, Path], dense: dict[str, Any]) -> None:
    """Byte for byte, log probabilities too; fails where a layer stays ours."""
    without = answers(files[0], REQUESTS, installed=False)
    assert dense == without
    assert dense["counters"] == {}
    classes = [name for name in dense["head"].values() if isinstance(name, str)]
    assert all(name.startswith("vllm.") for name in classes)


def test_on_holds_the_rows_once_and_in_the_index_order(exact: dict[str, Any]) -> None:
    assert "IndexOrderLMHead" in exact["head"]["lm_head"]
    assert "IndexLogits" in exact["head"]["logits_processor"]
    assert exact["head"]["embed_tokens"].startswith("vllm.")  # untied: vLLM's own
    assert exact["head"]["rows"] == ALL_CLUSTERS * 4  # no second table


@pytest.mark.parametrize("place", range(len(CASES)), ids=list(CASES))
def test_each_parameter_has_the_dense_heads_effect(
    place: int, dense: dict[str, Any], exact: dict[str, Any]
) -> None:
    """Fails for a parameter that is ignored: its answer differs from the one without it."""
    name = list(CASES)[place]
    expected, found = dense["outputs"][place], exact["outputs"][place]
    base, changed = CASES[name]
    plain = dense["outputs"][list(CASES).index("greedy" if base is PLAIN else "temperature")]
    if changed and "logprobs" not in name:
        assert [one["token_ids"] for one in expected] != [one["token_ids"] for one in plain]
    for mine, theirs in zip(found, expected, strict=True):
        _agree(mine, theirs)


def test_a_mixed_batch_gives_each_request_its_own(
    dense: dict[str, Any], exact: dict[str, Any]
) -> None:
    """One ends early, so that rows move; fails where needs do not follow their requests."""
    for mine, theirs in zip(exact["outputs"][-1], dense["outputs"][-1], strict=True):
        _agree(mine, theirs)


def _agree(mine: dict[str, Any], theirs: dict[str, Any]) -> None:
    assert mine["token_ids"] == theirs["token_ids"]
    assert len(mine["logprobs"]) == len(theirs["logprobs"])
    for ours, dense in zip(mine["logprobs"], theirs["logprobs"], strict=True):
        _close(ours, dense)
    _close(mine["prompt_logprobs"], theirs["prompt_logprobs"])


def _close(mine: list[Any], theirs: list[Any]) -> None:
    assert [[token for token, _ in place] for place in mine] == [
        [token for token, _ in place] for place in theirs
    ]
    for ours, dense in zip(mine, theirs, strict=True):
        for (_, found), (_, expected) in zip(ours, dense, strict=True):
            assert found == pytest.approx(expected, abs=1e-3)


def test_steps_and_fallbacks_are_counted(exact: dict[str, Any]) -> None:
    counters = exact["counters"]
    assert counters["steps:flashhead"] > counters["steps:dense"] > 0
    for reason in ("logit_bias", "allowed_token_ids", "raised_penalties", "logprobs"):
        assert counters[f"fallbacks:{reason}"] > 0
    # Once for the prompt's rows and once for the first token's, of three requests or fewer steps.
    assert 0 < counters["fallbacks:prompt_logprobs"] < 12


@pytest.mark.parametrize("eager", [True, False], ids=["eager", "compiled"])
def test_a_tied_model_reads_its_input_from_the_same_rows(tmp_path: Path, eager: bool) -> None:
    """Fails where the input embedding reads rows in the order of token ids."""
    model, index = tmp_path / "model", tmp_path / "index"
    make(model, index, tied=True)
    requests, engine = [PLAIN, DRAWN, MIXED], {"enforce_eager": eager}
    flashhead = {"index": str(index), "num_probes": ALL_CLUSTERS, "crossover": "never"}
    found = answers(model, requests, flashhead, engine=engine)
    assert "IndexOrderEmbedding" in found["head"]["embed_tokens"]
    expected = answers(model, requests, engine=engine)
    for ours, theirs in zip(found["outputs"], expected["outputs"], strict=True):
        for mine, dense in zip(ours, theirs, strict=True):
            _agree(mine, dense)


def test_an_index_of_other_weights_is_refused(files: tuple[Path, Path], tmp_path: Path) -> None:
    make(tmp_path / "model", tmp_path / "index", seed=1)
    with pytest.raises(RuntimeError, match="was built for other weights"):
        answers(files[0], [PLAIN], str(tmp_path / "index"))


def test_dummy_weights_are_refused(files: tuple[Path, Path]) -> None:
    with pytest.raises(RuntimeError, match="cannot check an index"):
        answers(files[0], [PLAIN], str(files[1]), engine={"load_format": "dummy"})


def test_vllm_starts_after_the_plugin_is_registered() -> None:
    """vLLM 0.32 does not start on a CPU once llvmlite is imported: the plugin imports it late."""
    code = (
        "import sys; from flashhead_dist.integrations.vllm.plugin import register; register(); "
        "register(); import flashhead_dist.integrations.vllm.engine; "
        "assert 'llvmlite' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_both_model_runners_take_the_installed_processor() -> None:
    """Fails where the class has one interface only: vLLM with the other runner would not start."""
    code = (
        "from types import SimpleNamespace as N\n"
        "from vllm.v1.sample.logits_processor import _load_logitsprocs_plugins as first\n"
        "from vllm.v1.worker.gpu.sample.logits_processor.loader import "
        "_load_v2_logitsprocs_plugins as second\n"
        "config = N(additional_config={}, model_config=None)\n"
        "assert first() == second() and len(first()) == 1\n"
        "for made in (first()[0](config, 'cpu', False), second()[0](config, None)):\n"
        "    assert made.apply(5) == 5 and not made.add_request(0, None)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
