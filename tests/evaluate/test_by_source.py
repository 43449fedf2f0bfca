"""Figures by source with intervals, and the command that predicts texts and writes them as CSV."""

from __future__ import annotations

import importlib
import json
import math
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import pytest
import torch

from flashhead_dist.evaluate.intervals import clusters_of, figures_by_source
from flashhead_dist.models import open_model
from flashhead_dist.states import HiddenStates

if TYPE_CHECKING:
    from tests.integrations.transformers_zoo import Pair, Zoo

LAUNCH = Path(__file__).parents[2] / "launch"


def hidden(documents: torch.Tensor | None) -> HiddenStates:
    """200 states, 80 of them from `a` and 120 from `c`; nothing from `b`."""
    sources = (torch.arange(200) >= 80).long() * 2
    return HiddenStates(torch.zeros(200, 4), sources, ("a", "b", "c"), "made up", documents)


def test_means_and_limits_by_source() -> None:
    documents = torch.arange(200) // 20
    top1 = torch.ones(200)
    top1[[0, 90, 91, 92, 199]] = 0
    kl = torch.linspace(0, 1, 200)
    frame = figures_by_source({"top1_agreement": top1, "kl_nats": kl}, hidden(documents))
    assert frame["source"].tolist() == ["a", "c", "all"]
    assert frame["states"].tolist() == [80, 120, 200]
    assert frame["clusters"].tolist() == [4, 6, 10]
    assert frame["top1_agreement"].tolist() == pytest.approx([79 / 80, 116 / 120, 195 / 200])
    assert frame["kl_nats"].tolist() == pytest.approx(
        [float(kl[:80].mean()), float(kl[80:].mean()), 0.5]
    )
    for name in ("top1_agreement", "kl_nats"):
        assert bool((frame[f"{name}_low"] <= frame[name]).all())
        assert bool((frame[name] <= frame[f"{name}_high"]).all())
    # Documents of `a` are 20 neighbours of a slope: drawing states would give a third of this.
    width = frame["kl_nats_high"][0] - frame["kl_nats_low"][0]
    assert width > 0.15


def test_a_share_of_one_has_an_interval() -> None:
    frame = figures_by_source({"top1_agreement": torch.ones(200)}, hidden(None))
    assert (frame["top1_agreement_high"] == 1).all()
    assert frame["top1_agreement_low"][0] == pytest.approx(0.9542, abs=1e-3)


def test_one_cluster_has_no_interval_but_that_of_a_share() -> None:
    """Fails where one document is drawn again and again: limits equal to the figure."""
    few = HiddenStates(torch.zeros(30, 4), torch.zeros(30).long(), ("a",), "made up", None)
    figures = {"top1_agreement": torch.ones(30), "kl_nats": torch.linspace(0, 1, 30)}
    row = figures_by_source(figures, few).iloc[0]
    assert row["clusters"] == 1
    assert math.isnan(row["kl_nats_low"])
    assert math.isnan(row["kl_nats_high"])
    assert 0.8 < row["top1_agreement_low"] < 0.9


