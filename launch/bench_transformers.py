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

import copy
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import pandas as pd
import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor
from tyro.conf import arg

from flashhead_dist.integrations.transformers import replace_head
from flashhead_kernels.cpu_threads import compute_threads
from flashhead_topology.probe import probe_machine
from options import Checked, IndexedModel, JsonOutput, Positive, one_of, parse, run_command

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


@dataclass(kw_only=True)
class Measurement(Checked):
    """What to time."""

    dtype: Annotated[str, one_of(("float32", "bfloat16", "float16")), arg()] = "float32"
    """of the model"""
    threads: Positive[int] = 1
    """threads"""
    new_tokens: Positive[int] = 24
    """tokens a call continues the prompt by"""
    rounds: Positive[int] = 9
    """calls of each kind"""


@dataclass(kw_only=True)
class BenchOptions:
    """Options of this script."""

    model: IndexedModel
    measurement: Measurement
    output: JsonOutput


def measure(models: dict[str, Any], prompt: Tensor, measurement: Measurement) -> pd.DataFrame:
    """One row a call: way, head, ms (per token), tokens. The first round is a warm-up."""
    calls: list[dict[str, Any]] = []
    for number in track(range(-1, measurement.rounds), "rounds", console=Console(stderr=True)):
        for way, options in WAYS.items():
            for head, model in models.items():
                torch.manual_seed(number)
                start_s = time.perf_counter()
                found = model.generate(prompt, max_new_tokens=measurement.new_tokens, **options)
                ms = (time.perf_counter() - start_s) * 1e3 / measurement.new_tokens
                ids = found if isinstance(found, Tensor) else found.sequences
                tokens = tuple(ids[0, prompt.shape[1] :].tolist())
                calls.append({"way": way, "head": head, "ms": ms, "tokens": tokens})
    return pd.DataFrame(calls[len(WAYS) * len(models) :])


def summarise(calls: pd.DataFrame) -> pd.DataFrame:
    """One row a way: medians, p10 and p90 of ms per token, their ratio, and equal greedy tokens."""
    table = pd.DataFrame(index=list(WAYS))
    for head in ("dense", "flashhead"):
        times = calls[calls["head"] == head].groupby("way")["ms"]
        table[f"{head}_ms"] = times.median()
        table[f"{head}_p10_ms"], table[f"{head}_p90_ms"] = times.quantile(0.1), times.quantile(0.9)
    table["ratio"] = table["dense_ms"] / table["flashhead_ms"]
    tokens = {head: part.set_index("way")["tokens"] for head, part in calls.groupby("head")}
    equal = (tokens["dense"] == tokens["flashhead"]).groupby(level=0).mean()
    drawn = pd.Series({way: options["do_sample"] for way, options in WAYS.items()})
    table["identical_tokens_share"] = equal.mask(drawn)
    return table.rename_axis("way").reset_index()


def work(options: BenchOptions) -> dict[str, Any] | None:
    """Measure, print the table, and return the document where --json asks for it."""
    measurement, machine = options.measurement, probe_machine()
    with compute_threads(machine.num_cores):
        source = options.model.open()
        index = options.model.index_folder(source)
        assert index is not None
        dense, tokenizer = source.load_body(getattr(torch, measurement.dtype))
        dense.generation_config.eos_token_id = None
        models = {"dense": dense, "flashhead": replace_head(copy.deepcopy(dense), index)}
        prompt = tokenizer(PROMPT, return_tensors="pt").input_ids
    with compute_threads(measurement.threads):
        summary = summarise(measure(models, prompt, measurement))
    print(
        f"{source.name} in {measurement.dtype}, {measurement.threads} threads of "
        f"{machine.cpu_model}: ms per token"
    )
    print(summary.to_string(index=False, float_format="%.2f", na_rep="drawn"))
    if not options.output.json:
        return None
    document = {"model": source.name, "dtype": measurement.dtype, "threads": measurement.threads}
    return document | {"ways": json.loads(summary.to_json(orient="records"))}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark and return an exit code."""
    script = "launch/bench_transformers.py"
    return run_command(lambda: work(parse(BenchOptions, argv, script, __doc__)))


if __name__ == "__main__":
    sys.exit(main())
