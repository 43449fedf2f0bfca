"""The command `texts` of evaluate.py: greedy texts of heads beside the dense head's."""

from __future__ import annotations

import argparse
import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from flashhead_dist.decode.prompts import Prompt, held_out_prompts, read_prompts
from flashhead_dist.errors import UserError
from flashhead_dist.evaluate.texts import (
    DENSE,
    Batch,
    TextDecoder,
    TextRecord,
    append_records,
    compare_texts,
    first_difference,
    read_records,
    summarize,
)
from flashhead_dist.heads.base import Head
from flashhead_dist.heads.flashhead_escalate import FlashHeadEscalate
from flashhead_dist.heads.registry import HEADS, NamedHead, build_head, named_head, needs_index
from flashhead_dist.index import ensure_index, load_manifest
from flashhead_dist.models import ModelSource, open_model
from flashhead_dist.parallel import TensorParallel
from flashhead_dist.progress import progress
from flashhead_kernels.cpu_threads import compute_threads
from flashhead_topology.probe import probe_machine

COMMANDS = ("texts",)


@dataclass(frozen=True)
class _Contender:
    """A head with its index, as NAME[:PROBES][@DIR] names it."""

    label: str
    name: str
    num_probes: int | None
    index: Path | None
    key: str
    model: ModelSource

    def build(self) -> Head:
        return build_head(
            self.name, tp=TensorParallel.single(), model=self.model, index_dir=self.index,
            num_probes=self.num_probes,
        )  # fmt: skip