def test_perplexities_and_their_ratio_are_of_the_same_draws() -> None:
    """Fails where dense and head are drawn apart: their common ups and downs would not cancel."""
    draw = torch.Generator().manual_seed(0)
    dense = -3 + 2 * torch.randn(200, generator=draw)
    figures = {"dense_log_prob": dense, "head_log_prob": dense - 0.01}
    row = figures_by_source(figures, hidden(torch.arange(200) // 5)).iloc[-1]
    assert row["dense_perplexity"] == pytest.approx(math.exp(-float(dense.mean())), rel=1e-5)
    assert row["perplexity"] == pytest.approx(row["dense_perplexity"] * math.exp(0.01), rel=1e-5)
    assert row["dense_perplexity_high"] > 1.2 * row["dense_perplexity_low"]
    assert row["perplexity_ratio_high"] - row["perplexity_ratio_low"] < 1e-5


def test_clusters_are_documents_of_a_source_or_else_runs() -> None:
    # One number in two sources is two documents.
    numbers, what = clusters_of(hidden(torch.arange(200) % 2))
    assert (len(np.unique(numbers)), what) == (4, "documents")
    # A source of one document is drawn by runs, or its interval would have no width.
    numbers, what = clusters_of(hidden(torch.arange(200).clamp(min=80) // 20))
    assert (len(np.unique(numbers[:80])), len(np.unique(numbers[80:]))) == (2, 6)
    numbers, what = clusters_of(hidden((torch.arange(200) // 40).clamp(max=2)))
    assert (len(np.unique(numbers[:80])), len(np.unique(numbers[80:]))) == (2, 2)
    assert what == "documents (blocks of 64 states where one)"
    numbers, what = clusters_of(hidden(None))
    # 80 states are two runs of at most 64, and so are 120.
    assert (len(np.unique(numbers)), what) == (4, "blocks of 64 states")
    assert len(np.unique(numbers[:80])) == 2


class _Letters:
    bos_token_id = 2
    pad_token_id = 0

    def __call__(self, text: str) -> SimpleNamespace:
        return SimpleNamespace(input_ids=[2, *(3 + ord(letter) % 500 for letter in text)])


@pytest.fixture
def launch(zoo: Zoo, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[ModuleType]:
    monkeypatch.syspath_prepend(str(LAUNCH))
    monkeypatch.setenv("FLASHHEAD_CACHE", str(tmp_path / "cache"))
    command = importlib.import_module("evaluate")
    pair: Pair = zoo.pair("qwen3")
    opened = open_model(str(pair.folder / "model"))
    model = replace(opened, body_loader=lambda dtype: (pair.dense, _Letters()))
    options = importlib.import_module("options")
    monkeypatch.setattr(options, "open_model", lambda *_, **__: model)
    yield command
    sys.modules.pop("evaluate", None)


def test_texts_give_perplexity_and_divergence_by_source(
    launch: ModuleType, zoo: Zoo, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = [
        {"source": source, "document": f"{source}{number}", "text": word * (5 + number)}
        for source, word in (("en", "ab cd"), ("fi", "hei maa"))
        for number in range(4)
    ]
    texts, table = tmp_path / "mine.jsonl", tmp_path / "made" / "out.csv"
    texts.write_text("\n".join(map(json.dumps, lines)))
    arguments = [
        "fidelity", "--index", str(zoo.pair("qwen3").index), "--texts", str(texts),
        "--num-probes", "4", "--csv", str(table), "--threads", "1",
    ]  # fmt: skip
    assert launch.main([*arguments, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["interval_clusters"] == "documents"
    assert [row["source"] for row in document["by_source"]] == ["en", "fi", "all"]
    assert [row["clusters"] for row in document["by_source"]] == [4, 4, 8]
    assert document["num_states"] == sum(len(line["text"]) for line in lines)
    assert document["kl_nats"] > 0.01
    assert document["perplexity"] > 1
    assert document["dense_perplexity"] > 1
    frame = pd.read_csv(table)
    assert frame["source"].tolist() == ["en", "fi", "all"]
    assert frame["perplexity_ratio"][2] == pytest.approx(
        document["perplexity"] / document["dense_perplexity"], rel=1e-4
    )
    assert launch.main([*arguments[:-4], "--no-kl", "--tokens", "40", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert (document["num_states"], document["kl_nats"], document["perplexity"]) == (40, None, None)


def test_texts_exclude_states_without_texts(
    launch: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    cases = {
        "--texts excludes": ["--texts", "--synthetic", "600,64"],
        "--tokens is 0": ["--texts", "--tokens", "0"],
        "nowhere do not exist": ["--texts", "nowhere"],
    }
    for value, given in cases.items():
        assert launch.main(["fidelity", *given]) == 2
        assert value in capsys.readouterr().err
