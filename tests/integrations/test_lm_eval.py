"""FlashHead as a model of lm-eval: likelihoods, texts, and a task of a user's own, offline."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from flashhead_dist.errors import UserError
from flashhead_dist.integrations.transformers import replace_head
from flashhead_dist.models import open_model
from tests.launch.ground import build_small
from tests.launch.small_llama import save_small_llama

pytest.importorskip("lm_eval", reason="needs lm-eval: make test-lm-eval")

PAIRS = [("abc", "d"), ("a longer context", " and its end"), ("x", "yz"), ("ab", "c" * 20)]
TASK = """
task: colours
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: {kind}
doc_to_text: "{{{{question}}}}"
{rest}
"""
CHOICE = "doc_to_choice: [red, blue]\ndoc_to_target: target\nmetric_list: [{metric: acc}]"
GENERATE = (
    "doc_to_target: '{{answer}}'\nmetric_list: [{metric: exact_match}]\n"
    "generation_kwargs: {max_gen_toks: 8, until: ['~~']}"
)


@pytest.fixture(scope="module", autouse=True)
def offline(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setenv("HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("datasets")))
        patch.setenv("FLASHHEAD_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("lm_eval")
    save_small_llama(folder / "model", context=128, names_stop=True)
    model = open_model(str(folder / "model"))
    index = build_small(model, folder / "index", 4, num_probes=8)
    return {"pretrained": str(folder / "model"), "index": str(index)}


def load(files: dict[str, str], **options: Any) -> Any:
    from flashhead_dist.integrations.lm_eval import FlashHeadLM

    return FlashHeadLM(**files, **options)


def requests_of(kind: str, arguments: list[tuple[Any, ...]]) -> list[Any]:
    from lm_eval.api.instance import Instance

    return [Instance(kind, {}, one, i) for i, one in enumerate(arguments)]


def body_of(files: dict[str, str]) -> tuple[Any, Any]:
    return open_model(files["pretrained"]).load_body(torch.float32)


def sums(model: Any, tokenizer: Any) -> list[float]:
    """What `model` itself says of each continuation, one by one and from a value a token."""
    found = []
    for context, continuation in PAIRS:
        ids = tokenizer(context + continuation, return_tensors="pt").input_ids
        start = len(tokenizer(context).input_ids)
        with torch.no_grad():
            rows = model(ids).logits[0, start - 1 : -1].float().log_softmax(1)
        found.append(float(rows.gather(1, ids[0, start:, None]).sum()))
    return found


@pytest.mark.parametrize("batch_size", [1, 3])
def test_likelihoods_are_the_closed_forms_or_the_dense_heads(
    files: dict[str, str], batch_size: int
) -> None:
    """Fails where a padded row, or the wrong position of a row, is read."""
    dense_body, tokenizer = body_of(files)
    truth = sums(dense_body, tokenizer)
    replaced = sums(replace_head(dense_body, files["index"]), tokenizer)
    # Few probes of random rows: or one could stand for the other.
    assert max(abs(a - b) for a, b in zip(truth, replaced, strict=True)) > 0.05
    asked = requests_of("loglikelihood", PAIRS)
    for likelihood, expected in (("dense", truth), ("closed_form", replaced)):
        model = load(files, likelihood=likelihood, batch_size=batch_size)
        found = [one for one, _ in model.loglikelihood(asked, disable_tqdm=True)]
        assert found == pytest.approx(expected, abs=1e-3)


def test_a_whole_text_is_the_sum_of_its_windows(files: dict[str, str]) -> None:
    model = load(files, max_length=16)
    text = "a text of more bytes than a window holds, and then some"
    (found,) = model.loglikelihood_rolling(requests_of("loglikelihood_rolling", [(text,)]))
    assert -20 * len(text) < found < -0.1 * len(text)
    with pytest.raises(UserError, match="a continuation of 20 tokens is longer"):
        model.loglikelihood(requests_of("loglikelihood", [("a", "b" * 20)]), disable_tqdm=True)


def test_texts_are_the_retrieval_heads_and_greedy_to_it(files: dict[str, str]) -> None:
    body, tokenizer = body_of(files)
    prompt = "a longer context"
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    expected = replace_head(body, files["index"]).generate(ids, max_new_tokens=10, pad_token_id=0)
    model = load(files)
    options = {"until": ["~~"], "max_gen_toks": 10, "do_sample": False}
    asked = requests_of("generate_until", [(prompt, options), ("x", options)])
    found = model.generate_until(asked, disable_tqdm=True)
    tokens = expected[0, ids.shape[1] :].tolist()
    assert found[0] == tokenizer.decode(tokens, skip_special_tokens=True)
    request = [(("", ""), ids[0].tolist(), tokens), (("", ""), ids[0].tolist(), [tokens[0] ^ 1])]
    assert [greedy for _, greedy in model._loglikelihood_tokens(request)] == [True, False]


@pytest.mark.parametrize(
    ("kind", "rest", "metric"),
    [("multiple_choice", CHOICE, "acc"), ("generate_until", GENERATE, "exact_match")],
    ids=["choice", "text"],
)
def test_a_task_of_ones_own_runs_by_lm_evals_command(
    files: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
    rest: str,
    metric: str,
) -> None:
    from flashhead_dist.integrations.lm_eval import main

    data = tmp_path / "colours.jsonl"
    items = [{"question": f"{i} is", "target": i % 2, "answer": "red"} for i in range(4)]
    data.write_text("".join(json.dumps(item) + "\n" for item in items))
    (tmp_path / "colours.yaml").write_text(TASK.format(data=data, kind=kind, rest=rest))
    options = ",".join(f"{name}={value}" for name, value in files.items())
    command = ["lm_eval", "run", "--model", "flashhead", "--model_args", options]
    command += ["--tasks", "colours", "--include_path", str(tmp_path), "--batch_size", "2"]
    monkeypatch.setattr(sys, "argv", [*command, "--output_path", str(tmp_path / "out")])
    assert main() == 0
    (written,) = (tmp_path / "out").rglob("results_*.json")
    found = json.loads(written.read_text())
    assert f"{metric},none" in found["results"]["colours"]
    assert found["n-samples"]["colours"]["effective"] == 4
    assert found["config"]["likelihood_head"] == "flashhead"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"likelihood": "sampled"}, "likelihood 'sampled' is unknown"),
        ({"batch_size": "auto"}, "batch_size 'auto' is not served"),
        ({"dtype": "int4"}, "dtype 'int4' is not served"),
        ({"index": "nowhere"}, "nowhere"),
    ],
)
def test_a_mistake_is_one_sentence(
    files: dict[str, str], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        load(files | options)
