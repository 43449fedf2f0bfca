"""The command `texts` of evaluate.py: greedy texts of heads, compared with the dense head's."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from rich.table import Table
from tyro.conf import arg

from flashhead_dist.decode.prompts import Prompt, held_out_prompts, read_prompts
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
from flashhead_dist.heads.registry import NamedHead, build_head, named_head, needs_index
from flashhead_dist.index import ensure_index, load_manifest
from flashhead_dist.models import ModelSource
from flashhead_dist.parallel import TensorParallel
from flashhead_dist.progress import progress
from flashhead_kernels.cpu_threads import compute_threads
from options import (
    Checked,
    File,
    JsonOutput,
    ModelOptions,
    NonNegative,
    Positive,
    ThreadOptions,
    text_table,
)

_HEADINGS = (
    "head", "bytes, %", "identical, %", "identical to the first stop, %",
    "median first difference", "median of those that differ", "equal tokens, %",
)  # fmt: skip


@dataclass(kw_only=True)
class _Decoding(Checked):
    """What to decode, and with which heads."""

    heads: Annotated[list[str], arg(metavar="NAME[:PROBES][@DIR]")] = field(
        default_factory=lambda: ["flashhead"]
    )
    """heads, each with its number of probes (default: the index's) and an index folder (default:
    the model's)"""
    prompts: File[Path | None] = None
    """a prompt a line, or .jsonl as launch/generate.py takes it (default: MT-Bench, GSM8K and
    openings in 26 languages, of the shipped corpus's test documents)"""
    num_prompts: Positive[int] = 100
    """the first N prompts"""
    max_new_tokens: Positive[int] = 256
    """tokens of each text"""
    batch_size: Positive[int] = 20
    """prompts at once"""
    verify: NonNegative[int] = 0
    """also decode the first N prompts (in whole batches) with every head itself"""

    def texts(self) -> list[Prompt]:
        """The prompts; raises UserError for a file that cannot be read."""
        if self.prompts is None:
            return held_out_prompts(self.num_prompts)
        texts = read_prompts(self.prompts)[: self.num_prompts]
        return [Prompt(self.prompts.stem or "prompts", text) for text in texts]


@dataclass(kw_only=True)
class _RecordOutput(JsonOutput):
    """What to write."""

    out: File[Path] = Path("runs/texts.jsonl")
    """records, a line for each head and prompt"""


@dataclass(kw_only=True)
class TextsCommand:
    """Greedy texts of heads compared with the dense head's: share identical, first difference.

    The dense head decodes every prompt once, over a float32 body, and every other head answers for
    the hidden states of its texts: up to its first other answer its own text is the same. Texts are
    cached and findings are saved in --out: an interrupted run continues from there.
    """

    source: ModelOptions
    decoding: _Decoding
    threads: ThreadOptions
    output: _RecordOutput

    def run(self) -> dict[str, Any]:
        """Decode and compare; raises UserError for what cannot be used."""
        options = self.decoding
        named = [named_head(text) for text in options.heads]
        known = read_records(self.output.out)
        prompts = options.texts()
        model = self.source.open()
        decoder = TextDecoder(
            model, max_new_tokens=options.max_new_tokens, batch_size=options.batch_size
        )
        with compute_threads(self.threads.count):
            batches = decoder.batches(prompts)
            contenders = [
                _contender(label, head, model, decoder, batches)
                for label, head in zip(options.heads, named, strict=True)
            ]
            records = _compare(decoder, batches, contenders, known, self.output.out)
            verified = _verify(decoder, batches, contenders, records, options.verify)
        return {
            "model": model.name,
            "weight_hash": model.weight_hash,
            "num_prompts": len(prompts),
            "max_new_tokens": options.max_new_tokens,
            "batch_size": options.batch_size,
            "records": str(self.output.out),
            "heads": [
                summarize([r for r in records if r.key == contender.key]).to_json()
                | contender.facts(model)
                | {
                    "verified_texts": len(verified[contender.key]),
                    "verified_equal": sum(verified[contender.key]),
                }
                for contender in contenders
            ],
        }

    def show(self, document: dict[str, Any]) -> list[Table | str]:
        """The document as a table and sentences."""
        rows = []
        sentences = []
        for head in document["heads"]:
            name, differing = head["head"], head["median_of_differing"]
            rows.append(
                [
                    name,
                    f"{100 * head['bytes_share']:.2f}",
                    _cell(head["identical"], 100),
                    _cell(head["identical_to_end"], 100),
                    _cell(head["median_first_difference"]),
                    "-" if differing is None else _cell(differing),
                    f"{100 * head['token_agreement']:.3f}",
                ]
            )
            if head["escalated_share"] is not None:
                sentences.append(f"{name}: {100 * head['escalated_share']:.2f} % of rows escalated")
            if head["verified_texts"]:
                sentences.append(
                    f"{name}: {head['verified_equal']} of {head['verified_texts']} texts that it "
                    f"decoded itself first differ where their records say"
                )
        title = (
            f"Greedy texts of {document['max_new_tokens']} tokens from {document['num_prompts']} "
            f"prompts, against {DENSE} of {document['model']}"
        )
        caption = "95 % intervals in brackets; inf: no difference; records: " + document["records"]
        return [text_table(_HEADINGS, rows, title=title, caption=caption), *sentences]


@dataclass(frozen=True)
class _Contender:
    """A head to compare; key: what its records depend on."""

    label: str
    head: Head
    index_hash: str | None
    key: str

    def facts(self, model: ModelSource) -> dict[str, Any]:
        """escalated_share is None for other heads, and where every record was known."""
        escalated = None
        if isinstance(self.head, FlashHeadEscalate) and self.head.num_rows:
            escalated = self.head.escalated_share
        dense_bytes = 2 * model.vocab_size * model.hidden_size
        return {
            "index_hash": self.index_hash,
            "bytes_share": self.head.read_bytes_per_row / dense_bytes,
            "escalated_share": escalated,
        }


def _contender(
    label: str,
    named: NamedHead,
    model: ModelSource,
    decoder: TextDecoder,
    batches: Sequence[Batch],
) -> _Contender:
    index = named.index
    if index is None and needs_index(named.name):
        index = ensure_index(model)
    index_hash = None if index is None else load_manifest(index).index_hash
    settings: list[object] = [named.name, index_hash, model.weight_hash, decoder.max_new_tokens]
    settings += [named.num_probes] if named.num_probes else []
    texts = [batch.token_ids for batch in batches]
    digest = hashlib.sha256(json.dumps([*settings, texts]).encode())
    head = build_head(
        named.name, tp=TensorParallel.single(), model=model, index_dir=index,
        num_probes=named.num_probes,
    )  # fmt: skip
    return _Contender(label, head, index_hash, digest.hexdigest()[:16])


def _compare(
    decoder: TextDecoder,
    batches: Sequence[Batch],
    contenders: Sequence[_Contender],
    known: Sequence[TextRecord],
    out: Path,
) -> list[TextRecord]:
    """Records of every contender and prompt, new ones written as they come."""
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
                    contender.head, texts, stops, key=contender.key, label=contender.label
                )
                append_records(out, found)
                records += found
    return records