def add_commands(commands: Any) -> None:
    """Add the command to the subparsers of evaluate.py."""
    texts = commands.add_parser(
        "texts",
        help="greedy texts beside the dense head's: share identical, first difference",
        description="The dense head decodes every prompt once, over a float32 body, and every "
        "other head answers for the hidden states of its texts: up to its first other answer its "
        "own text is the same. What is decoded stays in the cache, and what is found in --out: a "
        "run that was ended goes on from there.",
    )
    texts.add_argument("--model", help="HF folder, .gguf file or hub id (default: built in)")
    texts.add_argument(
        "--heads", nargs="+", default=["flashhead"], metavar="NAME[:PROBES][@DIR]",
        help="heads, each with its number of probes (default: the index's) and an index folder "
        f"(default: the model's): {', '.join(HEADS)}",
    )  # fmt: skip
    texts.add_argument(
        "--prompts", type=Path, metavar="FILE",
        help="a prompt a line, or .jsonl as launch/generate.py takes it (default: MT-Bench, GSM8K "
        "and openings in 26 languages, of the shipped corpus's test documents)",
    )  # fmt: skip
    texts.add_argument("--num-prompts", type=int, default=100, metavar="N", help="the first N")
    texts.add_argument("--max-new-tokens", type=int, default=256, metavar="N", help="of each text")
    texts.add_argument("--batch-size", type=int, default=20, metavar="N", help="prompts at once")
    texts.add_argument(
        "--verify", type=int, default=0, metavar="N",
        help="also decode the first N prompts (in whole batches) with every head itself",
    )  # fmt: skip
    texts.add_argument(
        "--out", type=Path, default=Path("runs/texts.jsonl"), metavar="FILE",
        help="records, a line for each head and prompt (default: %(default)s)",
    )  # fmt: skip
    texts.add_argument("--threads", type=int, metavar="N", help="default: all cores")
    texts.add_argument("--json", action="store_true", help="one JSON document on stdout")


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Run the command and return its document.

    Raises:
        UserError: something given cannot be used.
    """
    named = [named_head(text) for text in arguments.heads]
    known = read_records(arguments.out)
    prompts = _prompts(arguments)
    model = open_model(arguments.model)
    decoder = TextDecoder(
        model, max_new_tokens=arguments.max_new_tokens, batch_size=arguments.batch_size
    )
    with compute_threads(arguments.threads or probe_machine().num_cores):
        batches = decoder.batches(prompts)
        contenders = [
            _contender(label, head, model, decoder, batches)
            for label, head in zip(arguments.heads, named, strict=True)
        ]
        heads = {contender.key: contender.build() for contender in contenders}
        records = _compare(decoder, batches, contenders, heads, known, arguments.out)
        verified = _verify(decoder, batches, contenders, heads, records, arguments.verify)
    return {
        "model": model.name,
        "weight_hash": model.weight_hash,
        "num_prompts": len(prompts),
        "max_new_tokens": arguments.max_new_tokens,
        "batch_size": arguments.batch_size,
        "records": str(arguments.out),
        "heads": [
            summarize([r for r in records if r.key == contender.key]).to_json()
            | {
                "index_hash": _index_hash(contender.index),
                "bytes_share": _bytes_share(heads[contender.key], model),
                "escalated_share": _escalated_share(heads[contender.key]),
                "verified_texts": len(verified[contender.key]),
                "verified_equal": sum(verified[contender.key]),
            }
            for contender in contenders
        ],
    }


def _prompts(arguments: argparse.Namespace) -> list[Prompt]:
    if arguments.num_prompts < 1:
        raise UserError(f"--num-prompts {arguments.num_prompts} is too small: give at least 1")
    if arguments.prompts is None:
        return held_out_prompts(arguments.num_prompts)
    texts = read_prompts(arguments.prompts)[: arguments.num_prompts]
    return [Prompt(arguments.prompts.stem or "prompts", text) for text in texts]


def _contender(
    label: str,
    head: NamedHead,
    model: ModelSource,
    decoder: TextDecoder,
    batches: Sequence[Batch],
) -> _Contender:
    name, num_probes, index = head.name, head.num_probes, head.index
    if index is None and needs_index(name):
        index = ensure_index(model)
    settings: list[object] = [name, _index_hash(index), model.weight_hash, decoder.max_new_tokens]
    settings += [num_probes] if num_probes else []
    texts = [batch.token_ids for batch in batches]
    digest = hashlib.sha256(json.dumps([*settings, texts]).encode())
    return _Contender(label, name, num_probes, index, digest.hexdigest()[:16], model)


def _index_hash(index: Path | None) -> str | None:
    return None if index is None else load_manifest(index).index_hash


def _bytes_share(head: Head, model: ModelSource) -> float:
    return head.read_bytes_per_row / (2 * model.vocab_size * model.hidden_size)


def _escalated_share(head: Head) -> float | None:
    """Of the rows that it served now; None for other heads, and where every record was known."""
    if isinstance(head, FlashHeadEscalate) and head.num_rows:
        return head.escalated_share
    return None


def _compare(
    decoder: TextDecoder,
    batches: Sequence[Batch],
    contenders: Sequence[_Contender],
    heads: dict[str, Head],
    known: Sequence[TextRecord],
    out: Path,
) -> list[TextRecord]:
    """Records of every contender and prompt, those that are not known yet written as they come."""
    records = list({(r.key, r.prompt): r for r in known}.values())
    done = {(r.key, r.prompt) for r in records}
    stops = decoder.stop_token_ids
    with progress("starting", total=len(batches) * (1 + len(contenders)), visible=True) as advance:
        for number, batch in enumerate(batches, start=1):
            advance.stage(f"dense texts, batch {number} of {len(batches)}")
            texts = decoder.dense_texts(batch)
            for contender in contenders:
                advance.stage(f"{contender.label}, batch {number} of {len(batches)}")
                if (contender.key, batch.first) in done:
                    continue
                found = compare_texts(
                    heads[contender.key], texts, stops, key=contender.key, label=contender.label
                )
                append_records(out, found)
                records += found
    return records


def _verify(
    decoder: TextDecoder,
    batches: Sequence[Batch],
    contenders: Sequence[_Contender],
    heads: dict[str, Head],
    records: Sequence[TextRecord],
    count: int,
) -> dict[str, list[bool]]:
    """By key, of each text decoded by the head itself: whether it parts where its record says."""
    equal: dict[str, list[bool]] = {contender.key: [] for contender in contenders}
    found = {(r.key, r.prompt): r for r in records}
    chosen = [batch for batch in batches if batch.first < count]
    with progress("starting", total=len(chosen) * len(contenders), visible=bool(chosen)) as advance:
        for batch in chosen:
            dense = decoder.dense_texts(batch)
            for contender in contenders:
                advance.stage(f"decoding with {contender.label} from prompt {batch.first + 1}")
                tokens, _ = decoder.decode(batch, heads[contender.key])
                for row in range(len(tokens)):
                    record = found[contender.key, batch.first + row]
                    place = first_difference(dense.token_ids[row], tokens[row])
                    other = None if place is None else int(tokens[row, place])
                    same = (place, other) == (record.first_difference, record.head_token)
                    equal[contender.key].append(same)
    return equal


def show(document: dict[str, Any]) -> None:
    """Print the document as a table."""
    table = Table(
        title=f"Greedy texts of {document['max_new_tokens']} tokens from "
        f"{document['num_prompts']} prompts, against {DENSE} of {document['model']}",
        caption="95 % intervals in brackets; inf: no difference; records: " + document["records"],
    )
    table.add_column("head")
    for name in (
        "bytes, %", "identical, %", "identical to the first stop, %", "median first difference",
        "median of those that differ", "tokens alike, %",
    ):  # fmt: skip
        table.add_column(name, justify="right")
    for head in document["heads"]:
        table.add_row(
            head["head"],
            f"{100 * head['bytes_share']:.2f}",
            _cell(head["identical"], 100),
            _cell(head["identical_to_end"], 100),
            _cell(head["median_first_difference"]),
            "-" if head["median_of_differing"] is None else _cell(head["median_of_differing"]),
            f"{100 * head['token_agreement']:.3f}",
        )
    console = Console()
    console.print(table)
    for head in document["heads"]:
        if head["escalated_share"] is not None:
            console.print(
                f"{head['head']}: {100 * head['escalated_share']:.2f} % of rows escalated"
            )
        if head["verified_texts"]:
            console.print(
                f"{head['head']}: {head['verified_equal']} of {head['verified_texts']} texts that "
                f"it decoded itself part where their records say"
            )


def _cell(interval: dict[str, float | None], scale: float = 1) -> str:
    values = [math.inf if value is None else scale * value for value in interval.values()]
    value, low, high = (f"{number:.0f}" for number in values)
    return f"{value} [{low}, {high}]"
