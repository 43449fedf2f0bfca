"""launch/bench_cpu.py: its JSON line, its table, its mistakes."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType

import pytest
import torch

from flashhead_dist.index import load_shard
from tests.launch.scripts import load_script

SCRIPT = Path(__file__).parents[2] / "launch" / "bench_cpu.py"
SYNTHETIC = ["--synthetic", "2000,64", "--published-probes", "20", "--iters", "3"]


@pytest.fixture(scope="module")
def bench() -> ModuleType:
    return load_script("bench_cpu")


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> object:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FLASHHEAD_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


def test_last_line_holds_every_way_at_every_batch_size(
    bench: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    threads = torch.get_num_threads()
    assert bench.main([*SYNTHETIC, "--batch-sizes", "1,3", "--draws", "--json"]) == 0
    assert torch.get_num_threads() == threads
    printed = capsys.readouterr().out
    document = json.loads(printed.splitlines()[-1])
    assert document["synthetic"] is True
    assert "SYNTHETIC" in printed
    ways = ["flashhead", "dense_local_max", "dense torch", "published, eager"]
    ways += [f"flashhead, {how}" for how in ("drawn", "top-k 50", "top-p 0.95")]
    ways += ["dense_local_max, drawn"]
    results = document["results"]
    assert [(r["batch_size"], r["head"]) for r in results] == [(b, w) for b in (1, 3) for w in ways]
    for result in results:
        assert 0 < result["p10_us"] <= result["median_us"] <= result["p90_us"]
        own = next(r for r in results if r["batch_size"] == result["batch_size"])
        assert result["times_flashhead"] == pytest.approx(result["median_us"] / own["median_us"])


def test_the_published_scheme_with_every_cluster_is_the_dense_argmax(
    bench: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    assert bench.main([*SYNTHETIC, "--json"]) == 0
    index = Path(json.loads(capsys.readouterr().out.splitlines()[-1])["index"])
    shard = load_shard(index).shard
    real = shard.token_ids >= 0
    embedding = torch.zeros(2000, 64, dtype=shard.rows.dtype)
    embedding[shard.token_ids[real].long()] = shard.rows[real]
    states = torch.randn(20, 64, generator=torch.Generator().manual_seed(3)).to(embedding.dtype)
    num_clusters = shard.token_ids.numel() // 16
    found = bench.published_scheme(shard, num_clusters)(states)
    logits = states @ embedding.T
    best = logits.gather(1, found.long().unsqueeze(1)).squeeze(1)
    # Equal logits in bf16 may name another token.
    assert torch.equal(best, logits.max(1).values)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--batch-sizes", "0"], "--batch-sizes holds 0"),
        (["--batch-sizes", "100000"], "--batch-sizes holds 100000"),
        (["--iters", "0"], "--iters holds 0"),
        (["--published-probes", "100000"], "--published-probes is 100000"),
    ],
)
def test_mistakes_end_in_one_sentence_and_code_2(
    bench: ModuleType, capsys: pytest.CaptureFixture[str], arguments: list[str], named: str
) -> None:
    assert bench.main([*SYNTHETIC, *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "Traceback" not in captured.err
    (said,) = [line for line in captured.err.splitlines() if line.startswith("error: ")]
    assert named in said
    assert ": give " in said
