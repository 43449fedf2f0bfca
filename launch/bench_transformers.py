"""Time transformers' generate with a model's own head and with FlashHead in its place.

    python launch/bench_transformers.py          the default model and its index, one thread
    python launch/bench_transformers.py --dtype bfloat16 --threads 2 --json
    python launch/bench_transformers.py --model DIR --index DIR --new-tokens 8 --rounds 2

Both models run in one process and take turns, call by call, so that whatever else the machine does
falls on both. A call continues one short prompt, batch 1, by --new-tokens tokens and nothing ends
it; its time over that number is the time per token, prompt included. The median over --rounds calls
is printed, with p10 to p90, and the ratio of medians.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

from flashhead_dist.errors import INTERRUPTED, UserError
from flashhead_dist.index import ensure_index
from flashhead_dist.integrations.transformers import replace_head
from flashhead_dist.models import open_model
from flashhead_kernels.cpu_threads import compute_threads
from flashhead_topology.probe import probe_machine

PROMPT = "The most important thing about tides is"
WAYS: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "greedy, repetition penalty": {"do_sample": False, "repetition_penalty": 1.2},
    "temperature 0.7": {"do_sample": True, "temperature": 0.7, "top_k": 0},
    "top-k 50": {"do_sample": True, "top_k": 50},
    "top-p 0.9": {"do_sample": True, "top_p": 0.9, "top_k": 0},
    "prompt lookup": {"do_sample": False, "prompt_lookup_num_tokens": 4},
    "greedy, output_scores": {
        "do_sample": False,
        "output_scores": True,
        "return_dict_in_generate": True,
    },
}
DTYPES = ("float32", "bfloat16", "float16")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", help="HF folder, .gguf file or hub id (default: built in)")
    parser.add_argument("--index", type=Path, metavar="DIR", help="default: the model's, cached")
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--threads", type=int, default=1, metavar="N")
    parser.add_argument("--new-tokens", type=int, default=24, metavar="N")
    parser.add_argument("--rounds", type=int, default=9, metavar="N")
    parser.add_argument("--json", action="store_true", help="one JSON document as the last line")
    return parser


def check(arguments: argparse.Namespace) -> None:
    """Refuse what is wrong whatever the model; raises UserError."""
    for flag in ("threads", "new_tokens", "rounds"):
        value = getattr(arguments, flag)
        if value < 1:
            raise UserError(f"--{flag.replace('_', '-')} is {value}: give 1 or more")


def load(arguments: argparse.Namespace) -> tuple[dict[str, Any], Tensor, str]:
    """The two models by head, the prompt `[1, L]`, and the model's name."""
    source = open_model(arguments.model)
    index = arguments.index or ensure_index(source)
    dense, tokenizer = source.load_body(getattr(torch, arguments.dtype))
    dense.generation_config.eos_token_id = None
    replaced = replace_head(copy.deepcopy(dense), index)
    return (
        {"dense": dense, "flashhead": replaced},
        tokenizer(PROMPT, return_tensors="pt").input_ids,
        source.name,
    )


def measure(models: dict[str, Any], prompt: Tensor, new_tokens: int, rounds: int) -> pd.DataFrame:
    """One row a call: way, head, round, ms_per_token, tokens."""
    calls: list[dict[str, Any]] = []
    for number in track(range(-1, rounds), "rounds", console=Console(stderr=True)):
        for way, options in WAYS.items():
            for head, model in models.items():
                torch.manual_seed(number)
                start_s = time.perf_counter()
                found = model.generate(prompt, max_new_tokens=new_tokens, **options)
                ms = (time.perf_counter() - start_s) * 1e3 / new_tokens
                ids = found if isinstance(found, Tensor) else found.sequences
                tokens = ids[0, prompt.shape[1] :].tolist()
                if number >= 0:
                    calls.append({"way": way, "head": head, "ms": ms, "tokens": tokens})
    return pd.DataFrame(calls)


def summarise(calls: pd.DataFrame) -> pd.DataFrame:
    """One row a way: medians, p10 and p90 of ms per token, their ratio, and equal greedy tokens."""
    rows = []
    for way, of_way in calls.groupby("way", sort=False):
        row: dict[str, Any] = {"way": way}
        for head, of_head in of_way.groupby("head", sort=False):
            row[f"{head}_ms"] = of_head["ms"].median()
            row[f"{head}_p10_ms"], row[f"{head}_p90_ms"] = of_head["ms"].quantile([0.1, 0.9])
        row["ratio"] = row["dense_ms"] / row["flashhead_ms"]
        texts = of_way.groupby("head")["tokens"].first()
        pairs = list(zip(texts["dense"], texts["flashhead"], strict=True))
        greedy = not WAYS[str(way)]["do_sample"]
        row["identical_tokens_share"] = (
            sum(a == b for a, b in pairs) / len(pairs) if greedy else None
        )
        rows.append(row)
    return pd.DataFrame(rows)


def show(summary: pd.DataFrame, console: Console) -> None:
    """Print the table."""
    table = Table("way", "dense ms", "flashhead ms", "dense / flashhead", "same tokens")
    for row in summary.to_dict("records"):
        times = [
            f"{row[f'{head}_ms']:.1f} ({row[f'{head}_p10_ms']:.1f}-{row[f'{head}_p90_ms']:.1f})"
            for head in ("dense", "flashhead")
        ]
        share = row["identical_tokens_share"]
        same = "drawn" if pd.isna(share) else f"{100 * share:.0f} %"
        table.add_row(row["way"], *times, f"{row['ratio']:.2f}", same)
    console.print(table)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark and return an exit code."""
    arguments = _parser().parse_args(argv)
    machine = probe_machine()
    console = Console()
    try:
        check(arguments)
        with compute_threads(machine.num_cores):
            models, prompt, name = load(arguments)
        with compute_threads(arguments.threads):
            calls = measure(models, prompt, arguments.new_tokens, arguments.rounds)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("\nerror: interrupted.", file=sys.stderr)
        return INTERRUPTED
    summary = summarise(calls)
    console.print(
        f"{name} in {arguments.dtype}, {arguments.threads} threads of {machine.cpu_model}: "
        "ms per token (p10-p90)"
    )
    show(summary, console)
    if arguments.json:
        settings = {"model": name, "dtype": arguments.dtype, "threads": arguments.threads}
        ways = json.loads(summary.to_json(orient="records"))
        print(json.dumps(settings | {"ways": ways}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
