"""Speculative decoding with an EAGLE draft: what its output head costs, and what that changes.

    python launch/drafts.py                        the default model; its draft is trained once
    python launch/drafts.py --num-drafts 3 --max-new-tokens 48 --threads 2 --json
    python launch/drafts.py --vocabularies 32768,8192

One draft proposes under several heads: dense and FlashHead, each over the whole vocabulary and over
the tokens most used in the texts that the draft was trained on. The target verifies with its dense
head, so every text is the same, which is checked. Heads take turns, prompt by prompt. Prompts are
held out of training, in turn MT-Bench, GSM8K and passages in some 26 languages.

acceptance   share of the proposals that the target's head chose too
tokens/pass  tokens of a text over forward passes of the target
head ms      the draft's head, a proposal; medians over prompts, as ms a token is
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from flashhead_dist.decode.drafts import (
    Drafted,
    DraftHeads,
    ensure_draft,
    summarise,
    training_texts,
)
from flashhead_dist.decode.prompts import Prompt, held_out_prompts
from flashhead_dist.errors import INTERRUPTED, UserError
from flashhead_dist.index import ensure_index
from flashhead_dist.models import open_model
from flashhead_dist.progress import progress
from flashhead_kernels.cpu_threads import compute_threads
from flashhead_topology.probe import probe_machine
from rank_parser import integers


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", help="HF folder, .gguf file or hub id (default: built in)")
    parser.add_argument("--index", type=Path, metavar="DIR", help="default: the model's, cached")
    parser.add_argument("--draft", type=Path, metavar="DIR", help="default: trained in the cache")
    parser.add_argument("--epochs", type=int, default=4, metavar="N", help="of training")
    parser.add_argument("--num-drafts", type=int, default=3, metavar="N", help="proposals a round")
    parser.add_argument("--num-prompts", type=int, default=24, metavar="N")
    parser.add_argument("--max-new-tokens", type=int, default=48, metavar="N")
    parser.add_argument(
        "--vocabularies", type=integers, default=[32768], metavar="N,N", help="reduced; 0: none"
    )
    parser.add_argument("--threads", type=int, default=1, metavar="N")
    parser.add_argument("--json", action="store_true", help="one JSON document as the last line")
    return parser


def check(arguments: argparse.Namespace) -> None:
    """Refuse what is wrong whatever the model; raises UserError."""
    arguments.vocabularies = [size for size in arguments.vocabularies if size]
    least = {"epochs": 1, "num_drafts": 1, "num_prompts": 1, "max_new_tokens": 2, "threads": 1}
    for flag, minimum in least.items():
        value = getattr(arguments, flag)
        if value < minimum:
            raise UserError(f"--{flag.replace('_', '-')} is {value}: give {minimum} or more")


def run(arguments: argparse.Namespace, num_cores: int) -> tuple[list[Drafted], list[Prompt], str]:
    """Train where needed, decode with every head in turn; what they did, the prompts, the model."""
    errors = Console(stderr=True)
    prompts = held_out_prompts(arguments.num_prompts)
    with compute_threads(num_cores):
        source = open_model(arguments.model)
        index = arguments.index or ensure_index(source)
        model, tokenizer = source.load_body(torch.float32)
        losses: list[float] = []
        folder = arguments.draft
        if folder is None:
            with errors.status("Reading texts to train a draft on, once (minutes)") as status:

                def told(loss: float) -> None:
                    losses.append(loss)
                    status.update(f"Training a draft: batch {len(losses)}, loss {loss:.3f}")

                folder = ensure_draft(
                    source, model, tokenizer, num_epochs=arguments.epochs, on_batch=told
                )
        texts = training_texts(tokenizer) if arguments.vocabularies else []
    with compute_threads(arguments.threads):
        heads = DraftHeads(
            source, model, folder, index, texts,
            vocabularies=arguments.vocabularies, threads=arguments.threads,
        )  # fmt: skip
        first = tokenizer(prompts[0].text).input_ids
        for entry in heads.measured:
            heads.decode(first, entry.label, arguments.num_drafts, 4)
        with progress("starting", total=len(prompts), visible=True) as advance:
            advance.stage("prompt 1")
            turns = heads.compare(
                tokenizer, prompts, arguments.num_drafts, arguments.max_new_tokens
            )
            for number, _ in enumerate(turns, start=2):
                if number <= len(prompts):
                    advance.stage(f"prompt {number} of {len(prompts)}")
    return heads.measured, prompts, source.name


def show(rows: Sequence[dict[str, Any]], console: Console) -> None:
    """Print the table."""
    table = Table(
        "draft head", "acceptance %", "tokens/pass", "head ms", "draft ms", "ms a token",
        "same tokens %",
    )  # fmt: skip
    for row in rows:
        drafted = row["acceptance"] is not None
        table.add_row(
            row["head"],
            f"{100 * row['acceptance']:.1f}" if drafted else "-",
            f"{row['tokens_per_pass']:.2f}",
            f"{row['draft_head_ms']:.2f}" if drafted else "-",
            f"{row['draft_ms']:.1f}" if drafted else "-",
            f"{row['ms_per_token']:.1f}",
            f"{100 * row['identical_tokens_share']:.1f}",
        )
    console.print(table)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the comparison and return an exit code."""
    arguments = _parser().parse_args(argv)
    machine = probe_machine()
    try:
        check(arguments)
        measured, prompts, name = run(arguments, machine.num_cores)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("\nerror: interrupted.", file=sys.stderr)
        return INTERRUPTED
    rows = summarise(measured, prompts)
    console = Console()
    console.print(
        f"{name} in fp32, {arguments.threads} threads of {machine.cpu_model}: {len(prompts)} "
        f"prompts of {arguments.max_new_tokens} new tokens, {arguments.num_drafts} proposals a "
        "round, verified by dense_local_max",
        soft_wrap=True,
    )
    show(rows, console)
    if arguments.json:
        settings = {"model": name, "threads": arguments.threads}
        settings |= {"num_drafts": arguments.num_drafts, "num_prompts": len(prompts)}
        print(json.dumps(settings | {"heads": rows}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
