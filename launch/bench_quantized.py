"""Decode with a model's own body and with its four-bit copy, each under a dense head and FlashHead.

    python launch/bench_quantized.py                   the default model; its copy is made once
    python launch/bench_quantized.py --threads 2 --max-new-tokens 48 --json
    python launch/bench_quantized.py --model DIR --quantized DIR     a W4A16 checkpoint of your own

The four take turns, prompt by prompt, in one process, so that whatever else the machine does falls
on all. A head's gain is a ratio within one body, the body's within one head; "same tokens" are
those of the dense head over the same body. The copy rounds weights to nearest (compressed-tensors,
"pack-quantized"): it is made for time, not for quality.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

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
from flashhead_dist.errors import INTERRUPTED, UserError
from flashhead_dist.heads.sampling import SamplingParameters
from flashhead_dist.index import ensure_index
from flashhead_dist.integrations.quantized_make import GROUP_SIZE, default_w4a16_folder
from flashhead_dist.models import ModelSource, open_model
from flashhead_dist.progress import progress
from flashhead_kernels.cpu_threads import compute_threads
from flashhead_topology.probe import probe_machine
from rank_parser import DTYPES

HEADS = (DENSE, "flashhead")
OWN, FOUR_BIT = "own", "w4a16"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", help="HF folder, .gguf file or hub id (default: built in)")
    parser.add_argument("--index", type=Path, metavar="DIR", help="default: the model's, cached")
    parser.add_argument(
        "--quantized", type=Path, metavar="DIR", help="the copy (default: made in the cache)"
    )
    parser.add_argument("--group-size", type=int, default=GROUP_SIZE, metavar="N")
    parser.add_argument("--prompts", type=Path, metavar="FILE", help="default: 20 built in")
    parser.add_argument("--max-new-tokens", type=int, default=48, metavar="N")
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="fp32", help="default: fp32")
    parser.add_argument("--threads", type=int, default=1, metavar="N")
    parser.add_argument("--json", action="store_true", help="one JSON document as the last line")
    return parser


def check(arguments: argparse.Namespace) -> None:
    """Refuse what is wrong whatever the model; raises UserError."""
    for flag, least in (("threads", 1), ("max_new_tokens", 2), ("group_size", 1)):
        value = getattr(arguments, flag)
        if value < least:
            raise UserError(f"--{flag.replace('_', '-')} is {value}: give {least} or more")


class Bodies:
    """Both bodies with both heads, and what decoding with them took."""

    def __init__(self, sources: dict[str, ModelSource], index: Path, dtype: torch.dtype) -> None:
        """Loads nothing yet: see `load`."""
        self.variants = [Variant(head) for head in HEADS]
        self.engines = {
            body: Engine(
                model=source,
                index_dir=index,
                variants=self.variants,
                layout=Layout(),
                dtype=dtype,
                device=torch.device("cpu"),
                parameters=SamplingParameters(),
            )
            for body, source in sources.items()
        }
        self.measured = {body: [Measured(v) for v in self.variants] for body in sources}

    def load(self, texts: Sequence[str], max_new_tokens: int) -> Request:
        """Read both; raises UserError for a prompt that does not fit. Returns what to decode."""
        for engine in self.engines.values():
            engine.load()
        engine = self.engines[OWN]
        request = Request(
            prompts=[engine.tokenizer(text).input_ids for text in texts],
            max_new_tokens=max_new_tokens,
            pad_token_id=engine.pad_token_id,
        )
        request.check(engine.model.vocab_size, engine.context_length)
        for engine in self.engines.values():
            warm_up(engine, self.variants, request)
        return request

    def decode(self, request: Request) -> None:
        """Decode every prompt four times, the body that goes first alternating."""
        with progress("starting", total=len(request.prompts), visible=True) as advance:
            for number, prompt in enumerate(request.prompts):
                advance.stage(f"prompt {number + 1} of {len(request.prompts)}")
                order = list(self.engines) if number % 2 else list(self.engines)[::-1]
                for body in order:
                    one = replace(request, prompts=[prompt])
                    for _ in compare(
                        self.engines[body], self.measured[body], one, on_states=_silent
                    ):
                        pass


def _silent(*_: Any) -> None:
    return None


def summarise(measured: dict[str, list[Measured]]) -> dict[str, Any]:
    """Figures by body and head; gains are ratios of medians of ms a token."""
    tpot = {
        body: {item.variant.head: middle(item.tpot_s) * 1e3 for item in items}
        for body, items in measured.items()
    }
    head_gain = {body: by_head[DENSE] / by_head["flashhead"] for body, by_head in tpot.items()}
    body_gain = {head: tpot[OWN][head] / tpot[FOUR_BIT][head] for head in HEADS}
    return {
        "tpot_ms": tpot,
        "tpot_p90_ms": {
            body: {item.variant.head: p90(item.tpot_s) * 1e3 for item in items}
            for body, items in measured.items()
        },
        "head_gain": head_gain,
        "body_gain": body_gain,
        "gain": tpot[OWN][DENSE] / tpot[FOUR_BIT]["flashhead"],
        "identical_tokens_share": {
            body: identical_share(items[1].tokens, items[0].tokens)
            for body, items in measured.items()
        },
    }


def show(found: dict[str, Any], console: Console) -> None:
    """Print the table."""
    table = Table(
        "body", "head", "TPOT ms", "p90", "head's gain", "over own body, dense", "same tokens %"
    )
    first = found["tpot_ms"][OWN][DENSE]
    for body, by_head in found["tpot_ms"].items():
        for head, ms in by_head.items():
            plain = head == DENSE
            share = found["identical_tokens_share"][body]
            table.add_row(
                body,
                head,
                f"{ms:.1f}",
                f"{found['tpot_p90_ms'][body][head]:.1f}",
                "-" if plain else f"{found['head_gain'][body]:.2f}",
                f"{first / ms:.2f}",
                "-" if plain else f"{100 * share:.1f}",
            )
    console.print(table)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark and return an exit code."""
    arguments = _parser().parse_args(argv)
    machine, errors = probe_machine(), Console(stderr=True)
    try:
        check(arguments)
        with compute_threads(machine.num_cores):
            source = open_model(arguments.model)
            index = arguments.index or ensure_index(source)
            folder = arguments.quantized
            if folder is None:
                with errors.status("Making the W4A16 copy, once (half a minute)"):
                    folder = default_w4a16_folder(source, arguments.group_size)
            sources = {OWN: source, FOUR_BIT: open_model(str(folder))}
        with compute_threads(arguments.threads):
            bodies = Bodies(sources, index, DTYPES[arguments.dtype])
            with errors.status("Loading both bodies"):
                request = bodies.load(read_prompts(arguments.prompts), arguments.max_new_tokens)
            bodies.decode(request)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("\nerror: interrupted.", file=sys.stderr)
        return INTERRUPTED
    found = summarise(bodies.measured)
    console = Console()
    console.print(
        f"{source.name} in {arguments.dtype}, {arguments.threads} threads of {machine.cpu_model}, "
        f"{len(request.prompts)} prompts of {arguments.max_new_tokens} new tokens; copy: {folder}",
        soft_wrap=True,
    )
    show(found, console)
    if arguments.json:
        settings = {"model": source.name, "dtype": arguments.dtype, "threads": arguments.threads}
        print(json.dumps(settings | found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
