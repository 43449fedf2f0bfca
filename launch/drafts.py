"""Speculative decoding with an EAGLE draft: what its output head costs, and what that changes.

    python launch/drafts.py                        the default model; its draft is trained once
    python launch/drafts.py --num-drafts 3 --max-new-tokens 48 --threads 2 --json
    python launch/drafts.py --vocabularies 32768,8192

One draft proposes under several heads: dense and FlashHead, each over the full vocabulary and over
the tokens most used in the texts that the draft was trained on. The target verifies with its dense
head, so every text is the same, which is checked. Heads take turns, prompt by prompt. Prompts are
held out of training, in turn MT-Bench, GSM8K and passages in some 26 languages.

acceptance   share of the proposals that the target's head chose too
tokens/pass  tokens of a text over forward passes of the target
head ms      the draft's head, a proposal; medians over prompts, as ms a token is
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
from rich.console import Console
from rich.table import Table

from flashhead_dist.decode.drafts import DraftHeads, ensure_draft, summarise, training_texts
from flashhead_dist.decode.prompts import held_out_prompts
from flashhead_dist.progress import progress
from flashhead_kernels.cpu_threads import compute_threads
from flashhead_topology.probe import probe_machine
from options import (
    Count,
    Folder,
    IndexedModel,
    Integers,
    JsonOutput,
    Positive,
    Range,
    parse,
    run_command,
)


@dataclass(kw_only=True)
class Options(IndexedModel, JsonOutput):
    """Options of the script."""

    draft: Folder[Path | None] = None
    """draft model (default: trained in the cache)"""
    epochs: Positive[int] = 4
    """of training"""
    num_drafts: Positive[int] = 3
    """proposals a round"""
    num_prompts: Positive[int] = 24
    """prompts"""
    max_new_tokens: Annotated[Count[int], Range(2)] = 48
    """of each text"""
    vocabularies: Integers[list[int]] = field(default_factory=lambda: [32768])
    """sizes of reduced vocabularies; 0: none"""
    threads: Positive[int] = 1
    """threads"""


def run(options: Options) -> dict[str, Any] | None:
    """Train where needed, decode with every head in turn, and print the table."""
    machine = probe_machine()
    vocabularies = [size for size in options.vocabularies if size]
    prompts = held_out_prompts(options.num_prompts)
    with compute_threads(machine.num_cores):
        source = options.open()
        index = options.index_folder(source)
        assert index is not None
        model, tokenizer = source.load_body(torch.float32)
        folder = options.draft or _trained_draft(source, model, tokenizer, options.epochs)
        texts = training_texts(tokenizer) if vocabularies else []
    with compute_threads(options.threads):
        heads = DraftHeads(
            source, model, folder, index, texts,
            vocabularies=vocabularies, threads=options.threads,
        )  # fmt: skip
        first = tokenizer(prompts[0].text).input_ids
        for entry in heads.measured:
            heads.decode(first, entry.label, options.num_drafts, 4)
        with progress("decoding", total=len(prompts), unit="prompts") as advance:
            turns = heads.compare(tokenizer, prompts, options.num_drafts, options.max_new_tokens)
            for _ in turns:
                advance()
    rows = summarise(heads.measured, prompts)
    console = Console()
    console.print(
        f"{source.name} in fp32, {options.threads} threads of {machine.cpu_model}: {len(prompts)} "
        f"prompts of {options.max_new_tokens} new tokens, {options.num_drafts} proposals a "
        "round, verified by dense_local_max",
        soft_wrap=True,
    )
    show(rows, console)
    settings = {"model": source.name, "threads": options.threads}
    settings |= {"num_drafts": options.num_drafts, "num_prompts": len(prompts)}
    return settings | {"heads": rows} if options.json else None


def _trained_draft(source: Any, model: Any, tokenizer: Any, num_epochs: int) -> Path:
    losses: list[float] = []
    with Console(stderr=True).status("Reading texts to train a draft on, once (minutes)") as status:

        def on_batch(loss: float) -> None:
            losses.append(loss)
            status.update(f"Training a draft: batch {len(losses)}, loss {loss:.3f}")

        return ensure_draft(source, model, tokenizer, num_epochs=num_epochs, on_batch=on_batch)


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
    return run_command(lambda: run(parse(Options, argv, "launch/drafts.py", __doc__)))


if __name__ == "__main__":
    sys.exit(main())
