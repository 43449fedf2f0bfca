"""Decode with a model's own body and with its four-bit copy, each under a dense head and FlashHead.

    python launch/bench_quantized.py                   the default model; its copy is made once
    python launch/bench_quantized.py --threads 2 --max-new-tokens 48 --json
    python launch/bench_quantized.py --model DIR --quantized DIR     a W4A16 checkpoint of your own

The four take turns, prompt by prompt, in one process, so that other work of the machine affects all
of them. A head's speedup is a ratio within one body, the body's within one head; "same tokens" are
those of the dense head over the same body. The copy rounds weights to nearest (compressed-tensors,
"pack-quantized"): it is made for time, not for quality.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import torch
from rich.console import Console
from rich.table import Table

from flashhead_dist.decode.compare import (
    Measured,
    Request,
    compare,
    identical_share,
    middle,
    p90,
    warm_up,
)
from flashhead_dist.decode.engine import DENSE, Engine, Layout, Variant
from flashhead_dist.decode.prompts import read_prompts
from flashhead_dist.heads.sampling import SamplingParameters
from flashhead_dist.integrations.quantized_make import GROUP_SIZE, default_w4a16_folder
from flashhead_dist.models import open_model
from flashhead_dist.progress import progress
from flashhead_kernels.cpu_threads import compute_threads
from flashhead_topology.probe import probe_machine
from options import (
    DTYPES,
    Count,
    DType,
    File,
    Folder,
    IndexedModel,
    JsonOutput,
    Positive,
    Range,
    parse,
    run_command,
)

FLASHHEAD = "flashhead"
HEADS = (DENSE, FLASHHEAD)
OWN, FOUR_BIT = "own", "w4a16"


@dataclass(kw_only=True)
class Options(IndexedModel, JsonOutput):
    """Options of the script."""

    quantized: Folder[Path | None] = None
    """the copy (default: made in the cache)"""
    group_size: Positive[int] = GROUP_SIZE
    """columns that share a scale"""
    prompts: File[Path | None] = None
    """one a line, or .jsonl (default: 20 built in)"""
    max_new_tokens: Annotated[Count[int], Range(2)] = 48
    """of each text"""
    dtype: DType[str] = "fp32"
    """of activations and head"""
    threads: Positive[int] = 1
    """threads"""


def run(options: Options) -> dict[str, Any] | None:
    """Decode every prompt with both bodies and both heads, and print the table."""
    machine, errors = probe_machine(), Console(stderr=True)
    with compute_threads(machine.num_cores):
        source = options.open()
        index = options.index_folder(source)
        folder = options.quantized
        if folder is None:
            with errors.status("Making the W4A16 copy, once (half a minute)"):
                folder = default_w4a16_folder(source, options.group_size)
        copy = open_model(str(folder))
    variants = [Variant(head) for head in HEADS]
    engines = {
        body: Engine(
            model=model,
            index_dir=index,
            variants=variants,
            layout=Layout(),
            dtype=DTYPES[options.dtype],
            device=torch.device("cpu"),
            parameters=SamplingParameters(),
        )
        for body, model in ((OWN, source), (FOUR_BIT, copy))
    }
    measured = {body: [Measured(variant) for variant in variants] for body in engines}
    with compute_threads(options.threads):
        with errors.status("Loading both bodies"):
            for engine in engines.values():
                engine.load()
            own = engines[OWN]
            request = Request(
                prompts=[own.tokenizer(text).input_ids for text in read_prompts(options.prompts)],
                max_new_tokens=options.max_new_tokens,
                pad_token_id=own.pad_token_id,
            )
            request.check(source.vocab_size, own.context_length)
            for engine in engines.values():
                warm_up(engine, variants, request)
        with progress("decoding", total=len(request.prompts), unit="prompts") as advance:
            for number, prompt in enumerate(request.prompts):
                # The body that goes first alternates.
                for body in list(engines)[:: 1 if number % 2 else -1]:
                    one = replace(request, prompts=[prompt])
                    list(compare(engines[body], measured[body], one, on_states=lambda *_: None))
                advance()
    found = summarise(measured)
    console = Console()
    console.print(
        f"{source.name} in {options.dtype}, {options.threads} threads of {machine.cpu_model}, "
        f"{len(request.prompts)} prompts of {options.max_new_tokens} new tokens; copy: {folder}",
        soft_wrap=True,
    )
    console.print(table(found))
    settings = {"model": source.name, "dtype": options.dtype, "threads": options.threads}
    return settings | found if options.json else None


def summarise(measured: dict[str, list[Measured]]) -> dict[str, Any]:
    """Figures by body and head; gains are ratios of medians of ms a token."""

    def ms(figure: Any) -> dict[str, dict[str, float]]:
        return {
            body: {item.variant.head: figure(item.tpot_s) * 1e3 for item in items}
            for body, items in measured.items()
        }

    tpot = ms(middle)
    return {
        "tpot_ms": tpot,
        "tpot_p90_ms": ms(p90),
        "head_gain": {body: of_head[DENSE] / of_head[FLASHHEAD] for body, of_head in tpot.items()},
        "body_gain": {head: tpot[OWN][head] / tpot[FOUR_BIT][head] for head in HEADS},
        "gain": tpot[OWN][DENSE] / tpot[FOUR_BIT][FLASHHEAD],
        "identical_tokens_share": {
            body: identical_share(items[1].tokens, items[0].tokens)
            for body, items in measured.items()
        },
    }


def table(found: dict[str, Any]) -> Table:
    """The figures as a table."""
    rows = Table("body", "head", "TPOT ms", "p90", "x dense", "x own body, dense", "same tokens %")
    first = found["tpot_ms"][OWN][DENSE]
    for body, by_head in found["tpot_ms"].items():
        for head, ms in by_head.items():
            own = found["head_gain"][body], 100 * found["identical_tokens_share"][body]
            speedup, same = ("-", "-") if head == DENSE else (f"{own[0]:.2f}", f"{own[1]:.1f}")
            p90_ms = f"{found['tpot_p90_ms'][body][head]:.1f}"
            rows.add_row(body, head, f"{ms:.1f}", p90_ms, speedup, f"{first / ms:.2f}", same)
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark and return an exit code."""
    return run_command(lambda: run(parse(Options, argv, "launch/bench_quantized.py", __doc__)))


if __name__ == "__main__":
    sys.exit(main())