def _verify(
    decoder: TextDecoder,
    batches: Sequence[Batch],
    contenders: Sequence[_Contender],
    records: Sequence[TextRecord],
    count: int,
) -> dict[str, list[bool]]:
    """By key, for each text decoded by the head itself: whether its record is right."""
    equal: dict[str, list[bool]] = {contender.key: [] for contender in contenders}
    found = {(r.key, r.prompt): r for r in records}
    chosen = [batch for batch in batches if batch.first < count]
    with progress("starting", total=len(chosen) * len(contenders), visible=bool(chosen)) as advance:
        for batch in chosen:
            dense = decoder.dense_texts(batch)
            for contender in contenders:
                advance.stage(f"decoding with {contender.label} from prompt {batch.first + 1}")
                tokens, _ = decoder.decode(batch, contender.head)
                for row in range(len(tokens)):
                    record = found[contender.key, batch.first + row]
                    place = first_difference(dense.token_ids[row], tokens[row])
                    other = None if place is None else int(tokens[row, place])
                    same = (place, other) == (record.first_difference, record.head_token)
                    equal[contender.key].append(same)
    return equal


def _cell(interval: dict[str, float | None], scale: float = 1) -> str:
    values = [math.inf if value is None else scale * value for value in interval.values()]
    value, low, high = (f"{number:.0f}" for number in values)
    return f"{value} [{low}, {high}]"
